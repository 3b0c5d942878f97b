"""Interval bounds: exact where they are exact, and never above what an attack leaves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attacks.pgd import pgd
from attacks.threat import Threat
from evaluation.certificate import (
    Certified,
    bounds,
    certify,
    certify_mixture,
    certify_targets,
    is_supported,
)
from evaluation.plan import Scene, Setup
from evaluation.targets import target_of
from networks.ensemble import Ensemble, mean
from networks.external import External
from networks.gates import ClasswiseGate, SimpleGate
from networks.moe import Frozen, MixtureOfExperts
from networks.normalize import Normalize
from networks.spatial_gate import SpatialGate


def survives(weight, bias, points, labels, eps):
    """Closed form of a linear map: inputs [N, D], labels [N]."""
    weight, bias, points = weight.double(), bias.double(), points.double()
    lowest, highest = (-points).clamp_min(-eps), (1 - points).clamp_max(eps)
    logits, rows, safe = points @ weight.T + bias, torch.arange(len(points)), torch.ones(len(points)).bool()
    for rival in range(len(weight)):
        difference = weight[labels] - weight[rival]
        worst = torch.minimum(difference * lowest, difference * highest).sum(dim=1)
        safe &= (logits[rows, labels] - logits[:, rival] + worst > 0) | (labels == rival)
    return safe


@pytest.mark.parametrize("eps", [0.0, 0.002, 0.01, 0.05])
def test_the_certificate_of_a_linear_classifier_is_exact(eps):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).eval()
    images = torch.rand(300, 3, 4, 4)
    labels = network(images).argmax(1)
    expected = survives(network[1].weight, network[1].bias, images.flatten(1), labels, eps)
    found = certify(network, images, labels, eps, None)
    assert torch.equal(found.right, expected) and (eps == 0) == expected.all().item()
    assert expected.any()


def test_the_certificate_of_a_pixelwise_segmenter_is_exact():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    images, labels = torch.rand(2, 3, 16, 16), torch.randint(4, (2, 16, 16))
    labels = torch.where(torch.rand(labels.shape) < 0.8, network(images).argmax(1), labels)
    labels[:, :2] = 255
    flat, kept = images.permute(0, 2, 3, 1).reshape(-1, 3), labels.flatten()
    weight = network[0].weight.flatten(1)
    expected = survives(weight, network[0].bias, flat, kept.where(kept != 255, 0), 0.02) & (kept != 255)
    found = certify(network, images, labels, 0.02).right
    assert torch.equal(found.flatten(), expected) and 0.2 < expected.double().mean() < 0.8


def layers():
    """name -> (layer, shape of its input)"""
    norm = nn.BatchNorm2d(4)
    norm.running_mean, norm.running_var = torch.randn(4), torch.rand(4) + 0.5
    norm.weight.data, norm.bias.data = torch.randn(4), torch.randn(4)
    return {
        "linear": (nn.Linear(6, 5), (6,)),
        "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (4, 9, 9)),
        "norm": (norm, (4, 3, 3)),
        "relu": (nn.ReLU(inplace=True), (4, 3, 3)),
        "tanh": (nn.Tanh(), (4,)),
        "average": (nn.AvgPool2d(2), (4, 6, 6)),
        "adaptive": (nn.AdaptiveAvgPool2d(2), (4, 5, 5)),
        "maximum": (nn.MaxPool2d(2), (4, 6, 6)),
        "normalize": (Normalize(std=(0.2, -0.3, 0.4)), (3, 4, 4)),  # upside down in one channel
        "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), (4, 3, 3)),
        "nearest": (nn.Upsample(size=(7, 5), mode="nearest"), (4, 3, 3)),
        "flatten": (nn.Flatten(), (4, 3, 3)),
    }


@torch.no_grad()
@pytest.mark.parametrize("kind", layers())
def test_bounds_hold_at_random_points_and_are_reached_at_corners(kind):
    torch.manual_seed(1)
    layer, shape = layers()[kind]
    layer.double().eval()
    low = torch.randn(1, *shape, dtype=torch.float64)
    high = low + torch.rand(1, *shape, dtype=torch.float64)
    least, most = bounds(layer, low.clone(), high.clone())
    assert is_supported(layer) and least.shape == most.shape
    for _ in range(50):
        inside = low + torch.rand_like(low) * (high - low)
        out = layer(inside)
        assert (out >= least - 1e-9).all() and (out <= most + 1e-9).all()
    for index in torch.randperm(least.numel())[:10].tolist():  # each output by itself: the corner it asks for
        leaf = ((low + high) / 2).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(layer(leaf * 1.0).flatten()[index], leaf)
        corner = torch.where(gradient > 0, low, high)
        if kind not in ("relu", "maximum"):
            assert layer(corner).flatten()[index].item() == pytest.approx(
                least.flatten()[index].item(), abs=1e-9
            )


def network(seed, *tail):
    torch.manual_seed(seed)
    body = [Normalize(), nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2)]
    return (
        nn.Sequential(nn.Sequential(*body), nn.Conv2d(6, 4, 3, padding=1), *tail).requires_grad_(False).eval()
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.5, 2.0]), st.booleans())
def test_nothing_that_is_certified_falls_to_an_attack(seed, eps, headed):
    """eps in /255; headed: differences of logits are bounded in the last convolution, before upsampling."""
    up = nn.Upsample(scale_factor=2, mode="bilinear")
    model = network(seed, up) if headed else network(seed, up, nn.Tanh())
    images = torch.rand(2, 3, 8, 8)
    labels = model(images).argmax(1)
    found = certify(model, images, labels, eps / 255)
    assert found.reason == "" and (
        found.right.any() or eps == 2.0
    )  # of a wide ball, hardly any network has some
    threat = Threat(eps / 255, seeds=(0, 1))
    for loss in ("margin", "masked_ce"):
        attacked = pgd(model, images, labels, threat, loss=loss, steps=10)
        for points in (attacked.images, attacked.balanced):
            assert (model(points).argmax(1) == labels)[found.right].all()
    without = certify(nn.Sequential(*model, nn.Hardtanh(-1e9, 1e9)), images, labels, eps / 255)
    assert without.right is None


def test_bounding_differences_certifies_more():
    """A monotone layer of slope 1 at the end hides that the last convolution is linear."""

    same = nn.MaxPool2d(1)
    images = torch.rand(4, 3, 8, 8)
    model = network(0, nn.Upsample(scale_factor=2, mode="bilinear"))
    labels = model(images).argmax(1)
    folded, plain = (
        certify(one, images, labels, 1 / 255).right for one in (model, nn.Sequential(model, same))
    )
    assert folded[plain].all() and folded.sum() > plain.sum() > 0


class Standardised(nn.Conv2d):
    """A convolution with another weight than the one that it holds."""

    def forward(self, values):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return nn.functional.conv2d(values, weight / weight.std(), self.bias)


class OfImage(nn.Module):
    """Divides each image by its own spread."""

    def forward(self, images):
        return (images - images.mean()) / images.std()


OfImage.__name__ = "Normalize"


def hooked():
    layer = nn.Conv2d(3, 4, 1)
    layer.register_forward_hook(lambda module, values, out: -out)
    return layer


def hooked_chain():
    layer = nn.Sequential(nn.Conv2d(3, 4, 1))
    layer.register_forward_pre_hook(lambda module, values: (-values[0],))
    return layer


def replaced():
    layer = nn.Conv2d(3, 4, 1)
    layer.forward = lambda values: -values
    return layer


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (Standardised(3, 4, 1), "Standardised"),
        (OfImage(), "Normalize"),
        (hooked(), "Conv2d"),
        (hooked_chain(), "Sequential"),
        (replaced(), "Conv2d"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), "ParametrizedConv2d"),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "Conv2d"),
        (nn.Upsample(scale_factor=2, mode="bicubic"), "Upsample"),
        (nn.GELU(), "GELU"),
        (nn.BatchNorm2d(3).train(), "BatchNorm2d"),
        (nn.Dropout(0.5).train(), "Dropout"),
    ],
)
def test_other_layers_get_none(layer, name):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), layer, nn.Conv2d(layer(torch.rand(1, 3, 4, 4)).shape[1], 4, 1))
    found = certify(model, torch.rand(1, 3, 4, 4), torch.zeros(1, 4, 4).long(), 0.01)
    assert found.right is None and found.reason == f"none computed: no interval bounds through {name}"


# --- mixtures


class Expert(nn.Sequential):
    """A chain of layers that is an expert: its logits have the size of the image."""

    stride, num_classes, feature_channels = 1, 4, 4

    def __init__(self):
        super().__init__(Normalize(), nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))

    def forward_features(self, images):
        logits = self(images)
        return logits, logits


def mixture(gate=SimpleGate, **keys):
    torch.manual_seed(0)
    experts = {"a": Expert(), "b": Expert()}
    experts["b"].load_state_dict(
        {k: v + 0.02 * torch.randn_like(v) for k, v in experts["a"].state_dict().items()}
    )
    model = MixtureOfExperts(experts, gate(8, 2, 4), 4, **keys).requires_grad_(False).eval()
    images = torch.rand(2, 3, 8, 8)
    return model, images, model.experts[0](images).argmax(1)


def test_a_mixture_is_certified_where_all_experts_are():
    model, images, labels = mixture()
    found = certify_mixture(model, images, labels, 0.5 / 255)
    each = [certify(expert, images, labels, 0.5 / 255).right for expert in model.experts]
    assert torch.equal(found.right, each[0] & each[1]) and not torch.equal(*each)
    assert found.right.sum() > 20
    for weight in torch.linspace(0, 1, 5).tolist():
        weights = torch.tensor([weight, 1 - weight]).view(1, 2, 1, 1, 1).expand(2, -1, -1, -1, -1)
        points = (images + 0.5 / 255 * torch.randn(images.shape).sign()).clamp(0, 1)
        assert (model.forward_given(points, weights).argmax(1) == labels)[found.right].all()


@pytest.mark.parametrize(
    ("gate", "keys", "reason"),
    [
        (ClasswiseGate, {}, "the gate has more than one weight per expert and image"),
        (SpatialGate, {}, "the gate has more than one weight per expert and image"),
        (SimpleGate, {"conv": True}, "the mixture is no weighted sum of its experts' logits"),
        (SimpleGate, {"mix": "probs"}, "the mixture is no weighted sum of its experts' logits"),
    ],
)
def test_other_mixtures_get_none(gate, keys, reason):
    model, images, labels = mixture(gate, **keys)
    if keys.get("conv"):
        nn.init.normal_(model.conv.weight)
    found = certify_mixture(model, images, labels, 0.5 / 255)
    assert found.right is None and found.reason == f"none computed: {reason}"


def test_experts_that_are_no_chain_get_none():
    model, images, labels = mixture()
    model.experts[1].network.append(nn.GELU())
    assert (
        certify_mixture(model, images, labels, 0.001).reason
        == "none computed: no interval bounds through GELU"
    )


def scenes(count=2):
    dice = torch.Generator().manual_seed(5)
    images = torch.rand(count, 2, 3, 8, 8, generator=dice)
    for batch, one in enumerate(images):
        labels = torch.randint(0, 4, (2, 8, 8), generator=dice)
        labels[0, 0] = 255
        yield Scene(one, labels, (f"{batch}a", f"{batch}b"), (f"{batch}", f"{batch}"))


SMALL = """
import torch
from torch import nn

