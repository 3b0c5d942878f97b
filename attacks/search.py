"""What every attack has in common: it tries points, and keeps the best of them by what the network says of each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attacks.threat import Threat, check_inside, each, is_ignored, is_inside, refuse_bad_images
from engine.config import UserError

# (points [B, ...] that take a gradient, progress of the attack in [0, 1)) -> Trial
Objective = Callable[[Tensor, float], "Trial"]

UNSEEN = torch.iinfo(torch.int64).max  # correct pixels of an image of which no point has been looked at


@dataclass(frozen=True)
class Trial:
    """What an objective says of a point of each image.

    loss [B]: to be raised, with a graph. logits [B, K, *S]: of the network that is attacked, unmodified.
    tracked [B]: what step-size control looks at where that is another quantity than the loss.
    """

    loss: Tensor
    logits: Tensor
    tracked: Tensor | None = None


@dataclass(frozen=True)
class Found:
    """What an attack found on B images.

    images: of all points tried those with the fewest correct pixels. balanced: those with the lowest accuracy
    averaged over the classes of the image (for class labels the same). correct int64 [B], class_accuracy float64
    [B]: of these. forwards, backwards: passes through the network, per image. zero_gradients, bad_gradients
    int64 [B]: steps with a gradient of zeros while there were correct pixels, and with one that was not finite
    everywhere (no move there).
    losses float32 [T, B]: what was tracked, in order.
    """

    images: Tensor
    balanced: Tensor
    correct: Tensor
    class_accuracy: Tensor
    forwards: int
    backwards: int
    zero_gradients: Tensor
    bad_gradients: Tensor
    losses: Tensor


class Search:
    """The incumbents of an attack on a batch, and the count of what it cost.

    model: images in [0, 1] -> logits [B, K, *S], in eval mode, its weights without gradient. labels [B, *S].
    score: what points are judged by, logits -> (int64 [B], float64 [B]), both the lower the better for the attacker
    and 0 where nothing is left to gain; None: `scores`.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        threat: Threat,
        score: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ):
        refuse_bad_images(images)
        self.model, self.images, self.labels, self.threat = model, images, labels.long(), threat
        self.score = score or partial(scores, labels=self.labels, ignore_index=threat.ignore_index)
        count, device = len(images), images.device
        self.best, self.balanced = images.clone(), images.clone()
        self.correct = torch.full((count,), UNSEEN, device=device)
        self.class_accuracy = torch.full((count,), torch.inf, dtype=torch.float64, device=device)
        self.zero_gradients = torch.zeros(count, dtype=torch.int64, device=device)
        self.bad_gradients = torch.zeros_like(self.zero_gradients)
        self.forwards = self.backwards = 0
        self.losses: list[Tensor] = []

    def look(self, points: Tensor, draws: int = 1) -> Tensor:
        """The network's logits at the points, which become candidates: one forward pass without a graph, or the
        mean of several."""
        with torch.no_grad():
            logits = self.model(points)
            for _ in range(draws - 1):
                logits = logits + self.model(points)
        self.forwards += draws
        logits = logits / draws if draws > 1 else logits
        self.offer(points, logits)
        return logits

    def gradient(
        self, points: Tensor, objective: Objective, progress: float = 0.0, draws: int = 1
    ) -> tuple[Tensor, Tensor]:
        """(gradient of the objective's loss, tracked loss [B]) at the points, which become candidates.

        draws: passes that gradient, tracked loss and logits are averaged over, for networks that draw lots (EoT,
        Athalye et al. 2018, arXiv 1707.07397). What is not finite in a gradient is replaced by zeros and counted.
        """
        gradient, tracked, logits = self._pass(points, objective, progress)
        if draws > 1:
            for _ in range(draws - 1):
                more = self._pass(points, objective, progress)
                gradient, tracked, logits = gradient + more[0], tracked + more[1], logits + more[2]
            gradient, tracked, logits = gradient / draws, tracked / draws, logits / draws
        self.offer(points, logits)
        self.losses.append(tracked.float())
        return self._finite(gradient), tracked

    def offer(self, points: Tensor, logits: Tensor) -> None:
        """Takes the points where they are better than the incumbents: those inside the ball, with finite logits."""
        correct, class_accuracy = self.score(logits)
        fewer, lower = correct < self.correct, class_accuracy < self.class_accuracy
        if not (fewer | lower).any():
            return
        sound = is_inside(points, self.images, self.threat) & _is_finite(logits)
        fewer, lower = fewer & sound, lower & sound
        self.correct = torch.where(fewer, correct, self.correct)
        self.class_accuracy = torch.where(lower, class_accuracy, self.class_accuracy)
        self.best = torch.where(each(fewer, points), points, self.best)
        self.balanced = torch.where(each(lower, points), points, self.balanced)

    @property
    def alive(self) -> Tensor:
        """Images that still have a correct pixel, bool [B]: the others need no further step."""
        return self.correct > 0

    def moved(self, points: Tensor, further: Tensor) -> Tensor | None:
        """The points after a step: further for images that still have a correct pixel; None where none has."""
        alive = self.alive
        left = alive.sum().item()
        if left == len(points):
            return further
        return torch.where(each(alive, points), further, points) if left else None

    def within(self, threat: Threat) -> "Search":
        """A search of the same images in another ball; `count` takes what it cost."""
        return Search(self.model, self.images, self.labels, threat, self.score)

    def count(self, other: "Search") -> None:
        """Adds passes, alarms and losses of another search of the same images, not its points."""
        self.forwards, self.backwards = self.forwards + other.forwards, self.backwards + other.backwards
        self.zero_gradients = self.zero_gradients + other.zero_gradients
        self.bad_gradients = self.bad_gradients + other.bad_gradients
        self.losses += other.losses

    def found(self) -> Found:
        """The incumbents. UserError where the network gave no finite logits at any point of an image,
        AssertionError where an incumbent has left the ball."""
        unseen = (self.correct == UNSEEN).nonzero().flatten().tolist()
        if unseen:
            raise UserError(
                f"attack: the network's logits are not finite at any of the points tried of images {unseen} of the "
                "batch; what it does there can't be judged"
            )
        for points in (self.best, self.balanced):
            check_inside(points, self.images, self.threat)
        losses = torch.stack(self.losses) if self.losses else self.best.new_zeros(0, len(self.best))
        return Found(
            self.best,
            self.balanced,
            self.correct,
            self.class_accuracy,
            self.forwards,
            self.backwards,
            self.zero_gradients,
            self.bad_gradients,
            losses,
        )

    def _pass(self, points: Tensor, objective: Objective, progress: float) -> tuple[Tensor, Tensor, Tensor]:
        """(gradient, tracked loss, logits) of one forward and backward pass. A loss that doesn't depend on the
        points has a gradient of zeros."""
        leaf = points.detach().requires_grad_()
        with torch.enable_grad():
            trial = objective(leaf, progress)
            total = trial.loss.sum()
        gradient = None
        if total.requires_grad:
            (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
        self.forwards, self.backwards = self.forwards + 1, self.backwards + 1
        tracked = trial.loss if trial.tracked is None else trial.tracked
        return (
            torch.zeros_like(leaf) if gradient is None else gradient,
            tracked.detach(),
            trial.logits.detach(),
        )

    def _finite(self, gradient: Tensor) -> Tensor:
        largest = gradient.flatten(1).abs().amax(dim=1)  # NaN where there is one
        self.bad_gradients += ~torch.isfinite(largest)
        self.zero_gradients += (largest == 0) & self.alive
        return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def scores(logits: Tensor, labels: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """(correct pixels int64 [B], accuracy averaged over the classes of each image float64 [B]); lower is better
    for an attacker. An image without a labelled pixel has 0 and 0."""
    count, classes = logits.shape[:2]
    right = logits.max(dim=1).indices == labels  # argmax, some times faster
    ignored = is_ignored(labels, ignore_index)
    if labels.ndim == 1:
        right = right & ~ignored
        return right.long(), right.double()
    place = (labels * 2 + right).masked_fill(ignored, 2 * classes).view(count, -1)
    pixels = torch.zeros(count, 2 * classes + 1, dtype=torch.int64, device=labels.device)
    pixels.scatter_add_(1, place, torch.ones_like(place))
    pixels = pixels[:, :-1].view(count, classes, 2)  # of each class: wrong, right
    hits, present = pixels[:, :, 1], pixels.sum(dim=2)
    accuracy = (hits.double() / present.clamp_min(1)).sum(dim=1) / (present > 0).sum(dim=1).clamp_min(1)
    return hits.sum(dim=1), accuracy


def _is_finite(logits: Tensor) -> Tensor:
    flat = logits.flatten(1)
    return torch.isfinite(flat.amin(dim=1)) & torch.isfinite(flat.amax(dim=1))
