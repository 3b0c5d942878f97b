"""The worst case over recorded attacks: which attack to believe on each image, for accuracy and for mIoU.

A: attacks recorded, the clean images among them; N: images; C: classes that count; P: searches side by side. All
says something about these attacks only: one that was not run may do worse.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from engine.config import UserError
from evaluation.statistics import ClassCounts, Estimate, Resamples

POLISHED = 8  # ends of the fast search that are searched on with exact gains
CHUNK = 2**17  # numbers in the larger arrays of a search: what stays in the cache
SMALLEST = 1e-12  # by which a step must lower the mIoU

# (weights, selection [P, N]) -> the best attack for each image and how much that gains, [P, N] each
Gains = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class WorstAccuracy:
    """Pixel accuracy in [0, 1] where each image has the attack with the fewest right pixels (the first of equals).

    pooled: over all pixels. image_mean: mean over the images with labelled pixels. selection int64 [N]: the attacks.
    """

    pooled: float
    image_mean: float
    selection: np.ndarray


@dataclass(frozen=True, eq=False)
class SearchBracket:
    """mIoU in [0, 1] at the worst selection of one recorded attack per image.

    upper: at `selection` int64 [N], the worst that was found; lower: no selection is below it, and hardly one reaches
    it, as it lets every class have its own. classes [C]: those counted. start: where the search that won began, the
    name of an attack or one of "fewest right pixels", "lowest class balance", "previous". best_single: the lowest
    mIoU of one attack for all images, `single` its name.
    """

    upper: float
    lower: float
    selection: np.ndarray
    classes: np.ndarray
    start: str
    best_single: float
    single: str


def refuse_other_labels(counts: ClassCounts) -> None:
    """UserError where an image has not the same labels under all attacks: then images were mixed up."""
    wrong = (counts.true != counts.true[:1]).any(axis=2)
    if wrong.any():
        attack, image = np.argwhere(wrong)[0].tolist()
        raise UserError(
            f"worst case: image {image} has other labels under attack {attack} than under attack 0; "
            "every attack's counts must be of the same images in the same order"
        )


def select(counts: ClassCounts, selection: np.ndarray) -> ClassCounts:
    """Counts [N, K] of each image under its attack, of counts [A, N, K]."""
    return counts.map(lambda pixels: pixels[selection, np.arange(len(selection))])


def fewest_right(counts: ClassCounts) -> np.ndarray:
    """For each image the attack with the fewest right pixels, int64 [N]."""
    return counts.right.sum(axis=2).argmin(axis=0)


def lowest_balance(counts: ClassCounts) -> np.ndarray:
    """For each image the attack with the lowest accuracy averaged over the image's classes, int64 [N]."""
    return (counts.right / np.maximum(counts.true, 1)).sum(axis=2).argmin(axis=0)


def worst_aacc(counts: ClassCounts) -> WorstAccuracy:
    """Exact: images don't interact in the pixel accuracy."""
    selection = fewest_right(counts)
    worst = select(counts, selection)
    right, true = worst.right.sum(axis=1), worst.true.sum(axis=1)
    if not true.any():
        raise UserError("worst case: no labelled pixel in these images")
    labelled = true > 0
    mean = (right[labelled] / true[labelled]).mean()
    return WorstAccuracy(float(right.sum() / true.sum()), float(mean), selection)


def worst_miou(
    counts: ClassCounts,
    *,
    names: Sequence[str] = (),
    classes: Sequence[int] | None = None,
    previous: np.ndarray | None = None,
) -> SearchBracket:
    """Lowest mIoU over selections of one attack per image, searched for, and a bound below it.

    counts [A, N, K]; names of the A attacks (none given: "attack 0", ...); classes: ids over which the mean goes,
    each with ground truth (None: all with ground truth); previous [N]: a selection that is known to be bad, such as
    that before an attack was added. Found by steps that lower the mIoU most, from every single attack and the
    selections named in SearchBracket, so it is never above any of these.
    """
    refuse_other_labels(counts)
    attacks, images = counts.right.shape[:2]
    names = list(names) or [f"attack {number}" for number in range(attacks)]
    if len(names) != attacks:
        raise UserError(f"worst case: {len(names)} names for {attacks} attacks")
    classes = _with_truth(counts, classes)
    search = _Search.over(counts, classes)
    selections = [*search.singles, fewest_right(counts), lowest_balance(counts)]
    selections += [] if previous is None else [_checked(previous, attacks, images)]
    starts = np.stack(selections)
    weights = np.ones(starts.shape)
    singles = search.miou(weights[:attacks], starts[:attacks])
    reached = search.descend(weights, starts, search.estimated_gains)
    best = search.miou(weights, reached).argsort(kind="stable")[:POLISHED]
    polished = search.descend(weights[best], reached[best], search.exact_gains)
    values = search.miou(weights[best], polished)
    won = values.argmin()
    return SearchBracket(
        upper=float(values[won]),
        lower=float(lowest_ious(counts, classes).sum() / len(classes)),
        selection=search.first_of_equals(polished[won]),
        classes=classes,
        start=[*names, "fewest right pixels", "lowest class balance", "previous"][best[won]],
        best_single=float(singles.min()),
        single=names[singles.argmin()],
    )


