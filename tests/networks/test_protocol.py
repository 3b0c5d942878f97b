"""What attacks rely on: one pass gives the gate's logits and a function from weights to logits, nothing is kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from networks.ensemble import Ensemble, max, mean, mean_probs, vote
from networks.gates import ClasswiseGate, SimpleGate, UniformGate
from networks.moe import MixtureOfExperts
from networks.spatial_gate import SpatialGate

GATES = {
    "simple": SimpleGate,
    "classwise": ClasswiseGate,
    "spatial": SpatialGate,
    "uniform": UniformGate,
    "spatial, per class": lambda *shape: SpatialGate(*shape, per_class=True),
}


def mixture(experts, gate="simple", **keys):
    channels = sum(expert.feature_channels for expert in experts.values())
    model = MixtureOfExperts(experts, GATES[gate](channels, len(experts), 5), 5, **keys)
    for name, parameter in model.gate.named_parameters():
        if name.startswith("expert_"):
            nn.init.normal_(parameter)
    if keys.get("conv"):
        nn.init.normal_(model.conv.weight, std=0.3)
    return model.eval()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "keys",
    [{}, {"routing": "top1"}, {"conv": True}, {"conv": True, "conv_at": "full"}, {"mix": "probs"}],
)
def test_forward_is_the_mix_of_the_routed_gate_logits_bit_for_bit(toy_experts, gate, keys):
    model, images = mixture(toy_experts(2), gate, **keys), torch.rand(2, 3, 33, 50)
    gate_logits, mix = model.gate_and_mix(images)
    assert gate_logits.shape[:3] == (1, 2, model.num_experts)
    weights = model.route(gate_logits)
    assert torch.equal(mix(weights), model(images))
    assert torch.equal(mix(weights[0]), model(images))
    assert torch.equal(model.forward_given(images, weights), model(images))
    assert torch.equal(model.gate_logits(images), gate_logits)


def test_the_mix_is_forward_given_for_any_weights(toy_experts):
    model, images = mixture(toy_experts(3), "classwise", conv=True), torch.rand(2, 3, 33, 50)
    _, mix = model.gate_and_mix(images)
    for weights in torch.rand(4, 1, 2, 3, 5, 1, 1):
        assert torch.equal(mix(weights), model.forward_given(images, weights))


def test_experts_run_once_however_often_is_mixed(toy_experts):
    experts = toy_experts(3)
    _, mix = mixture(experts).gate_and_mix(torch.rand(2, 3, 16, 16))
    for index in range(3):
        mix(F.one_hot(torch.tensor([index] * 2), 3).float()[None, ..., None, None, None])
    assert [expert.passes for expert in experts.values()] == [1, 1, 1]


def test_nothing_is_kept_for_another_call(toy_experts):
    model = mixture(toy_experts(2), conv=True)
    first, second = torch.rand(2, 2, 3, 16, 16)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        model(first)  # as clean evaluation runs
    gate_logits, mix = model.gate_and_mix(first)
    model.gate_and_mix(second)
    weights = model.route(gate_logits)
    assert torch.equal(mix(weights), model(first)) and not torch.equal(model(first), model(second))
    assert not gate_logits.is_inference() and not mix(weights).is_inference()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("gate", ["simple", "classwise", "spatial"])
@pytest.mark.parametrize("of", ["gate logits", "logits"])
def test_gradients_by_image_are_those_of_finite_differences(toy_experts, gate, of):
    model = mixture(toy_experts(2), gate, conv=True).double()
    images, direction = torch.rand(2, 2, 3, 16, 20, dtype=torch.float64)

    def value(images):
        gate_logits, mix = model.gate_and_mix(images)
        out = gate_logits if of == "gate logits" else mix(model.route(gate_logits))
        return (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)).sum()

    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    step = 1e-6
    with torch.no_grad():
        difference = (value(images + step * direction) - value(images - step * direction)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-5)
    assert abs(difference.item()) > 1e-6


def test_gradients_by_weights_are_the_experts_logits(toy_experts):
    experts, images = toy_experts(2), torch.rand(1, 3, 16, 16)
    _, mix = mixture(experts).gate_and_mix(images)
    weights = torch.full((1, 1, 2, 1, 1, 1), 0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(mix(weights).sum(), weights)
    expected = [expert(images).sum().item() for expert in experts.values()]
    assert gradient.flatten().tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("combine", [mean, max, mean_probs, vote])
def test_an_ensemble_is_its_rule_of_its_experts_logits(toy_experts, combine):
    experts, images = toy_experts(3), torch.rand(2, 3, 33, 50)
    model = Ensemble(experts, combine)
    expert_logits = model.expert_logits(images)
    assert model.num_experts == 3 and expert_logits.shape == (2, 3, 5, 33, 50)
    assert [expert.passes for expert in experts.values()] == [1, 1, 1]
    assert torch.equal(model.combine(expert_logits), model(images))


def test_mean_and_max_ensembles_are_mixtures(toy_experts):
    """Equal weights; and for each class and place all weight to the largest logit."""
    experts, images = toy_experts(3), torch.rand(2, 3, 32, 48)
    uniform = mixture(experts, "uniform")
    torch.testing.assert_close(uniform(images), Ensemble(experts, mean)(images))
    expert_logits = uniform.inspect(images).expert_logits
    largest = torch.zeros_like(expert_logits).scatter(1, expert_logits.argmax(1, keepdim=True), 1.0)
    torch.testing.assert_close(
        uniform.forward_given(images, largest),
        F.interpolate(expert_logits.amax(1), size=(32, 48), mode="bilinear"),
    )
