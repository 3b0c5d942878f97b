"""Scores of an image as detectors of attacks, against one that knows nothing of them and one that evades them.

A detector that tells plain attacks from clean images says little: an attacker who knows it lowers its score as well
(Tramer et al. 2020, arXiv 2002.08347). Both figures stand side by side, the second for the worst of a sweep of weights
kappa of the score in what is raised.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from attacks.evade import SCORES, Said, evade, listen
from attacks.quantise import quantised
from attacks.search import scores
from attacks.threat import Threat, count_labelled, seed_of
from engine.steps import under_attack
from evaluation.beside import Keep, keep_nothing
from evaluation.formats import eps_text, markdown_table, percent
from evaluation.plan import Scene, Setup
from evaluation.statistics import Estimate, Resamples
from evaluation.targets import ROUTED, Target, exact_float32
from metrics.detection import auroc, counts_by_score, fpr_at_tpr, resampled_auroc

KAPPAS = (1.0, 10.0, 100.0)
STEPS = 20
WORTH = 0.5  # share of the accuracy that a plain attack takes which an evasive one has to take to count
DETECTION_COLUMNS = (
    "model", "eps", "score", "kappa", "clean", "attacked", "auroc", "ci_low", "ci_high", "units", "fpr95", "n_images",
)  # fmt: skip


def disagreement(said: Said) -> Tensor:
    """Share of the pixels where not all experts say the same, [B]."""
    answers = said.expert_logits.argmax(dim=2)
    return _share((answers != answers[:, :1]).any(dim=1))


def contradiction(said: Said) -> Tensor:
    """Share of the pixels where all experts say the same, and the network something else, [B]."""
    answers = said.expert_logits.argmax(dim=2)
    agree = (answers == answers[:, :1]).all(dim=1)
    return _share(agree & (said.logits.argmax(dim=1) != answers[:, 0]))


# What is measured; what an attacker lowers in its place are the smooth ones of the same names in attacks.evade.
DETECTORS: dict[str, Callable[[Said], Tensor]] = {
    **SCORES,
    "disagreement": disagreement,
    "contradiction": contradiction,
}


def scores_of(target: Target) -> list[str]:
    """Those that its kind has."""
    if target.kind in ROUTED:
        return list(DETECTORS)
    return [
        name
        for name in DETECTORS
        if name == "entropy" or target.kind == "ensemble" and name != "gate_entropy"
    ]


def cost(target: Target, kappas: Sequence[float] = KAPPAS, steps: int = STEPS) -> int:
    """Passes per image of `detection_rows` at one eps."""
    attacks = 1 + len(scores_of(target)) * len(kappas)
    return 1 + attacks * (steps + 2)


def detection_rows(
    target: Target,
    scenes: Iterable[Scene],
    setup: Setup,
    eps: float,
    *,
    kappas: Sequence[float] = KAPPAS,
    steps: int = STEPS,
    device: torch.device | str = "cpu",
    keep: Keep = keep_nothing,
) -> list[dict]:
    """A row for each score and each kappa, 0 (an attacker who knows of no detector) first, in the columns of
    DETECTION_COLUMNS: accuracy clean and attacked, AUROC with its interval over the blocks of the images and FPR at
    95 % TPR of the score, on n_images clean images against as many attacked ones, which are rounded to bytes where
    those of the setup are. A score that is no number, as of a gate that says NaN, flags nothing. keep: of each batch
    (see evaluation.beside)."""
    names, device = scores_of(target), torch.device(device)
    trials = [(name, kappa) for name in names for kappa in (0.0, *kappas)]
    before: dict[str, list] = {name: [] for name in names}
    after: dict[tuple, list] = {trial: [] for trial in trials}
    right: dict[tuple | None, int] = dict.fromkeys((None, *after), 0)
    valid, blocks = 0, []
    for index, scene in enumerate(scenes):
        work = partial(measure, target, scene, setup, eps, names, kappas, steps, device)
        found = keep(f"{target.name}, batch {index}", work)
        blocks += scene.blocks
        valid += count_labelled(scene.labels, setup.ignore_index)
        right[None] += found["right"]
        for name, values in zip(names, found["clean"], strict=True):
            before[name] += as_numbers(values)
        for trial, (values, right_here) in zip(trials, found["attacked"], strict=True):
            after[trial] += as_numbers(values)
            right[trial] += right_here
    rows, resamples = [], Resamples(blocks)
    for (name, kappa), values in after.items():
        negative, positive = np.array(before[name]), np.array(values)
        counts = counts_by_score(negative, positive)
        drawn = resampled_auroc(negative, positive, resamples.multiplicities)
        low, high = Estimate(float(auroc(counts)), drawn, resamples).bounds()
        rows.append(
            {
                "model": target.name,
                "eps": eps,
                "score": name,
                "kappa": kappa,
                "clean": right[None] / max(valid, 1),
                "attacked": right[name, kappa] / max(valid, 1),
                "auroc": float(auroc(counts)),
                "ci_low": low,
                "ci_high": high,
                "units": resamples.units,
                "fpr95": fpr_at_tpr(counts),
                "n_images": len(values),
            }
        )
    return rows


def measure(
    target: Target,
    scene: Scene,
    setup: Setup,
    eps: float,
    names: Sequence[str],
    kappas: Sequence[float],
    steps: int,
    device: torch.device,
) -> dict:
    """Plain values of a batch: "clean", scores of each name per image, "right" pixels, and "attacked", for each name
    and kappa (0 first) [scores per image, right pixels]. None stands for a score that is no number."""
    images, labels = scene.images.to(device), scene.labels.to(device)
    seeds = tuple(seed_of(setup.seed, name, "detectors") for name in scene.names)
    threat = Threat(eps, setup.norm, setup.ignore_index, seeds)

    def measured(points: Tensor, wanted: Sequence[str]) -> tuple[list[list], int]:
        with torch.no_grad():
            said = listen(target.model, points)
            found = [as_plain(DETECTORS[name](said).tolist()) for name in wanted]
        return found, int(scores(said.logits, labels.long(), threat.ignore_index)[0].sum())

    def attacked(wanted: Sequence[str], kappa: float, **score) -> tuple[list[list], int]:
        points = evade(target.model, images, labels, threat, kappa=kappa, steps=steps, **score).images
        return measured(
            quantised(points, images, threat) if setup.adversarials == "uint8" else points, wanted
        )

    with under_attack(target.model), exact_float32(device):
        clean, right = measured(images, names)
        plain, right_plain = attacked(names, 0.0)  # knows of no detector: one attack for all
        found = []
        for name, values in zip(names, plain, strict=True):
            found.append([values, right_plain])
            for kappa in kappas:
                (own,), right_here = attacked([name], kappa, score=name)
                found.append([own, right_here])
    return {"clean": clean, "right": right, "attacked": found}


def as_plain(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def as_numbers(values: Sequence[float | None]) -> list[float]:
    """None is lower than any score: it flags nothing."""
    return [-1.0 if value is None else value for value in values]


def side_by_side(rows: Iterable[Mapping]) -> list[dict]:
    """Per model, eps and score: the row of kappa 0, and the one with the lowest AUROC among those whose attack takes
    at least WORTH of the accuracy that the plain one takes, else that of kappa 0 again: {"plain": row, "adaptive":
    row}."""
    groups: dict[tuple, list[Mapping]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["eps"], row["score"]), []).append(row)
    found = []
    for own in groups.values():
        plain = next(row for row in own if row["kappa"] == 0)
        taken = plain["clean"] - plain["attacked"]
        worth = [row for row in own if row["clean"] - row["attacked"] >= WORTH * taken] or [plain]
        adaptive = min(worth, key=lambda row: math.inf if math.isnan(row["auroc"]) else row["auroc"])
        found.append({"plain": plain, "adaptive": adaptive})
    return found


def detection_table(rows: Iterable[Mapping]) -> list[str]:
    """Lines of a Markdown table: each detector against both attackers."""
    titles = "model, eps, score, images, AUROC, FPR95, adaptive AUROC, adaptive FPR95, kappa, accuracy"
    lines = []
    for pair in side_by_side(rows):
        plain, adaptive = pair["plain"], pair["adaptive"]
        lines.append(
            [
                plain["model"],
                eps_text(plain["eps"]),
                plain["score"],
                f"{plain['n_images']} + {plain['n_images']}",
                area(plain),
                percent(plain["fpr95"]),
                area(adaptive),
                percent(adaptive["fpr95"]),
                f"{adaptive['kappa']:g}",
                f"{percent(plain['clean'])} > {percent(plain['attacked'])} > {percent(adaptive['attacked'])}",
            ]
        )
    return markdown_table(titles.split(", "), lines, left=3)


def area(row: Mapping) -> str:
    """AUROC with its interval, if there is one."""
    interval = "" if row["ci_low"] is None else f" [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
    return f"{row['auroc']:.3f}{interval}"


def _share(pixels: Tensor) -> Tensor:
    return pixels.flatten(1).double().mean(dim=1)
