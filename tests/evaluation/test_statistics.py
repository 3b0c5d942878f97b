"""Intervals against explicit resampling, closed forms and published values; what may not be resampled is refused."""

import inspect

import numpy as np
import pytest
from scipy.stats import beta, binomtest

from engine.config import UserError
from evaluation import statistics
from evaluation.statistics import (
    ClassCounts,
    Estimate,
    Resamples,
    Share,
    aacc,
    clopper_pearson,
    estimate_image_mean,
    estimates,
    fwiou,
    macc,
    mean_iou,
)
from metrics import confusion

FIGURES = {"miou": mean_iou([0, 1, 3]), "aacc": aacc, "macc": macc, "fwiou": fwiou}


def matrices(images, classes=4, seed=0, level=0.7):
    """Counts of images that differ in how hard they are; every class is in every image."""
    generator = np.random.default_rng(seed)
    right = generator.beta(8 * level, 8 * (1 - level), (images, 1, 1))
    shares = right * np.eye(classes) + (1 - right) * generator.dirichlet(np.ones(classes), (images, classes))
    true = generator.integers(20, 500, (images, classes, 1))
    return np.floor(true * shares).astype(np.int64) + np.eye(classes, dtype=np.int64)


def of(counts, blocks, figures=FIGURES, **keys):
    return estimates(Resamples(blocks, **keys), ClassCounts.of(counts), figures)


def width(estimate):
    low, high = estimate.percentiles()
    return high - low


def test_figures_are_those_of_explicitly_copied_images():
    counts, blocks = matrices(14), list("aabbbcddeefghi")
    resamples = Resamples(blocks, replicates=60, seed=5)
    found = estimates(resamples, ClassCounts.of(counts), FIGURES)
    per_image = estimate_image_mean(resamples, confusion.aacc(counts))
    slow = {
        "miou": lambda matrix: confusion.miou(matrix, "gt_only", [0, 1, 3]),
        "aacc": confusion.aacc, "macc": confusion.macc, "fwiou": confusion.fwiou,
    }  # fmt: skip
    whole = counts.sum(axis=0)
    for name, figure in slow.items():
        assert found[name].value == pytest.approx(figure(whole), abs=1e-15)
    for replicate, draw in enumerate(resamples.draws):
        assert draw.sum() == 9 == resamples.units
        drawn = [block for block, times in zip("abcdefghi", draw, strict=True) for _ in range(times)]
        copies = [counts[image] for block in drawn for image in range(14) if blocks[image] == block]
        for name, figure in slow.items():
            assert found[name].replicates[replicate] == pytest.approx(figure(sum(copies)), abs=1e-13)
        mean = np.mean([confusion.aacc(matrix) for matrix in copies])
        assert per_image.replicates[replicate] == pytest.approx(mean, abs=1e-13)


def test_blocks_are_drawn_evenly_with_replacement():
    draws = Resamples([f"{number}" for number in range(20)], replicates=20_000).draws
    assert (draws.sum(axis=1) == 20).all()
    assert np.abs(draws.mean(axis=0) - 1).max() < 0.04  # five standard errors
    assert draws.var() == pytest.approx(1 - 1 / 20, abs=0.01)  # of a binomial with 20 draws of 1/20


def test_the_interval_holds_the_truth_as_often_as_it_says_where_units_are_independent():
    generator = np.random.default_rng(1)
    covered = {"blocks": 0, "frames": 0}
    for _ in range(250):
        counts = np.repeat(generator.normal(0.5, 0.1, 40), 5)  # blocks of five frames that are alike
        names = {"blocks": np.repeat(np.arange(40), 5), "frames": np.arange(200)}
        for kind, blocks in names.items():
            resamples = Resamples(blocks.astype(str), replicates=300, seed=int(generator.integers(1000)))
            low, high = estimate_image_mean(resamples, counts).interval()
            covered[kind] += low <= 0.5 <= high
    assert 0.90 < covered["blocks"] / 250 < 0.99
    assert covered["frames"] / 250 < 0.75  # what frames taken for units would claim


def test_one_image_has_zero_width_and_no_interval():
    for estimate in of(matrices(1), ["a"]).values():
        assert np.ptp(estimate.replicates) == 0 == width(estimate)
        assert np.isnan(estimate.interval()).all()


