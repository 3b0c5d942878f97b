"""Quick dilated depthwise convolutions against nn.Conv2d."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from networks import dilation
from networks.complexity import gmacs
from networks.deeplab import DeepLabV3Plus
from networks.dilation import DilatedDepthwise, quick_dilation
from networks.smp import SMP

CHANNELS = 4


def pair(dilation, bias=False, size=(3, 3)):
    """nn.Conv2d and what is made of it, frozen; dilation: of rows and columns."""
    torch.manual_seed(0)
    padding = [step * (edge // 2) for step, edge in zip(dilation, size, strict=True)]
    plain = nn.Conv2d(CHANNELS, CHANNELS, size, 1, padding, dilation, groups=CHANNELS, bias=bias)
    network = nn.Sequential(plain)
    quick_dilation(network)
    assert type(network[0]) is DilatedDepthwise and network[0].weight is plain.weight
    return plain.requires_grad_(False), network


def answers(conv, images, slope):
    images = images.clone().requires_grad_()
    answer = conv(images)
    (gradient,) = torch.autograd.grad(answer, images, slope)
    return answer.detach(), gradient


def calls_of(monkeypatch, name):
    """A list that grows with every call of that function of networks.dilation."""
    calls, function = [], getattr(dilation, name)
    monkeypatch.setattr(dilation, name, lambda *args: calls.append(1) or function(*args))
    return calls


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 14), st.integers(1, 14), st.integers(2, 9), st.integers(2, 9),
    st.sampled_from([(3, 3), (5, 5), (1, 3), (5, 3)]), st.booleans(), st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_answers_and_gradients_are_those_of_conv2d(
    images, height, width, down, across, size, bias, last, seed
):
    plain, network = pair((down, across), bias, size)
    torch.manual_seed(seed)
    x, slope = torch.randn(2, images, CHANNELS, height, width).unbind()
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    for found, expected in zip(answers(network, x, slope), answers(plain, x, slope), strict=True):
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=1e-5)
        if (
            size == (3, 3) and down >= max(6, height) and across >= max(6, width) and not bias
        ):  # the middle tap alone
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("size", "dilation", "taken"),
    [((4, 6), 12, True), ((30, 40), 12, True), ((30, 40), 24, True), ((30, 40), 6, False), ((76, 120), 12, False),
     ((4, 6), 5, False)],
)  # fmt: skip
def test_taps_are_taken_where_they_are_quicker(monkeypatch, size, dilation, taken):
    calls, (_, network) = calls_of(monkeypatch, "summed"), pair((dilation, dilation))
    network(torch.randn(1, CHANNELS, *size))
    assert bool(calls) is taken


def test_the_gradient_is_a_pass_forward():
    """oneDNN's own takes up to twenty times as long."""
    (plain, network), images = pair((2, 2), size=(5, 5)), torch.randn(2, CHANNELS, 8, 8)
    slope = torch.randn(2, CHANNELS, 8, 8)

    def backward_convolutions(conv):
        leaf = images.clone().requires_grad_()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            torch.autograd.grad(conv(leaf), leaf, slope)
        return sum(
            event.count for event in profile.key_averages() if event.key == "aten::convolution_backward"
        )

    assert backward_convolutions(network) == 0 < backward_convolutions(plain)


def test_weights_that_are_trained_and_bf16_are_those_of_conv2d(monkeypatch):
    plain, network = pair((12, 12))
    calls, images = calls_of(monkeypatch, "convolved"), torch.randn(2, CHANNELS, 8, 8)
    for conv in (plain, network[0]):
        conv.requires_grad_(True)
    (own,) = torch.autograd.grad(network(images).square().sum(), [network[0].weight])
    (expected,) = torch.autograd.grad(plain(images).square().sum(), [plain.weight])
    assert torch.equal(own, expected) and not calls
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert network(images).dtype == torch.bfloat16 and not calls
    with torch.no_grad():  # as in validation
        network(images)
    assert calls


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 8, 3, padding=6, dilation=6, groups=4),
        nn.Conv2d(4, 4, 3, padding=6, dilation=6),
        nn.Conv2d(4, 4, 3, padding=6, dilation=6, groups=4, stride=2),
        nn.Conv2d(4, 4, 3, padding=1, dilation=6, groups=4),
        nn.Conv2d(4, 4, 5, padding=6, dilation=6, groups=4),
        nn.Conv2d(4, 4, 4, padding=6, dilation=3, groups=4),
        nn.Conv2d(4, 4, 3, padding=6, dilation=6, groups=4, padding_mode="reflect"),
    ],
)
def test_others_are_left_alone(conv):
    network = nn.Sequential(conv)
    quick_dilation(network)
    assert network[0] is conv and type(conv) is nn.Conv2d


@pytest.mark.parametrize("size", [(64, 96), (96, 160)])
def test_deeplab_says_the_same_costs_the_same_and_keeps_its_names(monkeypatch, size):
    def build():
        torch.manual_seed(0)
        keys = {"backbone": "mobilenet_v2", "pretrained": "none", "aspp_separable": True}
        return DeepLabV3Plus(5, **keys).eval().requires_grad_(False)

    quick = build()
    monkeypatch.setattr("networks.deeplab.quick_dilation", lambda network: None)
    plain = build()
    assert (
        sum(type(module) is DilatedDepthwise for module in quick.modules()) == 3 + 4
    )  # of ASPP, of the encoder
    assert quick.state_dict().keys() == plain.state_dict().keys()
    assert gmacs(quick, size) == gmacs(plain, size)
    images = torch.rand(2, 3, *size)
    found, expected = (answers(network, images, torch.ones(2, 5, *size)) for network in (quick, plain))
    assert all(torch.allclose(*both, atol=1e-5) for both in zip(found, expected, strict=True))
    assert torch.equal(found[0], expected[0]) or size != (64, 96)  # there no outer tap of ASPP sees the map


def test_architectures_of_the_library_have_them_too():
    network = SMP(3, architecture="DeepLabV3Plus", backbone="mobilenet_v2", pretrained="none")
    assert sum(type(module) is DilatedDepthwise for module in network.modules()) == 3 + 4
