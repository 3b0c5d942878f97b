"""AUROC from histograms against scikit-learn on the pixels themselves; the distance against its definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from metrics.detection import (
    BINS,
    auroc,
    bin_of,
    count_scores,
    counts_by_score,
    fpr_at_tpr,
    jensen_shannon,
    resampled_auroc,
)


def noisy_scores(seed, images=2):
    """Scores that are higher on wrong pixels, crowded near 0 as a distance between probabilities is."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(1, images, 30, 40, generator=generator) < 0.2
    scores = (torch.randn(images, 30, 40, generator=generator) + 0.8 * wrong[0]).mul(1.2).sub(2).sigmoid()
    labels = torch.randint(0, 5, (images, 30, 40), generator=generator, dtype=torch.uint8)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return scores, wrong, labels


@pytest.mark.parametrize("seed", range(3))
def test_the_histogram_gives_the_auroc_of_its_bins_exactly_and_of_the_scores_nearly(seed):
    scores, wrong, labels = noisy_scores(seed)
    counts = count_scores(bin_of(scores), wrong, labels)
    assert counts.shape == (1, 2, 2, BINS) and counts.dtype == torch.int64
    assert counts.sum() == (labels != 255).sum()
    for image in range(2):
        known = labels[image] != 255
        truth, values = wrong[0, image][known], scores[image][known]
        found = float(auroc(counts[0, image].numpy()))
        assert found == pytest.approx(roc_auc_score(truth, bin_of(values)), abs=1e-12)
        assert found == pytest.approx(roc_auc_score(truth, values), abs=1e-3)
    pooled = float(auroc(counts.sum(dim=1).numpy())[0])
    known = labels != 255
    assert pooled == pytest.approx(roc_auc_score(wrong[0][known], bin_of(scores)[known]), abs=1e-12)


@given(st.lists(st.integers(0, 50), min_size=4, max_size=4))
@settings(max_examples=100, deadline=None)
def test_a_score_of_yes_and_no_has_half_of_one_plus_tpr_minus_fpr(counts):
    right_no, right_yes, wrong_no, wrong_yes = counts
    found = float(auroc(np.array([[right_no, right_yes], [wrong_no, wrong_yes]])))
    if right_no + right_yes == 0 or wrong_no + wrong_yes == 0:
        assert math.isnan(found)
        return
    tpr, fpr = wrong_yes / (wrong_no + wrong_yes), right_yes / (right_no + right_yes)
    assert found == pytest.approx((1 + tpr - fpr) / 2)
    truth = [0] * (right_no + right_yes) + [1] * (wrong_no + wrong_yes)
    scores = [0] * right_no + [1] * right_yes + [0] * wrong_no + [1] * wrong_yes
    assert found == pytest.approx(roc_auc_score(truth, scores))


def test_a_resample_is_scored_as_if_its_images_were_there_as_often():
    generator = np.random.default_rng(0)
    clean, attacked = generator.integers(0, 6, 12) / 6, generator.integers(2, 9, 12) / 6  # with equal scores
    multiplicities = generator.multinomial(12, np.full(12, 1 / 12), 5)
    multiplicities[0] = 1
    for found, often in zip(resampled_auroc(clean, attacked, multiplicities), multiplicities, strict=True):
        counts = counts_by_score(np.repeat(clean, often), np.repeat(attacked, often))
        assert found == pytest.approx(auroc(counts), abs=1e-12)


def test_bins_are_of_equal_width_and_the_last_one_holds_one():
    scores = torch.tensor([0.0, 0.5 / BINS, 1 / BINS, 0.5, 1 - 1e-6, 1.0])
    assert bin_of(scores).tolist() == [0, 0, 1, BINS // 2, BINS - 1, BINS - 1]


@pytest.mark.parametrize("num_experts", [2, 3])
def test_the_distance_is_its_definition(num_experts):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, num_experts, 5, 3, 4, generator=generator, dtype=torch.float64) * 3

    def entropy(probabilities):  # over the classes
        return torch.special.entr(probabilities).sum(dim=-3)

    probabilities = logits.softmax(dim=2)
    divergence = entropy(probabilities.mean(dim=1)) - entropy(probabilities).mean(dim=1)
    found = jensen_shannon(logits)
    assert found.shape == (2, 3, 4)
    assert torch.allclose(found**2 * math.log(num_experts), divergence, atol=1e-12)
    shifted = logits + torch.randn(2, num_experts, 1, 3, 4, generator=generator, dtype=torch.float64)
    assert torch.allclose(jensen_shannon(shifted), found)  # the constant of a pixel's logits says nothing


def test_the_distance_is_zero_for_like_experts_and_one_for_sure_and_different_ones():
    alike = torch.randn(1, 1, 4, 2, 2).expand(1, 3, 4, 2, 2)
    assert jensen_shannon(alike).max() < 1e-3  # float32: the root of a rounding error
    sure = torch.full((1, 3, 4, 1, 1), -200.0)
    for expert in range(3):
        sure[0, expert, expert] = 200.0
    assert jensen_shannon(sure).item() == pytest.approx(1)


@settings(max_examples=50, deadline=None)
@given(
    negative=st.lists(st.integers(0, 6), min_size=1, max_size=30),
    positive=st.lists(st.integers(0, 6), min_size=1, max_size=30),
    tpr=st.sampled_from([0.5, 0.95, 1.0]),
)
def test_auroc_and_fpr_of_scores_themselves_are_those_of_scikit_learn(negative, positive, tpr):
    negative, positive = np.array(negative) / 7, np.array(positive) / 7
    counts = counts_by_score(negative, positive)
    truth, values = np.repeat([0, 1], [len(negative), len(positive)]), np.concatenate([negative, positive])
    assert float(auroc(counts)) == pytest.approx(roc_auc_score(truth, values), abs=1e-12)
    false, true, _ = roc_curve(truth, values, drop_intermediate=False)
    assert fpr_at_tpr(counts, tpr) == pytest.approx(false[true >= tpr - 1e-12].min(), abs=1e-12)


def test_without_scores_of_either_there_is_no_fpr_and_nan_is_refused():
    assert math.isnan(fpr_at_tpr(counts_by_score(np.array([]), np.array([1.0]))))
    assert math.isnan(fpr_at_tpr(counts_by_score(np.array([1.0]), np.array([]))))
    assert fpr_at_tpr(counts_by_score(np.array([0.0, 0.4]), np.array([0.5, 0.6]))) == 0
    with pytest.raises(ValueError, match="NaN"):
        counts_by_score(np.array([np.nan]), np.array([1.0]))
