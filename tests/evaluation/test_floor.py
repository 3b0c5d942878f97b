"""The gate-free floor against all vertices of the weights, tried one by one."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evaluation.floor import gate_free_floor
from networks.cnn_moe.model import CNNMoE
from networks.gates import ClasswiseGate, SimpleGate
from networks.mixture import ExpertOutputs, Mixture
from networks.spatial_gate import SpatialGate

GATES = {
    "simple": SimpleGate,
    "classwise": ClasswiseGate,
    "spatial": SpatialGate,
    "spatial, per class": lambda *shape: SpatialGate(*shape, per_class=True),
}


class Given(Mixture):
    """A real mixture of given expert logits [B, E, C, h, w] on a grid of stride `scale`."""

    def __init__(self, expert_logits, scale, gate="simple", **keys):
        _, experts, classes, *_ = expert_logits.shape
        names = tuple(map(str, range(experts)))
        super().__init__(names, GATES[gate](2 * experts, experts, classes), classes, scale, **keys)
        self.expert_logits = expert_logits
        if keys.get("conv"):
            nn.init.normal_(self.conv.weight, std=0.4)
        self.requires_grad_(False).eval()

    def run_experts(self, images):
        batch, experts, _, *grid = self.expert_logits.shape
        features = [torch.rand(batch, 2, *grid) for _ in range(experts)]
        return ExpertOutputs(self.expert_logits, features, images, tuple(images.shape[-2:]))


def case(seed, experts=2, classes=3, gate="simple", scale=2, size=(6, 8), **keys):
    """(mixture, images, labels that every other pixel's experts agree on)"""
    torch.manual_seed(seed)
    grid = [-(-edge // scale) for edge in size]
    expert_logits = torch.randn(2, 1, classes, *grid) + 0.7 * torch.randn(2, experts, classes, *grid)
    model = Given(expert_logits, scale, gate, **keys)
    uniform = torch.full((2, experts, 1, 1, 1), 1 / experts)
    images = torch.rand(2, 3, *size)
    return model, images, model.forward_given(images, uniform).argmax(1)


def right_at_all_vertices(model, images, labels, classes):
    """Every choice of an expert for each of the gate's classes."""
    experts, right = model.num_experts, torch.ones_like(labels, dtype=torch.bool)
    for choice in itertools.product(range(experts), repeat=classes):
        weights = (
            F.one_hot(torch.tensor(choice), experts).T.float()[None, :, :, None, None].expand(2, -1, -1, 1, 1)
        )
        right &= model.forward_given(images, weights).argmax(1) == labels
    return right


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(2, 3),
    st.integers(2, 4),
    st.sampled_from(["simple", "classwise"]),
    st.sampled_from([{}, {"conv": True}, {"conv": True, "conv_at": "full"}, {"mix": "log_probs"}]),
    st.sampled_from([1, 2, 4]),
)
def test_the_floor_is_what_holds_at_all_vertices(seed, experts, classes, gate, keys, scale):
    """At full size, upsampling and convolution included; sizes that the stride doesn't divide too."""
    model, images, labels = case(seed, experts, classes, gate, scale, size=(6, 7), **keys)
    expected = right_at_all_vertices(model, images, labels, classes if gate == "classwise" else 1)
    found = gate_free_floor(model, images, labels)
    assert found.reason == "" and torch.equal(found.right, expected)


@pytest.mark.parametrize("routing", ["soft", "top1"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("conv", [False, True])
def test_no_weights_go_below_the_floor(gate, conv, routing):
    reached = 0
    for seed in range(8):
        model, images, labels = case(seed, gate=gate, conv=conv, routing=routing)
        found = gate_free_floor(model, images, labels)
        if gate.startswith("spatial") and conv:
            assert found.right is None
            assert (
                found.reason == "none: a spatial gate before a convolution, or one that mixes no plain logits"
            )
            continue
        shape = model.gate_logits(images)[0].shape
        for _ in range(20):
            weights = model.route(5 * torch.randn(shape))
            right = model.forward_given(images, weights).argmax(1) == labels
            assert right[found.right].all()
        reached += found.right.sum().item()
    assert reached > 100 or conv


@pytest.mark.parametrize("gate", ["spatial", "spatial, per class"])
def test_the_floor_of_a_spatial_gate_is_exact_for_weights_of_each_place(gate):
    """One pixel of the logits' grid after another, upsampled by hand: the four places a pixel is made of."""
    model, images, labels = case(3, gate=gate, scale=2, size=(4, 4))
    z, found = model.expert_logits, gate_free_floor(model, images, labels).right
    place = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1)
    unit = F.interpolate(torch.eye(4).view(1, 4, 2, 2), size=(4, 4), mode="bilinear")[0]  # [4 places, 4, 4]
    for b, (y, x) in itertools.product(range(2), place.view(-1, 2).tolist()):
        label, share = labels[b, y, x], unit[:, y, x]
        values = z[b].flatten(2)  # [E, C, 4]
        right = True
        for rival in set(range(3)) - {label.item()}:
            if gate == "spatial":
                least = (values[:, label] - values[:, rival]).amin(0)
            else:
                least = values[:, label].amin(0) - values[:, rival].amax(0)
            right &= ((share * least).sum() > 0).item()
        assert found[b, y, x] == right
    assert 0 < found.double().mean() < 1


def pixel(expert_logits, gate, **keys):
    """A mixture of one pixel, [E, C] logits."""
    return Given(torch.tensor(expert_logits)[None, :, :, None, None].float(), 1, gate, **keys)


def test_experts_that_agree_are_a_floor_of_a_simple_gate_and_none_of_a_classwise_one():
    """z1 = (2, 1), z2 = (10, 9): weights (1, 0) for class 0 and (0, 1) for class 1 give (2, 9)."""
    image, label = torch.rand(1, 3, 1, 1), torch.zeros(1, 1, 1).long()
    for gate, right in (("simple", True), ("classwise", False)):
        model = pixel([[2, 1], [10, 9]], gate)
        assert gate_free_floor(model, image, label).right.item() is right
        assert all((z.argmax(1) == 0).all() for z in model.expert_logits.unbind(1))
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 2, 1, 1)
    assert model.forward_given(image, weights).flatten().tolist() == [2, 9]
    assert gate_free_floor(pixel([[2, 1], [10, 1.5]], "classwise"), image, label).right.item() is True


def test_classwise_weights_before_a_convolution_by_the_formula():
    """Least lead of y over k: sum over j of min over e of (W_y - W_k)_j z_e,j, with a kernel of its middle only."""
    z = torch.tensor([[2.0, 1.0, -1.0], [1.0, 2.0, 0.5]])
    image, labels = torch.rand(1, 3, 1, 1), torch.arange(3)
    for seed in range(20):
        torch.manual_seed(seed)
        model = pixel(z.tolist(), "classwise", conv=True)
        kernel = model.conv.weight[:, :, 1, 1]  # the other taps see zeros
        for label in labels.tolist():
            lead = [((kernel[label] - kernel[k]) * z).amin(0).sum() for k in range(3) if k != label]
            found = gate_free_floor(model, image, torch.full((1, 1, 1), label)).right.item()
            assert found is bool(min(lead) > 0)


def test_identical_experts_have_nothing_to_fear_from_a_gate():
    model, images, labels = case(0, gate="simple", conv=True)
    model.expert_logits = model.expert_logits[:, :1].expand(-1, 2, -1, -1, -1)
    labels[:, ::2] = (labels[:, ::2] + 1) % 3
    found = gate_free_floor(model, images, labels)
    assert torch.equal(found.right, model(images).argmax(1) == labels)


def test_pixels_without_a_label_are_not_right():
    model, images, labels = case(0)
    whole = gate_free_floor(model, images, labels).right
    void = torch.rand(labels.shape) < 0.4
    found = gate_free_floor(model, images, labels.masked_fill(void, 255)).right
    assert torch.equal(found, whole & ~void) and whole[void].any()
    assert torch.equal(gate_free_floor(model, images, labels, ignore_index=None).right, whole)


@pytest.mark.parametrize("gate", ["simple", "classwise"])
def test_mixed_probabilities_have_none(gate):
    found = gate_free_floor(*case(0, gate=gate, mix="probs"))
    assert found.right is None and found.reason == "none: what is mixed is not linear in the weights"


def test_of_a_classifier_that_routes_hard_it_is_that_all_pathways_are_right():
    torch.manual_seed(3)
    model = CNNMoE(4, arch="resnet18", ratio=0.05, num_experts=3).eval()
    images, labels = torch.rand(40, 3, 8, 8), torch.randint(4, (40,))
    found = gate_free_floor(model, images, labels)
    each = torch.stack([model.pathway(expert)(images).argmax(1) == labels for expert in range(3)])
    assert torch.equal(found.right, each.all(dim=0)) and each.any(dim=0).sum() > found.right.sum()


def test_a_classifier_that_weighs_its_convolutions_has_none():
    torch.manual_seed(3)
    model = CNNMoE(4, arch="resnet18", ratio=0.05, num_experts=3, top_k=2).eval()
    found = gate_free_floor(model, torch.rand(8, 3, 8, 8), torch.randint(4, (8,)))
    assert found.right is None and found.reason == "none: what is mixed is not linear in the weights"
