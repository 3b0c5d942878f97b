"""An attack that hides from detectors: it raises the task's loss and lowers the score that would give it away.

Scores are of an image as a whole, in [0, 1], from one pass of a network: how much its experts differ, how unsure it or
its gate is, how often it contradicts experts that agree. Here they are smooth; evaluation/detectors.py counts pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attacks.parts import Climber, PartsSearch, TaskLoss
from attacks.routed import Inside, look_inside, preferences
from attacks.search import Found, Trial
from attacks.threat import Threat, each, is_inside
from engine.config import NonNegative, PositiveInt, UserError

VERSION = 2  # raised when it finds other images


def evade(
    model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    score: Literal[
        "entropy", "mutual_information", "disagreement", "contradiction", "gate_entropy"
    ] = "entropy",
    kappa: NonNegative = 10.0,
    loss: TaskLoss = "masked_ce",
    steps: PositiveInt = 30,
    restarts: PositiveInt = 1,
    climber: Climber = "pgd",
) -> Found:
    """Raises the task's loss minus kappa times a detector's score (an adaptive attack in the sense of Tramer et al.
    2020, arXiv 2002.08347). What is found are the points with the highest cross-entropy minus kappa times the score,
    not those with the fewest correct pixels.

    Args:
        score: what the detector looks at, see SCORES; entropy for any network, gate_entropy for routed models, the
            others for routed models and ensembles.
        kappa: weight of the score, where that is a number; 0 is an attack that knows of no detector. One value may be
            too small to hide and another too large to do harm: sweep it.
        loss: of the task; a mask is that of the pixels which the network still gets right.
        steps: gradient steps of all restarts together.
        restarts: times that it begins anew.
        climber: with a fixed step (pgd), or one that is halved where the loss no longer rises (apgd).
    """

    def objective(points: Tensor, progress: float) -> Trial:
        said = listen(model, points)
        beside = -kappa * known(SCORES[score](said), points) if kappa else 0.0
        return search.trial(said.logits, said.logits, beside)

    search = Evasion(model, images, labels, threat, loss, climber, objective)
    return search.run("evade", [search.objective] * restarts, steps)


class Evasion(PartsSearch):
    """A search for the points where what is tracked is highest. It goes on where no pixel is right any more."""

    def __init__(self, model, images, labels, threat, loss, climber, objective):
        super().__init__(model, images, labels, threat, loss, climber)
        self.task = objective
        self.highest = torch.full((len(images),), -torch.inf, device=images.device)

    @property
    def alive(self) -> Tensor:
        return torch.ones_like(self.highest, dtype=torch.bool)

    def objective(self, points: Tensor, progress: float) -> Trial:
        trial = self.task(points, progress)
        self.tracked = trial.tracked.detach()  # at the points that `offer` is asked about next
        return trial

    def look(self, points: Tensor, draws: int = 1) -> Tensor:
        with torch.no_grad():
            logits = self.objective(points, 1.0).logits
        self.forwards += 1
        self.offer(points, logits)
        return logits

    def offer(self, points: Tensor, logits: Tensor) -> None:
        correct, class_accuracy = self.score(logits)
        higher = (self.tracked > self.highest) & is_inside(points, self.images, self.threat)
        self.highest = torch.where(higher, self.tracked, self.highest)
        self.correct = torch.where(higher, correct, self.correct)
        self.class_accuracy = torch.where(higher, class_accuracy, self.class_accuracy)
        self.best = self.balanced = torch.where(each(higher, points), points, self.best)


@dataclass(frozen=True)
class Said:
    """What a network and its parts say of B images, from one pass: its logits [B, K, *S], those of its E experts
    [B, E, K, *S] (None: it has none), the preferences of its gate [S, B, E, K', h, w] (see attacks.routed; None: it has
    no gate)."""

    logits: Tensor
    expert_logits: Tensor | None = None
    preferences: Tensor | None = None


def listen(model, points: Tensor) -> Said:
    """One pass of a routed model, an ensemble, or any other network."""
    if hasattr(model, "gate_logits"):
        seen = look_inside(model, points)
        return Said(seen.logits, experts_alone(seen), preferences(model, seen))
    if hasattr(model, "expert_logits"):
        expert_logits = model.expert_logits(points)
        return Said(model.combine(expert_logits), expert_logits)
    return Said(model(points))


def experts_alone(seen: Inside) -> Tensor:
    """What a routed model says with all weight on one expert, for each of them, [B, E, K, *S]."""
    experts = seen.gate_logits.shape[-4]
    rows = torch.eye(experts, device=seen.gate_logits.device, dtype=seen.gate_logits.dtype)
    shape = (*seen.gate_logits.shape[:-2], 1, 1)
    return torch.stack([seen.mix(row.view(-1, 1, 1, 1).expand(shape)) for row in rows], dim=1)


def known(values: Tensor, points: Tensor) -> Tensor:
    """Scores [B] of points, with 0 and no slope for those that are no number, as of a gate that says NaN: such a score
    gives nothing away."""
    finite = values.isfinite()
    if finite.all():
        return values
    kept = torch.where(finite, values, 0.0)
    if not kept.requires_grad:
        return kept
    # NaN times zero would be NaN on the way back, and take the task's gradient with it
    (slope,) = torch.autograd.grad(kept.sum(), points, retain_graph=True, allow_unused=True)
    slope = torch.zeros_like(points) if slope is None else torch.where(each(finite, points), slope, 0.0)
    return kept.detach() + (slope * (points - points.detach())).flatten(1).sum(dim=1)


def entropy(said: Said) -> Tensor:
    """Mean over the pixels of the entropy of the network's probabilities, over log K."""
    return _image_mean(_entropy(said.logits, 1)) / math.log(said.logits.shape[1])


