"""Projected gradient ascent that halves its step where it gets stuck, and its schedule of shrinking balls."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from attacks.pgd import raise_loss
from attacks.pixel_losses import RESTLESS, LossName, targeted_dlr
from attacks.search import Found, Objective, Search
from attacks.threat import Threat, each, project, projection, random_point, steepest
from engine.config import PositiveInt, Probability

# Radii in units of eps, and the share of the steps in %.
SCHEDULES = {"constant": ((1.0, 100),), "red_eps": ((2.0, 30), (1.5, 30), (1.0, 40))}


def apgd(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    loss: LossName = "ce",
    track: Literal["ce", "loss"] | None = None,
    steps: PositiveInt = 100,
    restarts: PositiveInt = 1,
    schedule: Literal["constant", "red_eps"] = "constant",
    rho: Probability = 0.75,
    momentum: Probability = 0.75,
    draws: PositiveInt = 1,
) -> Found:
    """Auto-PGD from a random point (Croce and Hein 2020, arXiv 2003.01690).

    Masked losses, what they are judged by and red_eps are those of SEA (Croce et al. 2024, arXiv 2306.12941).
    Images [B, C, H, W] in [0, 1], labels [B, *S]; model as in attacks.search. `steps` forward and backward passes
    for each restart, and one more forward pass (red_eps: three).

    Args:
        loss: what is raised, see attacks/pixel_losses.py.
        track: what step sizes are judged by: ce or the loss itself; null: ce for losses that leave pixels out or
            change on the way, else the loss.
        steps: gradient steps of a restart.
        restarts: times that it begins anew, unless no image has a correct pixel left.
        schedule: red_eps spends 30 % of the steps in a ball of 2 eps and 30 % in one of 1.5 eps first.
        rho: the step is halved where the loss rose in no more than this share of the last steps.
        momentum: share of the gradient step in a move, the rest repeats the move before.
        draws: passes that a gradient is averaged over.
    """
    search = Search(model, images, labels, threat)
    track = track or ("ce" if loss in RESTLESS else "loss")
    objective = raise_loss(search, loss, track if track != "loss" else None)
    for restart in range(restarts):
        if not search.alive.any():
            break
        ascend(search, objective, ("apgd", restart), steps, schedule, draws=draws, rho=rho, momentum=momentum)
    return search.found()


def apgd_targeted(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    targets: PositiveInt = 9,
    steps: PositiveInt = 100,
    restarts: PositiveInt = 1,
    rho: Probability = 0.75,
    momentum: Probability = 0.75,
    draws: PositiveInt = 1,
) -> Found:
    """Auto-PGD on the targeted DLR loss (APGD-T; Croce and Hein 2020, arXiv 2003.01690). Needs 4 classes.

    The targets are the other classes that score highest at the image, of a label map at each pixel.
    Images [B, C, H, W] in [0, 1], labels [B, *S]; model as in attacks.search.

    Args:
        targets: number of other classes, all if there are fewer.
        steps: gradient steps for each target and restart.
        restarts: times that it begins anew with each target, unless no image has a correct pixel left.
        rho: the step is halved where the loss rose in no more than this share of the last steps.
        momentum: share of the gradient step in a move, the rest repeats the move before.
        draws: passes that a gradient is averaged over.
    """
    search = Search(model, images, labels, threat)
    logits = search.look(images, draws)
    known = search.labels.clamp(0, logits.shape[1] - 1)  # ignored labels are no class
    others = logits.scatter(1, known.unsqueeze(1), -torch.inf)
    rivals = others.topk(min(targets, logits.shape[1] - 1), dim=1).indices
    for number, target in enumerate(rivals.unbind(dim=1)):
        for restart in range(restarts):
            if not search.alive.any():
                return search.found()
            start = random_point(images, threat, "apgd_targeted", number, restart)
            climb(search, towards(search, target), start, steps, draws, rho=rho, momentum=momentum)
    return search.found()


def ascend(
    search: Search,
    objective: Objective,
    draw: tuple,
    steps: int,
    schedule: str = "constant",
    *,
    draws: int = 1,
    rho: float = 0.75,
    momentum: float = 0.75,
) -> None:
    """One restart: climbs from a random point through the balls of a schedule, each time from the point of the ball
    before that had the fewest correct pixels there. draw: names the random start."""
    balls = stages(steps, schedule)
    points, done = random_point(search.images, _ball(search, balls[0][0]), *draw), 0
    for radius, count in balls:
        ball = _ball(search, radius)
        stage = search if radius == 1 else search.within(ball)
        start = project(points, search.images, ball)
        climb(stage, _part(objective, done, count, steps), start, count, draws, rho=rho, momentum=momentum)
        if stage is not search:
            search.count(stage)
        points, done = stage.best, done + count


def stages(steps: int, schedule: str) -> list[tuple[float, int]]:
    """(radius in units of eps, steps) of each ball; what rounding leaves goes to the last."""
    *first, (radius, _) = SCHEDULES[schedule]
    found = [(larger, share * steps // 100) for larger, share in first]
    found.append((radius, steps - sum(count for _, count in found)))
    return [(radius, count) for radius, count in found if count]


def climb(
    search: Search,
    objective: Objective,
    start: Tensor,
    steps: int,
    draws: int = 1,
    *,
    rho: float = 0.75,
    momentum: float = 0.75,
) -> Tensor:
    """`steps` steps of Auto-PGD from `start`, the last point looked at as well, which is returned; for what it
    shares with `pgd.climb` see there. Steps begin with 2 eps; at each of the `checkpoints` an image where the
    tracked loss rose in no more than a share rho of the steps since the last, or whose step was kept there and whose
    best loss hasn't risen since, goes back to the point of its best loss with half the step."""
    threat = search.threat
    points = previous = peak = start
    inside = projection(search.images, threat)
    size = torch.full((len(start),), 2 * threat.eps, device=start.device)
    peak_loss = torch.full_like(size, -torch.inf)
    peak_gradient = torch.zeros_like(start)
    last = peak_loss_before = peak_loss
    rises, halved = torch.zeros_like(size), torch.ones_like(size, dtype=torch.bool)
    checks = checkpoints(steps)
    for step in range(steps):
        gradient, tracked = search.gradient(points, objective, step / steps, draws)
        higher = tracked > peak_loss
        peak_loss = torch.where(higher, tracked, peak_loss)
        peak = torch.where(each(higher, points), points, peak)
        peak_gradient = torch.where(each(higher, points), gradient, peak_gradient)
        if step == 0:
            peak_loss_before = peak_loss
        else:
            rises = rises + (tracked > last)
        last = tracked
        if step in checks:
            stuck = (rises <= rho * checks[step]) | (~halved & (peak_loss <= peak_loss_before))
            size = torch.where(stuck, size / 2, size)
            points = torch.where(each(stuck, points), peak, points)
            gradient = torch.where(each(stuck, points), peak_gradient, gradient)
            rises, halved, peak_loss_before = torch.zeros_like(rises), stuck, peak_loss
        share = momentum if step else 1.0
        uphill = inside(points + each(size, points) * steepest(gradient, threat.norm))
        moved = inside(points + share * (uphill - points) + (1 - share) * (points - previous))
        moved = search.moved(points, moved)
        if moved is None:
            return points
        previous, points = points, moved
    search.look(points, draws)
    return points


def checkpoints(steps: int) -> dict[int, int]:
    """Step -> number of steps since the checkpoint before (22 % of all first, then 3 % less each time, at least
    6 %)."""
    length, less, least = (max(share * steps // 100, 1) for share in (22, 3, 6))
    found, at = {}, length
    while at < steps:
        found[at] = length
        length = max(length - less, least)
        at += length
    return found


def towards(search: Search, target: Tensor) -> Objective:
    """The objective of a targeted attack: the targeted DLR loss, each pixel with the class [B, *S] it is to take."""

    def loss(logits: Tensor, labels: Tensor, threat: Threat, progress: float) -> Tensor:
        return targeted_dlr(logits, labels, target)

    return raise_loss(search, loss)


def _ball(search: Search, radius: float) -> Threat:
    return search.threat.at(radius * search.threat.eps)


def _part(objective: Objective, done: int, count: int, steps: int) -> Objective:
    """An objective whose progress goes on from `done` of all steps, for a climb of `count` of them."""
    return lambda points, progress: objective(points, (done + progress * count) / steps)
