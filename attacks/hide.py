"""An attack with another goal: the pixels of one class are to vanish, and nothing else is to change."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.pgd import climb
from attacks.search import Found, Search, Trial, scores
from attacks.threat import Threat, is_ignored, random_point
from engine.config import IGNORE, ClassId, Positive, PositiveInt, Probability, UserError

VERSION = 2  # raised when it finds other images
FOR_LABEL_MAPS = True  # one label for an image is nothing that could be hidden in it


def hide(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    class_id: ClassId,
    goal: Literal["prediction", "labels"] = "prediction",
    steps: PositiveInt = 40,
    step_size: Positive | None = None,
    restarts: PositiveInt = 1,
    random_start: bool = False,
    omega: Probability = 0.5,
    confidence: Probability = 0.75,
) -> Found:
    """Hides a class ("no pedestrian"; the dynamic target of Metzen et al. 2017, arXiv 1704.05712, here for each
    image on its own).

    Images [B, C, H, W] in [0, 1], labels [B, H, W]; model as in attacks.search. What is looked for are not the
    fewest correct pixels: `images` are the points with the fewest pixels that are not as they are to be, `balanced`
    those with the lowest mean of the share of hidden pixels that are still seen and the share of other pixels that
    have changed (`Aim.failures`). `correct` and `class_accuracy` say of them what they say of every attack; how far
    the goal was reached is aim_at(...).shares(model(points)); robustness.csv has `hidden_<class>`, the share of the
    pixels with that label that are not answered as it, before and after. An image without the class stays as it is.

    Args:
        class_id: the class to hide, by its number; in a config by its name as well.
        goal: what hides and what stays: the network's answer on the image (its mistakes stay), or the labels.
        steps: gradient steps of a restart; one more forward pass looks at the last point.
        step_size: in units of pixels; null: 2.5 eps / steps.
        restarts: times that it begins anew.
        random_start: begin at a random point of the ball, not at the image; restarts always do.
        omega: weight of the pixels to hide; the others have 1 - omega.
        confidence: a pixel that is as it is to be with a higher probability than this is let alone.
    """
    with torch.no_grad():
        logits = model(images)
    aim = aim_at(class_id, logits, labels, goal, threat.ignore_index)
    there = aim.hidden.flatten(1).any(dim=1)
    aim = replace(aim, kept=aim.kept & there[:, None, None])  # nothing to gain without the class
    search = Search(model, images, labels, threat, score=aim.failures)
    search.forwards += 1
    search.offer(images, logits)

    def objective(points: Tensor, progress: float) -> Trial:
        logits = model(points)
        return Trial(-aim.loss(logits, omega, confidence), logits)

    for restart in range(restarts):
        start = random_point(images, threat, "hide", restart) if random_start or restart else images
        climb(search, objective, start, steps, step_size)
    found = search.found()
    with torch.no_grad():
        correct, _ = scores(model(found.images), search.labels, threat.ignore_index)
        _, accuracy = scores(model(found.balanced), search.labels, threat.ignore_index)
    return replace(found, correct=correct, class_accuracy=accuracy, forwards=found.forwards + 2)


@dataclass(frozen=True)
class Aim:
    """What the network is to say about B images.

    goal [B, H, W]: class ids, meaningless outside hidden and kept. hidden, kept bool [B, H, W]: pixels that are to
    lose the class, and those that are to stay; ignored ones are in neither.
    """

    class_id: int
    goal: Tensor
    hidden: Tensor
    kept: Tensor

    def loss(self, logits: Tensor, omega: float, confidence: float) -> Tensor:
        """To be lowered, [B]: cross-entropy to the goal, its mean over hidden pixels times omega and its mean over
        kept ones times 1 - omega, without pixels that are at the goal with more than `confidence`.

        The paper weighs the sums over the pixels; with means, omega doesn't depend on the size of what is hidden.
        """
        losses = F.cross_entropy(logits, self.goal, reduction="none")
        losses = losses * ((-losses.detach()).exp() <= confidence)
        return omega * _mean(losses, self.hidden) + (1 - omega) * _mean(losses, self.kept)

    def shares(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(share of hidden pixels that are no longer predicted as the class, share of kept pixels predicted as
        they are to be), float64 [B] each; 1 where there are none."""
        seen, changed = self._missed(logits)
        return 1 - _mean(seen.double(), self.hidden), 1 - _mean(changed.double(), self.kept)

    def failures(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(pixels where the attacker has failed int64 [B], mean of the shares of such pixels among the hidden and
        among the kept float64 [B]): a score for `Search`, lower is better for the attacker."""
        missed = sum(part.flatten(1).sum(dim=1) for part in self._missed(logits))
        hidden, kept = self.shares(logits)
        return missed, 1 - (hidden + kept) / 2

    def _missed(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        said = logits.argmax(dim=1)
        return self.hidden & (said == self.class_id), self.kept & (said != self.goal)


def aim_at(
    class_id: int, logits: Tensor, labels: Tensor, goal: str = "prediction", ignore_index: int | None = IGNORE
) -> Aim:
    """The aim of hiding a class in what the network says of the clean images (logits [B, K, H, W]), or in the
    labels [B, H, W]. UserError for a class that isn't there, and for labels of whole images."""
    if labels.ndim != 3:
        raise UserError(f"hide: needs a label per pixel [B, H, W], found {list(labels.shape)}")
    if isinstance(class_id, str):
        raise UserError(f"hide: class_id {class_id!r} is a name; give the number of the class")
    if class_id >= logits.shape[1]:
        raise UserError(f"hide: class_id {class_id} is no class; allowed: 0..{logits.shape[1] - 1}")
    counted = ~is_ignored(labels, ignore_index)
    before = logits.argmax(dim=1) if goal == "prediction" else labels.long().masked_fill(~counted, 0)
    hidden = counted & (before == class_id)
    second = logits.index_fill(1, torch.tensor([class_id], device=logits.device), -torch.inf).argmax(dim=1)
    filled = torch.stack([fill(*own) for own in zip(before, hidden, counted & ~hidden, second, strict=True)])
    return Aim(class_id, filled, hidden, counted & ~hidden)


def fill(classes: Tensor, holes: Tensor, others: Tensor, instead: Tensor) -> Tensor:
    """classes [H, W] with each hole (bool [H, W]) filled by what the nearest of the others holds (Euclidean), or by
    `instead` [H, W] where there are no others."""
    if not holes.any():
        return classes
    if not others.any():
        return torch.where(holes, instead, classes)
    from scipy.ndimage import distance_transform_edt

    nearest = distance_transform_edt(~others.cpu().numpy(), return_distances=False, return_indices=True)
    rows, columns = torch.from_numpy(nearest).long().to(classes.device)
    return torch.where(holes, classes[rows, columns], classes)


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Over the chosen pixels of each image, [B]; 0 without any."""
    summed = (values * chosen).flatten(1).sum(dim=1)
    return summed / chosen.flatten(1).sum(dim=1).clamp_min(1)
