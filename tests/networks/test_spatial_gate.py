"""The spatial gate and mixing with weights for each place."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from networks.complexity import parameters
from networks.moe import ExpertOutputs, MixtureOfExperts
from networks.resize import upsample
from networks.spatial_gate import SpatialGate

MIXES = ["logits", "log_probs", "probs"]


class Named(nn.Module):
    """What a mixture asks of an expert that never runs."""

    feature_channels, stride = 6, 16

    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes


def mixture(experts, classes, **keys):
    named = {str(index): Named(classes) for index in range(experts)}
    return MixtureOfExperts(named, SpatialGate(6 * experts, experts, classes), classes, **keys)


def weight_map(experts, classes=1, grid=(4, 4), images=2):
    return (3 * torch.randn(images, experts, classes, *grid, dtype=torch.float64)).softmax(dim=1)


def outputs_of(expert_logits, size):
    return ExpertOutputs(expert_logits, [], None, size)


# --- the gate itself


def test_parameters_and_shapes():
    gate = SpatialGate(512, 2, 38)
    assert parameters(gate)[0] == (512 * 9 * 32 + 32) + (32 * 9 * 32 + 32) + (32 * 2 + 2)
    per_class = SpatialGate(8, 3, 5, width=7, per_class=True)
    features = [torch.randn(2, 4, 6, 9).relu() for _ in range(2)]
    assert per_class(features).shape == (2, 3, 5, 6, 9)
    assert SpatialGate(8, 3, 5)(features).shape == (2, 3, 1, 6, 9)


def test_experts_and_classes_of_the_last_convolution_are_not_mixed_up():
    gate = SpatialGate(4, 3, 5, per_class=True)
    with torch.no_grad():
        gate.expert_conv.weight.zero_()
        gate.expert_conv.bias.copy_(torch.arange(15.0))  # expert e, class k: 5 e + k
    logits = gate([torch.randn(1, 4, 2, 2)])
    assert torch.equal(logits[0, :, :, 0, 0], torch.arange(15.0).view(3, 5))


def test_it_reads_the_neighbourhood_and_nothing_far():
    gate = SpatialGate(4, 2, 5)
    features = torch.rand(1, 4, 12, 12, requires_grad=True)
    gate([features])[0, 0, 0, 6, 6].backward()
    seen = features.grad.abs().sum((0, 1)) > 0
    assert seen[4:9, 4:9].all() and seen.sum() == 25


def test_starts_near_equal_weights_with_a_gradient_everywhere():
    gate = SpatialGate(8, 3, 5, per_class=True)
    weights = gate([torch.randn(2, 4, 7, 5).relu() for _ in range(2)]).softmax(dim=1)
    assert (weights - 1 / 3).abs().mean() < 0.1
    assert weights[:, 0].unique().numel() > 1
    weights[:, 0].sum().backward()
    for name, parameter in gate.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_dead_share_is_by_image_and_knows_both_layers():
    gate = SpatialGate(4, 2, 5, width=3)
    with torch.no_grad():
        gate.conv.weight.fill_(-1)
        gate.context.weight.fill_(1)
    images = [torch.stack([torch.zeros(4, 3, 3), torch.ones(4, 3, 3)])]
    assert gate.dead_share(images).tolist() == [0, 1]
    with torch.no_grad():
        gate.context.bias.fill_(-1e3)
    assert gate.dead_share(images).tolist() == [1, 1]


def test_gate_logits_are_float32_under_bf16_autocast():
    gate = SpatialGate(4, 2, 5)
    with torch.no_grad():
        gate.expert_conv.weight.zero_()
        gate.expert_conv.bias.fill_(1 + 2**-12)  # bfloat16 would lose the last digits
    with torch.autocast("cpu", torch.bfloat16):
        logits = gate([torch.randn(1, 4, 2, 2)])
    assert logits.dtype == torch.float32
    assert torch.equal(logits, torch.full_like(logits, 1 + 2**-12))


# --- mixing with a map of weights


@pytest.mark.parametrize("logit_grid", [(16, 16), (64, 64)])  # before upsampling, and at full resolution
@pytest.mark.parametrize("mix", MIXES)
def test_one_hot_maps_are_that_expert(mix, logit_grid):
    model = mixture(3, 5, mix=mix)
    expert_logits = torch.randn(2, 3, 5, *logit_grid)
    for index in range(3):
        weights = F.one_hot(torch.tensor([index] * 2), 3).float()[..., None, None, None].expand(2, 3, 1, 4, 4)
        alone = expert_logits[:, index]
        expected = upsample(alone if mix == "logits" else alone.log_softmax(1), (50, 64), 16)
        logits, _ = model.combine(outputs_of(expert_logits, (50, 64)), weights)
        torch.testing.assert_close(logits, expected, **({"rtol": 0, "atol": 0} if mix == "logits" else {}))


@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize("mix", MIXES)
def test_a_constant_map_is_one_weight_for_the_image(mix, classes):
    model = mixture(3, 5, mix=mix)
    outputs = outputs_of(torch.randn(2, 3, 5, 16, 16), (50, 64))
    weights = weight_map(3, classes, (1, 1)).float()
    constant = model.combine(outputs, weights.expand(-1, -1, -1, 4, 4))[0]
    torch.testing.assert_close(constant, model.combine(outputs, weights)[0], rtol=1e-5, atol=1e-5)


def test_places_are_weighed_by_the_spread_map_against_a_loop():
    model = mixture(2, 3)
    outputs, weights = outputs_of(torch.randn(1, 2, 3, 8, 8), (32, 32)), weight_map(2, 3, (2, 2), 1).float()
    mixed, same = model.mix(outputs, weights)
    assert same is weights
    for y, x, k in [(0, 0, 0), (3, 4, 1), (7, 2, 2)]:
        # place i of 8 lies at (i + 0.5) / 4 - 0.5 on a grid of 2, clamped to its ends
        across, down = (min(max((i + 0.5) / 4 - 0.5, 0), 1) for i in (x, y))
        for_expert = [
            (1 - down) * ((1 - across) * w[0, 0] + across * w[0, 1])
            + down * ((1 - across) * w[1, 0] + across * w[1, 1])
            for w in weights[0, :, k]
        ]
        expected = sum(w * z for w, z in zip(for_expert, outputs.logits[0, :, k, y, x].tolist(), strict=True))
        assert mixed[0, k, y, x].item() == pytest.approx(expected.item(), abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(2, 6), st.sampled_from(MIXES), st.booleans())
def test_experts_that_agree_on_the_grid_of_the_logits_are_never_contradicted(
    seed, experts, classes, mix, calibrate
):
    """And where that grid is the image's, as with full-resolution logits, on no pixel."""
    torch.manual_seed(seed)
    model = mixture(experts, classes, mix=mix, calibrate=calibrate).double()
    if calibrate:
        model.expert_temperatures.copy_(0.5 + torch.rand(experts))
    for grid in ((16, 16), (64, 64)):
        common = torch.randn(2, 1, classes, *grid, dtype=torch.float64)  # so that even four agree somewhere
        outputs = outputs_of(common + torch.randn(2, experts, classes, *grid).double(), (50, 64))
        choices = outputs.logits.argmax(2)
        agree = (choices == choices[:, :1]).all(dim=1)
        mixed = model.mix(outputs, weight_map(experts))[0].argmax(1)
        assert agree.any() and torch.equal(mixed[agree], choices[:, 0][agree])
        if grid == (64, 64):
            decided = model.combine(outputs, weight_map(experts))[0].argmax(1)
            assert torch.equal(decided[agree[:, :50]], choices[:, 0, :50][agree[:, :50]])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 3), st.sampled_from(MIXES))
