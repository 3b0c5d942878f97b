"""Cross-entropy of upsampled logits against the plain way: interpolate, crop, F.cross_entropy, backward."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import engine.upsampled
from engine.upsampled import upsample, upsampled_cross_entropy
from networks import resize

IGNORE, CLASSES = 255, 5
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 3.0, 0.0])
# logits, grid, labels: whole ratios, broken ones, cropped, a single place, one axis as it is, smaller
SIZES = {
    "4": ((6, 8), (24, 32), (24, 32)),
    "cropped": ((6, 8), (24, 32), (19, 27)),
    "broken": ((7, 10), (24, 33), (24, 33)),
    "broken, cropped": ((5, 9), (13, 32), (11, 18)),
    "one place": ((1, 1), (5, 7), (4, 7)),
    "one axis": ((6, 16), (24, 16), (23, 15)),
    "smaller": ((12, 9), (7, 5), (6, 5)),
}
sizes = pytest.mark.parametrize("shapes", SIZES.values(), ids=SIZES.keys())


@pytest.fixture(params=["small pieces", "one piece"])
def pieces(request, monkeypatch):
    """Bands of three rows and stripes of five columns, or everything in one."""
    band, columns = (3 * CLASSES * 30, 5) if request.param == "small pieces" else (10**9, 10**9)
    monkeypatch.setattr(engine.upsampled, "BAND", band)
    monkeypatch.setattr(engine.upsampled, "COLUMNS", columns)


def batch(shapes, dtype=torch.float32, images=2, ignored=0.3, seed=0):
    """Logits [B, C, h, w], labels of one image in full and of the others in part."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, CLASSES, *shapes[0], generator=generator, dtype=dtype)
    labels = torch.randint(0, CLASSES, (images, *shapes[2]), generator=generator)
    unknown = torch.rand(labels.shape, generator=generator) < ignored
    unknown[0] = False
    return logits.requires_grad_(), labels.masked_fill(unknown, IGNORE)


def plain(logits, labels, grid, weights=None):
    whole = F.interpolate(logits, size=grid, mode="bilinear", align_corners=False)
    whole = whole[..., : labels.shape[1], : labels.shape[2]]
    return F.cross_entropy(whole, labels, weights, ignore_index=IGNORE, reduction="sum")


def value_and_gradient(loss, logits):
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


def close(found, expected, relative):
    scale = expected.abs().max()
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert (found - expected).abs().max() <= relative * scale


@sizes
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype, relative", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_it_is_the_loss_of_the_upsampled_logits(pieces, shapes, weights, dtype, relative):
    logits, labels = batch(shapes, dtype)
    weights = None if weights is None else weights.to(dtype)
    found = upsampled_cross_entropy(logits, labels, shapes[1], IGNORE, weights)
    found, gradient = value_and_gradient(found, logits)
    expected, expected_gradient = value_and_gradient(plain(logits, labels, shapes[1], weights), logits)
    close(found, expected, relative)
    close(gradient, expected_gradient, relative)


@sizes
def test_numerical_gradients_agree(pieces, shapes):
    logits, labels = batch(shapes, torch.float64, images=1)
    assert torch.autograd.gradcheck(
        lambda values: 0.7 * upsampled_cross_entropy(values, labels, shapes[1], IGNORE, WEIGHTS), logits
    )


def test_upsample_is_that_of_the_networks():
    logits, _ = batch(SIZES["cropped"])
    assert torch.equal(upsample(logits, (32, 32), (19, 27)), resize.upsample(logits, (19, 27), 16))
    whole = torch.randn(2, CLASSES, 32, 32)
    assert torch.equal(upsample(whole, (32, 32), (19, 27)), resize.upsample(whole, (19, 27), 16))


def test_without_labels_it_is_zero_with_zero_gradients():
    logits, labels = batch(SIZES["cropped"])
    loss = upsampled_cross_entropy(logits, torch.full_like(labels, IGNORE), (24, 32), IGNORE)
    total, gradient = value_and_gradient(loss, logits)
    assert total == 0 and torch.equal(gradient, torch.zeros_like(logits))


def test_extreme_logits_stay_finite_and_right():
    logits, labels = batch(SIZES["broken"])
    extreme = (1e3 * logits.detach()).requires_grad_()
    found = value_and_gradient(upsampled_cross_entropy(extreme, labels, (24, 33), IGNORE), extreme)
    expected = value_and_gradient(plain(extreme, labels, (24, 33)), extreme)
    close(found[0], expected[0], 1e-5)
    close(found[1], expected[1], 2e-3)  # one step of float32 at 3000 shifts a softmax by that much


def test_layout_and_kind_of_labels_change_nothing():
    logits, labels = batch(SIZES["cropped"])
    expected = value_and_gradient(upsampled_cross_entropy(logits, labels, (24, 32), IGNORE), logits)
    other = logits.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    found = value_and_gradient(upsampled_cross_entropy(other, labels.byte(), (24, 32), IGNORE), other)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_logits_are_taken_in_float32(autocast):
    logits, labels = batch(SIZES["cropped"])
    rounded = logits.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = upsampled_cross_entropy(rounded, labels, (24, 32), IGNORE)
        exact = upsampled_cross_entropy(rounded.detach().float(), labels, (24, 32), IGNORE)
    assert loss.dtype == torch.float32 and torch.equal(loss.detach(), exact)
    assert value_and_gradient(loss, rounded)[1].dtype == torch.bfloat16


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_it_is_the_same_every_time_and_for_any_number_of_threads(threads):
    shapes = ((30, 40), (120, 160), (120, 160))
    logits, labels = batch(shapes, images=5)
    found = []
    for number in (1, 1, 2, 3):
        threads(number)
        found.append(value_and_gradient(upsampled_cross_entropy(logits, labels, shapes[1], IGNORE), logits))
    assert all(torch.equal(value, found[0][0]) and torch.equal(slope, found[0][1]) for value, slope in found)


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_threads_share_no_operation_and_torch_keeps_its_number(threads, monkeypatch):
    threads(3)
    seen, lines = [], engine.upsampled._lines
    monkeypatch.setattr(
        engine.upsampled, "_lines", lambda *of: seen.append(torch.get_num_threads()) or lines(*of)
    )
    logits, labels = batch(SIZES["4"])
    upsampled_cross_entropy(logits, labels, (24, 32), IGNORE)
    assert set(seen) == {1}
    assert torch.get_num_threads() == threads_of_a_new_thread() == 3


def test_a_label_that_is_no_class_is_refused(threads):
    threads(2)
    logits, labels = batch(SIZES["4"])
    labels[0, 0, 0] = CLASSES
    with pytest.raises((IndexError, RuntimeError)):
        upsampled_cross_entropy(logits, labels, (24, 32), IGNORE)
    assert torch.get_num_threads() == threads_of_a_new_thread() == 2
