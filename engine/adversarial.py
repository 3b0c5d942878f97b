"""Adversarial training: some images of every batch are attacked first, with the network as it is at that step."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.pixel_losses import PixelLoss, image_loss
from attacks.threat import Threat, project, random_point, seed_of, steepest
from engine.config import Adversarial
from engine.steps import PhaseLoss, under_attack

RAISED = {"pgd": "ce", "segpgd": "segpgd"}  # attack -> loss of attacks.pixel_losses that it raises


@dataclass(frozen=True)
class Attacked:
    """Inputs of a phase's loss as they were, and with the images of `rows` (int64 [A]) attacked."""

    clean: Any
    adversarial: Any
    rows: Tensor


@dataclass(frozen=True)
class Adversary:
    """`attack` and `loss` of an adversarial phase, from the loss that it would have without an attacker.

    Inputs are float32 images [B, 3, H, W] in [0, 1], or something with such `images` that can be indexed by rows.
    Everything random follows from the seed and the number of an image in the training, so that neither batch size,
    accumulation nor interruptions matter; the generators of the training are not touched.
    """

    settings: Adversarial
    value: PhaseLoss
    ignore_index: int
    seed: int

    def attack(self, model: nn.Module, inputs: Any, labels: Tensor, first: int) -> Attacked:
        """Attacks all but the clean fraction of the images, in float32, the model in evaluation mode: BatchNorm's
        statistics and dropout's dice are left alone. first: number of the first image in the training."""
        numbers = attacked_numbers(first, len(labels), self.settings.clean_fraction)
        rows = torch.tensor([number - first for number in numbers], dtype=torch.int64, device=labels.device)
        if not numbers:
            return Attacked(inputs, inputs, rows)
        chosen, images = inputs[rows], images_of(inputs).clone()

        def logits_of(points: Tensor) -> Tensor:
            return self.value.logits(model, self.value.run(model, with_images(chosen, points)))

        with under_attack(model):
            images[rows] = craft(
                logits_of,
                images[rows],
                labels[rows],
                threat_of(self.settings, self.ignore_index, [seed_of(self.seed, one) for one in numbers]),
                self.raised(logits_of, images[rows]),
                self.settings.steps,
                self.settings.step_size,
            )
        return Attacked(inputs, with_images(inputs, images), rows)

    def raised(self, logits_of: Callable[[Tensor], Tensor], images: Tensor) -> PixelLoss | str:
        """What the attack raises; against TRADES, pgd raises the divergence itself, as published."""
        if self.settings.loss == "ce" or self.settings.attack != "pgd":
            return RAISED[self.settings.attack]
        with torch.no_grad():
            clean = logits_of(images)
        return lambda logits, labels, threat, progress: divergence(clean, logits)

    def loss(self, model: nn.Module, inputs: Attacked, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(sum, count): of the images as attacked (Madry et al. 2018, arXiv 1706.06083; SegPGD-AT: Gu et al. 2022,
        arXiv 2207.12391), or of TRADES."""
        if self.settings.loss == "trades":
            return self.trades(model, inputs, labels)
        return self.value(model, inputs.adversarial, labels)

    def trades(self, model: nn.Module, inputs: Attacked, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of the clean images plus beta times the divergence of the attacked images' predictions from their
        clean ones, a mean over all labelled pixels (TRADES; Zhang et al. 2019, arXiv 1901.08573).

        Two passes, as published, so in training mode BatchNorm sees both batches."""
        outputs = self.value.run(model, inputs.clean)
        total, count = self.value.loss(model, outputs, labels)
        if not len(inputs.rows):
            return total, count
        clean = self.value.logits(model, outputs)
        adversarial = self.value.logits(model, self.value.run(model, inputs.adversarial))
        labelled = labels != self.ignore_index
        gap = divergence(clean[inputs.rows], adversarial[inputs.rows])
        gap = gap.masked_fill(~labelled[inputs.rows], 0.0).sum() / labelled.sum().clamp_min(1)
        return total + count * self.settings.beta * gap, count


def craft(
    logits_of: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    loss: PixelLoss | str,
    steps: int,
    step_size: float | None = None,
) -> Tensor:
    """The last of `steps` steps uphill from a random point of the ball; no incumbents, no passes to score them. A value
    whose gradient is not finite becomes NaN, and with it the loss: training stops there.

    Images [B, C, H, W] in [0, 1], labels [B, *S]; weights get no gradient. step_size null: 2.5 eps / steps."""
    size = 2.5 * threat.eps / steps if step_size is None else step_size
    points = random_point(images, threat, "training")
    for step in range(steps):
        points.requires_grad_()
        losses = image_loss(loss, logits_of(points), labels, threat, step / steps)
        (gradient,) = torch.autograd.grad(losses.sum(), points)
        points = project(points.detach() + size * steepest(gradient, threat.norm), images, threat)
        points = points.masked_fill(
            ~gradient.isfinite(), torch.nan
        )  # the sign of NaN is 0: no silent attack on nothing
    return points


def attacked_numbers(first: int, count: int, clean_fraction: float) -> list[int]:
    """Those of the images number first, ..., first + count - 1 of a training that are attacked: evenly spread, as
    many as 1 - clean_fraction of all up to any of them, rounded down."""

    def before(number: int) -> int:
        return math.floor(number * (1 - clean_fraction) + 1e-9)  # 10 (1 - 0.9) is 0.9999999999999998

    return [number for number in range(first, first + count) if before(number + 1) > before(number)]


def threat_of(settings: Adversarial, ignore_index: int, seeds: list[int]) -> Threat:
    return Threat(settings.eps, settings.norm, ignore_index, tuple(seeds))


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """Kullback-Leibler divergence of softmax(others) from softmax(logits), both [B, K, *S], per pixel [B, *S]."""
    log_p, log_q = logits.float().log_softmax(dim=1), others.float().log_softmax(dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def images_of(inputs: Any) -> Tensor:
    return inputs if isinstance(inputs, Tensor) else inputs.images


def with_images(inputs: Any, images: Tensor) -> Any:
    return images if isinstance(inputs, Tensor) else replace(inputs, images=images)
