"""Validation of a classifier in training: clean, attacked through the router, and attacked on the clean route."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from attacks.threat import Threat, seed_of
from dataloaders.image_batches import ImageBatch, images_of
from engine.adversarial import craft
from engine.config import ClassifierTrain
from engine.pathways import NO_LABEL
from engine.steps import evaluating

STEP = 0.25  # of eps


def metric_names(model: nn.Module) -> list[str]:
    """What `validated` measures of a network."""
    names = ["top1", "attacked_top1", "frozen_top1", "robust_top1"]
    if not hasattr(model, "gate_logits"):
        return [name for name in names if name != "frozen_top1"]
    experts = range(model.num_experts)
    return [*names, "flips", *(f"load_{e}" for e in experts), *(f"top1_of_{e}" for e in experts)]


def validated(
    model: nn.Module, batches: Iterable[ImageBatch], settings: ClassifierTrain, device: torch.device
) -> dict[str, float]:
    """top1: clean accuracy. attacked_top1: under PGD on cross-entropy, its gradient through the router as well;
    frozen_top1: on images made with each one's clean route kept, shown to the model as it is; robust_top1: the lower of
    the two. flips: share of images and sites with another route after the first attack. load_E: share of images and
    sites that expert E takes; top1_of_E: accuracy with all images on it."""
    eps = settings.val_eps or settings.eps
    routed = hasattr(model, "gate_logits")
    totals: dict[str, float] = dict.fromkeys(metric_names(model), 0.0)
    count = 0
    layout = torch.channels_last if settings.channels_last else torch.preserve_format
    with evaluating(model), torch.enable_grad():
        for batch in batches:
            images, labels = images_of(batch, device, layout), batch.labels.to(device)
            count += len(labels)
            seeds = tuple(seed_of(settings.seed, frame.name, "validation") for frame in batch.frames)
            threat = Threat(eps or 0.0, "linf", NO_LABEL, seeds)
            with torch.no_grad():
                totals["top1"] += right(model(images), labels)
            attacked = images if eps is None else attack(model, images, labels, threat, settings.val_steps)
            with torch.no_grad():
                totals["attacked_top1"] += right(model(attacked), labels)
            if routed:
                add_routed(
                    model, images, attacked, labels, threat, settings.val_steps, eps is not None, totals
                )
    figures = {name: total / count for name, total in totals.items()}
    figures["robust_top1"] = min(figures["attacked_top1"], figures.get("frozen_top1", 1.0))
    return figures


def add_routed(
    model: nn.Module,
    images: Tensor,
    attacked: Tensor,
    labels: Tensor,
    threat: Threat,
    steps: int,
    attacks: bool,
    totals: dict[str, float],
) -> None:
    """What is measured of a router and its pathways on a batch."""
    with torch.no_grad():
        scores = model.gate_logits(images)
        route, clean = model.route(scores).detach(), scores.flatten(2).argmax(dim=2)
        other = model.gate_logits(attacked).flatten(2).argmax(dim=2)
        totals["flips"] += (other != clean).float().mean(dim=0).sum().item()
        for expert in range(model.num_experts):
            totals[f"load_{expert}"] += (clean == expert).float().mean(dim=0).sum().item()
            forced = torch.zeros_like(route)
            forced[:, :, expert] = 1
            totals[f"top1_of_{expert}"] += right(model.forward_given(images, forced), labels)
    points = images
    if attacks:
        points = attack(lambda one: model.forward_given(one, route), images, labels, threat, steps)
    with torch.no_grad():
        totals["frozen_top1"] += right(model(points), labels)


def attack(
    logits_of: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, threat: Threat, steps: int
) -> Tensor:
    """The last of `steps` PGD steps of a quarter of eps."""
    return craft(logits_of, images, labels, threat, "ce", steps, STEP * threat.eps)


def right(logits: Tensor, labels: Tensor) -> int:
    return int((logits.argmax(dim=1) == labels).sum())
