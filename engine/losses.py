"""Losses as functions (logits, labels) -> (sum, count), so that micro-batches and processes can be added up.
They never look at the rank of the labels: [B] classifies images, [B, H, W] segments them. Where a loss has the
attribute `upsampled`, that is a quicker way to its value for bilinearly upsampled logits."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import NonNegative, PositiveInt, Probability, UserError
from engine.upsampled import upsample, upsampled_cross_entropy

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def cross_entropy(
    class_pixels: Tensor | None,
    ignore_index: int,
    *,
    class_weights: Literal["none", "balanced", "median_frequency"] = "none",
    label_smoothing: Probability = 0.0,
) -> Loss:
    """Softmax cross-entropy, averaged over the labelled pixels of all images together.

    class_pixels: pixels of each class in the training split [K], needed by class weights only.
    class_weights: none, or weigh a class with share f of the labelled pixels by 1 / (K f) (balanced; K occur)
        or by median(f) / f (median_frequency; Eigen and Fergus 2015, with f over all images). A class
        that never occurs has weight 1. The count is then the sum of the pixels' weights, as in torch.
    label_smoothing: share of the target that is spread evenly over all classes, 0 to 1.
    """
    weights = _class_weights(class_pixels, class_weights)

    def on(device: torch.device) -> Tensor | None:
        return None if weights is None else weights.to(device)

    def count(labels: Tensor) -> Tensor:
        labelled = labels != ignore_index
        if weights is None:
            return labelled.sum()
        return (on(labels.device)[labels.where(labelled, 0)] * labelled).sum()

    def loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses = _pixel_losses(logits, labels, ignore_index, on(logits.device), label_smoothing)
        return losses.sum(), count(labels)

    def upsampled(logits: Tensor, labels: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The loss of logits [B, C, h, w] upsampled to the grid and cropped to the labels [B, H, W]."""
        if logits.device.type != "cpu" or label_smoothing or tuple(logits.shape[-2:]) == tuple(grid):
            return loss(upsample(logits.float(), grid, labels.shape[1:]), labels)
        total = upsampled_cross_entropy(logits, labels, grid, ignore_index, on(logits.device))
        return total, count(labels)

    loss.upsampled = upsampled
    return loss


def ohem(
    class_pixels: Tensor | None,
    ignore_index: int,
    *,
    pixels: PositiveInt | None = None,
    fraction: Probability | None = None,
) -> Loss:
    """Bootstrapped cross-entropy (Pohlen et al. 2017): the mean over an image's K worst pixels, averaged over
    the images with a labelled pixel. Pixels that tie at the K-th place share it: order does not matter.

    pixels: K itself (published: 512 x 64); an image with fewer labelled pixels gives all of them.
    fraction: K as a share of the image's labelled pixels, 0 to 1, at least one; 0.25 if neither is given.
    Raises UserError where both are given.
    """
    if pixels is not None and fraction is not None:
        raise UserError(f"loss ohem: give pixels ({pixels}) or fraction ({fraction}), not both")
    share = 0.25 if fraction is None else fraction

    def loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses = _pixel_losses(logits, labels, ignore_index)  # [B, N]
        available = (labels.reshape(labels.shape[0], -1) != ignore_index).sum(1)  # [B]
        if pixels is None:
            kept = (available.double() * share).round().long().clamp_min(1)
            largest = max(1, round(losses.shape[1] * share))
        else:
            kept = available.clamp(min=1, max=pixels)
            largest = min(pixels, losses.shape[1])
        with torch.no_grad():  # a threshold and a weight a pixel: without scatter it is exact on CUDA too
            worst = losses.topk(largest, dim=1).values
            threshold = worst.gather(1, kept[:, None] - 1)  # [B, 1]
            above, ties = losses > threshold, losses == threshold
            left = (kept - above.sum(1))[:, None] / ties.sum(1, keepdim=True).clamp_min(1)
            chosen = above + ties * left
        return ((losses * chosen).sum(1) / kept).sum(), (available > 0).sum()

    return loss


def dice(class_pixels: Tensor | None, ignore_index: int) -> Loss:
    """Soft Dice loss (Milletari et al. 2016, without squares): per image, mean of 1 - 2 |p y| / (|p| + |y|)
    over the classes that occur in its labels, averaged over the images that have a labelled pixel.
    Images are taken one by one so that the loss does not depend on how a batch was cut."""

    def loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses = _image_dice(logits, labels, ignore_index)
        return losses.sum(), _images_with_labels(labels, ignore_index).sum()

    return loss


def cross_entropy_dice(
    class_pixels: Tensor | None, ignore_index: int, *, dice_weight: NonNegative = 1.0
) -> Loss:
    """Cross-entropy plus Dice, both per image, averaged over the images that have a labelled pixel.

    dice_weight: factor of the Dice part, 0 or more.
    """

    def loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        pixels = (labels.reshape(labels.shape[0], -1) != ignore_index).sum(1).clamp_min(1)
        entropies = _pixel_losses(logits, labels, ignore_index).sum(1) / pixels
        losses = entropies + dice_weight * _image_dice(logits, labels, ignore_index)
        return losses.sum(), _images_with_labels(labels, ignore_index).sum()

    return loss


def _pixel_losses(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of every pixel in float32 [B, N], 0 where ignored."""
    # One row a pixel: the kernel for 4-d logits is not deterministic on CUDA. A view in channels_last.
    rows = logits.float().movedim(1, -1).reshape(-1, logits.shape[1])
    losses = F.cross_entropy(
        rows,
        labels.flatten(),
        weights,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses.view(labels.shape[0], -1)


def _image_dice(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Dice loss of each image [B], 0 for an image without labelled pixels."""
    batch, num_classes = logits.shape[:2]
    flat = labels.reshape(batch, 1, -1)
    truth = flat == torch.arange(num_classes, device=labels.device)[:, None]  # [B, K, N]
    probabilities = logits.float().reshape(batch, num_classes, -1).softmax(1) * (flat != ignore_index)
    overlap = (probabilities * truth).sum(2)  # [B, K]
    pixels = truth.sum(2)
    present = pixels > 0
    losses = (1 - 2 * overlap / (probabilities.sum(2) + pixels).clamp_min(1e-7)) * present
    return losses.sum(1) / present.sum(1).clamp_min(1)


def _images_with_labels(labels: Tensor, ignore_index: int) -> Tensor:
    return (labels.reshape(labels.shape[0], -1) != ignore_index).any(1)


def _class_weights(class_pixels: Tensor | None, kind: str) -> Tensor | None:
    if kind == "none":
        return None
    if class_pixels is None:
        raise UserError(
            f"loss class_weights: {kind} needs the pixel counts of a training split, and there are none"
        )
    pixels = class_pixels.double()
    present = pixels > 0
    shares = pixels / pixels.sum()
    target = 1 / present.sum() if kind == "balanced" else shares[present].quantile(0.5)
    return torch.where(present, target / shares, 1.0).float()
