"""Attacks that know the members of an ensemble, each scored on the unmodified ensemble.

An ensemble offers `expert_logits(images) -> [B, E, K, *S]` and `combine(expert logits) -> logits [B, K, *S]`, so that
a pass of an attack runs each member once. `steps` are gradient steps of all runs of an attack together; each run
looks at its last point with one more forward pass, and what the members say of the clean images takes another.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from attacks.parts import Climber, PartsSearch, TaskLoss, agreement, wrong_classes
from attacks.search import Found, Trial
from attacks.threat import Threat
from engine.config import PositiveInt, Positives, UserError

# expert logits [B, E, K, *S], the ensemble's own logits [B, K, *S] -> what is raised
MemberLoss = Callable[[Tensor, Tensor], Trial]


def member_sum(
    model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    loss: TaskLoss = "masked_ce",
    steps: PositiveInt = 20,
    restarts: PositiveInt = 1,
    climber: Climber = "pgd",
) -> Found:
    """Raises the mean of the members' losses: none is forgotten, whoever decides.

    Args:
        loss: of the task; a mask is that of the pixels which the ensemble still gets right.
        steps: gradient steps of all restarts together.
        restarts: times that it begins anew.
        climber: with a fixed step (pgd), or one that is halved where the loss no longer rises (apgd).
    """
    search = EnsembleSearch(model, images, labels, threat, loss, climber)

    def total(expert_logits: Tensor, own: Tensor) -> Trial:
        trials = [search.trial(one, own) for one in expert_logits.unbind(1)]
        losses, tracked = zip(*((trial.loss, trial.tracked) for trial in trials), strict=True)
        return Trial(torch.stack(losses).mean(dim=0), own, torch.stack(tracked).mean(dim=0))

    return search.run_each("member_sum", [total] * restarts, steps)


def mean_of_probabilities(
    model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    loss: TaskLoss = "masked_ce",
    steps: PositiveInt = 20,
    restarts: PositiveInt = 1,
    climber: Climber = "pgd",
) -> Found:
    """Raises the loss of the members' mean probability, whatever joins them.

    Args:
        loss: of the task; a mask is that of the pixels which the ensemble still gets right.
        steps: gradient steps of all restarts together.
        restarts: times that it begins anew.
        climber: with a fixed step (pgd), or one that is halved where the loss no longer rises (apgd).
    """
    search = EnsembleSearch(model, images, labels, threat, loss, climber)

    def of_mean(expert_logits: Tensor, own: Tensor) -> Trial:
        return search.trial(expert_logits.log_softmax(dim=2).logsumexp(dim=1), own)

    return search.run_each("mean_of_probabilities", [of_mean] * restarts, steps)


def each_member(
    model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    loss: TaskLoss = "masked_ce",
    steps: PositiveInt = 20,
    climber: Climber = "pgd",
) -> Found:
    """Raises the loss of one member alone, of each in turn.

    Args:
        loss: of the task; a mask is that of the pixels which the ensemble still gets right.
        steps: gradient steps of all members together.
        climber: with a fixed step (pgd), or one that is halved where the loss no longer rises (apgd).
    """
    search = EnsembleSearch(model, images, labels, threat, loss, climber)

    def of_one(expert_logits: Tensor, own: Tensor, member: int) -> Trial:
        return search.trial(expert_logits[:, member], own)

    members = search.clean.shape[1]
    return search.run_each(
        "each_member", [partial(of_one, member=member) for member in range(members)], steps
    )


def members_to_one_wrong(
    model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: PositiveInt = 20,
    targets: PositiveInt = 2,
    climber: Climber = "pgd",
) -> Found:
    """Drives all members to the same wrong class at each pixel: a vote or a mean of them has to follow.

    Args:
        steps: gradient steps of all targets together.
        targets: runs; the first goes for each pixel's likeliest wrong class, the next for the second likeliest.
        climber: with a fixed step (pgd), or one that is halved where the loss no longer rises (apgd).
    """
    search = EnsembleSearch(model, images, labels, threat, climber=climber)

    def agree(expert_logits: Tensor, own: Tensor, goal: Tensor) -> Trial:
        return Trial(agreement(expert_logits, goal, threat), own)

    goals = wrong_classes(search.clean, search.labels, threat, targets)
    return search.run_each("members_to_one_wrong", [partial(agree, goal=goal) for goal in goals], steps)


def smooth_ensemble(
    model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    rule: Literal["vote", "max"] = "vote",
    temperatures: Positives = (1.0, 0.3),
    loss: TaskLoss = "masked_ce",
    steps: PositiveInt = 20,
    climber: Climber = "pgd",
) -> Found:
    """Raises the loss of a smooth stand-in for a rule that has no gradient, or that of one member only.

    vote: the members' mean of softmax(logits / t). max: t logsumexp over the members of logits / t. Both tend to
    the rule as t falls; t is in units of the gap between the two largest logits on the clean image, so that the
    scale of logits doesn't matter.

    Args:
        rule: how the ensemble joins its members.
        temperatures: one run for each t.
        loss: of the task; a mask is that of the pixels which the ensemble still gets right.
        steps: gradient steps of all temperatures together.
        climber: with a fixed step (pgd), or one that is halved where the loss no longer rises (apgd).
    """
    search = EnsembleSearch(model, images, labels, threat, loss, climber)
    largest = search.clean.topk(2, dim=2).values
    gap = (largest[:, :, 0] - largest[:, :, 1]).flatten(1).mean(dim=1)
    unit = torch.where(gap > 0, gap, 1.0).view(-1, *[1] * (search.clean.ndim - 1))

    def smooth(expert_logits: Tensor, own: Tensor, temperature: float) -> Trial:
        scaled = expert_logits / (temperature * unit)
        if rule == "vote":
            return search.trial(scaled.log_softmax(dim=2).logsumexp(dim=1), own)
        return search.trial(temperature * unit[:, 0] * scaled.logsumexp(dim=1), own)

    losses = [partial(smooth, temperature=temperature) for temperature in temperatures]
    return search.run_each("smooth_ensemble", losses, steps)


class EnsembleSearch(PartsSearch):
    """A search that knows what each member says; `clean` [B, E, K, *S] of the clean images."""

    def __init__(
        self, model, images: Tensor, labels: Tensor, threat: Threat, loss: str = "ce", climber: str = "pgd"
    ):
        super().__init__(model, images, labels, threat, loss, climber)
        if not hasattr(model, "expert_logits"):
            raise UserError("attack: it is for ensembles, and the network has no expert_logits")
        with torch.no_grad():
            self.clean = model.expert_logits(images)
            self.offer(images, model.combine(self.clean))
        self.forwards += 1

    def run_each(self, name: str, losses: Sequence[MemberLoss], steps: int) -> Found:
        """A run for each loss."""

        def objective(points: Tensor, progress: float, member_loss: MemberLoss) -> Trial:
            expert_logits = self.model.expert_logits(points)
            own = self.model.combine(expert_logits.detach())
            return member_loss(expert_logits, own)

        return self.run(name, [partial(objective, member_loss=one) for one in losses], steps)
