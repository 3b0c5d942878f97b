"""How well a score tells wrong pixels from right ones: AUROC, streamed as a histogram of whole numbers."""

import math

import numpy as np
import torch
from torch import Tensor

from engine.config import IGNORE

BINS = 256


def jensen_shannon(expert_logits: Tensor) -> Tensor:
    """Jensen-Shannon distance between the experts' probabilities, [B, ...] in [0, 1]; expert_logits
    [B, E, C, ...], E >= 2.

    The square root of JSD / log E, where JSD = H(mean of the probabilities) - mean of H(probabilities) in
    nats (Lin 1991; Endres and Schindelin 2003): 0 where all give the same probabilities, 1 where each is sure of a
    class of its own.
    """
    logs = expert_logits.log_softmax(dim=2)
    probabilities = logs.exp()
    mean = probabilities.mean(dim=1)
    apart = (probabilities * logs).sum(dim=2).mean(dim=1)  # minus the mean entropy
    together = torch.special.xlogy(mean, mean).sum(dim=1)
    divergence = (apart - together) / math.log(expert_logits.shape[1])
    return divergence.clamp(0, 1).sqrt()


def bin_of(scores: Tensor) -> Tensor:
    """Bin of scores in [0, 1], int32 of their shape: BINS of equal width, 1 falls into the last one."""
    return (scores * BINS).to(torch.int32).clamp_(0, BINS - 1)


def count_scores(bins: Tensor, wrong: Tensor, labels: Tensor) -> Tensor:
    """Labelled pixels by image, by right and wrong, and by bin: int64 [R, B, 2, BINS] on the device.

    bins [B, ...] as of `bin_of`, wrong [R, B, ...] of R models, labels [B, ...].
    """
    rows, images = wrong.shape[:2]
    cells = rows * images * 2 * BINS
    block = torch.arange(rows * images, device=wrong.device, dtype=torch.int32) * (2 * BINS)
    place = wrong.to(torch.int32) * BINS + bins + block.view(rows, images, *[1] * (bins.dim() - 1))
    place.masked_fill_(labels == IGNORE, cells)
    return torch.bincount(place.flatten(), minlength=cells + 1)[:cells].reshape(rows, images, 2, BINS)


def auroc(counts: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of a score as a detector of wrong pixels, [...]; NaN without right or wrong ones.

    counts [..., 2, S]: right pixels (0) and wrong ones (1) by score, ascending. It is the chance that a wrong
    pixel has a higher score than a right one, equal scores counting half: exact for the scores as they were
    binned. With two scores (no, yes) it is (1 + TPR - FPR) / 2.
    """
    counts = np.asarray(counts, dtype=np.float64)
    right, wrong = counts[..., 0, :], counts[..., 1, :]
    below = right.cumsum(axis=-1) - right / 2
    pairs = right.sum(axis=-1) * wrong.sum(axis=-1)
    return np.divide((wrong * below).sum(axis=-1), pairs, out=np.full(pairs.shape, np.nan), where=pairs != 0)


def counts_by_score(negative: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """int64 [2, S]: how often each value occurs among scores of those to pass (0) and of those to find (1), values
    ascending; what `auroc` and `fpr_at_tpr` take, exact for the scores."""
    both = np.concatenate([negative, positive])
    if np.isnan(both).any():
        raise ValueError("a score is NaN")
    values, place = np.unique(both, return_inverse=True)
    found = np.zeros((2, len(values)), np.int64)
    np.add.at(found, (np.repeat([0, 1], [len(negative), len(positive)]), place), 1)
    return found


def resampled_auroc(negative: np.ndarray, positive: np.ndarray, multiplicities: np.ndarray) -> np.ndarray:
    """AUROC of N scores to pass against N to find on each resample of the N images, [R]; multiplicities [R, N]: how
    often each image is in it, clean and attacked alike."""
    above = np.sign(np.subtract.outer(positive, negative)) / 2 + 0.5  # [N to find, N to pass]
    pairs = ((multiplicities @ above) * multiplicities).sum(axis=1)
    return pairs / multiplicities.sum(axis=1) ** 2


def fpr_at_tpr(counts: np.ndarray, tpr: float = 0.95) -> float:
    """Share of those to pass that are stopped at the highest threshold that finds at least a share `tpr` of those to
    find; NaN where there are none of either. counts [2, S] as of `counts_by_score`."""
    passed, found = np.asarray(counts)[:, ::-1].cumsum(axis=1)  # at or above each value, descending
    if not passed[-1] or not found[-1]:
        return math.nan
    first = int((found >= tpr * found[-1] - 1e-9).argmax())
    return float(passed[first] / passed[-1])
