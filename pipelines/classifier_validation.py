"""Validation of a classifier in training: clean, attacked through the router, and attacked on the clean route."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from attacks.threat import Threat, seed_of
from dataloaders.image_batches import ImageBatch, images_of
from engine.adversarial import craft
from engine.arithmetic import layout_of
from engine.config import ClassifierTrain, UserError
from engine.pathways import NO_LABEL
from engine.steps import evaluating
from evaluation.targets import exact_float32
from metrics.gate import mean_effective_experts

STEP = 0.25  # of eps


def val_eps_of(settings: ClassifierTrain) -> float | None:
    """The largest change in validation; None where nothing attacks it."""
    return settings.val_eps or settings.eps


def metric_names(model: nn.Module, settings: ClassifierTrain) -> list[str]:
    """What `validated` measures of a network: only what it is without attack, if the settings have no eps."""
    routed, attacks = hasattr(model, "gate_logits"), val_eps_of(settings) is not None
    names = ["top1", "attacked_top1", "frozen_top1", "robust_top1", "flips"] if attacks else ["top1"]
    if not routed:
        return [name for name in names if name not in ("frozen_top1", "flips")]
    return [
        *names,
        *(f"load_{e}" for e in range(model.num_experts)),
        "effective_experts",
        *(f"top1_of_{e}" for e in paths_of(model)),
    ]


def paths_of(model: nn.Module) -> range:
    """The experts of a routed network that an image may take alone: none where several are weighed for each."""
    return range(model.num_experts if model.routing == "hard" else 0)


def validated(
    model: nn.Module,
    batches: Iterable[ImageBatch],
    settings: ClassifierTrain,
    device: torch.device,
    name: str = "the model",
) -> dict[str, float]:
    """top1: clean accuracy. attacked_top1: under PGD on cross-entropy, its gradient through the router as well;
    frozen_top1: on images made with each one's clean route kept, shown to the model as it is; robust_top1: the lower of
    the two. flips: share of images and sites with another route after the first attack. load_E: share of images and
    sites that expert E takes, or of the weights; effective_experts: exp of the entropy of the loads, mean over the
    sites; top1_of_E: accuracy with all images on it.

    All of it in float32, without TF32. name: of the model, for messages. UserError for logits that are not finite."""
    eps = val_eps_of(settings)
    routed = hasattr(model, "gate_logits")
    totals: dict[str, float] = dict.fromkeys(metric_names(model, settings), 0.0)
    count, weights = 0, 0.0
    layout = layout_of(settings)
    with evaluating(model), torch.enable_grad(), exact_float32(device):
        for batch in batches:
            images, labels = images_of(batch, device, layout), batch.labels.to(device)
            count += len(labels)
            seeds = tuple(seed_of(settings.seed, frame.name, "validation") for frame in batch.frames)
            with torch.no_grad():
                totals["top1"] += right(model(images), labels)
            route = add_routes(model, images, labels, totals) if routed else None
            if routed:
                weights = weights + route.mean(dim=(3, 4, 5)).sum(dim=1, dtype=torch.float64)  # [S, E]
            if eps is not None:
                threat = Threat(eps, "linf", NO_LABEL, seeds)
                add_attacked(model, images, labels, route, threat, settings.val_steps, totals)
    broken = [metric for metric, total in totals.items() if math.isnan(total)]
    if broken:
        raise UserError(
            f"{name}: NaN or inf among its logits of validation images ({', '.join(broken)}); lower "
            "train.optimizer.lr, or set train.clip_norm"
        )
    figures = {metric: total / count for metric, total in totals.items()}
    if routed:
        loads = (weights / count).cpu().numpy()
        figures["effective_experts"] = mean_effective_experts(loads)
    if eps is not None:
        figures["robust_top1"] = min(figures["attacked_top1"], figures.get("frozen_top1", 1.0))
    return figures


@torch.no_grad()
def add_routes(model: nn.Module, images: Tensor, labels: Tensor, totals: dict[str, float]) -> Tensor:
    """Adds the loads of the experts and the accuracy of each on all images of a batch; returns the clean route."""
    route = model.route(model.gate_logits(images)).detach()
    for expert in range(model.num_experts):
        totals[f"load_{expert}"] += route[:, :, expert].flatten(2).mean(dim=(0, 2)).sum().item()
    for expert in paths_of(model):
        forced = torch.zeros_like(route)
        forced[:, :, expert] = 1
        totals[f"top1_of_{expert}"] += right(model.forward_given(images, forced), labels)
    return route


def add_attacked(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    route: Tensor | None,
    threat: Threat,
    steps: int,
    totals: dict[str, float],
) -> None:
    """Adds what a batch gives under attack. route: the clean one of a routed model."""
    attacked = attack(model, images, labels, threat, steps)
    with torch.no_grad():
        totals["attacked_top1"] += right(model(attacked), labels)
    if route is None:
        return
    frozen = attack(lambda one: model.forward_given(one, route), images, labels, threat, steps)
    with torch.no_grad():
        other = model.route(model.gate_logits(attacked)).flatten(2).argmax(dim=2)
        totals["flips"] += (other != route.flatten(2).argmax(dim=2)).float().mean(dim=0).sum().item()
        totals["frozen_top1"] += right(model(frozen), labels)


def attack(
    logits_of: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, threat: Threat, steps: int
) -> Tensor:
    """The last of `steps` PGD steps of a quarter of eps."""
    return craft(logits_of, images, labels, threat, "ce", steps, STEP * threat.eps)


def right(logits: Tensor, labels: Tensor) -> float:
    """Images that are; NaN for logits that are not finite, of which argmax would make answers."""
    return (logits.argmax(dim=1) == labels).sum().item() if logits.isfinite().all() else math.nan