def test_nor_after_upsampling_where_all_places_that_a_pixel_is_made_of_agree(seed, experts, mix):
    torch.manual_seed(seed)
    model = mixture(experts, 3, mix=mix).double()
    smooth = F.interpolate(torch.randn(2 * experts, 3, 3, 3).double(), size=(16, 16), mode="bilinear")
    outputs = outputs_of(smooth.view(2, experts, 3, 16, 16), (50, 64))
    choices = outputs.logits.argmax(2)
    agree = (choices == choices[:, :1]).all(dim=1)
    said = F.one_hot(choices[:, 0], 3).movedim(-1, 1) * agree[:, None]  # of the class that all say
    share = upsample(said.double(), (50, 64), 16)  # 1 where all places around say that class
    mixed = model.combine(outputs, weight_map(experts))[0].argmax(1)
    certain = share.amax(1) > 1 - 1e-9
    assert torch.equal(mixed[certain], share.argmax(1)[certain])


def test_agreement_after_upsampling_alone_is_not_enough():
    """Between two places both experts say class 0, while the map picks from each the one that says class 1."""
    leads = torch.tensor([[3.0, -1.0], [-1.0, 3.0]])  # of class 0 over class 1: expert, place
    expert_logits = torch.zeros(1, 2, 2, 2, 2)
    expert_logits[0, :, 0] = leads[:, None, :]
    weights = torch.tensor([[0.0, 1.0], [1.0, 0.0]])[None, :, None, None, :].expand(1, 2, 1, 2, 2)
    model = mixture(2, 2)
    middle = (slice(None), slice(None), 4, 8)
    experts = [upsample(one, (16, 16), 16)[middle] for one in expert_logits.unbind(1)]
    mixed = model.combine(outputs_of(expert_logits, (16, 16)), weights)[0][middle]
    assert [one.argmax(1).item() for one in experts] == [0, 0] and mixed.argmax(1).item() == 1


def test_top1_maps_take_every_place_from_exactly_one_expert():
    model = mixture(3, 5, routing="top1")
    outputs = outputs_of(torch.randn(2, 3, 5, 16, 16), (50, 64))
    gate_logits = torch.randn(2, 3, 1, 4, 4)
    mixed = model.mix(outputs, model.route(gate_logits))[0]
    chosen = gate_logits.argmax(1).repeat_interleave(4, 2).repeat_interleave(4, 3)  # [B, 1, 16, 16]
    expected = outputs.logits.gather(1, chosen[:, :, None].expand(-1, -1, 5, -1, -1))[:, 0]
    assert torch.equal(mixed, expected)


@pytest.mark.parametrize("conv_at", ["logits", "full"])
def test_conv_starts_as_the_identity_and_comes_after_the_mixing(conv_at):
    plain, with_conv = mixture(2, 5), mixture(2, 5, conv=True, conv_at=conv_at)
    outputs, weights = outputs_of(torch.randn(2, 2, 5, 16, 16), (50, 64)), weight_map(2).float()
    torch.testing.assert_close(
        with_conv.combine(outputs, weights)[0], plain.combine(outputs, weights)[0], rtol=1e-6, atol=1e-6
    )
    nn.init.normal_(with_conv.conv.weight)
    mixed, full = plain.mix(outputs, weights)[0], plain.combine(outputs, weights)[0]
    expected = (
        with_conv.conv(full) if conv_at == "full" else upsample(with_conv.conv(mixed), outputs.size, 16)
    )
    torch.testing.assert_close(with_conv.combine(outputs, weights)[0], expected, rtol=1e-4, atol=1e-4)
