"""The hard-route trap: `python -m evaluation.traps` shows plain attacks miss a gate that gives them no gradient.

Two experts, one right by a wide margin and one that answers the next class, and a gate that turns from the first to
the second when every value of the image changes by nine tenths of the budget, each with its own sign. Plain attacks
see the expert that answers, and no noise turns the gate; AutoAttack, on classifiers, is one of them. Made soft, or hard
with a straight-through gradient, the same gate falls to them: what they lack is its gradient.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from attacks import apgd, pgd, routed, square
from attacks.autoattack import autoattack
from attacks.routed import look_inside
from attacks.search import Found, scores
from attacks.threat import Threat, seed_of
from engine.command import run
from evaluation.classifier_autoattack import AUTOATTACK
from evaluation.classifier_clean import About, read_clean
from evaluation.classifier_suites import classifier_members
from evaluation.classifier_tables import SUITE, write_classifier_tables
from evaluation.classifiers import ANSWERS, answers, save_answers
from evaluation.formats import aligned
from evaluation.image_results import ImageResults, load_images
from evaluation.plan import Scene, Setup
from evaluation.record_checks import ALARM
from evaluation.robust import attack_all
from evaluation.suites import member
from evaluation.target_checks import slope_of, task_loss
from evaluation.targets import target_of

EPS = 8 / 255
MARGIN = 0.9  # of eps: how far the gate of a clean image is from turning
SLOPE = 30  # a soft gate gives the right expert of a clean image a weight of 0.7
CONTRAST = 0.3  # of what tells classes apart: almost ten times eps
CLASSES = 4
SIZE = 16
IMAGES = 8
TASKS = ("classification", "segmentation")
GATES = ("hard", "soft", "straight-through")

PLAIN = {
    "fgsm": pgd.fgsm,
    "pgd": pgd.pgd,
    "pgd masked_ce": partial(pgd.pgd, loss="masked_ce"),
    "pgd jensen_shannon": partial(pgd.pgd, loss="jensen_shannon"),
    "segpgd": pgd.segpgd,
    "cospgd": pgd.cospgd,
    "apgd dlr": partial(apgd.apgd, loss="dlr", steps=30),
    "apgd masked_ce red_eps": partial(apgd.apgd, loss="masked_ce", steps=60, schedule="red_eps"),
    "square": partial(square.square, queries=100),
}
FOR_CLASSIFIERS = {"autoattack": autoattack}  # plain attacks on classifiers alone
GATE_AWARE = {
    "soft_gate": routed.soft_gate,
    "route_first": routed.route_first,
    "stay_route": routed.stay_route,
    "joint": routed.joint,
    "weakest_expert": routed.weakest_expert,
    "all_to_one_wrong": routed.all_to_one_wrong,
    "gate_only": routed.gate_only,
    "experts_only": routed.experts_only,
}


class Trap(nn.Module):
    """A routed model of two linear experts, of the whole image or of each pixel.

    The gate's logit for the first is SLOPE times the mean over the image of signs * (value - 0.5), 0 for the second.
    """

    num_experts = 2

    def __init__(
        self,
        task: Literal["classification", "segmentation"],
        gate: Literal["hard", "soft", "straight-through"],
    ):
        super().__init__()
        dice = torch.Generator().manual_seed(0)
        self.task, self.straight_through = task, gate == "straight-through"
        self.routing = "soft" if gate == "soft" else "hard"
        side = 1 if task == "segmentation" else SIZE
        patterns = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).float()
        if task == "classification":
            patterns = random_signs(dice, CLASSES, 3 * SIZE * SIZE)
        self.register_buffer("patterns", patterns.view(CLASSES, 3, side, side))
        self.register_buffer("signs", random_signs(dice, 3, SIZE, SIZE))

    def forward(self, images: Tensor) -> Tensor:
        gate_logits, mix = self.gate_and_mix(images)
        return mix(self.route(gate_logits))

    def gate_logits(self, images: Tensor) -> Tensor:
        return self.gate_and_mix(images)[0]

    def forward_given(self, images: Tensor, weights: Tensor) -> Tensor:
        return self.gate_and_mix(images)[1](weights)

    def gate_and_mix(self, images: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """(gate logits [1, B, 2, 1, 1, 1], weights -> logits [B, 4] or [B, 4, 16, 16])."""
        right = 10 * nn.functional.conv2d(images - 0.5, self.patterns) / self.patterns[0].numel()
        expert_logits = torch.stack([right, right.roll(1, dims=1)], dim=1)

        def mix(weights: Tensor) -> Tensor:
            logits = (weights.reshape(-1, 2, 1, 1, 1) * expert_logits).sum(dim=1)
            return logits if self.task == "segmentation" else logits.flatten(1)

        lead = SLOPE * self.lead(images)
        return torch.stack([lead, torch.zeros_like(lead)], dim=1).view(1, -1, 2, 1, 1, 1), mix

    def lead(self, images: Tensor) -> Tensor:
        """How much every value has to change, against its sign, before the gate turns; [B]."""
        return (self.signs * (images - 0.5)).mean(dim=(1, 2, 3))

    def route(self, gate_logits: Tensor) -> Tensor:
        weights = gate_logits.softmax(dim=-4)
        if self.routing == "soft":
            return weights
        hard = routed.one_hot(gate_logits)
        return hard + (weights - weights.detach()) if self.straight_through else hard

    def samples(self, count: int = IMAGES) -> tuple[Tensor, Tensor]:
        """(images [count, 3, 16, 16], labels [count] or [count, 16, 16]): patterns of the classes with noise, and
        the gate's margin."""
        dice = torch.Generator().manual_seed(1)
        shape = (count,) if self.task == "classification" else (count, SIZE, SIZE)
        labels = torch.randint(CLASSES, shape, generator=dice)
        shown = self.patterns[labels]  # [B, 3, 16, 16] or [B, 16, 16, 3, 1, 1]
        if self.task == "segmentation":
            shown = shown[..., 0, 0].permute(0, 3, 1, 2)
        images = 0.5 + CONTRAST * shown + 0.02 * (torch.rand(shown.shape, generator=dice) - 0.5)
        return images + self.signs * (MARGIN * EPS - self.lead(images)).view(-1, 1, 1, 1), labels


