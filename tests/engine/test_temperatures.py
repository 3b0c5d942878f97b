"""Temperatures against a brute-force grid and against the laws of scaling, sampled pixels against upsampling."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from engine.config import UserError
from engine.temperatures import COLDEST, HOTTEST, fit_temperature, fit_temperatures, logits_at, sample_pixels


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def calibrated(number, classes=5, scale=2.0):
    """Logits, and labels drawn from their probabilities."""
    logits = scale * torch.randn(number, classes, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(1), 1)[:, 0]


def loss(logits, labels, temperature):
    return F.cross_entropy(logits.double() / temperature, labels).item()


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 3.0, 20.0])
def test_fitted_temperature_beats_every_temperature_of_a_grid(factor):
    logits, labels = calibrated(300)
    fitted = fit_temperature(factor * logits, labels)
    best = loss(factor * logits, labels, fitted)
    assert all(best <= loss(factor * logits, labels, T) + 1e-12 for T in torch.logspace(-2, 2, 2001).tolist())
    for nearby in (fitted * (1 - 1e-4), fitted * (1 + 1e-4)):
        assert best < loss(factor * logits, labels, nearby)


def test_calibrated_logits_get_1_and_scaled_ones_their_scale():
    logits, labels = calibrated(50_000)
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(1, rel=0.03)
    for scale in (0.2, 7.0):
        assert fit_temperature(scale * logits, labels) == pytest.approx(scale * fitted, rel=1e-9)


def test_offsets_of_a_pixel_do_not_matter():
    logits, labels = calibrated(300)
    shifted = logits + 5 * torch.randn(300, 1, dtype=torch.float64)
    assert fit_temperature(shifted, labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-6)


def test_limits_where_logits_are_always_right_or_say_nothing():
    logits, labels = calibrated(200)
    assert fit_temperature(logits, logits.argmax(1)) == COLDEST
    assert fit_temperature(logits, logits.argmin(1)) == HOTTEST
    assert fit_temperature(torch.zeros(200, 5), labels) == HOTTEST
    assert (
        3 < fit_temperature(1e4 * logits, torch.where(torch.rand(200) < 0.9, logits.argmax(1), 0)) <= HOTTEST
    )


@pytest.mark.parametrize("logit_grid", [(12, 16), (48, 64), (3, 4)])
def test_logits_at_pixels_are_those_of_the_upsampled_logits(logit_grid):
    logits = torch.randn(2, 5, *logit_grid)
    full = logits
    if logit_grid != (48, 64):
        full = F.interpolate(logits, size=(48, 64), mode="bilinear", align_corners=False)
    rows, columns = torch.meshgrid(torch.arange(33), torch.arange(50), indexing="ij")
    sampled = logits_at(logits, rows.flatten(), columns.flatten(), (48, 64))
    torch.testing.assert_close(sampled.view(2, 5, 33, 50), full[..., :33, :50], rtol=1e-4, atol=1e-4)


def padded(size):
    return tuple(-(-edge // 16) * 16 for edge in size)


def images(number, experts=2, classes=5, size=(33, 50)):
    """Expert logits, and labels of which every third row is ignored."""
    logits = torch.randn(number, experts, classes, 12, 16)
    labels = torch.randint(classes, (number, *size), dtype=torch.uint8)
    labels[:, ::3] = 255
    return logits, labels


def in_batches(logits, labels, batch_size):
    for start in range(0, len(logits), batch_size):
        part = slice(start, start + batch_size)
        yield SimpleNamespace(logits=logits[part], size=tuple(labels.shape[1:])), labels[part]


def test_sample_is_of_labelled_pixels_seeded_and_the_same_for_any_batch_size():
    logits, labels = images(4)
    draw = lambda batch_size, seed: list(  # noqa: E731
        sample_pixels(in_batches(logits, labels, batch_size), padded, pixels=40, seed=seed)
    )
    one, other, differing = draw(1, 0), draw(3, 0), draw(1, 1)
    for (z, y), (same_z, same_y) in zip(one, other, strict=True):
        torch.testing.assert_close(z, same_z)
        assert torch.equal(y, same_y) and z.shape == (2, 5, 40) and (y < 5).all()
    assert not torch.equal(one[0][1], differing[0][1])
    everything = list(sample_pixels(in_batches(logits, labels, 2), padded, pixels=10**6, seed=0))
    for (_, y), truth in zip(everything, labels, strict=True):
        assert torch.equal(y.sort()[0], truth[truth != 255].long().sort()[0])


def test_every_expert_gets_the_temperature_of_its_own_logits(monkeypatch):
    monkeypatch.setattr("engine.temperatures.PIXELS", 10**6)
    logits, labels = calibrated(33 * 50 * 2, classes=5)
    full = logits.float().T.reshape(5, 2, 33, 50).movedim(1, 0)
    full = F.pad(full, (0, 14, 0, 15))  # the padded grid is 48 x 64, no upsampling
    labels = labels.view(2, 33, 50)
    experts = torch.stack([0.5 * full, 4 * full], dim=1)
    cold, hot = fit_temperatures(in_batches(experts, labels, 1), padded)
    alone = fit_temperature(logits, labels.flatten())
    assert cold == pytest.approx(0.5 * alone, rel=1e-3) and hot == pytest.approx(4 * alone, rel=1e-3)


def test_without_a_label_there_is_nothing_to_fit():
    logits, labels = images(2)
    with pytest.raises(UserError, match=r"gate\.calibrate: no pixel of the validation frames has a label"):
        fit_temperatures(in_batches(logits, torch.full_like(labels, 255), 1), padded)
