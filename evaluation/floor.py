"""The gate-free floor: pixels of an attacked image that are right whatever the gate says, from its experts alone.

A diagnostic of one image: where it is far below what the mixture got right there, the experts are lost and only the
gate holds. It says nothing of other images, so it is no certificate.

Weights are those of the gate's kind: non-negative, summing to 1 over the experts, one for all classes or one for
each, the same for the whole image (h = w = 1) or of each place by itself. The logits are linear in them, so what a
label leads a rival k by is least at a vertex of the simplices, and a pixel is right for all weights where each of
these least leads is above 0. With weights that are the same for the whole image that is exact at full size, since
upsampling and convolution are linear maps of logits too: the least lead is

    sum over j of min over e of (part_e,j of the label - part_e,j of k)

where part_e,j are the logits for a weight of 1 for class j of expert e and 0 elsewhere. With one weight for all
classes: all experts (after the convolution) are right. With one for each class and no convolution:
min_e z_e,y > max over k != y of max_e z_e,k.

With weights of each place there is none where a convolution looks at several of them. Without one it is exact for
weights that each place of the logits' grid may choose by itself; a spatial gate has a coarser grid, or may be unable
to choose them, so that for it this is a bound from below.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.routed import Inside, look_inside
from attacks.threat import is_ignored
from engine.config import IGNORE

TOLERANCE = 1e-4  # of the largest logit: what float32 may do to a sum


@dataclass(frozen=True)
class Floor:
    """right: bool [B, *S], False where there is no label; None where there is no floor, and why."""

    right: Tensor | None
    reason: str = ""


@torch.no_grad()
def gate_free_floor(
    model, images: Tensor, labels: Tensor, ignore_index: int | None = IGNORE, seen: Inside | None = None
) -> Floor:
    """Of a routed model (see attacks.routed) at images [B, 3, H, W] in [0, 1], attacked or not; labels [B, *S]. Of hard
    routing with one weight per image it is over the experts: no other weights occur, and mixing needn't be linear.
    seen: what `look_inside` gave for these images, where it has been called already."""
    seen = seen or look_inside(model, images)
    ignored = is_ignored(labels, ignore_index)
    known = labels.masked_fill(ignored, 0).long()
    sites, _, experts, classes, *grid = seen.gate_logits.shape
    if sites > 1:
        return Floor(None, f"none: a gate at {sites} sites")
    alone = parts_of(seen, slice(None))
    if grid == [1, 1] and classes == 1 and getattr(model, "routing", "soft") == "hard":
        found = Floor(
            least_lead([alone], known).amin(dim=1) > 0
        )  # one expert takes all: there are no other weights
    elif grid != [1, 1]:
        found = _of_each_place(model, images, alone, known, classes)
    else:
        found = _of_the_image(seen, alone, known, classes)
    return Floor(found.right & ~ignored) if found.right is not None else found


def least_lead(parts: Iterable[Tensor], labels: Tensor) -> Tensor:
    """What the label leads each other class by, [B, C, *S], under the worst weights that are one-hot for each part
    [B, E, C, *S]: they add up. inf at the label itself; labels [B, *S]."""
    lead = 0
    for part in parts:
        index = labels[:, None, None].expand(-1, part.shape[1], 1, *labels.shape[1:])
        lead = lead + (part.gather(2, index) - part).amin(dim=1)
    return lead.scatter(1, labels[:, None], torch.inf)


def lead_of_bounds(low: Tensor, high: Tensor, labels: Tensor) -> Tensor:
    """The label's `low` less the other classes' `high`, all [B, C, *S]; inf at the label itself."""
    return (low.gather(1, labels[:, None]) - high).scatter(1, labels[:, None], torch.inf)


def _of_the_image(seen: Inside, alone: Tensor, labels: Tensor, classes: int) -> Floor:
    """Weights that are the same at all places; `alone` [B, E, C, H, W] is what each expert says with all weight."""
    weights = some_weights(seen)[0]
    mixed = seen.mix(weights[None])
    weights = weights.view(
        *weights.shape[:3], *[1] * (alone.ndim - 3)
    )  # [B, E, K, ...], for images one by one as well
    if is_close((weights * alone).sum(dim=1), mixed):  # no class has a part of another's weights
        lead = least_lead([alone], labels)
        if classes > 1:
            lead = lead_of_bounds(alone.amin(dim=1), alone.amax(dim=1), labels)
        return Floor(lead.amin(dim=1) > 0)
    recombined = torch.zeros_like(mixed)

    def parts() -> Iterator[Tensor]:
        for index in range(classes):
            part = parts_of(seen, index)
            recombined.add_((weights[:, :, [index]] * part).sum(dim=1))
            yield part

    lead = least_lead(parts(), labels)
    if not is_close(recombined, mixed):
        return Floor(None, "none: what is mixed is not linear in the weights")
    return Floor(lead.amin(dim=1) > 0)


def _of_each_place(model, images: Tensor, alone: Tensor, labels: Tensor, classes: int) -> Floor:
    """Weights of each place of the logits' grid by itself."""
    if not (hasattr(model, "inspect") and hasattr(model, "stride")):
        return Floor(
            None, "none: a spatial gate, and the network tells nothing of the grid (inspect, stride)"
        )

    def enlarge(logits: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        grid = [-(-edge // model.stride) * model.stride for edge in (height, width)]
        return F.interpolate(logits, size=grid, mode="bilinear", align_corners=False)[..., :height, :width]

    low_res = model.inspect(images).expert_logits  # [B, E, C, h, w]
    if not is_close(enlarge(low_res.flatten(0, 1)).view_as(alone), alone):
        return Floor(None, "none: a spatial gate before a convolution, or one that mixes no plain logits")
    if classes > 1:
        lead = lead_of_bounds(enlarge(low_res.amin(dim=1)), enlarge(low_res.amax(dim=1)), labels)
        return Floor(lead.amin(dim=1) > 0)
    right = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique().tolist():
        lead = enlarge((low_res[:, :, [label]] - low_res).amin(dim=1))
        lead[:, label] = torch.inf
        right |= (labels == label) & (lead.amin(dim=1) > 0)
    return Floor(right)


def some_weights(seen: Inside) -> Tensor:
    """Weights [S, B, E, K, h, w] that have nothing to do with the gate's: they tell whether mixing is linear."""
    dice = torch.Generator().manual_seed(0)
    return torch.rand(seen.gate_logits.shape, generator=dice).to(seen.gate_logits).softmax(dim=-4)


def parts_of(seen: Inside, index: int | slice) -> Tensor:
    """Logits [B, E, C, H, W] for a weight of 1 for class `index` of one expert each, and 0 for all else."""
    shape = (*seen.gate_logits.shape[:-2], 1, 1)
    parts = []
    for expert in range(shape[2]):
        weights = seen.gate_logits.new_zeros(shape)
        weights[:, :, expert, index] = 1.0
        parts.append(seen.mix(weights))
    return torch.stack(parts, dim=1)


def is_close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().amax() <= TOLERANCE * expected.abs().amax())