def build(num_classes, stride=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride, 1), nn.ReLU(), nn.Conv2d(4, num_classes, 1))
"""


def external(folder, **keys):
    (folder / "net.py").write_text(SMALL)
    return External(3, file=str(folder / "net.py"), **keys).eval()


def test_an_external_network_is_certified_as_what_it_holds(tmp_path):
    images, labels = torch.rand(2, 3, 8, 8), torch.randint(3, (2, 8, 8))
    network = external(tmp_path, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.2])
    inside = nn.Sequential(network.normalize, network.network).eval()
    found = certify(network, images, labels, 0.002)
    assert torch.equal(found.right, certify(inside, images, labels, 0.002).right) and found.right.any()
    assert torch.equal(certify(Frozen(network), images, labels, 0.002).right, found.right)
    right = network(images).argmax(1) == labels
    assert torch.equal(
        certify(external(tmp_path), images, labels, 0.0).right, external(tmp_path)(images).argmax(1) == labels
    )
    assert (right | ~found.right).all()
    assert certify(external(tmp_path, stride=4), images, labels, 0.002).reason.endswith("through External")


def test_smaller_logits_are_certified_at_the_size_of_the_image(tmp_path):
    network, images = external(tmp_path, args={"stride": 2}), torch.rand(2, 3, 8, 8)
    labels = network(images).argmax(1)
    assert certify(network, images, labels, 0.0).right.all()
    found = certify(network, images, labels, 0.004).right
    threat = Threat(0.004, "linf", None, (0, 1))
    attacked = pgd(network, images, labels, threat, steps=20).images
    assert found.any() and (network(attacked).argmax(1) == labels)[found].all()


def test_a_network_that_is_no_module_gets_none(tmp_path):
    (tmp_path / "net.py").write_text("def build(num_classes):\n    return lambda images: images\n")
    network = External(3, file=str(tmp_path / "net.py"))
    images, labels = torch.rand(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    assert "no interval bounds through" in certify(network, images, labels, 0.1).reason


def test_shares_of_targets_are_taken_over_all_labelled_pixels_of_all_batches():
    model, _, _ = mixture()
    targets = [target_of("moe", model), target_of("net", model.experts[0])]
    setup = Setup(("a", "b", "c", "d"), (0.25 / 255, 1 / 255))
    found = {(one.model, one.eps): one for one in certify_targets(targets, list(scenes()), setup)}
    assert list(found) == [(name, eps) for name in ("moe", "net") for eps in setup.eps]
    for name, check, network in (("moe", certify_mixture, model), ("net", certify, model.experts[0])):
        right = sum(int(check(network, s.images, s.labels, 1 / 255).right.sum()) for s in scenes())
        assert found[name, 1 / 255] == Certified(name, 1 / 255, right / (2 * (2 * 64 - 8)), "", 4)
        assert found[name, 0.25 / 255].value > found[name, 1 / 255].value > 0


def test_targets_without_a_certificate_say_why_and_run_no_further_batch():
    model, _, _ = mixture(ClasswiseGate)
    ensemble = Ensemble({"a": model.experts[0], "b": model.experts[1]}, mean).eval()
    setup = Setup(("a", "b", "c", "d"), (1 / 255,))
    seen = []

    def watched():
        for scene in scenes():
            seen.append(scene)
            yield scene

    targets = [target_of("moe", model), target_of("mean", ensemble)]
    for target in targets:
        (found,) = certify_targets([target], watched(), setup)
        assert found.value is None and found.reason.startswith("none computed: ")
    assert len(seen) == 2
    (found,) = certify_targets(
        [target_of("net", model.experts[0])], watched(), Setup(setup.classes, (1.0,), norm="l2")
    )
    assert found.value is None and "for linf" in found.reason and len(seen) == 2
