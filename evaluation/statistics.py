"""Intervals: a bootstrap over blocks of consecutive frames, never over pixels; Clopper-Pearson for top-1 accuracy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv

from engine.config import UserError

REPLICATES = 2000
LEVEL = 0.95
FEWEST_UNITS = 10  # of a bootstrap: with fewer there is no interval


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """Pixels of each class, [..., K]: predicted rightly, by the label, by the prediction. All figures follow."""

    right: np.ndarray
    true: np.ndarray
    predicted: np.ndarray

    @classmethod
    def of(cls, matrices: np.ndarray) -> "ClassCounts":
        """Of confusion counts [..., K, K] (rows: truth, columns: prediction)."""
        matrices = np.asarray(matrices)
        right = np.diagonal(matrices, axis1=-2, axis2=-1)
        return cls(
            right.astype(np.int64),
            matrices.sum(axis=-1, dtype=np.int64),
            matrices.sum(axis=-2, dtype=np.int64),
        )

    @property
    def union(self) -> np.ndarray:
        return self.true + self.predicted - self.right

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "ClassCounts":
        return ClassCounts(function(self.right), function(self.true), function(self.predicted))


class Resamples:
    """Resamples of N images: as many blocks as there are, drawn with replacement, each with all of its images.

    blocks: the name of each image's block, a run of consecutive frames or a drive; neighbouring frames are alike, so
    these are the units that may count as independent. Nothing smaller can be drawn. Figures that are compared share
    one Resamples: then their difference is paired. The same blocks and seed give the same resamples, in whatever
    order the images are.
    """

    def __init__(self, blocks: Sequence[str], *, replicates: int = REPLICATES, seed: int = 0):
        blocks = np.asarray(blocks, dtype=str)
        if blocks.ndim != 1 or not len(blocks):
            raise UserError(
                f"bootstrap: takes the block of each image, one name per image; found {blocks.shape}"
            )
        self.names, self.unit_of = np.unique(blocks, return_inverse=True)
        self.units, self.images = len(self.names), len(blocks)
        share = np.full(self.units, 1 / self.units)
        self.draws = np.random.default_rng(seed).multinomial(self.units, share, replicates)  # [R, units]

    @property
    def multiplicities(self) -> np.ndarray:
        """How often each image is in each resample, int64 [R, N]."""
        return self.draws[:, self.unit_of]

    def same_as(self, other: "Resamples") -> bool:
        """Whether both draw the same blocks."""
        return np.array_equal(self.names, other.names) and np.array_equal(self.draws, other.draws)

    def pool(self, counts: np.ndarray) -> np.ndarray:
        """Sums over the images of each resample, float64 [R, ...], of whole numbers [N, ...].

        Exact below 2^53, so that threads and the order of images change no digit."""
        if len(counts) != self.images:
            raise UserError(
                f"bootstrap: blocks of {self.images} images, but counts of {len(counts)}; units are images"
            )
        order = self.unit_of.argsort(kind="stable")
        starts = np.searchsorted(self.unit_of[order], np.arange(self.units))
        sums = np.add.reduceat(counts[order].reshape(self.images, -1).astype(float), starts)
        return (self.draws.astype(float) @ sums).reshape(len(self.draws), *counts.shape[1:])


@dataclass(frozen=True, eq=False)
class Estimate:
    """A figure of some images and the same figure on every resample of them, [R]."""

    value: float
    replicates: np.ndarray
    resamples: Resamples

    @property
    def units(self) -> int:
        return self.resamples.units

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Percentile interval (Efron 1981); (NaN, NaN) for fewer than FEWEST_UNITS blocks."""
        if self.units < FEWEST_UNITS:
            return float("nan"), float("nan")
        return self.percentiles(level)

    def bounds(self) -> tuple[float | None, float | None]:
        """The interval, None in place of NaN, for files that know no NaN."""
        low, high = self.interval()
        return (None, None) if np.isnan(low) else (low, high)

    def percentiles(self, level: float = LEVEL) -> tuple[float, float]:
        """(low, high) that hold the middle `level` of the replicates, however few the blocks."""
        low, high = np.quantile(self.replicates, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The paired difference. ValueError where the two were not taken on the same resamples."""
        if not self.resamples.same_as(other.resamples):
            raise ValueError("a difference needs two figures on the same resamples of the same blocks")
        return Estimate(self.value - other.value, self.replicates - other.replicates, self.resamples)


@dataclass(frozen=True, eq=False)
class Share(Estimate):
    """Of a share of independent images, each of which is a block of its own."""

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The exact one, of any number of images."""
        return clopper_pearson(round(self.value * self.units), self.units, level)

    def __sub__(self, other: Estimate) -> "ShareGap":
        gap = super().__sub__(other)
        return ShareGap(gap.value, gap.replicates, gap.resamples)


class ShareGap(Estimate):
    """Of a paired difference of two shares of the same independent images."""

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """As of any estimate. Where no image differs a bootstrap can't tell how rare those are that do: then that of 0
        of as many images (Clopper-Pearson)."""
        if self.units < FEWEST_UNITS or np.ptp(self.replicates):
            return super().interval(level)
        unseen = clopper_pearson(0, self.units, level)[1]
        return max(-1.0, self.value - unseen), min(1.0, self.value + unseen)


# (pooled counts [..., K], those of the whole sample [K]) -> figure [...]. A resample may lack a class; the set of
# classes is the same nevertheless: such a class keeps its IoU of the whole sample. Leaving it out would move a mean
# over few classes by points, and counting stray predictions of it as an IoU of 0 by more.
Figure = Callable[[ClassCounts, ClassCounts], np.ndarray]


def mean_iou(classes: Sequence[int], empty: float = 0.0) -> Figure:
    """mIoU over a fixed set of classes; one with no pixel in the whole sample counts `empty`."""
    classes = np.asarray(classes, dtype=int)

    def figure(drawn: ClassCounts, sample: ClassCounts) -> np.ndarray:
        drawn, sample = (counts.map(lambda pixels: pixels[..., classes]) for counts in (drawn, sample))
        own = _share(sample.right, sample.union, sample.union > 0, empty)
        return _share(drawn.right, drawn.union, drawn.true > 0, own).mean(axis=-1)

    return figure


def aacc(drawn: ClassCounts, sample: ClassCounts) -> np.ndarray:
    """Share of pixels that are right, all images pooled."""
    right, true = drawn.right.sum(axis=-1), drawn.true.sum(axis=-1)
    return _share(right, true, true > 0, sample.right.sum() / sample.true.sum())


def macc(drawn: ClassCounts, sample: ClassCounts) -> np.ndarray:
    """Mean over the sample's classes of the share of their pixels that are right."""
    there = sample.true > 0
    own = _share(sample.right, sample.true, there, np.nan)
    return _share(drawn.right, drawn.true, drawn.true > 0, own)[..., there].mean(axis=-1)


def fwiou(drawn: ClassCounts, sample: ClassCounts) -> np.ndarray:
    """IoU weighted by the pixels of each class."""
    weighed = (drawn.true * _share(drawn.right, drawn.union, drawn.true > 0, 0.0)).sum(axis=-1)
    total = drawn.true.sum(axis=-1)
    whole = (sample.true * _share(sample.right, sample.union, sample.true > 0, 0.0)).sum()
    return _share(weighed, total, total > 0, whole / sample.true.sum())


def estimates(
    resamples: Resamples, counts: ClassCounts, figures: Mapping[str, Figure]
) -> dict[str, Estimate]:
    """Figures of N images, counts [N, K], by name; all on the same resamples. ValueError without a labelled pixel."""
    if not counts.true.any():
        raise ValueError("no labelled pixel in these images")
    sample, drawn = counts.map(lambda pixels: pixels.sum(axis=0)), counts.map(resamples.pool)
    return {
        name: Estimate(float(figure(sample, sample)), figure(drawn, sample), resamples)
        for name, figure in figures.items()
    }


def estimate_image_mean(resamples: Resamples, values: np.ndarray) -> Estimate:
    """The mean over images of a value per image [N], such as its accuracy; images with NaN don't count."""
    counted = ~np.isnan(values)
    number = resamples.pool(counted)
    sums = (resamples.multiplicities * np.where(counted, values, 0.0)).sum(
        axis=1
    )  # no BLAS: same digits everywhere
    mean = float(values[counted].mean()) if counted.any() else float("nan")
    return Estimate(mean, _share(sums, number, number > 0, mean), resamples)


def units_named(blocks: Sequence[str]) -> str:
    """What a bootstrap over the blocks of these frames draws, for people."""
    alone = len(set(blocks)) == len(blocks)
    return "single frames, taken as independent" if alone else "blocks of consecutive frames"


def clopper_pearson(right: int, images: int, level: float = LEVEL) -> tuple[float, float]:
    """Exact interval of a top-1 accuracy, `right` of `images` independent images (Clopper and Pearson 1934).

    Never for pixels: those of one image are not independent."""
    if not 0 <= right <= images or not images:
        raise ValueError(f"{right} right of {images} images")
    tail = (1 - level) / 2
    low = float(betaincinv(right, images - right + 1, tail)) if right else 0.0
    high = float(betaincinv(right + 1, images - right, 1 - tail)) if right < images else 1.0
    return low, high


def _share(part, whole, where, instead) -> np.ndarray:
    """part / whole in float64, `instead` where not `where`."""
    part, whole, where, instead = np.broadcast_arrays(part, whole, where, instead)
    return np.divide(part, whole, out=instead.astype(float), where=where)