def lowest_ious(counts: ClassCounts, classes: np.ndarray) -> np.ndarray:
    """The lowest IoU of each class over all selections, each class on its own: float64 [C], exact.

    Dinkelbach (1967): with the ratio r = I / U of a selection, the selection that minimises I - r * U (image by
    image) has a ratio below r, or r is the minimum. Compared as whole numbers (I * U_r - I_r * U), so it is a bound
    to the last digit; these fit into int64 up to 10^18 = pixels of an image x pixels of all images.
    """
    right, union = (pixels[..., classes].astype(np.int64) for pixels in (counts.right, counts.union))
    whole = right[0].sum(axis=0), union[0].sum(axis=0)  # of the current selection of each class, [C]
    while True:
        selection = (right * whole[1] - whole[0] * union).argmin(axis=0)[None]  # [1, N, C]
        lower = tuple(
            np.take_along_axis(pixels, selection, axis=0)[0].sum(axis=0) for pixels in (right, union)
        )
        if not (lower[0] / lower[1] < whole[0] / whole[1]).any():
            return whole[0] / whole[1]
        whole = lower


def estimate_worst_miou(resamples: Resamples, counts: ClassCounts, worst: SearchBracket) -> Estimate:
    """`worst.upper` with its replicates: in each the selection is searched for anew, else they would be too high.

    Starts: the selection of the whole sample and the best single attack of the resample. An image that is drawn m
    times counts m times and has one attack. A class that a resample lacks keeps its IoU, see `statistics.Figure`.
    """
    search = _Search.over(counts, worst.classes)
    whole = np.ones((1, resamples.images)), worst.selection[None]
    kept = search.ious(*whole)[0] / len(worst.classes)

    def again(weights: np.ndarray) -> np.ndarray:
        given = np.broadcast_to(worst.selection, weights.shape)
        single = search.singles[search.single_mious(weights).argmin(axis=1)]
        ends = [search.descend(weights, start, search.estimated_gains) for start in (given, single)]
        lower = search.miou(weights, ends[1]) < search.miou(weights, ends[0])
        best = search.descend(weights, np.where(lower[:, None], ends[1], ends[0]), search.exact_gains)
        return search.miou(weights, best) + np.where(search.present(weights), 0.0, kept).sum(axis=1)

    values = _in_parts(again, search.together, resamples.multiplicities.astype(float))
    return Estimate(worst.upper, values, resamples)


def _with_truth(counts: ClassCounts, classes: Sequence[int] | None) -> np.ndarray:
    """The ids to count, ascending. UserError for one without ground truth, and where there is none."""
    present = np.flatnonzero(counts.true[0].sum(axis=0))
    classes = present if classes is None else np.unique(np.asarray(classes, dtype=int))
    missing = np.setdiff1d(classes, present)
    if len(missing) or not len(classes):
        found = f"class {missing[0]} has none" if len(missing) else "there is none"
        raise UserError(f"worst case: takes classes with ground truth in these images; {found}")
    return classes


def _checked(previous: np.ndarray, attacks: int, images: int) -> np.ndarray:
    previous = np.asarray(previous)
    if previous.shape != (images,) or not np.isin(previous, np.arange(attacks)).all():
        raise UserError(
            f"worst case: previous takes one of {attacks} attacks for each of {images} images, found {previous}"
        )
    return previous


