"""Adversarial images that an 8-bit file can hold, without leaving the ball."""

import torch
from torch import Tensor

from attacks.threat import TOLERANCE, Threat
from engine.config import UserError

LEVELS = 255
OFF_GRID = 1e-3  # of a level: what float32 leaves of k / 255, whichever way it was computed


def quantised(points: Tensor, images: Tensor, threat: Threat) -> Tensor:
    """The points [B, ...] on multiples of 1/255, inside ball and box; where nothing changes, the image's own bits.

    linf: the nearest multiple, or the next one towards the image where that would leave the ball; eps below 1/255
    leaves nothing but the image. l2: changes are cut towards the image and, as long as the ball allows, rounded
    to the nearest instead, those first that were cut most. The network may answer otherwise than at the points:
    score it again.

    UserError for images that aren't on multiples of 1/255 themselves (such as frames resized in floating point):
    what is added to them can't be told from their own rounding.
    """
    own = images.double() * LEVELS
    base = own.round()
    if (own - base).abs().max() > OFF_GRID:
        raise UserError(
            "uint8 adversarial images: the images themselves are no multiples of 1/255; attack frames as 8-bit "
            "files hold them (resized before they become floating point), or keep float32 adversarial images"
        )
    change = points.double() * LEVELS - base
    radius = (threat.eps + TOLERANCE / 2) * LEVELS
    if threat.norm == "linf":
        steps = change.round().clamp(-int(radius), int(radius))
    else:
        steps = _rounded_inside(change.flatten(1), radius).view_as(change)
    return torch.where(steps == 0, images, ((base + steps) / LEVELS).to(images))


def _rounded_inside(change: Tensor, radius: float) -> Tensor:
    """Whole numbers near the changes [B, N], each row at most `radius` long if that of the changes is."""
    cut = change.trunc()
    rest = (change - cut).abs()
    order = rest.argsort(dim=1, descending=True, stable=True)
    cost = (2 * cut.abs() + 1) * (rest >= 0.5)  # what one more step adds to the squared length
    length = cut.square().sum(dim=1, keepdim=True) + cost.gather(1, order).cumsum(dim=1)
    further = torch.zeros_like(rest, dtype=torch.bool).scatter(1, order, length <= radius**2)
    return cut + (further & (rest >= 0.5)) * change.sign()
