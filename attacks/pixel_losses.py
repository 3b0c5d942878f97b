"""Losses that attacks raise: of logits [B, K, *S] and labels [B, *S], a number per pixel, averaged per image.

With S empty they are losses of class labels. Each is a function (logits, labels, threat, progress) -> [B, *S]; the
labels hold class ids only (`image_loss` takes care of ignored ones), progress is the share of the attack that has
passed. p is the softmax of the logits, y the label.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.threat import Threat
from engine.config import UserError

# Keys of LOSSES, as YAML may have them.
LossName = Literal[
    "ce", "masked_ce", "balanced_masked_ce", "jensen_shannon", "segpgd", "cospgd", "masked_spherical", "tsallis",
    "dlr", "margin",
]  # fmt: skip
PixelLoss = Callable[[Tensor, Tensor, Threat, float], Tensor]


def ce(logits: Tensor, labels: Tensor, threat: Threat, progress: float) -> Tensor:
    """Cross-entropy. Its gradient grows as a pixel gets more wrong: budget goes to pixels that are lost already."""
    return F.cross_entropy(logits, labels, reduction="none")


def masked_ce(logits: Tensor, labels: Tensor, threat: Threat, progress: float) -> Tensor:
    """Cross-entropy of the pixels that are right, 0 of the others (MCE; Croce et al. 2024, arXiv 2306.12941)."""
    return ce(logits, labels, threat, progress) * _right(logits, labels)


def balanced_masked_ce(logits: Tensor, labels: Tensor, threat: Threat, progress: float) -> Tensor:
    """Masked cross-entropy times the weight of the label's class (MCE-Bal, same paper): with one over the pixels
    of a class in the training split it aims at the mean accuracy of classes, which bounds mIoU from above."""
    if threat.class_weights is None:
        raise UserError(
            "loss balanced_masked_ce: needs class weights, the pixel counts of the training split"
        )
    if len(threat.class_weights) != logits.shape[1]:
        raise UserError(
            f"loss balanced_masked_ce: {len(threat.class_weights)} class weights for {logits.shape[1]} classes"
        )
    return masked_ce(logits, labels, threat, progress) * threat.class_weights.to(logits)[labels]


def jensen_shannon(logits: Tensor, labels: Tensor, threat: Threat, progress: float) -> Tensor:
    """Jensen-Shannon divergence between p and the one-hot label, in [0, log 2] (same paper), in a closed form that
    is finite, with its gradient, at any gap between logits.

    0.5 [log(2 / (1 + p_y)) + p_y log(2 p_y / (1 + p_y)) + (1 - p_y) log 2], p_y from its logarithm.
    """
    log_p = -F.cross_entropy(logits, labels, reduction="none")
    p = log_p.exp()
    return 0.5 * (2 * math.log(2) - (1 + p) * torch.log1p(p) + p * log_p)


def segpgd(logits: Tensor, labels: Tensor, threat: Threat, progress: float) -> Tensor:
    """Cross-entropy times 1 - lambda where a pixel is right, lambda where it is wrong, with lambda = progress / 2
    (SegPGD; Gu et al. 2022, arXiv 2207.12391: lambda = (t - 1) / 2T in step t of T)."""
    right = _right(logits, labels)
    return ce(logits, labels, threat, progress) * torch.where(right, 1 - progress / 2, progress / 2)


def cospgd(logits: Tensor, labels: Tensor, threat: Threat, progress: float) -> Tensor:
    """Cross-entropy times the cosine between p and the one-hot label, p_y / |p|, without gradient (CosPGD; Agnihotri
    et al. 2024, arXiv 2302.02213; p by softmax, as in the authors' package, where others describe a sigmoid)."""
    p = logits.detach().softmax(dim=1)
    weight = _of_label(p, labels) / torch.linalg.vector_norm(p, dim=1)
    return ce(logits, labels, threat, progress) * weight


def masked_spherical(logits: Tensor, labels: Tensor, threat: Threat, progress: float) -> Tensor:
    """-z_y / |z| of the pixels that are right (first version of arXiv 2306.12941)."""
    length = torch.linalg.vector_norm(logits, dim=1).clamp_min(1e-12)
    return -_of_label(logits, labels) / length * _right(logits, labels)


def tsallis(logits: Tensor, labels: Tensor, threat: Threat, progress: float) -> Tensor:
    """Tsallis cross-entropy -log_q(p_y) = (1 - p_y^(1-q)) / (1 - q) with q from -2 to 1 over the attack (TsallisPGD,
    arXiv 2605.03405): q = 1 is cross-entropy, smaller q look away from pixels that are lost already."""
    q = -2 + 3 * progress
    log_p = -ce(logits, labels, threat, progress)
    return -torch.expm1((1 - q) * log_p) / (1 - q) if q < 1 else -log_p


def dlr(logits: Tensor, labels: Tensor, threat: Threat, progress: float) -> Tensor:
    """Difference of logits ratio -(z_y - max_{k != y} z_k) / (z_(1) - z_(3)) (Croce and Hein 2020, arXiv
    2003.01690), invariant to shift and scale. UserError below 3 classes."""
    largest = _largest(logits, 3, "dlr")
    return margin(logits, labels, threat, progress) / (largest[:, 0] - largest[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2) (same paper). UserError below 4 classes."""
    largest = _largest(logits, 4, "targeted dlr")
    gap = largest[:, 0] - (largest[:, 2] + largest[:, 3]) / 2 + 1e-12
    return (_of_label(logits, target) - _of_label(logits, labels)) / gap


def margin(logits: Tensor, labels: Tensor, threat: Threat, progress: float) -> Tensor:
    """max_{k != y} z_k - z_y: above 0 where a pixel is wrong."""
    others = logits.scatter(1, labels.unsqueeze(1), -torch.inf).amax(dim=1)
    return others - _of_label(logits, labels)


LOSSES: dict[str, PixelLoss] = {
    "ce": ce,
    "masked_ce": masked_ce,
    "balanced_masked_ce": balanced_masked_ce,
    "jensen_shannon": jensen_shannon,
    "segpgd": segpgd,
    "cospgd": cospgd,
    "masked_spherical": masked_spherical,
    "tsallis": tsallis,
    "dlr": dlr,
    "margin": margin,
}


# Those that leave pixels out or change their weights on the way: their rise and fall says little about progress.
RESTLESS = ("masked_ce", "balanced_masked_ce", "masked_spherical", "segpgd", "cospgd", "tsallis")


def image_loss(
    loss: PixelLoss | str, logits: Tensor, labels: Tensor, threat: Threat, progress: float = 0.0
) -> Tensor:
    """Mean of a loss over the labelled pixels of each image, [B]; 0 for an image without any."""
    function = LOSSES[loss] if isinstance(loss, str) else loss
    if threat.ignore_index is None:
        return function(logits, labels, threat, progress).view(len(labels), -1).mean(dim=1)
    ignored = labels == threat.ignore_index
    values = function(logits, labels.masked_fill(ignored, 0), threat, progress).masked_fill(ignored, 0.0)
    counted = (~ignored).view(len(labels), -1).sum(dim=1)
    return values.view(len(labels), -1).sum(dim=1) / counted.clamp_min(1)


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """Where no class has a larger logit than the label; an argmax over channels takes far longer."""
    logits = logits.detach()
    return _of_label(logits, labels) == logits.amax(dim=1)


def _of_label(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels.unsqueeze(1)).squeeze(1)


def _largest(logits: Tensor, count: int, name: str) -> Tensor:
    if logits.shape[1] < count:
        raise UserError(f"loss {name}: needs at least {count} classes, found {logits.shape[1]}")
    return logits.topk(count, dim=1).values
