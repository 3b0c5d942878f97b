"""Values of the losses by hand, and what holds for all logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks import pixel_losses
from attacks.pixel_losses import LOSSES, RESTLESS, image_loss, targeted_dlr
from attacks.threat import Threat
from engine.config import UserError, signature_of

THREAT = Threat(0.1, ignore_index=None)


def value(loss, logits, label, progress=0.0, threat=THREAT):
    return image_loss(
        loss, torch.tensor([logits], dtype=torch.float32), torch.tensor([label]), threat, progress
    ).item()


def gradient(loss, logits, label, progress=0.0, threat=THREAT):
    leaf = torch.tensor([logits], dtype=torch.float32, requires_grad=True)
    return torch.autograd.grad(image_loss(loss, leaf, torch.tensor([label]), threat, progress).sum(), leaf)[
        0
    ][0]


@pytest.mark.parametrize(
    ("classes", "expected"), [(2, 0.215762), (3, 0.318257), (21, 0.596291), (38, 0.631955)]
)
def test_jensen_shannon_of_equal_probabilities(classes, expected):
    assert value("jensen_shannon", [1.5] * classes, 0) == pytest.approx(expected, abs=1e-6)


def test_jensen_shannon_gradient_at_equal_probabilities():
    expected = [-0.154033, 0.077016, 0.077016]
    assert gradient("jensen_shannon", [0, 0, 0], 0).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("gap", [-1e30, -1e4, -200, -104, -5, 0, 5, 104, 200, 1e4, 1e30])
def test_jensen_shannon_is_finite_at_any_gap(gap):
    found = value("jensen_shannon", [gap, 0], 0)
    assert -1e-7 <= found <= math.log(2) + 1e-7
    assert gradient("jensen_shannon", [gap, 0], 0).isfinite().all()
    assert found == pytest.approx(math.log(2) if gap < -100 else 0.0 if gap > 100 else found, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=8), st.integers(0, 7))
def test_jensen_shannon_is_the_divergence_by_its_definition(logits, label):
    label %= len(logits)
    p = torch.tensor(logits, dtype=torch.float64).softmax(0)
    q = F.one_hot(torch.tensor(label), len(logits)).double()
    middle = (p + q) / 2
    expected = (torch.special.xlogy(p, p / middle) + torch.special.xlogy(q, q / middle)).sum() / 2
    assert value("jensen_shannon", logits, label) == pytest.approx(expected.item(), abs=2e-6)


def test_cospgd_weight():
    ce = value("ce", [2, 1, 0], 0)
    assert value("cospgd", [2, 1, 0], 0) == pytest.approx(0.931028 * ce, abs=1e-6)
    assert torch.allclose(
        gradient("cospgd", [2, 1, 0], 0), 0.931028 * gradient("ce", [2, 1, 0], 0), atol=1e-6
    )


def test_segpgd_lambda_over_ten_steps():
    right, wrong = value("ce", [2, 1, 0], 0), value("ce", [2, 1, 0], 1)
    shares = [value("segpgd", [2, 1, 0], 1, step / 10) / wrong for step in range(10)]
    assert shares == pytest.approx([0.05 * step for step in range(10)])
    shares = [value("segpgd", [2, 1, 0], 0, step / 10) / right for step in range(10)]
    assert shares == pytest.approx([1 - 0.05 * step for step in range(10)])


def test_dlr():
    assert value("dlr", [3, 1, 0, -1], 0) == pytest.approx(-0.666667, abs=1e-6)
    assert value("dlr", [3, 1, 0, -1], 1) == pytest.approx(0.666667, abs=1e-6)
    assert value("dlr", [5 * z + 7 for z in (3, 1, 0, -1)], 0) == pytest.approx(-0.666667, abs=1e-6)
    logits = torch.tensor([[3.0, 1, 0, -1]])
    towards = targeted_dlr(logits, torch.tensor([0]), torch.tensor([1]))
    assert towards.item() == pytest.approx(-0.571429, abs=1e-6)
    assert targeted_dlr(5 * logits + 7, torch.tensor([0]), torch.tensor([1])).item() == pytest.approx(
        towards.item()
    )


def test_dlr_refuses_too_few_classes():
    with pytest.raises(UserError, match="loss dlr: needs at least 3 classes, found 2"):
        value("dlr", [3, 1], 0)
    with pytest.raises(UserError, match="targeted dlr: needs at least 4 classes, found 3"):
        targeted_dlr(torch.zeros(1, 3), torch.tensor([0]), torch.tensor([1]))


def test_margin():
    assert value("margin", [3, 1, 0.5], 0) == -2
    assert value("margin", [3, 1, 0.5], 1) == 2
    assert gradient("margin", [3, 1, 0.5], 2).tolist() == [1, 0, -1]


@pytest.mark.parametrize("loss", ["masked_ce", "masked_spherical", "balanced_masked_ce"])
def test_masked_losses_let_go_of_pixels_that_are_wrong(loss):
    threat = Threat(0.1, ignore_index=None, class_weights=torch.tensor([3.0, 1.0, 1.0]))
    assert gradient(loss, [2, 1, 0], 1, threat=threat).tolist() == [0, 0, 0]
    assert value(loss, [2, 1, 0], 1, threat=threat) == 0
    assert gradient(loss, [2, 1, 0], 0, threat=threat).abs().max() > 0.1


def test_gradients_as_a_pixel_gets_more_wrong():
    """Cross-entropy pulls ever harder, Jensen-Shannon and Tsallis with q < 1 let go."""
    gaps = (0.0, -2.0, -4.0, -8.0)
    strength = {
        loss: [gradient(loss, [gap, 0.0, 0.0], 0).norm().item() for gap in gaps]
        for loss in ("ce", "jensen_shannon", "tsallis")
    }
    assert strength["ce"] == sorted(strength["ce"]) and strength["ce"][0] < strength["ce"][-1]
    assert strength["jensen_shannon"] == sorted(strength["jensen_shannon"], reverse=True)
    assert strength["jensen_shannon"][-1] < 0.01 and strength["tsallis"][-1] < 1e-6


def test_balanced_masked_ce_weighs_classes():
    threat = Threat(0.1, ignore_index=None, class_weights=torch.tensor([3.0, 0.5, 1.0]))
    assert value("balanced_masked_ce", [2, 1, 0], 0, threat=threat) == pytest.approx(
        3 * value("ce", [2, 1, 0], 0)
    )
    assert value("balanced_masked_ce", [1, 2, 0], 1, threat=threat) == pytest.approx(
        0.5 * value("ce", [2, 1, 0], 0)
    )
    with pytest.raises(UserError, match="needs class weights"):
        value("balanced_masked_ce", [2, 1, 0], 0)
    with pytest.raises(UserError, match="3 class weights for 2 classes"):
        value("balanced_masked_ce", [2, 1], 0, threat=threat)


def test_masked_spherical_is_the_normalised_logit():
    assert value("masked_spherical", [3, 4, 0], 1) == pytest.approx(-0.8)
    assert value("masked_spherical", [30, 40, 0], 1) == pytest.approx(-0.8)


def test_tsallis_goes_from_q_minus_2_to_cross_entropy():
    p = torch.tensor([2.0, 1.0, 0.0]).softmax(0)[0].item()
    for progress, q in ((0.0, -2.0), (0.5, -0.5), (0.9, 0.7)):
        expected = -(p ** (1 - q) - 1) / (1 - q)
        assert value("tsallis", [2, 1, 0], 0, progress) == pytest.approx(expected, rel=1e-5)
    assert value("tsallis", [2, 1, 0], 0, 1.0) == pytest.approx(value("ce", [2, 1, 0], 0))
    assert value("tsallis", [2, 1, 0], 0, 0.9999999) == pytest.approx(value("ce", [2, 1, 0], 0), rel=1e-5)


def test_cross_entropy_is_torchs():
    logits, labels = torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    expected = F.cross_entropy(logits, labels, reduction="none").mean(dim=(1, 2))
    assert torch.allclose(image_loss("ce", logits, labels, THREAT), expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("ignore_index", [255, -1])
def test_ignored_pixels_change_neither_loss_nor_gradient(loss, ignore_index):
    threat = Threat(0.1, ignore_index=ignore_index, class_weights=torch.rand(4))
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 3, 4), torch.randint(4, (2, 3, 4))
    labels[:, 1] = ignore_index
    void = (labels == ignore_index).unsqueeze(1)

    def of(logits, labels, threat):
        leaf = logits.clone().requires_grad_()
        found = image_loss(loss, leaf, labels, threat, 0.5)
        return found.detach(), torch.autograd.grad(found.sum(), leaf)[0]

    found, slope = of(logits, labels, threat)
    other, other_slope = of(torch.where(void, torch.randn_like(logits), logits), labels, threat)
    assert torch.equal(found, other) and torch.equal(slope, other_slope)
    assert (slope.masked_select(void) == 0).all()
    seen = [0, 2]
    expected, _ = of(
        logits[:, :, seen],
        labels[:, seen],
        Threat(0.1, ignore_index=None, class_weights=threat.class_weights),
    )
    assert torch.allclose(found, expected, atol=1e-6)


def test_an_image_without_labels_has_no_loss():
    labels = torch.full((1, 2, 2), 255)
    assert image_loss("ce", torch.randn(1, 3, 2, 2), labels, Threat(0.1)).tolist() == [0]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_class_label_is_a_map_of_one_pixel(loss):
    torch.manual_seed(0)
    threat = Threat(0.1, ignore_index=None, class_weights=torch.rand(4))
    logits, labels = torch.randn(3, 4), torch.randint(4, (3,))
    of_labels = image_loss(loss, logits, labels, threat, 0.3)
    of_maps = image_loss(loss, logits[:, :, None, None], labels[:, None, None], threat, 0.3)
    assert of_labels.shape == (3,) and torch.allclose(of_labels, of_maps)


@pytest.mark.parametrize("attack", ["attacks.pgd:pgd", "attacks.pgd:fgsm", "attacks.apgd:apgd"])
def test_configs_allow_the_losses_that_there_are(attack):
    loss = signature_of(attack).types["loss"]
    assert {loss.validate_python(name) for name in LOSSES} == set(LOSSES)
    with pytest.raises(ValueError, match="Input should be"):
        loss.validate_python("cross_entropy")
    assert set(RESTLESS) < set(LOSSES)
    assert all(getattr(pixel_losses, name) is function for name, function in LOSSES.items())
