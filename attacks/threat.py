"""What an attacker may do to an image: a ball around it inside the box [0, 1], and where their dice come from."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from engine.config import IGNORE, UserError

TOLERANCE = 1e-6  # of a budget: float32 rounds images + perturbation


@dataclass(frozen=True)
class Threat:
    """The threat model of a batch of B images in pixel space [0, 1], the network's input before normalisation.

    eps: radius of the ball around each image (linf: largest change of a value; l2: length of all changes).
    ignore_index: label of pixels that count nowhere (None: all count, as for class labels).
    seeds: one number per image; everything random about it follows from that and from what is drawn, so batches
    don't matter. class_weights [K]: of each class in class-balanced losses (None: those losses refuse to run).
    """

    eps: float
    norm: Literal["linf", "l2"] = "linf"
    ignore_index: int | None = IGNORE
    seeds: tuple[int, ...] = ()
    class_weights: Tensor | None = field(default=None, compare=False)

    def __post_init__(self):
        if not 0 <= self.eps < math.inf:
            raise UserError(f"threat: eps must be 0 or more, found {self.eps}")
        if self.norm not in ("linf", "l2"):
            raise UserError(f"threat: norm must be linf or l2, found {self.norm}")

    def at(self, eps: float) -> "Threat":
        """The same with another radius."""
        return replace(self, eps=eps)

    def generators(self, count: int, *draw) -> list[torch.Generator]:
        """A CPU generator per image for what `draw` names, such as ("pgd", restart)."""
        if len(self.seeds) != count:
            raise UserError(f"threat: {len(self.seeds)} seeds for {count} images; give one per image")
        return [torch.Generator().manual_seed(seed_of(seed, *draw)) for seed in self.seeds]


def seed_of(*parts) -> int:
    """A 63-bit seed from numbers and names, the same on every machine."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def project(points: Tensor, images: Tensor, threat: Threat) -> Tensor:
    """The points [B, ...] brought into ball and box. linf: to the nearest point, those inside stay as they are; l2:
    by shortening, then clamping (which shortens further, as images lie in the box). eps = 0 gives the images."""
    return projection(images, threat)(points)


def projection(images: Tensor, threat: Threat) -> Callable[[Tensor], Tensor]:
    """`project` for many points of the same images: points [B, ...] -> those brought into ball and box."""
    if threat.norm == "linf":
        lowest, highest = (images - threat.eps).clamp_min(0.0), (images + threat.eps).clamp_max(1.0)
        return lambda points: points.clamp(lowest, highest)

    def shorten(points: Tensor) -> Tensor:
        change = points - images
        change = change * (threat.eps / lengths(change).clamp_min(1e-12)).clamp_max(1.0)
        return (images + change).clamp(0.0, 1.0)

    return shorten


def random_point(images: Tensor, threat: Threat, *draw) -> Tensor:
    """A point of the ball around each image, uniformly, then clamped to the box."""
    change = random_change(images.shape[1:], threat.norm, threat.generators(len(images), *draw))
    return project(images + threat.eps * change.to(images), images, threat)


def random_change(shape: Sequence[int], norm: str, generators: Sequence[torch.Generator]) -> Tensor:
    """A point of the ball of radius 1 around zero by each generator, uniformly, [B, *shape]."""
    if norm == "linf":
        return torch.stack([torch.rand(shape, generator=one).mul_(2).sub_(1) for one in generators])
    noise = torch.stack([torch.randn(shape, generator=one) for one in generators])
    share = torch.stack([torch.rand((), generator=one, dtype=torch.float64) for one in generators])
    radius = share ** (1 / noise[0].numel())
    return noise * (each(radius, noise) / lengths(noise)).float()


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """Unit step of steepest ascent: the sign of the gradient (linf) or the gradient over its length (l2).

    Where a gradient is zero there is no step. It has to be finite: the sign of NaN passes as 0.
    """
    if norm == "linf":
        return gradient.sign()
    # scaled first: the squares of small gradients underflow
    scaled = gradient / each(gradient.flatten(1).abs().amax(dim=1).clamp_min(1e-30), gradient)
    return scaled / lengths(scaled).clamp_min(1e-12)


def lengths(change: Tensor) -> Tensor:
    """Euclidean length of each of B changes, [B, 1, ...]; summed in float64."""
    length = torch.linalg.vector_norm(change.flatten(1), dim=1, dtype=torch.float64)
    return each(length, change).to(change.dtype)


def each(values: Tensor, images: Tensor) -> Tensor:
    """[B] -> [B, 1, ...]: one value for the whole of each image."""
    return values.view(-1, *[1] * (images.ndim - 1))


def sizes(points: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """(linf, l2) sizes of the changes of each image, float64 [B] each: the norms actually used."""
    change = (points.double() - images.double()).flatten(1)
    return change.abs().amax(dim=1), torch.linalg.vector_norm(change, dim=1)


def is_inside(points: Tensor, images: Tensor, threat: Threat) -> Tensor:
    """Which of the B points lie in ball and box, up to float32's rounding; bool [B]. NaN doesn't."""
    bound = threat.eps + TOLERANCE * (1 if threat.norm == "linf" else max(1.0, threat.eps))
    flat = points.flatten(1)
    return (_used(points, images, threat.norm) <= bound) & (flat.amin(dim=1) >= 0) & (flat.amax(dim=1) <= 1)


def _used(points: Tensor, images: Tensor, norm: str) -> Tensor:
    """One of `sizes`, in float32: attacks ask at every step."""
    change = points - images
    if norm == "linf":
        return change.abs_().flatten(1).amax(dim=1).double()
    return lengths(change).flatten().double()


def check_inside(points: Tensor, images: Tensor, threat: Threat) -> None:
    """AssertionError where a point has left ball or box, or isn't finite: a bug of the attack that made it."""
    if not is_inside(points, images, threat).all():
        used = _used(points, images, threat.norm).max().item()
        raise AssertionError(
            f"an adversarial image is {used} from its image ({threat.norm}), eps {threat.eps}"
        )


def is_ignored(labels: Tensor, ignore_index: int | None) -> Tensor:
    """Where a label counts nowhere; bool of their shape."""
    if ignore_index is None:
        return torch.zeros_like(labels, dtype=torch.bool)
    return labels == ignore_index


def count_labelled(labels: Tensor, ignore_index: int | None) -> int:
    """How many of the labels count."""
    return int((~is_ignored(labels, ignore_index)).sum())


def refuse_bad_images(images: Tensor) -> None:
    """UserError for images that are not float32 in [0, 1]: attacks work before normalisation."""
    if images.dtype != torch.float32 or not (images.amin() >= 0 and images.amax() <= 1):
        found = f"{images.dtype} in [{images.amin().item():.3g}, {images.amax().item():.3g}]"
        raise UserError(
            f"attack: images must be float32 in [0, 1], found {found}; put normalisation into the network"
        )