@dataclass(frozen=True)
class Outcome:
    """What attacks left of a trap: share of pixels that are right in the worst case over the plain attacks, over
    those that know the gate, and by name; share of images whose route the latter's worst case changed; why the
    masking flag is raised, empty where it isn't."""

    task: str
    gate: str
    clean: float
    plain: float
    aware: float
    flips: float
    flag: str
    each: Mapping[str, float]


def spring(task: str, gate: str) -> Outcome:
    """Attacks a trap, all attacks on the same images."""
    model = Trap(task, gate).eval()
    images, labels = model.samples()
    threat = Threat(
        EPS, ignore_index=None, seeds=tuple(seed_of("trap", index) for index in range(len(images)))
    )
    unaware = plain_attacks(task)
    found = {name: attack(model, images, labels, threat) for name, attack in (unaware | GATE_AWARE).items()}

    def right(some: Mapping[str, Callable]) -> Tensor:
        return torch.stack([found[name].correct for name in some])

    total = labels.numel()
    plain, aware = (right(some).amin(dim=0).sum().item() / total for some in (unaware, GATE_AWARE))
    worst = worst_images([found[name] for name in GATE_AWARE])
    clean_route, route = (model.gate_logits(some).argmax(dim=2).flatten() for some in (images, worst))
    return Outcome(
        task,
        gate,
        scores(model(images), labels, None)[0].sum().item() / total,
        plain,
        aware,
        (clean_route != route).double().mean().item(),
        masking(plain, aware, gate_is_blind(model, images, labels, threat)),
        {name: one.correct.sum().item() / total for name, one in found.items()},
    )


def plain_attacks(task: str) -> dict[str, Callable]:
    """By name; AutoAttack is for classifiers."""
    return PLAIN | (FOR_CLASSIFIERS if task == "classification" else {})


