"""Confusion matrices (rows: truth, columns: prediction) and every figure that is a function of one."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.config import IGNORE

ABSENT_POLICIES = ("nan", "zero", "one", "gt_only")


def confusion(predictions: Tensor, labels: Tensor, num_classes: int, ignore_index: int = IGNORE) -> Tensor:
    """Per-image counts, int64 [B, K, K] on the device of `predictions`.

    Predictions are [B, ...] in [0, num_classes), labels of the same shape. A pixel whose label is
    `ignore_index`, or outside [0, num_classes), is not counted, whatever its prediction. Waits for nothing on
    a GPU: ignored pixels fall into an extra cell that is cut off (no boolean indexing), and the image is part
    of the index (one bincount).
    """
    batch, device, num_cells = predictions.shape[0], predictions.device, num_classes * num_classes
    rows = labels.to(device=device, dtype=torch.int32).reshape(batch, -1)
    ignored = (rows == ignore_index) | (rows < 0) | (rows >= num_classes)
    cells = (rows * num_classes).add_(predictions.reshape(batch, -1).to(torch.int32))
    cells.masked_fill_(ignored, num_cells)
    cells += torch.arange(batch, device=device, dtype=torch.int32)[:, None] * (num_cells + 1)
    counts = torch.bincount(cells.flatten(), minlength=batch * (num_cells + 1))
    return counts.reshape(batch, num_cells + 1)[:, :num_cells].reshape(batch, num_classes, num_classes)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise quotient in float64, NaN where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def _parts(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right, true and predicted pixels of each class, each float64 [..., K]."""
    matrix = np.asarray(matrix, dtype=np.float64)
    right = np.diagonal(matrix, axis1=-2, axis2=-1)
    return right, matrix.sum(axis=-1), matrix.sum(axis=-2)


def iou_per_class(matrix: np.ndarray) -> np.ndarray:
    """Intersection over union of each class in [0, 1], [..., K]; NaN where the union is empty."""
    right, true, predicted = _parts(matrix)
    return _ratio(right, true + predicted - right)


def counted_classes(
    matrix: np.ndarray, absent: str = "nan", classes: Sequence[int] | None = None
) -> np.ndarray:
    """Classes that enter the mean of `miou` under the same arguments, bool [..., K]."""
    if absent not in ABSENT_POLICIES:
        raise ValueError(f"absent: {absent!r} is not one of {', '.join(ABSENT_POLICIES)}")
    right, true, predicted = _parts(matrix)
    counted = {
        "nan": true + predicted > 0,
        "gt_only": true > 0,
        "zero": np.ones_like(true, dtype=bool),
        "one": np.ones_like(true, dtype=bool),
    }[absent]
    if classes is not None:
        counted = counted & np.isin(np.arange(right.shape[-1]), np.asarray(classes, dtype=int))
    return counted


def miou(matrix: np.ndarray, absent: str = "nan", classes: Sequence[int] | None = None) -> np.ndarray:
    """Mean IoU in [0, 1] over classes, [...]; NaN where no class is counted.

    `absent` says what a class does that is empty: `nan` leaves out classes in neither truth nor prediction
    (a class that is predicted but never true counts 0), `gt_only` leaves out all classes without truth,
    `zero` and `one` count every class, those with an empty union as 0 or 1. `classes` fixes the set of
    class ids that may be counted; the policy then rules inside that set.
    """
    counted = counted_classes(matrix, absent, classes)
    empty = 1.0 if absent == "one" else 0.0
    iou = np.nan_to_num(iou_per_class(matrix), nan=empty)
    return _ratio(np.where(counted, iou, 0.0).sum(axis=-1), counted.sum(axis=-1))


def aacc(matrix: np.ndarray) -> np.ndarray:
    """Share of counted pixels that are right, in [0, 1], [...]; NaN without pixels."""
    right, true, _ = _parts(matrix)
    return _ratio(right.sum(axis=-1), true.sum(axis=-1))


def macc(matrix: np.ndarray) -> np.ndarray:
    """Mean over classes with ground truth of the share of their pixels that are right, in [0, 1], [...]."""
    right, true, _ = _parts(matrix)
    accuracy = np.nan_to_num(_ratio(right, true), nan=0.0)
    return _ratio(accuracy.sum(axis=-1), (true > 0).sum(axis=-1))


def fwiou(matrix: np.ndarray) -> np.ndarray:
    """IoU weighted by the share of true pixels of each class, in [0, 1], [...]; NaN without pixels."""
    _, true, _ = _parts(matrix)
    iou = np.nan_to_num(iou_per_class(matrix), nan=0.0)
    return _ratio((true * iou).sum(axis=-1), true.sum(axis=-1))