def mutual_information(said: Said) -> Tensor:
    """Mean over the pixels of the entropy of the experts' mean probabilities minus their mean entropy, over log E:
    the Jensen-Shannon divergence between them (Lin 1991)."""
    expert_logits = _experts(said, "mutual_information")
    mean = expert_logits.log_softmax(dim=2).logsumexp(dim=1)  # log E more than the logarithm of the mean
    divergence = _entropy(mean, 1) - _entropy(expert_logits, 2).mean(dim=1)
    return _image_mean(divergence) / math.log(max(expert_logits.shape[1], 2))


def disagreement(said: Said) -> Tensor:
    """Mean over the pixels of the chance that experts who draw from their probabilities don't all say the same."""
    return 1 - _image_mean(_all_say(_experts(said, "disagreement")).sum(dim=1))


def contradiction(said: Said) -> Tensor:
    """Mean over the pixels of the chance that all experts say the same, and the network something else."""
    together = _all_say(_experts(said, "contradiction"))
    return _image_mean((together * (1 - said.logits.softmax(dim=1))).sum(dim=1))


def gate_entropy(said: Said) -> Tensor:
    """Mean over sites, classes and places of the entropy of a soft gate's weights, of a hard one's softmax(gate
    logits), over log E."""
    if said.preferences is None:
        raise UserError("evade: score gate_entropy is for routed models, and the network has no gate_logits")
    values = _entropy(said.preferences, 2).transpose(0, 1)  # [B, S, K, h, w]
    return _image_mean(values) / math.log(max(said.preferences.shape[2], 2))


SCORES: dict[str, Callable[[Said], Tensor]] = {
    "entropy": entropy,
    "mutual_information": mutual_information,
    "disagreement": disagreement,
    "contradiction": contradiction,
    "gate_entropy": gate_entropy,
}


def _entropy(logits: Tensor, dim: int) -> Tensor:
    logs = logits.log_softmax(dim=dim)
    logs = logs.masked_fill(logits.isneginf(), 0.0)  # a masked expert: its share is 0
    return -(logs.exp().masked_fill(logits.isneginf(), 0.0) * logs).sum(dim=dim)


def _all_say(expert_logits: Tensor) -> Tensor:
    """Chance [B, K, *S] that all experts say a class."""
    return expert_logits.log_softmax(dim=2).sum(dim=1).exp()


def _experts(said: Said, score: str) -> Tensor:
    if said.expert_logits is None:
        raise UserError(f"evade: score {score} needs several experts; a single network has entropy only")
    return said.expert_logits


def _image_mean(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).mean(dim=1)
