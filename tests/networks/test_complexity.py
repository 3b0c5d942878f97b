import pytest
import torch
from torch import nn

from networks.complexity import gmacs, parameters
from networks.gates import ClasswiseGate
from networks.moe import MixtureOfExperts


def test_convolutions_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, groups=4)
    )
    assert gmacs(model, (64, 96)) == pytest.approx((8 * 3 * 9 + 8 * 2 * 9) * 32 * 48 / 1e9)
    assert parameters(model) == (8 * 3 * 9 + 8 + 16 + 8 * 2 * 9 + 8, 8 * 3 * 9 + 8 + 16 + 8 * 2 * 9 + 8)


def test_a_mixture_costs_its_experts_its_gate_and_its_conv(toy_experts):
    experts = toy_experts(2)
    gate = ClasswiseGate(12, 2, 5, width=2, grid=(4, 4), hidden=16)
    model = MixtureOfExperts(experts, gate, 5, conv=True)
    own = (9 * 12 * 10) * 8 * 8  # 3x3 convolution on the 8x8 features of a 128x128 image
    own += 10 * (4 * 8 * 8 + 4 * 8 * 4)  # pooling as two matrix products
    own += 5 * (32 * 16 + 16 * 2) + 9 * 25 * 32 * 32
    expected = sum(gmacs(expert, (128, 128)) for expert in experts.values()) + own / 1e9
    assert gmacs(model, (128, 128)) == pytest.approx(expected)
    trainable = parameters(gate)[0] + 9 * 25
    assert parameters(model) == (
        trainable + sum(parameters(expert)[0] for expert in experts.values()),
        trainable,
    )


def test_counting_leaves_the_model_as_it_was(toy_expert):
    model = toy_expert(5).train()
    model.stem[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gmacs(model, (64, 64))
    assert [module.training for module in (model, model.stem, model.stem[1], model.head)] == [
        True,
        True,
        False,
        True,
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
