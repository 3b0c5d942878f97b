"""What attacks on the parts of a model share: losses of other logits than the model's own, and runs that share the
steps of an attack."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from attacks import apgd, pgd
from attacks.pixel_losses import ce, image_loss
from attacks.search import Found, Objective, Search, Trial
from attacks.threat import Threat, is_ignored, random_point
from engine.config import UserError

TaskLoss = Literal["ce", "masked_ce", "jensen_shannon"]
Climber = Literal["pgd", "apgd"]
CLIMBERS: dict[Climber, Callable] = {"pgd": pgd.climb, "apgd": apgd.climb}


class PartsSearch(Search):
    """A search that raises losses of the logits of parts, or of a stand-in for the model; `loss` is ce, masked_ce
    or jensen_shannon, `climber` pgd (a fixed step) or apgd."""

    def __init__(
        self,
        model,
        images: Tensor,
        labels: Tensor,
        threat: Threat,
        loss: TaskLoss = "ce",
        climber: Climber = "pgd",
    ):
        super().__init__(model, images, labels, threat)
        self.loss, self.climber = loss, climber

    def trial(self, logits: Tensor, own: Tensor, beside: Tensor | float = 0.0) -> Trial:
        """Raises the loss of some logits plus `beside` [B], where the model's own logits are `own`, both
        [B, K, *S]. A mask is that of the pixels which the model itself still gets right; steps are judged without
        it."""
        entropy = image_loss("ce", logits, self.labels, self.threat)
        loss = entropy
        if self.loss == "masked_ce":
            right = own.detach().argmax(dim=1) == self.labels
            loss = image_loss(lambda *given: ce(*given) * right, logits, self.labels, self.threat)
        elif self.loss != "ce":
            loss = image_loss(self.loss, logits, self.labels, self.threat)
        return Trial(loss + beside, own, tracked=entropy + beside)

    def run(self, name: str, objectives: Sequence[Objective], steps: int, sweep: int = 1) -> Found:
        """A climb for each objective; the steps are shared. Every `sweep` of them begin at a random point and go on
        from the best ones that were found."""
        climb, shares = CLIMBERS[self.climber], split(steps, len(objectives), name)
        for run, (objective, share) in enumerate(zip(objectives, shares, strict=True)):
            if not self.alive.any():
                break
            onward = run % sweep > 0
            start = self.best if onward else random_point(self.images, self.threat, name, run)
            climb(self, objective, start, share)
        return self.found()


def split(steps: int, runs: int, name: str) -> list[int]:
    """Steps of each run, as even as can be. UserError without any run, and where one would have no step."""
    if not runs:
        raise UserError(
            f"{name}: nothing to raise, so that it would give the images back; give at least one value"
        )
    if steps < runs:
        raise UserError(f"{name}: {steps} steps for {runs} runs; give at least {runs}")
    return [steps * (run + 1) // runs - steps * run // runs for run in range(runs)]


def wrong_classes(expert_logits: Tensor, labels: Tensor, threat: Threat, count: int) -> list[Tensor]:
    """The likeliest wrong class of each pixel by the mean log-probability of experts [B, E, K, *S], then the second
    likeliest, and so on: [B, *S] each, `count` or all there are. Ignored pixels keep the ignore index."""
    ignored = is_ignored(labels, threat.ignore_index)
    mean = expert_logits.log_softmax(dim=2).mean(dim=1)
    mean = mean.scatter(1, labels.masked_fill(ignored, 0).unsqueeze(1), -math.inf)
    ranked = mean.topk(min(count, mean.shape[1] - 1), dim=1).indices
    return [torch.where(ignored, labels, goal) for goal in ranked.unbind(1)]


def agreement(expert_logits: Tensor, goal: Tensor, threat: Threat) -> Tensor:
    """Mean log-probability that experts [B, E, K, *S] give to the classes `goal` [B, *S], per image [B]."""
    return -torch.stack([image_loss("ce", one, goal, threat) for one in expert_logits.unbind(1)]).mean(dim=0)
