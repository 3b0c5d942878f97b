"""An active test of attacks: a weakness is implanted into their target, and the attacks have to find it.

After Zimmermann et al. 2022 (arXiv 2206.13991): an attack that fails where an adversarial image is known to exist says
nothing where it fails otherwise. For each image a point of the ball is chosen, the witness, without any gradient: of
some random ones that where the network's outputs are farthest from those of the image. The network then answers
rightly, and wrongly at all pixels once its outputs have gone nine tenths of the way to those of the witness. Attacks
get there through the network's own gradients only, so that a network which hides these fails them. Of an ensemble the
outputs are those of each member; of a routed model they are its gate logits, which turn from an expert that is always
right to one that never is; of one with a single expert, whose gate has nothing to choose, those of the network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.routed import look_inside
from attacks.search import scores
from attacks.threat import Threat, is_ignored, project, random_point, steepest
from evaluation.findings import Finding
from evaluation.suites import Member
from evaluation.targets import ROUTED, Target

FAR = 0.9  # of the way to the witness: where the region of wrong answers begins
SCALE = 10.0  # of the implanted logits: nine tenths of the way back an answer has a probability of 0.9999
CANDIDATES = 12  # points that the witness is chosen from
CONTROLS = 5  # random points that stand for chance
CELLS = (1, 4, 16)  # sizes in pixels of the noise that witnesses are made of
FOUND = 0.95  # share of the implanted weaknesses that attacks have to find


def active_test(
    target: Target, images: Tensor, labels: Tensor, threat: Threat, members: Sequence[Member]
) -> list[Finding]:
    """Whether the members of a suite find weaknesses in the target's copies that certainly have some.

    Passes: those of the members, CANDIDATES, and CONTROLS random points that tell how easily chance finds them."""
    implanted = implant(target, images, labels, threat)
    weak = implanted.weak

    def finding(severity: str, text: str) -> list[Finding]:
        return [Finding("active test", target.name, threat.eps, "", severity, text)]

    total = int(weak.sum())
    if not total:
        return finding(
            "note",
            "no weakness could be implanted: nothing in the ball moves the outputs enough, or nothing is labelled",
        )
    broken = {"common": torch.zeros_like(weak), "adaptive": torch.zeros_like(weak)}
    for member in members:
        found = member.attack.build(implanted.target.model, images, labels, threat)
        broken[member.column] |= found.correct == 0
    by_chance = torch.zeros_like(weak)
    for place in range(CONTROLS):
        by_chance |= (
            _right(implanted.target, random_point(images, threat, "control", place), labels, threat) == 0
        )
    common, whole, chance = (
        int((some & weak).sum())
        for some in (broken["common"], broken["common"] | broken["adaptive"], by_chance)
    )
    text = (
        f"attacks found {whole} of {total} implanted weaknesses, common ones {common}, "
        f"{CONTROLS} random points {chance}"
    )
    if whole < FOUND * total:
        return finding("flag", f"{text}: the attacks are too weak here")
    return finding("ok", text)


@dataclass(frozen=True)
class Implanted:
    """A target of the same kind whose answers are wrong at `witness` [B, C, H, W], points of the ball; weak bool [B]:
    the images where that is so, which fails only where nothing moves the outputs, or nothing is labelled."""

    target: Target
    witness: Tensor
    weak: Tensor


def implant(target: Target, images: Tensor, labels: Tensor, threat: Threat) -> Implanted:
    """The target with an implanted weakness, for points around these images only. labels [B, *S]."""
    with torch.no_grad():
        num_classes = target.model(images[:1]).shape[1]
        kind = ONE if target.kind in ROUTED and target.num_experts == 1 else target.kind
        outputs = OUTPUTS[kind](target.model)
        start = outputs(images)
        witness = farthest(outputs, start, images, threat)
        way = Way(outputs, images, start, outputs(witness) - start)
    known = labels.masked_fill(is_ignored(labels, threat.ignore_index), 0)
    right = F.one_hot(known.long(), num_classes).movedim(-1, 1).to(images)
    model = COPIES[kind](target.model, way, SCALE * right, SCALE * right.roll(1, dims=1))
    experts = 2 if kind in ROUTED else target.num_experts
    copy = replace(target, model=model, num_experts=experts)
    labelled = ~is_ignored(labels, threat.ignore_index).reshape(len(labels), -1).all(dim=1)
    return Implanted(copy, witness, labelled & (_right(copy, witness, labels, threat) == 0))


def farthest(outputs: Callable[[Tensor], Tensor], start: Tensor, images: Tensor, threat: Threat) -> Tensor:
    """Of random points at the edge of the ball, coarse and fine noise in turn, that with the outputs farthest from
    `start`, for each image."""
    best, distance = images, torch.zeros(len(images), device=images.device)
    height, width = images.shape[-2:]
    for place in range(CANDIDATES):
        noise = random_point(torch.full_like(images, 0.5), threat.at(0.5), "witness", place) - 0.5
        cell = CELLS[place % len(CELLS)]
        coarse = noise[..., ::cell, ::cell]
        noise = coarse.repeat_interleave(cell, dim=-2).repeat_interleave(cell, dim=-1)[..., :height, :width]
        points = project(images + threat.eps * steepest(noise, threat.norm), images, threat)
        gone = torch.linalg.vector_norm((outputs(points) - start).flatten(1), dim=1)
        farther = gone > distance
        best = torch.where(farther.view(-1, *[1] * (images.ndim - 1)), points, best)
        distance = torch.where(farther, gone, distance)
    return best


@dataclass(frozen=True, eq=False)
class Way:
    """How far the outputs [B, *P, F] of points have gone from `start` in the direction `way` of the witness's, both of
    shape [N, *P, F] for N images: 0 at the image, 1 at the witness."""

    outputs: Callable[[Tensor], Tensor]
    images: Tensor
    start: Tensor
    way: Tensor

    def gone(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """([B, *P], index [B] of the image that each point is nearest to)."""
        apart = [(points.detach() - image).flatten(1).abs().amax(dim=1) for image in self.images]
        place = torch.stack(apart).argmin(dim=0)
        way = self.way[place]
        along = ((self.outputs(points) - self.start[place]) * way).sum(dim=-1)
        return along / way.square().sum(dim=-1).clamp_min(1e-30), place

    def lead(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """What the right answer leads the wrong one by, [B, *P] from 0.9 at the image to -0.1 at the witness; and
        the index."""
        share, place = self.gone(points)
        return FAR - share, place


class WeakNetwork:
    """Logits that go from the right classes to wrong ones; right, wrong [N, K, *S]."""

    def __init__(self, model, way: Way, right: Tensor, wrong: Tensor):
        self.way, self.right, self.wrong = way, right, wrong

    def __call__(self, points: Tensor) -> Tensor:
        lead, place = self.way.lead(points)
        return self.mixed(lead, place)

    def mixed(self, lead: Tensor, place: Tensor) -> Tensor:
        lead = lead.view(-1, *[1] * (self.right.ndim - 1))
        return lead * (self.right[place] - self.wrong[place]) / 2


class WeakEnsemble(WeakNetwork):
    """Each member goes its own way; they are joined as before."""

    def __init__(self, model, way: Way, right: Tensor, wrong: Tensor):
        super().__init__(model, way, right, wrong)
        self.combine, self.num_experts = model.combine, model.num_experts

    def expert_logits(self, points: Tensor) -> Tensor:
        lead, place = self.way.lead(points)  # [B, E]
        return torch.stack([self.mixed(one, place) for one in lead.unbind(1)], dim=1)

    def __call__(self, points: Tensor) -> Tensor:
        return self.combine(self.expert_logits(points))


class WeakMixture(WeakNetwork):
    """Two experts that don't look at the image, one right and one wrong, behind the routing of the model."""

    num_experts = 2

    def __init__(self, model, way: Way, right: Tensor, wrong: Tensor):
        super().__init__(model, way, right, wrong)
        self.routing, self.route = model.routing, model.route

    def gate_and_mix(self, points: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        lead, place = self.way.lead(points)

        def mix(weights: Tensor) -> Tensor:
            first, second = (
                weights[0, :, expert].reshape(-1, *[1] * (self.right.ndim - 1)) for expert in (0, 1)
            )
            return first * self.right[place] + second * self.wrong[place]

        return SCALE * torch.stack([lead, -lead], dim=1)[None, :, :, None, None, None] / 2, mix

    def gate_logits(self, points: Tensor) -> Tensor:
        return self.gate_and_mix(points)[0]

    def forward_given(self, points: Tensor, weights: Tensor) -> Tensor:
        return self.gate_and_mix(points)[1](weights)

    def __call__(self, points: Tensor) -> Tensor:
        gate_logits, mix = self.gate_and_mix(points)
        return mix(self.route(gate_logits))


class WeakExpert(WeakMixture):
    """One expert that goes from right to wrong, behind a gate that has nothing to choose."""

    num_experts = 1

    def gate_and_mix(self, points: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        lead, place = self.way.lead(points)

        def mix(weights: Tensor) -> Tensor:
            return weights[0, :, 0].reshape(-1, *[1] * (self.right.ndim - 1)) * self.mixed(lead, place)

        return torch.zeros_like(lead)[None, :, None, None, None, None], mix


ONE = "one"  # a mixture of one expert
COPIES = {
    "single": WeakNetwork,
    "ensemble": WeakEnsemble,
    "soft": WeakMixture,
    "hard": WeakMixture,
    ONE: WeakExpert,
}


def _of_network(model, points: Tensor) -> Tensor:
    return model(points).flatten(1)


def _of_members(model, points: Tensor) -> Tensor:
    return model.expert_logits(points).flatten(2)


def _of_gate(model, points: Tensor) -> Tensor:
    gate_logits = look_inside(model, points).gate_logits.transpose(0, 1).flatten(1)
    return gate_logits.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # masked experts: no way to anywhere


# kind -> model -> (points -> outputs [B, F], of an ensemble [B, E, F])
OUTPUTS: dict[str, Callable] = {
    "single": lambda model: partial(_of_network, model),
    "ensemble": lambda model: partial(_of_members, model),
    "soft": lambda model: partial(_of_gate, model),
    "hard": lambda model: partial(_of_gate, model),
    ONE: lambda model: partial(_of_network, model),
}


def _right(target: Target, points: Tensor, labels: Tensor, threat: Threat) -> Tensor:
    """Right pixels of each image, [B]."""
    with torch.no_grad():
        return scores(target.model(points), labels.long(), threat.ignore_index)[0]