@dataclass(frozen=True, eq=False)
class _Search:
    """Steps towards a lower mIoU. A problem is a weight of each image (how often it counts); P of them, weights and
    selections [P, N], are worked on side by side."""

    right: (
        np.ndarray
    )  # float64 [A, N, C], whole numbers, as are all sums of them: no digit depends on their order
    union: np.ndarray
    true: np.ndarray  # [N, C]

    @classmethod
    def over(cls, counts: ClassCounts, classes: np.ndarray) -> "_Search":
        parts = counts.right, counts.union, counts.true[0]
        return cls(*(np.ascontiguousarray(pixels[..., classes], dtype=float) for pixels in parts))

    @property
    def singles(self) -> np.ndarray:
        """One attack for all images, of each attack: selections [A, N]."""
        return np.broadcast_to(np.arange(len(self.right))[:, None], self.right.shape[:2])

    @property
    def together(self) -> int:
        """How many problems are worked on at a time, for memory."""
        attacks, images, classes = self.right.shape
        return max(1, CHUNK // (images * max(attacks, classes)))

    def present(self, weights: np.ndarray) -> np.ndarray:
        """Classes that a problem has true pixels of, bool [P, C]."""
        return weights @ self.true > 0

    def miou(self, weights: np.ndarray, selection: np.ndarray) -> np.ndarray:
        """[P]; a class without true pixels in a problem counts 0."""
        return _mean(*self._totals(weights, selection))

    def ious(self, weights: np.ndarray, selection: np.ndarray) -> np.ndarray:
        """[P, C]"""
        return np.divide(*self._totals(weights, selection))

    def single_mious(self, weights: np.ndarray) -> np.ndarray:
        """`miou` of every attack alone, [P, A]."""
        return _mean(*(np.moveaxis(weights @ pixels, 0, 1) for pixels in (self.right, self.union)))

    def descend(self, weights: np.ndarray, selection: np.ndarray, gains: Gains) -> np.ndarray:
        """Selections [P, N] after as many steps as lower the mIoU; `gains` proposes them."""
        return _in_parts(partial(self._descend, gains=gains), self.together, weights, selection)

    def _descend(self, weights: np.ndarray, selection: np.ndarray, gains: Gains) -> np.ndarray:
        selection, moving = selection.copy(), np.arange(len(selection))
        while len(moving):
            stepped, lowered = self._step(weights[moving], selection[moving], gains)
            moving = moving[lowered]
            selection[moving] = stepped[lowered]
        return selection

    def _step(
        self, weights: np.ndarray, selection: np.ndarray, gains: Gains
    ) -> tuple[np.ndarray, np.ndarray]:
        """(selections [P, N], whether they are better [P]). Takes each image's best change, in the order of their
        gain; of all beginnings of that list the one with the lowest mIoU is made: one change, or many at once."""
        best, gain = gains(weights, selection)
        order = np.argsort(-gain, axis=1, kind="stable")
        weight, changed, before = (
            np.take_along_axis(one, order, axis=1) for one in (weights, best, selection)
        )
        totals = self._totals(weights, selection)
        after = [
            whole[:, None]
            + (weight[..., None] * (pixels[changed, order] - pixels[before, order])).cumsum(axis=1)
            for whole, pixels in zip(totals, (self.right, self.union), strict=True)
        ]
        values = _mean(*after)  # [P, N]
        last = values.argmin(axis=1)[:, None]
        stepped = np.empty_like(selection)
        np.put_along_axis(
            stepped, order, np.where(np.arange(order.shape[1]) <= last, changed, before), axis=1
        )
        lowest = np.take_along_axis(values, last, axis=1)[:, 0]
        return stepped, lowest < _mean(*totals) - SMALLEST

    def estimated_gains(self, weights: np.ndarray, selection: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(best attack of each image [P, N], its gain) by the slope of the mIoU at the current totals: quick, and
        close where an image is a small part of the whole.

        Slopes are rounded to whole numbers so small that all products and sums are exact: equal attacks are equal."""
        right, union = self._totals(weights, selection)
        slope = self.present(weights) / np.maximum(union, 1)
        slopes = np.concatenate([slope, -slope * right / np.maximum(union, 1)], axis=1)  # [P, 2 C]
        pixels = np.concatenate([self.right, self.union], axis=2)  # [A, N, 2 C]
        bits = 52 - np.ceil(np.log2(pixels.sum(axis=2).max()))
        largest = np.abs(slopes).max(axis=1, keepdims=True)  # 0 in a resample without labels
        slopes = np.rint(slopes * 2.0**bits / np.where(largest > 0, largest, 1))
        scores = (slopes @ pixels.reshape(-1, pixels.shape[2]).T).reshape(len(slopes), *pixels.shape[:2])
        own = np.take_along_axis(scores, selection[:, None], axis=1)[:, 0]
        return scores.argmin(axis=1), weights * (own - scores.min(axis=1))

    def exact_gains(self, weights: np.ndarray, selection: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(best attack of each image [P, N], its gain) by the mIoU after that change alone."""
        images, totals = np.arange(selection.shape[1]), self._totals(weights, selection)
        after = np.zeros((len(selection), *self.right.shape[:2]))  # [P, A, N], times C
        for index in range(self.right.shape[2]):
            right, union = (
                (whole[:, index, None] - weights * pixels[selection, images, index])[:, None]
                + weights[:, None] * pixels[..., index]
                for whole, pixels in zip(totals, (self.right, self.union), strict=True)
            )
            after += right / np.maximum(union, 1)
        return after.argmin(axis=1), len(totals[0][0]) * _mean(*totals)[:, None] - after.min(axis=1)

    def first_of_equals(self, selection: np.ndarray) -> np.ndarray:
        """For each image [N] the first attack that gives the same counts."""
        images = np.arange(len(selection))
        same = [(pixels == pixels[selection, images]).all(axis=2) for pixels in (self.right, self.union)]
        return (same[0] & same[1]).argmax(axis=0)

    def _totals(self, weights: np.ndarray, selection: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Right pixels and unions over all images, [P, C] each."""
        images = np.arange(selection.shape[1])
        return tuple(
            (weights[:, None] @ pixels[selection, images])[:, 0] for pixels in (self.right, self.union)
        )


def _mean(right: np.ndarray, union: np.ndarray) -> np.ndarray:
    """Mean IoU, [..., C] -> [...]. Without true pixels a class has no right ones, and counts 0."""
    return (right / np.maximum(union, 1)).sum(axis=-1) / right.shape[-1]


def _in_parts(function: Callable, size: int, *arrays: np.ndarray) -> np.ndarray:
    """function of arrays [P, ...], `size` of the P at a time."""
    starts = range(0, len(arrays[0]), size)
    return np.concatenate([function(*(array[start : start + size] for array in arrays)) for start in starts])
