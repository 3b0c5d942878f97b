"""mIoU policy by policy against outside oracles, and the counting itself against a plain loop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score
from torchmetrics.classification import MulticlassJaccardIndex

from metrics.confusion import (
    aacc,
    confusion,
    counted_classes,
    fwiou,
    iou_per_class,
    macc,
    miou,
)

K = 5


@st.composite
def labelled_images(draw):
    """Small batches in which classes may lack from truth, prediction or both, and pixels may be ignored."""
    batch, pixels = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    true_ids = draw(st.lists(st.sampled_from([*range(K), 255]), min_size=1, max_size=K))
    predicted_ids = draw(st.lists(st.integers(0, K - 1), min_size=1, max_size=K))
    size = batch * pixels
    labels = draw(st.lists(st.sampled_from(true_ids), min_size=size, max_size=size))
    predictions = draw(st.lists(st.sampled_from(predicted_ids), min_size=size, max_size=size))
    shape = (batch, 1, pixels)
    return torch.tensor(predictions).reshape(shape), torch.tensor(labels, dtype=torch.uint8).reshape(shape)


def counted_by_hand(predictions, labels):
    counts = np.zeros((K, K), dtype=int)
    for prediction, label in zip(predictions.flatten().tolist(), labels.flatten().tolist(), strict=True):
        if label != 255:
            counts[label, prediction] += 1
    return counts


@settings(max_examples=60, deadline=None)
@given(labelled_images())
def test_counts_equal_a_loop_image_by_image(pair):
    predictions, labels = pair
    counts = confusion(predictions, labels, K)
    assert counts.dtype == torch.int64
    for image in range(len(labels)):
        assert np.array_equal(counts[image].numpy(), counted_by_hand(predictions[image], labels[image]))


def test_labels_of_any_rank_and_an_ignored_class_inside_the_range():
    labels = torch.tensor([0, 1, 2, 254], dtype=torch.uint8)  # [B], as in classification
    counts = confusion(torch.tensor([0, 0, 1, 1]), labels, 3, ignore_index=1)
    assert counts.sum((1, 2)).tolist() == [1, 0, 1, 0]  # 1 is ignored, 254 is no class
    assert counts[2, 2, 1] == 1


def test_the_prediction_of_an_ignored_pixel_does_not_matter():
    labels = torch.tensor([[255, 1], [0, 255]], dtype=torch.uint8)
    answers = [torch.tensor([[value, 1], [1, value]]) for value in (0, 2, 255)]
    counts = [confusion(answer, labels, 3) for answer in answers]
    assert counts[0].sum() == 2 and all(torch.equal(counts[0], other) for other in counts)


@settings(max_examples=60, deadline=None)
@given(labelled_images())
def test_nan_equals_torchmetrics_macro(pair):
    predictions, labels = pair
    matrix = confusion(predictions, labels, K).sum(0).numpy()
    oracle = MulticlassJaccardIndex(K, average="macro", ignore_index=255)(predictions, labels.long())
    if matrix.sum():
        assert miou(matrix, "nan") == pytest.approx(oracle.item(), abs=1e-6)
    else:
        assert np.isnan(miou(matrix, "nan"))


@settings(max_examples=60, deadline=None)
@given(labelled_images(), st.integers(0, K - 1))
def test_class_set_equals_torchmetrics_that_ignores_a_class(pair, ignored):
    predictions, labels = pair
    labels = torch.where(labels == 255, ignored, labels)
    kept = labels != ignored
    others = [index for index in range(K) if index != ignored]
    matrix = confusion(predictions, labels, K, ignore_index=ignored).sum(0).numpy()
    if kept.any() and counted_classes(matrix, "nan", others).any():
        oracle = MulticlassJaccardIndex(K, average="macro", ignore_index=ignored)(predictions, labels.long())
        assert miou(matrix, "nan", others) == pytest.approx(oracle.item(), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(labelled_images(), st.sampled_from([("zero", 0), ("one", 1)]))
def test_zero_and_one_equal_scikit_learn_with_all_labels(pair, policy):
    predictions, labels = pair
    counted = labels != 255
    if counted.any():
        name, zero_division = policy
        matrix = confusion(predictions, labels, K).sum(0).numpy()
        oracle = jaccard_score(
            labels[counted].numpy(), predictions[counted].numpy(), average="macro",
            labels=list(range(K)), zero_division=zero_division,
        )  # fmt: skip
        assert miou(matrix, name) == pytest.approx(oracle, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(labelled_images())
def test_gt_only_and_the_accuracies_equal_brute_force(pair):
    predictions, labels = pair
    keep = labels != 255
    truth, answer = labels[keep].numpy(), predictions[keep].numpy()
    matrix = confusion(predictions, labels, K).sum(0).numpy()
    if not len(truth):
        assert all(np.isnan(figure(matrix)) for figure in (aacc, macc, fwiou))
        return
    ious, accuracies, shares = [], [], []
    for index in sorted(set(truth.tolist())):
        both = np.sum((truth == index) & (answer == index))
        ious.append(both / np.sum((truth == index) | (answer == index)))
        accuracies.append(both / np.sum(truth == index))
        shares.append(np.mean(truth == index))
    assert miou(matrix, "gt_only") == pytest.approx(np.mean(ious))
    assert aacc(matrix) == pytest.approx(np.mean(truth == answer))
    assert macc(matrix) == pytest.approx(np.mean(accuracies))
    assert miou(matrix, "gt_only") <= macc(matrix) + 1e-12  # a union has at least the class's own pixels
    assert fwiou(matrix) == pytest.approx(np.dot(shares, ious))


def test_policies_on_a_class_that_is_only_predicted_and_one_in_neither():
    matrix = np.array(
        [[2, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    )  # 2: predicted only, 3: nowhere
    assert np.allclose(iou_per_class(matrix), [1, 0.5, 0, np.nan], equal_nan=True)
    assert miou(matrix, "nan") == pytest.approx(1.5 / 3)
    assert miou(matrix, "zero") == pytest.approx(1.5 / 4)
    assert miou(matrix, "one") == pytest.approx(2.5 / 4)
    assert miou(matrix, "gt_only") == pytest.approx(1.5 / 2)
    assert miou(matrix, "nan", classes=[1, 2]) == pytest.approx(0.25)
    assert miou(matrix, "one", classes=[1, 3]) == pytest.approx(0.75)
    assert counted_classes(matrix, "nan").tolist() == [True, True, True, False]
    with pytest.raises(ValueError, match="skip.*nan, zero, one, gt_only"):
        miou(matrix, "skip")


@pytest.mark.parametrize(
    ("labels", "predictions", "ignored", "iou", "mean"),
    [
        ([2, 1, 0, 0], [2, 1, 0, 1], 255, [1 / 2, 1 / 2, 1], 0.6667),
        ([2, 1, 0, 0], [2, 1, 0, 1], 0, [np.nan, 1, 1], 1.0),
        ([0, 1, 0, 0], [0, 1, 0, 1], 255, [2 / 3, 1 / 2, np.nan], 0.58333),
    ],
)
def test_ious_of_four_pixels_by_hand(labels, predictions, ignored, iou, mean):
    matrix = confusion(torch.tensor([predictions]), torch.tensor([labels]), 3, ignored)[0].numpy()
    assert np.allclose(iou_per_class(matrix), iou, equal_nan=True)
    assert miou(matrix, "nan") == pytest.approx(mean, abs=5e-5)


def test_a_perfect_prediction_of_an_image_that_is_half_void_is_all_right():
    labels = torch.arange(16).view(1, 4, 4) % 3
    predictions, labels[:, 2:] = labels.clone(), 255
    matrix = confusion(predictions, labels, 3)[0].numpy()
    assert matrix.sum() == 8 and aacc(matrix) == 1.0 and miou(matrix) == 1.0


def test_a_stack_of_matrices_gives_each_its_own_figure_and_figures_ignore_the_order_of_classes():
    stack = np.random.default_rng(0).integers(0, 9, (2, 3, K, K))
    stack[0, 0] = 0
    order = [3, 1, 4, 0, 2]
    for figure in (aacc, macc, fwiou, lambda m: miou(m, "nan"), lambda m: miou(m, "gt_only")):
        values = figure(stack)
        assert values.shape == (2, 3) and np.isnan(values[0, 0])
        assert values[1, 2] == pytest.approx(figure(stack[1, 2]))
        assert np.allclose(figure(stack[..., order, :][..., order]), values, equal_nan=True)
