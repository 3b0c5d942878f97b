"""How robust networks are while they train: the confusion of a few validation frames under the training's attack."""

from collections.abc import Callable, Sequence

import numpy
import torch
from torch import nn

from attacks.threat import seed_of
from dataloaders.frames import FrameIndex
from dataloaders.loader import EvalBatches
from engine.adversarial import RAISED, craft, threat_of
from engine.arithmetic import layout_of
from engine.config import Train
from engine.loop import images_of
from metrics.confusion import confusion
from networks.mixture import Mixture
from pipelines.gates import mixture_logits

FRAMES = 64  # about so many, in batches that are spread evenly


def attacked_confusion(
    models: Sequence[nn.Module],
    index: FrameIndex,
    batches: EvalBatches,
    settings: Train,
    device: torch.device,
) -> list[numpy.ndarray]:
    """int64 [K, K] of each model, in evaluation mode: each is attacked itself, in float32, by the steps of
    train.adversarial on cross-entropy or SegPGD's. A weak attack, to follow a training by, not to claim anything."""
    adversarial = settings.adversarial
    layout = layout_of(settings)
    counts = torch.zeros(len(models), index.num_classes, index.num_classes, dtype=torch.int64, device=device)
    every = max(1, round(len(batches.cache.frames) / FRAMES))
    for place, batch in enumerate(batches):
        if place % every:
            continue
        images, labels = images_of(batch, device, layout), batch.labels.to(device).long()
        seeds = [seed_of(settings.seed, "validation", row) for row in batch.rows]
        threat = threat_of(adversarial, index.ignore_index, seeds)
        for model, count in zip(models, counts, strict=True):
            points = craft(
                climbed(model),
                images,
                labels,
                threat,
                RAISED[adversarial.attack],
                adversarial.steps,
                adversarial.step_size,
            )
            with torch.no_grad():
                answers = model(points).argmax(1)
            count += confusion(answers, labels, index.num_classes, index.ignore_index).sum(0)
    return list(counts.cpu().numpy())


def climbed(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """images -> logits as the training attacks them."""
    if not isinstance(model, Mixture):
        return model
    return lambda images: mixture_logits(model, model.run_experts(images))
