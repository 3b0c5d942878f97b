"""What no gate over the same experts can exceed. Ceilings look at the label: they are bounds, not models.

All take expert_logits [B, E, C, h, w] and labels [B, h, w] (class ids or 255) and give class ids [B, h, w];
what they say where the label is 255 is not counted.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def oracle_expert_image(expert_logits: Tensor, labels: Tensor) -> Tensor:
    """The answer of the expert with most right pixels in the image (the first of equals): no gate that hands
    each image to one expert has a higher pixel accuracy."""
    answers = expert_logits.argmax(dim=2)  # [B, E, h, w]
    best = (answers == labels[:, None]).sum(dim=(2, 3)).argmax(dim=1)
    return answers[torch.arange(len(answers), device=answers.device), best]


def oracle_expert_pixel(expert_logits: Tensor, labels: Tensor) -> Tensor:
    """The label where any expert is right, else the (wrong) answer of the first expert: no gate that hands
    each pixel to one expert has a higher pixel accuracy."""
    answers = expert_logits.argmax(dim=2)
    return torch.where((answers == labels[:, None]).any(dim=1), labels.long(), answers[:, 0])


def best_gate_simple(expert_logits: Tensor, labels: Tensor) -> Tensor:
    """The label where some weight w in [0, 1] makes it win in w * first + (1 - w) * second, pixel by pixel.

    Two experts only. The label has to beat every other class strictly; for each class that bounds w from one
    side, so that the pixel can be won if the bounds leave an open interval. One-hot and equal weights are
    judged by their argmax itself, ties included, so no expert, oracle_expert or mean ensemble is above this
    row. Elsewhere the mean ensemble's answer stands. Bounds every gate that mixes logits with K = 1 and no
    convolution; not one that mixes probabilities or adds a convolution.
    """
    first, second = expert_logits.unbind(dim=1)
    index = _as_index(labels)
    first_label, second_label = first.gather(1, index)[:, 0], second.gather(1, index)[:, 0]
    lowest = torch.full_like(first_label, -torch.inf)
    highest = torch.full_like(first_label, torch.inf)
    for other in range(first.shape[1]):
        lead = second_label - second[:, other]  # of the label over `other` at w = 0; slope * w is added to it
        slope = (first_label - first[:, other]) - lead
        bound = -lead / slope
        never = torch.where(lead > 0, -torch.inf, torch.inf)  # flat: won at every w, or at none
        below = torch.where(slope > 0, bound, torch.where(slope == 0, never, -torch.inf))
        above = torch.where(slope < 0, bound, torch.inf)
        lowest = torch.maximum(lowest, torch.where(labels == other, -torch.inf, below))
        highest = torch.minimum(highest, above)  # inf where `other` is the label itself: a flat lead of 0
    reachable = (lowest < highest) & (lowest < 1) & (highest > 0)
    return _label_or_mean(reachable, expert_logits, labels)


def best_gate_classwise(expert_logits: Tensor, labels: Tensor) -> Tensor:
    """The label where some weights per expert and class make it win, pixel by pixel; any number of experts.

    That is where its largest logit over the experts exceeds every other class's smallest one (strictly).
    Else as best_gate_simple; bounds every gate that mixes logits without a convolution.
    """
    smallest = expert_logits.amin(dim=1)  # [B, C, h, w]
    index = _as_index(labels)
    label = expert_logits.amax(dim=1).gather(1, index)[:, 0]
    others = smallest.scatter(1, index, -torch.inf).amax(dim=1)
    return _label_or_mean(label > others, expert_logits, labels)


def ceilings_for(num_experts: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The ceilings by name; the simple best gate is computed for two experts only."""
    ceilings = {
        "oracle expert per image": oracle_expert_image,
        "oracle expert per pixel": oracle_expert_pixel,
        "best gate, simple": best_gate_simple,
        "best gate, class-wise": best_gate_classwise,
    }
    if num_experts != 2:
        del ceilings["best gate, simple"]
    return ceilings


def _as_index(labels: Tensor) -> Tensor:
    """Labels as an index over classes, int64 [B, 1, h, w]; 255 becomes 0, which is not counted there."""
    return torch.where(labels == 255, 0, labels).long()[:, None]


def _label_or_mean(reachable: Tensor, expert_logits: Tensor, labels: Tensor) -> Tensor:
    answers = expert_logits.argmax(dim=2)
    mean = expert_logits.mean(dim=1).argmax(dim=1)
    reachable = reachable | (answers == labels[:, None]).any(dim=1)
    return torch.where(reachable, labels.long(), mean)