def test_fewer_than_ten_units_give_no_interval():
    nine = [f"{image % 9}" for image in range(30)]
    assert all(np.isnan(one.interval()).all() and one.units == 9 for one in of(matrices(30), nine).values())
    ten = [f"{image % 10}" for image in range(30)]
    for one in of(matrices(30), ten).values():
        low, high = one.interval()
        assert low < one.value < high and one.units == 10


def test_data_four_times_halve_the_width_as_new_units_and_leave_it_as_the_same_ones():
    counts, blocks = matrices(40), [f"{image}" for image in range(40)]
    once = of(counts, blocks)
    new = of(np.tile(counts, (4, 1, 1)), [f"{copy}{image}" for copy in range(4) for image in range(40)])
    same = of(np.tile(counts, (4, 1, 1)), blocks * 4)
    for name in FIGURES:
        assert width(new[name]) == pytest.approx(width(once[name]) / 2, rel=0.1)
        assert width(same[name]) == pytest.approx(width(once[name]), rel=1e-12)
        assert new[name].value == pytest.approx(once[name].value)


def test_identical_models_differ_by_exactly_nothing_and_a_pair_is_narrower_than_its_parts():
    blocks = [f"{image // 2}" for image in range(60)]
    hard, easy = matrices(60), matrices(60)
    easy[:, 0, 0] += easy[:, 0, 1]  # the same images, a class better by what was taken for another
    easy[:, 0, 1] = 0
    first, again, better = of(hard, blocks), of(hard, blocks), of(easy, blocks)
    for name in FIGURES:
        zero = first[name] - again[name]
        assert zero.value == 0 and not zero.replicates.any() and zero.interval() == (0, 0)
        assert (better[name] - first[name]).interval()[0] > 0
        assert width(better[name] - first[name]) < width(better[name])


def test_shares_that_no_resample_changes_have_the_interval_of_nothing_seen():
    resamples, unseen = Resamples([str(image) for image in range(40)]), clopper_pearson(0, 40)[1]

    def share(right):
        mean = estimate_image_mean(resamples, np.asarray(right, dtype=float))
        return Share(mean.value, mean.replicates, mean.resamples)

    some = np.arange(40) < 10
    assert share(np.ones(40)).interval() == pytest.approx((1 - unseen, 1))
    assert share(np.zeros(40)).interval() == pytest.approx((0, unseen))
    assert (share(some) - share(some)).interval() == pytest.approx((-unseen, unseen))
    assert (share(np.ones(40)) - share(np.zeros(40))).interval() == pytest.approx((1 - unseen, 1))
    gap = share(some) - share(np.arange(40) < 7)
    assert gap.interval() == gap.percentiles()
    exact = binomtest(10, 40).proportion_ci(method="exact")
    assert share(some).interval() == pytest.approx((exact.low, exact.high))


def test_a_difference_is_of_the_same_resamples_only():
    first = of(matrices(12), list("abcdefghijkl"))["miou"]
    for blocks, seed in ((list("abcdefghijkl"), 1), (list("abcdefghijkk"), 0), (list("abcdefghijkm"), 0)):
        with pytest.raises(ValueError, match="same resamples"):
            first - of(matrices(12), blocks, seed=seed)["miou"]


def test_the_order_of_images_changes_no_digit():
    counts, blocks = matrices(30), np.array([f"{image % 13}" for image in range(30)])
    order = np.random.default_rng(0).permutation(30)
    one, other = of(counts, blocks), of(counts[order], blocks[order])
    assert all((one[name].replicates == other[name].replicates).all() for name in FIGURES)


def test_a_class_that_a_resample_lacks_keeps_its_iou_and_stray_predictions_do_not_matter():
    counts = np.zeros((12, 3, 3), dtype=np.int64)
    counts[:, 0, 0], counts[:, 0, 1] = np.arange(70, 82), 20  # 20 stray predictions of class 1 in each image
    counts[0, 1] = [10, 30, 0]  # class 1 is in one image only
    counts[:, 1, 2], counts[0, 1, 2] = 0, 0
    resamples = Resamples([f"{image:02}" for image in range(12)])
    estimate = estimates(resamples, ClassCounts.of(counts), {"miou": mean_iou([0, 1])})["miou"]
    without = np.flatnonzero(resamples.draws[:, 0] == 0)
    assert 500 < len(without) < 900  # (1 - 1/12)^12 of 2000 is 704
    of_class_1 = 30 / (12 * 20 + 40)
    for replicate in without[:50]:
        road = (resamples.multiplicities[replicate][:, None, None] * counts).sum(axis=0)
        iou = road[0, 0] / (road[0].sum() + road[1, 0])
        assert estimate.replicates[replicate] == pytest.approx((iou + of_class_1) / 2)
    assert estimate.value == pytest.approx(confusion.miou(counts.sum(axis=0), "gt_only"))


