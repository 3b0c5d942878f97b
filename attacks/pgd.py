"""Projected gradient ascent with a fixed step: FGSM, PGD, SegPGD, CosPGD."""

from collections.abc import Callable

from torch import Tensor

from attacks.pixel_losses import LossName, PixelLoss, image_loss
from attacks.search import Found, Objective, Search, Trial
from attacks.threat import Threat, projection, random_point, steepest
from engine.config import Positive, PositiveInt, UserError


def pgd(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    loss: LossName = "ce",
    steps: PositiveInt = 20,
    step_size: Positive | None = None,
    restarts: PositiveInt = 1,
    random_start: bool = True,
    draws: PositiveInt = 1,
) -> Found:
    """Projected gradient ascent (Madry et al. 2018, arXiv 1706.06083): sign steps (linf) or normalised ones (l2).

    Images [B, C, H, W] in [0, 1], labels [B, *S]; model as in attacks.search. The best of all points tried is kept,
    the last one included.

    Args:
        loss: what is raised, see attacks/pixel_losses.py.
        steps: gradient steps of a restart; one more forward pass looks at the last point.
        step_size: in units of pixels; null: 2.5 eps / steps.
        restarts: times that it begins anew, unless no image has a correct pixel left.
        random_start: begin at a random point of the ball, not at the image; restarts always do.
        draws: passes that a gradient is averaged over.
    """
    search = Search(model, images, labels, threat)
    objective = raise_loss(search, loss)
    for restart in range(restarts):
        if not search.alive.any():
            break
        start = random_point(images, threat, "pgd", restart) if random_start or restart else images
        climb(search, objective, start, steps, step_size, draws)
    return search.found()


def fgsm(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    loss: LossName = "ce",
) -> Found:
    """One step of length eps from the image (Goodfellow et al. 2015, arXiv 1412.6572).

    The image itself is kept where the step does no good.

    Args:
        loss: what is raised, see attacks/pixel_losses.py.
    """
    return pgd(model, images, labels, threat, loss=loss, steps=1, step_size=threat.eps, random_start=False)


def segpgd(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: PositiveInt = 20,
    restarts: PositiveInt = 1,
) -> Found:
    """Turns from the pixels that are right to all of them (Gu et al. 2022, arXiv 2207.12391).

    It is `pgd` with this loss; that one has further keys.

    Args:
        steps: gradient steps of a restart.
        restarts: times that it begins anew.
    """
    return pgd(model, images, labels, threat, loss="segpgd", steps=steps, restarts=restarts)


def cospgd(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: PositiveInt = 20,
    restarts: PositiveInt = 1,
) -> Found:
    """Weighs pixels by how close prediction and label are (Agnihotri et al. 2024, arXiv 2302.02213).

    It is `pgd` with this loss; that one has further keys.

    Args:
        steps: gradient steps of a restart.
        restarts: times that it begins anew.
    """
    return pgd(model, images, labels, threat, loss="cospgd", steps=steps, restarts=restarts)


def climb(
    search: Search,
    objective: Objective,
    start: Tensor,
    steps: int,
    step_size: float | None = None,
    draws: int = 1,
) -> Tensor:
    """`steps` steps uphill from `start`, the last point looked at as well, which is returned. Images that have no
    correct pixel left stay where they are. UserError for steps that cross all of [0, 1] and the ball."""
    threat = search.threat
    if step_size is not None and step_size >= 1 and step_size > threat.eps and threat.norm == "linf":
        raise UserError(f"step_size: {step_size:g} crosses all of [0, 1]; {step_size:g}/255 may be meant")
    size = 2.5 * threat.eps / steps if step_size is None else step_size
    points, inside = start, projection(search.images, threat)
    for step in range(steps):
        gradient, _ = search.gradient(points, objective, step / steps, draws)
        moved = search.moved(points, inside(points + size * steepest(gradient, threat.norm)))
        if moved is None:
            return points
        points = moved
    search.look(points, draws)
    return points


def raise_loss(search: Search, loss: PixelLoss | str, track: PixelLoss | str | None = None) -> Objective:
    """The objective of a plain white-box attack: a loss (of attacks.pixel_losses) of the network's own logits.

    track: another loss that step sizes are judged by."""

    def value(logits: Tensor, loss: PixelLoss | str, progress: float) -> Tensor:
        return image_loss(loss, logits, search.labels, search.threat, progress)

    def objective(points: Tensor, progress: float) -> Trial:
        logits = search.model(points)
        tracked = value(logits.detach(), track, progress) if track else None
        return Trial(value(logits, loss, progress), logits, tracked)

    return objective