def report(gate: str, folder: str | Path) -> ImageResults:
    """The classification trap evaluated as any classifier is, with the standard suite and AutoAttack, into the tables
    of the folder; what the suite's ledger says."""
    model, folder, device = Trap("classification", gate).eval(), Path(folder), torch.device("cpu")
    images, labels = model.samples()
    target, names = (
        target_of("trap", model, role=gate),
        tuple(f"image {place}" for place in range(len(images))),
    )
    own = {
        SUITE: classifier_members("standard", target.kind, target.num_experts),
        AUTOATTACK: [member(AUTOATTACK, {"name": "autoattack"}, "common", target.kind, target.num_experts)],
    }
    ledgers = {name: folder / f"ledger_{name}" for name in own}
    classes = tuple("abcd")
    for name, members in own.items():
        setup = Setup(classes, (EPS,), name, ignore_index=-1, subset="trap", about={"batch": len(images)})
        scenes = [Scene(images, labels, names, names)]
        attack_all(ledgers[name], scenes, [target], {"trap": members}, setup, log=str)
    save_answers(
        folder / ANSWERS, np.array(names), labels.numpy(), {"trap": answers(model, [(images, 0)], device)}
    )
    clean = read_clean(folder, classes, "trap")
    write_classifier_tables(folder, clean, {"trap": About(gate, 0, 0, 0.0, 0.0, 0.0)}, "trap", ledgers)
    return load_images(ledgers[SUITE])


def worst_images(found: list[Found]) -> Tensor:
    """Of several attacks those with the fewest correct pixels, image by image."""
    best = torch.stack([one.correct for one in found]).argmin(dim=0)
    return torch.stack([one.images for one in found])[best, torch.arange(len(best), device=best.device)]


def masking(plain: float, aware: float, blind: bool) -> str:
    """Why plain attacks are not to be believed, empty where nothing speaks against them."""
    reasons = []
    if aware < plain - ALARM:
        reasons.append(f"gate-aware attacks find {100 * (plain - aware):.1f} points more")
    if blind:
        reasons.append("the loss has no gradient by the gate")
    return "; ".join(reasons)


def gate_is_blind(model, images: Tensor, labels: Tensor, threat: Threat) -> bool:
    """Whether the task's loss has a gradient of exactly zero by all gate logits, for all images."""
    seen = look_inside(model, images)
    leaf = seen.gate_logits.detach().requires_grad_()
    return not slope_of(lambda: task_loss(seen, model.route(leaf), labels, threat).sum(), leaf).any()


def random_signs(dice: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(2, shape, generator=dice).float() * 2 - 1


def main(argv: Sequence[str]) -> int:
    """Prints all traps and their controls."""
    argparse.ArgumentParser(
        prog="python -m evaluation.traps",
        description="Attacks gates that no gradient tells of, and their controls, and prints which flags are raised. "
        "Takes no arguments.",
        allow_abbrev=False,
    ).parse_args(argv)
    outcomes = [spring(task, gate) for task in TASKS for gate in GATES]
    lines = [("task", "gate", "clean", "plain suite", "AutoAttack", "gate-aware", "route flips")]
    for one in outcomes:
        shares = (one.clean, one.plain, one.each.get("autoattack"), one.aware, one.flips)
        told = ("-" if share is None else f"{100 * share:.1f} %" for share in shares)
        lines.append((one.task, one.gate, *told))
    flags = ["masking flag", *(f"RAISED: {one.flag}" if one.flag else "-" for one in outcomes)]
    print(
        f"eps {EPS * 255:.0f}/255 (linf), {IMAGES} images of {SIZE} x {SIZE}, share of pixels that are right:"
    )
    for line, flag in zip(aligned(lines, left=2), flags, strict=True):
        print(f"{line}  {flag}")
    print(
        "\nThe hard gate of the classification task under suite standard and AutoAttack, as classifiers are evaluated:"
    )
    with tempfile.TemporaryDirectory() as folder:
        worst = report("hard", folder).worst("trap", EPS, "adaptive").mean()
        text = (Path(folder) / "robustness.md").read_text(encoding="utf-8")
    print(f"adaptive worst case: {100 * worst:.1f} %")
    for line in text.splitlines():
        if line.startswith("- !"):
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
