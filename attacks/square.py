"""Square Attack: random search over squares, which asks the network for scores only and never for a gradient."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Generator, Tensor

from attacks.pixel_losses import image_loss
from attacks.search import Found, Search
from attacks.threat import TOLERANCE, Threat, each, project
from engine.config import PositiveInt, Probability

# of the squares' area, in queries out of 10000; the paper has no 500, the authors' program has
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    loss: Literal["margin", "ce", "jensen_shannon"] = "margin",
    queries: PositiveInt = 1000,
    area: Probability = 0.8,
    restarts: PositiveInt = 1,
) -> Found:
    """Random search (Andriushchenko et al. 2020, arXiv 1912.00049): a square is changed, and the change is kept
    where the loss of its image rises.

    Images [B, C, H, W] in [0, 1], labels [B, *S]; model as in attacks.search. For label maps the loss of an image
    is the mean over its labelled pixels. A query is a forward pass; there are no others.

    Args:
        loss: what is raised.
        queries: forward passes of a restart.
        area: share of the image that the first squares cover; it is halved nine times.
        restarts: times that it begins anew.
    """
    search = Search(model, images, labels, threat)
    start, change = MOVES[threat.norm]
    for restart in range(restarts):
        dice = threat.generators(len(images), "square", restart)
        moves = [start(*own, threat.eps) for own in zip(images, dice, strict=True)]
        points = project(torch.stack(moves), images, threat)
        highest = _ask(search, loss, points, 0.0)
        for query in range(1, queries):
            if not search.alive.any():
                return search.found()
            side = side_of(area, query, queries, images.shape[-2:])
            moves = [change(*own, threat.eps, side) for own in zip(images, points, dice, strict=True)]
            trial = project(torch.stack(moves), images, threat)
            found = _ask(search, loss, trial, query / queries)
            higher = found > highest
            points = torch.where(each(higher, trial), trial, points)
            highest = torch.where(higher, found, highest)
            search.losses.append(highest.float())
    return search.found()


def side_of(area: float, query: int, queries: int, size: tuple[int, int]) -> int:
    """Edge of the squares of a query in an image of that (height, width), at least 1."""
    halved = sum(10000 * query > after * queries for after in HALVINGS)
    return min(max(round(math.sqrt(area / 2**halved * size[0] * size[1])), 1), *size)


def stripes(image: Tensor, die: Generator, eps: float) -> Tensor:
    """The start for linf, [C, H, W]: vertical stripes, one pixel wide, of +-eps in each channel."""
    return image + eps * _signs((len(image), 1, image.shape[2]), die, image)


def coloured_square(image: Tensor, point: Tensor, die: Generator, eps: float, side: int) -> Tensor:
    """The point with one square that is eps above or below the image, channel by channel; the other way round
    where the drawn signs would change nothing."""
    window = _window(image, side, die)
    step = eps * _signs((len(image), 1, 1), die, image)
    same = torch.allclose((image[window] + step).clamp(0, 1), point[window], rtol=0, atol=TOLERANCE)
    changed = point.clone()
    changed[window] = image[window] + (-step if same else step)
    return changed


def bumps(image: Tensor, die: Generator, eps: float) -> Tensor:
    """The start for l2, [C, H, W]: about 5 x 5 tiles of the shape that is added later, each with its own sign per
    channel, of length eps in all."""
    channels, *size = image.shape
    side = max(min(size) // 5, 1)
    rows, columns = (edge // side for edge in size)
    tiles = torch.kron(_signs((channels, rows, columns), die, image), two_bumps(side, die).to(image))
    change = torch.zeros_like(image)
    top, left = ((edge - count * side) // 2 for edge, count in zip(size, (rows, columns), strict=True))
    change[:, top : top + rows * side, left : left + columns * side] = tiles
    return image + eps * change / torch.linalg.vector_norm(change)


def moved_bumps(image: Tensor, point: Tensor, die: Generator, eps: float, side: int) -> Tensor:
    """The point with what one square held given to another (algorithm 3 of the paper): the second is set to zero,
    the first gets a pair of bumps, and with it the length of both and what eps leaves, shared by the channels."""
    change = point - image
    left = (eps**2 - change.square().sum()).clamp_min(0) / len(image)
    first, second = _window(image, side, die), _window(image, side, die)
    both = torch.zeros_like(image, dtype=torch.bool)
    both[first] = both[second] = True
    length = (change.square().masked_fill(~both, 0).sum(dim=(1, 2), keepdim=True) + left).sqrt()
    new = _signs((len(image), 1, 1), die, image) * _unit(two_bumps(side, die).to(image)[None])
    wanted = new + _unit(change[first])
    # squares of one pixel may cancel
    wanted = torch.where(wanted.abs().amax(dim=(1, 2), keepdim=True) > 1e-6, wanted, new)
    change[second] = 0
    change[first] = length * _unit(wanted)
    return image + change


def bump(height: int, width: int) -> Tensor:
    """A pyramid over a rectangle, [height, width] (equation 2 of the paper): ring by ring towards the middle
    1 / (n + 1)^2, then 1 / n^2, ..., 1 are added, with n = height // 2."""
    half = height // 2
    rows = (torch.arange(height) - half).abs()[:, None]
    columns = (torch.arange(width) - width // 2).abs()[None]
    sums = (1 / torch.arange(half + 1, 0, -1.0) ** 2).cumsum(dim=0)
    return sums[half - torch.maximum(rows, columns)]


def two_bumps(side: int, die: Generator) -> Tensor:
    """[side, side]: one half up, the other down, side by side or one above the other."""
    shape = torch.cat([bump(side, side // 2), -bump(side, side - side // 2)], dim=1)
    return shape if torch.randint(2, (), generator=die) else shape.T.contiguous()


MOVES = {"linf": (stripes, coloured_square), "l2": (bumps, moved_bumps)}


def _ask(search: Search, loss: str, points: Tensor, progress: float) -> Tensor:
    """The loss of each image at its point, [B]; lowest where the network gives no number."""
    values = image_loss(loss, search.look(points), search.labels, search.threat, progress)
    return values.nan_to_num(nan=-torch.inf)


def _window(image: Tensor, side: int, die: Generator) -> tuple:
    top, left = (int(torch.randint(edge - side + 1, (), generator=die)) for edge in image.shape[1:])
    return (..., slice(top, top + side), slice(left, left + side))


def _signs(shape: tuple[int, ...], die: Generator, like: Tensor) -> Tensor:
    return (2.0 * torch.randint(2, shape, generator=die) - 1).to(like)


def _unit(maps: Tensor) -> Tensor:
    """Each [h, w] of [C, h, w] at length 1; zeros stay."""
    return maps / torch.linalg.vector_norm(maps, dim=(1, 2), keepdim=True).clamp_min(1e-12)
