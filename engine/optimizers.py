"""Optimisers and learning-rate schedules; a schedule moves once per optimiser step, never per epoch."""

import math
from collections.abc import Callable, Iterable

import torch
from torch.optim.lr_scheduler import LambdaLR

from engine.config import NonNegative, NonNegativeInt, Positive, Probability, UserError


def sgd(
    parameters: Iterable,
    *,
    lr: Positive = 0.01,
    momentum: Probability = 0.9,
    weight_decay: NonNegative = 1e-4,
    nesterov: bool = False,
) -> torch.optim.SGD:
    """Stochastic gradient descent.

    lr: learning rate after warm-up, above 0.
    momentum: share of the last step that is kept, 0 to 1.
    weight_decay: factor of the weights that is added to their gradients, 0 or more.
    nesterov: look ahead along the momentum; needs momentum above 0.
    """
    if nesterov and not momentum:
        raise UserError("nesterov: true needs momentum above 0, and it is 0")
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)


def adamw(
    parameters: Iterable,
    *,
    lr: Positive = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: NonNegative = 0.01,
) -> torch.optim.AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    lr: learning rate after warm-up, above 0.
    betas: decay of the running means of gradients and of their squares, each from 0 to below 1.
    weight_decay: share of the weights, times lr, that every step takes away, 0 or more.
    """
    if not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"betas {list(betas)}: expected two numbers from 0 to below 1")
    return torch.optim.AdamW(parameters, lr=lr, betas=tuple(betas), weight_decay=weight_decay)


def poly(
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    *,
    power: Positive = 0.9,
    min_factor: Probability = 0.01,
    warmup_steps: NonNegativeInt = 0,
) -> LambdaLR:
    """Polynomial decay (DeepLab): the rate's factor is min_factor + (1 - min_factor) (1 - progress)^power.

    power: exponent, above 0; 1 is a straight line.
    min_factor: rate of the last step as a share of the configured one, 0 to 1.
    warmup_steps: steps of linear warm-up; with W of them, step i (from 0) has (i + 1) / (W + 1) of the rate.
    """

    def law(step: int, steps: int) -> float:
        return min_factor + (1 - min_factor) * (1 - _progress(step, steps)) ** power

    return _schedule(optimizer, total_steps, warmup_steps, law)


def cosine(
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    *,
    min_factor: Probability = 0.01,
    warmup_steps: NonNegativeInt = 0,
) -> LambdaLR:
    """Half a cosine from the configured rate to the minimum (Loshchilov and Hutter 2017, without restarts).

    min_factor: rate of the last step as a share of the configured one, 0 to 1.
    warmup_steps: steps of linear warm-up; with W of them, step i (from 0) has (i + 1) / (W + 1) of the rate.
    """

    def law(step: int, steps: int) -> float:
        return min_factor + (1 - min_factor) * (1 + math.cos(math.pi * _progress(step, steps))) / 2

    return _schedule(optimizer, total_steps, warmup_steps, law)


def step(
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    *,
    milestones: tuple[float, ...] = (0.5, 0.75),
    gamma: Probability = 0.1,
    warmup_steps: NonNegativeInt = 0,
) -> LambdaLR:
    """A staircase: from each milestone on, the rate is gamma times what it was before.

    milestones: shares of the steps after warm-up, each above 0 and below 1.
    gamma: what a fall leaves of the rate, 0 to 1.
    warmup_steps: steps of linear warm-up; with W of them, step i (from 0) has (i + 1) / (W + 1) of the rate.
    """
    if not all(0 < milestone < 1 for milestone in milestones):
        raise UserError(f"schedule step: milestones {list(milestones)}: expected shares above 0 and below 1")

    def law(step: int, steps: int) -> float:
        return gamma ** sum(step >= max(1, round(milestone * steps)) for milestone in milestones)

    return _schedule(optimizer, total_steps, warmup_steps, law)


def _progress(step: int, steps: int) -> float:
    """0 at the first step, 1 at the last."""
    return step / (steps - 1) if steps > 1 else 0.0


def _schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int, law: Callable[[int, int], float]
) -> LambdaLR:
    """law(step, steps) gives the factor of the rate at a step, both counted without the warm-up."""
    if warmup_steps >= total_steps:
        raise UserError(
            f"warmup_steps: {warmup_steps} is wrong; expected fewer than the {total_steps} steps of the training "
            "(epochs x batches / accumulate)"
        )
    steps = total_steps - warmup_steps

    def factor(index: int) -> float:
        if index < warmup_steps:
            return (index + 1) / (warmup_steps + 1)
        return law(min(index - warmup_steps, steps - 1), steps)  # torch asks once more after the last step

    return LambdaLR(optimizer, factor)
