"""What a gate does over many images: mean, spread and entropy of its weights, and whether it collapsed."""

from dataclasses import dataclass

import numpy as np

COLLAPSE = 0.95  # a mean weight above this: the gate has stopped looking at the image
SAME = 1e-6  # weights (float32) that differ by less are the same


@dataclass(frozen=True)
class GateStatistics:
    """Over N images; E experts, K = 1 for a gate that weighs images or the number of classes.

    Entropies are in nats, between 0 (one expert) and `entropy_max` = log E (all alike). A gate that decides
    image by image has a low `mean_entropy` and a high `entropy_of_mean`; one that collapsed has both low; one
    that never decides has both high.
    """

    images: int
    mean: np.ndarray  # [E, K]
    std: np.ndarray  # [E, K], over images (ddof 0)
    entropy_of_mean: np.ndarray  # [K]
    mean_entropy: np.ndarray  # [K]
    entropy_max: float
    collapsed: np.ndarray  # bool [K]: the mean weight of one expert is above COLLAPSE


def entropy(weights: np.ndarray) -> np.ndarray:
    """Shannon entropy in nats of weights [..., E, K] over the experts, [..., K]; 0 log 0 = 0."""
    weights = np.asarray(weights, dtype=np.float64)
    return -(weights * np.log(np.where(weights > 0, weights, 1.0))).sum(axis=-2)


def effective_experts(load: np.ndarray) -> np.ndarray:
    """exp(entropy) of shares [..., E, K] over the experts, [..., K]: 1 where one has all, E where all have alike."""
    return np.exp(entropy(load))


def mean_effective_experts(loads: np.ndarray) -> float:
    """Effective experts of loads [S, E] at S places that a gate decides for (sites, classes), mean over these: 1 where
    no decision hangs on the image, though every expert may have a place of its own."""
    return float(effective_experts(np.asarray(loads)[..., None]).mean())


def is_collapsed(loads: np.ndarray) -> bool:
    """Whether one expert has nearly all at each of the S places, not everywhere the same; loads [S, E]."""
    return bool((np.asarray(loads).max(axis=-1) > COLLAPSE).all())


def gate_statistics(weights: np.ndarray) -> GateStatistics:
    """Statistics of per-image weights [N, E, K] that sum to 1 over E; N >= 1."""
    weights = np.asarray(weights, dtype=np.float64)
    mean = weights.mean(axis=0)
    return GateStatistics(
        images=len(weights),
        mean=mean,
        std=weights.std(axis=0),
        entropy_of_mean=entropy(mean),
        mean_entropy=entropy(weights).mean(axis=0),
        entropy_max=float(np.log(weights.shape[1])),
        collapsed=mean.max(axis=0) > COLLAPSE,
    )


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Linear correlation of two series [N] in [-1, 1]; NaN where one is constant (but for rounding) or N < 3."""
    first, second = (np.asarray(series, dtype=np.float64) for series in (first, second))
    if _nothing_to_correlate(first, second):
        return float("nan")
    first, second = first - first.mean(), second - second.mean()
    return float((first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum()))


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation of two series [N] in [-1, 1], equal values sharing the mean of their ranks; NaN as above."""
    if _nothing_to_correlate(first, second):
        return float("nan")
    return pearson(_ranks(first), _ranks(second))


def _nothing_to_correlate(first: np.ndarray, second: np.ndarray) -> bool:
    return len(first) < 3 or min(np.ptp(first), np.ptp(second)) < SAME


def _ranks(series: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(series, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place]
