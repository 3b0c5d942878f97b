"""What no gate over the same experts can exceed. Ceilings look at the label: they are bounds, not models.

Labels are [B, h, w] (class ids or 255); all give class ids [B, h, w], which are not counted where the label is
255.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from engine.config import IGNORE
from evaluation.results import RowInfo


@dataclass
class ExpertPixels:
    """What the experts say about some pixels."""

    logits: Tensor  # [B, E, C, h, w]
    answers: Tensor  # [B, E, h, w], class ids

    @cached_property
    def mean_answer(self) -> Tensor:
        """Of the mean ensemble, [B, h, w]."""
        return self.logits.mean(dim=1).max(dim=1).indices


@dataclass(frozen=True)
class Ceilings:
    """Ceilings over `experts` by name: oracles from the answers [B, E, h, w] for whole images, best gates from
    ExpertPixels, any piece of the images at a time."""

    experts: tuple[str, ...] = ()
    oracles: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)
    best_gates: Mapping[str, Callable[[ExpertPixels, Tensor], Tensor]] = field(default_factory=dict)

    @property
    def infos(self) -> list[RowInfo]:
        return [RowInfo(name, "ceiling", self.experts) for name in (*self.oracles, *self.best_gates)]


NO_CEILINGS = Ceilings()


def oracle_expert_image(answers: Tensor, labels: Tensor) -> Tensor:
    """The answer of the expert with most right pixels in the image (the first of equals): no gate that hands
    each image to one expert has a higher pixel accuracy."""
    best = (answers == labels[:, None]).sum(dim=(2, 3)).argmax(dim=1)
    return answers[torch.arange(len(answers), device=answers.device), best]


def oracle_expert_pixel(answers: Tensor, labels: Tensor) -> Tensor:
    """The label where any expert is right, else the (wrong) answer of the first expert: no gate that hands
    each pixel to one expert has a higher pixel accuracy."""
    return torch.where((answers == labels[:, None]).any(dim=1), labels, answers[:, 0])


def best_gate_simple(pixels: ExpertPixels, labels: Tensor) -> Tensor:
    """The label where some weight w in [0, 1] makes it win in w * first + (1 - w) * second, pixel by pixel.

    Two experts only. The label has to beat every other class strictly; for each class that bounds w from one
    side, so that the pixel can be won if the bounds leave an open interval. One-hot and equal weights are
    judged by their argmax itself, ties included, so no expert, oracle_expert or mean ensemble is above this
    row. Elsewhere the mean ensemble's answer stands. Bounds every gate that mixes logits with one weight per image
    and no convolution; not one that mixes probabilities, adds a convolution, or is spatial (it mixes before
    upsampling, with other weights at the neighbouring places).
    """
    first, second = pixels.logits.unbind(dim=1)
    index = _as_index(labels)
    lead = second.gather(1, index) - second  # of the label over each class at w = 0; slope * w is added to it
    slope = (first.gather(1, index) - first) - lead
    bound = -lead / slope
    never = torch.where(lead > 0, -torch.inf, torch.inf)  # flat: won at every w, or at none
    below = torch.where(slope > 0, bound, torch.where(slope == 0, never, -torch.inf))
    above = torch.where(slope < 0, bound, torch.inf)
    lowest = below.scatter(1, index, -torch.inf).amax(dim=1)
    highest = above.amin(dim=1)  # inf at the label itself: a flat lead of 0
    return _label_or_mean((lowest < highest) & (lowest < 1) & (highest > 0), pixels, labels)


def best_gate_classwise(pixels: ExpertPixels, labels: Tensor) -> Tensor:
    """The label where some weights per expert and class make it win, pixel by pixel; any number of experts.

    That is where its largest logit over the experts exceeds every other class's smallest one (strictly).
    Else as best_gate_simple; bounds gates that mix logits, not calibrated ones, with a weight per image and class, and
    no convolution.
    """
    index = _as_index(labels)
    label = pixels.logits.amax(dim=1).gather(1, index)[:, 0]
    others = pixels.logits.amin(dim=1).scatter(1, index, -torch.inf).amax(dim=1)
    return _label_or_mean(label > others, pixels, labels)


def best_gate_of(classes_weighed: int) -> str:
    """The best gate that bounds a gate with K = `classes_weighed` weights per expert."""
    return "best gate, simple" if classes_weighed == 1 else "best gate, class-wise"


def ceilings_for(experts: Sequence[str]) -> Ceilings:
    """All that there are; the simple best gate is computed for two experts only."""
    oracles = {
        "oracle expert per image": oracle_expert_image,
        "oracle expert per pixel": oracle_expert_pixel,
    }
    best_gates = {best_gate_of(1): best_gate_simple, best_gate_of(2): best_gate_classwise}
    if len(experts) != 2:
        del best_gates[best_gate_of(1)]
    return Ceilings(tuple(experts), oracles, best_gates)


def _as_index(labels: Tensor) -> Tensor:
    """Labels as an index over classes, int64 [B, 1, h, w]; 255 becomes 0, which is not counted there."""
    return torch.where(labels == IGNORE, 0, labels).long()[:, None]


def _label_or_mean(reachable: Tensor, pixels: ExpertPixels, labels: Tensor) -> Tensor:
    reachable = reachable | (pixels.answers == labels[:, None]).any(dim=1)
    return torch.where(reachable, labels, pixels.mean_answer.to(labels.dtype))
