"""What the numbers of an evaluation say, in sentences. Every number and every verdict is computed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.ceilings import best_gate_of
from evaluation.disagreement import case_totals, error_detection
from evaluation.gate_table import regret
from evaluation.results import Results, main_subset
from metrics.disagreement import CASES, CONTRADICTED
from metrics.gate import gate_statistics, spearman

# What the strongest rank correlation of a gate's weight with luma within a subset says.
LIGHT = (
    (0.7, "it goes with the light"),
    (0.3, "it goes with the light in part"),
    (0.0, "it hardly goes with the light"),
)


@dataclass(frozen=True)
class Statement:
    """A headline and what stands behind it."""

    headline: str
    detail: str


def findings(results: Results, subsets: Sequence[str]) -> list[Statement]:
    """About experts at home and abroad, the chosen gate against the rest, its regret, whom it follows where the
    experts differ, and the weights of every gate.

    mIoU_common compares subsets, mIoU compares rows on one subset; both as in the matrix, in percent."""
    return [
        *home_and_abroad(results, subsets),
        *gate_against(results, subsets),
        *regret_of_chosen(results, subsets),
        *disagreement(results, subsets),
        *gates(results, subsets),
    ]


def home_and_abroad(results: Results, subsets: Sequence[str]) -> list[Statement]:
    """Every expert on the subsets that it alone was trained on, against the best of the other experts."""
    found = []
    experts = results.names("expert")
    for expert in experts:
        for subset in (home for home in results.row(expert).home if home in subsets):
            others = [name for name in experts if subset not in results.row(name).home]
            if not others:
                continue
            at_home = results.miou_common(expert, subset, subsets)
            rival = max(others, key=lambda name: results.miou_common(name, subset, subsets))
            abroad = results.miou_common(rival, subset, subsets)
            if math.isnan(at_home) or math.isnan(abroad):
                continue  # no class is true in all subsets
            found.append(
                Statement(
                    f"On {subset} the {expert} expert is {_distance(at_home - abroad)} the {rival} expert.",
                    f"mIoU_common {100 * at_home:.2f} at home against {100 * abroad:.2f}.",
                )
            )
    return found


def gate_against(results: Results, subsets: Sequence[str]) -> list[Statement]:
    """The chosen gate against the best of each other kind, on the main subset, over the classes with ground truth."""
    gate, subset = results.lead_gate, main_subset(subsets)
    if not gate:
        return []
    own = results.miou_gt_only(gate, subset)
    rivals = []
    for kind in ("expert", "baseline", "ensemble", "control"):
        names = [name for name in results.names(kind) if results.defined(name, subset)]
        if names:
            rival = max(names, key=lambda name: results.miou_gt_only(name, subset))
            rivals.append((kind, rival, own - results.miou_gt_only(rival, subset)))
    if not rivals:
        return []
    beaten = sum(margin > 0 for _, _, margin in rivals)
    how = "the gate chosen on the validation split" if gate == results.chosen else "the first gate"
    compared = "; ".join(f"{_distance(margin)} the best {kind} ({rival})" for kind, rival, margin in rivals)
    classes = np.count_nonzero(results.present(subset))
    headline = f"On {subset} the MoE {gate} reaches {100 * own:.2f} mIoU over the {classes} classes with ground truth"
    verdict = "above the best row of every other kind" if beaten == len(rivals) else (
        f"above the best of {beaten} of {len(rivals)} other kinds of rows"
    )  # fmt: skip
    return [Statement(f"{headline}, {verdict}.", f"It is {how}: {compared}.")]


def regret_of_chosen(results: Results, subsets: Sequence[str]) -> list[Statement]:
    """How far the chosen gate stays below the best gate of its kind."""
    gate, subset = results.lead_gate, main_subset(subsets)
    distance = regret(results, gate, subset) if gate else {}
    if not distance:
        return []
    best = results.miou_gt_only(best_gate_of(results.weights[gate].shape[2]), subset)
    return [
        Statement(
            f"The best weights for whole images would reach {100 * best:.2f} mIoU on {subset} over the same classes: "
            f"a regret of {100 * distance['miou']:.2f} points.",
            f"In pixel accuracy {100 * distance['aacc']:.2f} points. Best means told the label of every pixel; no gate "
            "that weighs plain logits image by image, without a convolution, has more pixels right.",
        )
    ]


def disagreement(results: Results, subsets: Sequence[str]) -> list[Statement]:
    """What the chosen gate makes of the pixels on which its experts differ, and of those on which they agree."""
    gate, subset = results.lead_gate, main_subset(subsets)
    if gate not in results.cases:
        return []
    counts = case_totals(results, gate, subset).sum(axis=0)[: len(CASES)]  # [4, 2 + E]
    agree, differ = counts.reshape(2, 2, -1).sum(axis=1)
    pixels, against = counts[:, 0].sum(), counts[CONTRADICTED]
    if not differ[0]:
        return [Statement(f"On {subset} the experts of {gate} agree on every pixel.", "")]
    experts = results.row(gate).experts
    alone = ", ".join(
        f"{name} on {_share(n, differ[0])}" for name, n in zip(experts, differ[2:], strict=True)
    )
    contradicts = "It never contradicts experts that agree"
    if against[0]:
        contradicts = (
            f"It contradicts experts that agree on {_share(against[0], pixels)} of the pixels and is right on "
            f"{_share(against[1], against[0])} of these (they: {_share(against[2], against[0])})"
        )
    detects = error_detection(results, gate, subset)
    return [
        Statement(
            f"On {subset} the experts differ on {_share(differ[0], pixels)} of the pixels; there {gate} is right on "
            f"{_share(differ[1], differ[0])}.",
            f"By themselves: {alone}. Where they agree, it is right on {_share(agree[1], agree[0])}. {contradicts}. "
            f"As a detector of its errors their difference has an AUROC of {detects['auroc_differ']:.2f}, the "
            f"Jensen-Shannon distance of their probabilities {detects['auroc_jensen_shannon']:.2f} (chance: 0.50).",
        )
    ]


def gates(results: Results, subsets: Sequence[str]) -> list[Statement]:
    """Per gate: the mean weight that differs most between training subsets, whether it follows the light, the
    regret, and the collapse alarm."""
    trained = [subset for subset in subsets if subset in results.protocol.training_subsets]
    found = []
    for gate in results.names("gate") if trained else ():
        per_image = results.weights[gate].mean(axis=2)  # [N, E]
        means = np.stack([per_image[results.mask(subset)].mean(axis=0) for subset in trained])  # [S, E]
        expert = int(np.ptp(means, axis=0).round(6).argmax())  # of two that differ alike the first
        high, low = trained[means[:, expert].argmax()], trained[means[:, expert].argmin()]
        values = means[:, expert].max(), means[:, expert].min()
        name = results.row(gate).experts[expert]
        headline = f"{gate} tells the subsets apart by {values[0] - values[1]:.2f}."
        detail = f"Its mean weight for {name} is {values[0]:.2f} on {high} and {values[1]:.2f} on {low}."
        if len(trained) == 1:
            headline = f"{gate} gives {name} a mean weight of {values[0]:.2f} on {trained[0]}."
            detail = ""
        detail += _light(results, per_image[:, expert], trained)
        if distance := regret(results, gate, main_subset(subsets)):
            detail += (
                f" On {main_subset(subsets)} it stays {100 * distance['miou']:.2f} points of mIoU "
                f"({100 * distance['aacc']:.2f} of pixel accuracy) below the best gate of its kind."
            )
        found.append(Statement(headline, detail.strip()))
        together = per_image[np.isin(results.subsets, results.protocol.training_subsets)]
        if gate_statistics(together[:, :, None]).collapsed.any():
            text = "One expert has nearly all the weight whatever the image."
            found.append(Statement(f"{gate} has collapsed.", text))
    return found


def _light(results: Results, weight: np.ndarray, trained: Sequence[str]) -> str:
    """Whether a weight [N] follows the light of the images within the subsets; "" where it is constant."""
    masks = {subset: results.mask(subset) for subset in trained}
    within = {name: spearman(weight[mask], results.luma[mask]) for name, mask in masks.items()}
    within = {name: value for name, value in within.items() if not np.isnan(value)}
    if not within:
        return ""
    strongest = max(map(abs, within.values()))
    verdict = next(text for limit, text in LIGHT if strongest >= limit)
    told = [f"{value:.2f} within {name}" for name, value in within.items()]
    if len(trained) > 1:
        mask = np.any(list(masks.values()), axis=0)
        told.insert(0, f"{spearman(weight[mask], results.luma[mask]):.2f} over all")
    return f" Rank correlation with the luma of the image: {', '.join(told)}; {verdict}."


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none"


def _distance(margin: float) -> str:
    points = f"{abs(100 * margin):.2f} points"
    return "level with" if points == "0.00 points" else f"{points} {'above' if margin > 0 else 'below'}"
