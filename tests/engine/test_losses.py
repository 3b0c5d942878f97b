"""Losses against torch, smp and brute force; what ignored pixels, empty and split batches may change."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.losses import DiceLoss

from engine.config import UserError, component
from engine.losses import cross_entropy, cross_entropy_dice, dice, ohem

IGNORE, CLASSES = 255, 5
PIXELS = torch.tensor([400, 100, 0, 50, 250])
EVERY = {
    "cross_entropy": cross_entropy(None, IGNORE),
    "balanced": cross_entropy(PIXELS, IGNORE, class_weights="balanced", label_smoothing=0.1),
    "ohem_pixels": ohem(None, IGNORE, pixels=7),
    "ohem_fraction": ohem(None, IGNORE, fraction=0.3),
    "dice": dice(None, IGNORE),
    "cross_entropy_dice": cross_entropy_dice(None, IGNORE, dice_weight=0.7),
}
every = pytest.mark.parametrize("loss", EVERY.values(), ids=EVERY.keys())


def batch(seed=0, images=3, shape=(6, 7), ignored=0.3):
    """Logits and labels; the last image has half as many labelled pixels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, CLASSES, *shape, generator=generator)
    labels = torch.randint(0, CLASSES, (images, *shape), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = IGNORE
    if shape:
        labels[-1, : shape[0] // 2] = IGNORE
    return logits, labels


def mean(loss, logits, labels) -> float:
    total, count = loss(logits, labels)
    return (total / count).item()


@pytest.mark.parametrize("kind", ["none", "balanced", "median_frequency"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(), (6, 7)], ids=["classification", "segmentation"])
def test_cross_entropy_is_that_of_torch(kind, smoothing, shape):
    shares = np.array([0.5, 0.125, 0, 0.0625, 0.3125])
    target = {"balanced": 1 / 4, "median_frequency": np.median([0.5, 0.125, 0.0625, 0.3125])}.get(kind)
    expected = None
    if target is not None:
        expected = torch.tensor([1.0 if share == 0 else target / share for share in shares]).float()
    logits, labels = batch(shape=shape)
    loss = cross_entropy(PIXELS, IGNORE, class_weights=kind, label_smoothing=smoothing)
    oracle = F.cross_entropy(logits, labels, expected, ignore_index=IGNORE, label_smoothing=smoothing)
    assert mean(loss, logits, labels) == pytest.approx(oracle.item(), rel=1e-5)


def test_class_weights_need_the_pixels_of_a_training_split():
    with pytest.raises(UserError, match="class_weights: balanced needs the pixel counts"):
        cross_entropy(None, IGNORE, class_weights="balanced")


def pixel_losses(logits, labels):
    """Cross-entropy of the labelled pixels of one image, in numpy."""
    rows = logits.double().flatten(1).T.numpy()
    pairs = zip(rows, labels.flatten().tolist(), strict=True)
    return np.array([np.log(np.exp(row).sum()) - row[label] for row, label in pairs if label != IGNORE])


@pytest.mark.parametrize("pixels", [1, 7, 20, 10_000])
def test_ohem_with_pixels_is_the_mean_of_the_worst_of_each_image(pixels):
    logits, labels = batch()
    labels[1] = IGNORE  # an image without labels is not counted
    images = [np.sort(pixel_losses(logits[row], labels[row]))[::-1][:pixels].mean() for row in (0, 2)]
    total, count = ohem(None, IGNORE, pixels=pixels)(logits, labels)
    assert count == 2
    assert (total / count).item() == pytest.approx(np.mean(images), rel=1e-5)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
def test_ohem_with_fraction_takes_that_share_of_each_image(fraction):
    logits, labels = batch()
    images = []
    for row in range(len(labels)):
        losses = np.sort(pixel_losses(logits[row], labels[row]))[::-1]
        images.append(losses[: max(1, round(fraction * len(losses)))].mean())
    loss = ohem(None, IGNORE, fraction=fraction)
    assert mean(loss, logits, labels) == pytest.approx(np.mean(images), rel=1e-5)


def test_ohem_sends_gradients_to_the_chosen_pixels_only_and_shares_ties():
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 0, 0] = torch.tensor([-3.0, 0.0, 0.0, 5.0])  # label 0: one bad pixel, two that tie, a good one
    logits.requires_grad_()
    total, _ = ohem(None, IGNORE, pixels=2)(logits, torch.zeros(1, 1, 4, dtype=torch.long))
    total.backward()
    slope = logits.grad[0, 1, 0]  # probability of the wrong class x weight / K
    assert slope.tolist() == pytest.approx([0.5 * torch.tensor(3.0).sigmoid().item(), 0.125, 0.125, 0.0])


def test_ohem_refuses_two_sizes():
    with pytest.raises(UserError, match=r"pixels \(5\) or fraction \(0.5\), not both"):
        ohem(None, IGNORE, pixels=5, fraction=0.5)


def test_dice_is_that_of_smp_over_the_classes_of_each_image():
    logits, labels = batch()
    labels[labels == 3] = 1
    images = []
    for row in range(len(labels)):
        present = len(set(labels[row].flatten().tolist()) - {IGNORE})
        oracle = DiceLoss("multiclass", ignore_index=IGNORE)(logits[row : row + 1], labels[row : row + 1])
        images.append(oracle.item() * CLASSES / present)  # smp divides by all classes, absent ones as 0
    assert mean(dice(None, IGNORE), logits, labels) == pytest.approx(np.mean(images), rel=1e-5)


def test_cross_entropy_dice_adds_both_per_image():
    logits, labels = batch()
    parts = [
        mean(cross_entropy(None, IGNORE), logits[row : row + 1], labels[row : row + 1])
        + 0.7 * mean(dice(None, IGNORE), logits[row : row + 1], labels[row : row + 1])
        for row in range(len(labels))
    ]
    assert mean(EVERY["cross_entropy_dice"], logits, labels) == pytest.approx(np.mean(parts), rel=1e-5)


@every
def test_parts_of_a_batch_add_up_to_the_whole(loss):
    logits, labels = batch()
    whole = torch.stack(loss(logits, labels)).tolist()
    parts = sum(torch.stack(loss(logits[cut], labels[cut])) for cut in (slice(0, 1), slice(1, 3)))
    assert parts.tolist() == pytest.approx(whole, rel=1e-5)


@every
def test_ignored_pixels_change_nothing(loss):
    logits, labels = batch()
    before = torch.stack(loss(logits, labels)).tolist()
    other = torch.where((labels == IGNORE)[:, None], -7 * logits, logits).requires_grad_()
    assert torch.stack(loss(other, labels)).tolist() == pytest.approx(before, rel=1e-6)
    loss(other, labels)[0].backward()
    assert other.grad.movedim(1, -1)[labels == IGNORE].abs().max() == 0
    assert other.grad.movedim(1, -1)[labels != IGNORE].abs().max() > 0


@every
@pytest.mark.parametrize("shape", [(), (6, 7)], ids=["classification", "segmentation"])
def test_a_batch_without_labels_is_zero_with_zero_gradients(loss, shape):
    logits, labels = batch(shape=shape)
    logits.requires_grad_()
    total, count = loss(logits, torch.full_like(labels, IGNORE))
    total.backward()
    assert (total.item(), count.item()) == (0, 0)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@every
def test_one_pixel_images_are_classification(loss):
    logits, labels = batch(images=9, shape=())
    flat = torch.stack(loss(logits, labels))
    images = torch.stack(loss(logits[:, :, None, None], labels[:, None, None]))
    assert torch.equal(flat, images)


@every
def test_bf16_logits_are_taken_in_float32(loss):
    logits, labels = batch()
    rounded = logits.bfloat16()
    expected = pytest.approx(loss(rounded.float(), labels)[0].item(), rel=1e-6)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            total, _ = loss(rounded, labels)
        assert total.dtype == torch.float32 and total.item() == expected


@every
def test_memory_format_changes_nothing(loss):
    logits, labels = batch()
    other = logits.contiguous(memory_format=torch.channels_last)
    expected = torch.stack(loss(logits, labels)).tolist()
    assert torch.stack(loss(other, labels)).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["none", "balanced"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("grid", [(12, 14), (15, 21), (6, 7)], ids=["whole", "broken", "as they are"])
def test_upsampled_cross_entropy_is_that_of_upsampled_logits(kind, smoothing, grid):
    loss = cross_entropy(PIXELS, IGNORE, class_weights=kind, label_smoothing=smoothing)
    logits, _ = batch()
    _, labels = batch(shape=(grid[0] - 1, grid[1] - 2))
    whole = F.interpolate(logits, size=grid, mode="bilinear", align_corners=False)[..., :-1, :-2]
    assert torch.stack(loss.upsampled(logits, labels, grid)).tolist() == pytest.approx(
        torch.stack(loss(whole, labels)).tolist(), rel=1e-5
    )


@pytest.mark.parametrize("kind", ["none", "balanced"])
def test_an_upsampled_batch_without_labels_is_zero_with_zero_gradients(kind):
    logits, _ = batch()
    logits.requires_grad_()
    labels = torch.full((3, 12, 14), IGNORE)
    total, count = cross_entropy(PIXELS, IGNORE, class_weights=kind).upsampled(logits, labels, (12, 14))
    total.backward()
    assert (total.item(), count.item()) == (0, 0)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_upsampling_is_left_out_where_it_does_not_pay(monkeypatch):
    taken = []
    monkeypatch.setattr(
        "engine.losses.upsampled_cross_entropy",
        lambda logits, *_: taken.append(tuple(logits.shape)) or logits.sum(),
    )
    logits, _ = batch()
    _, labels = batch(shape=(12, 14))
    cross_entropy(None, IGNORE).upsampled(logits, labels[:, :6, :7], (6, 7))
    cross_entropy(None, IGNORE, label_smoothing=0.1).upsampled(logits, labels, (12, 14))
    assert not taken
    cross_entropy(None, IGNORE).upsampled(logits, labels, (12, 14))
    assert taken == [tuple(logits.shape)]


@pytest.mark.parametrize("name", ["cross_entropy", "ohem", "dice", "cross_entropy_dice"])
def test_every_loss_of_the_table_is_built_from_a_config(name):
    loss = component("engine:LOSSES", name).build(PIXELS, IGNORE)
    logits, labels = batch()
    assert mean(loss, logits, labels) > 0