@pytest.mark.parametrize("absent", confusion.ABSENT_POLICIES)
def test_the_classes_that_a_figure_counts_are_the_same_in_every_resample(absent):
    counts = matrices(20, classes=5)
    counts[:, 3, :], counts[:, :, 4], counts[:, 4, :] = 0, 0, 0  # 3 is only predicted, 4 is nowhere
    whole = counts.sum(axis=0)
    counted = np.flatnonzero(confusion.counted_classes(whole, absent))
    blocks = [f"{image}" for image in range(20)]
    figures = {"all": mean_iou(counted, empty=float(absent == "one")), "true": mean_iou([0, 1, 2])}
    found = of(counts, blocks, figures)
    assert found["all"].value == pytest.approx(confusion.miou(whole, absent))
    empty = {"nan": 0, "zero": 0, "one": 1, "gt_only": 0}[absent]
    expected = (3 * found["true"].replicates + empty) / len(counted)
    assert found["all"].replicates == pytest.approx(expected, abs=1e-14)


def test_images_without_labels_change_nothing():
    counts = np.concatenate([matrices(12), np.zeros((12, 4, 4), np.int64)])
    blocks = [f"{image:02}" for image in range(12)] * 2
    with_them, without = of(counts, blocks), of(counts[:12], blocks[:12])
    assert all((with_them[name].replicates == without[name].replicates).all() for name in FIGURES)
    accuracy = confusion.aacc(counts)
    mean = estimate_image_mean(Resamples(blocks), accuracy)
    assert (mean.replicates == estimate_image_mean(Resamples(blocks[:12]), accuracy[:12]).replicates).all()
    some = of(
        counts, [f"{image}" for image in range(24)], replicates=50
    )  # resamples with few labels, or none
    assert all(np.isfinite(one.replicates).all() for one in some.values())
    with pytest.raises(ValueError, match="no labelled pixel"):
        of(counts[12:], blocks[12:])


def test_pixels_can_not_be_resampled():
    label = np.random.default_rng(0).integers(0, 3, (10, 8, 8))
    with pytest.raises(UserError, match="one name per image"):
        Resamples(label.astype(str))  # a name per pixel
    with pytest.raises(UserError, match="blocks of 640 images, but counts of 10; units are images"):
        of(matrices(10), label.ravel().astype(str))
    with pytest.raises(UserError, match="one name per image"):
        Resamples([])
    for thing in (Resamples, estimates, estimate_image_mean, Estimate.interval):
        keys = inspect.signature(thing).parameters
        assert not {"unit", "units", "pixels"} & set(keys)


def test_two_thousand_replicates_by_default_that_follow_the_seed():
    blocks = [f"{image}" for image in range(15)]
    one, same, other = (Resamples(blocks, seed=seed).draws for seed in (0, 0, 1))
    assert one.shape == (2000, 15) == (statistics.REPLICATES, 15)
    assert (one == same).all() and (one != other).any()


@pytest.mark.parametrize(
    ("right", "images", "interval"),
    [
        (500, 1000, (0.4685, 0.5315)),
        (0, 100, (0, 0.0362)),
        (50, 50, (0.9289, 1)),
        (5954, 10000, (0.5857, 0.6050)),
    ],
)
def test_clopper_pearson_has_the_published_values(right, images, interval):
    assert clopper_pearson(right, images) == pytest.approx(interval, abs=5e-5)


def test_clopper_pearson_is_scipys_beta_quantile_and_refuses_what_is_no_count():
    for right, images, level in ((1, 7, 0.95), (6, 7, 0.9), (123, 400, 0.99)):
        tail = (1 - level) / 2
        expected = beta.ppf(tail, right, images - right + 1), beta.ppf(1 - tail, right + 1, images - right)
        assert clopper_pearson(right, images, level) == pytest.approx(expected, abs=1e-12)
    for right, images in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="images"):
            clopper_pearson(right, images)
