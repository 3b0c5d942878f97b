"""What holds for every gate, whatever it reads and however it routes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.checkpoints import copy_tensors
from networks.gates import ClasswiseGate, SimpleGate
from networks.moe import MixtureOfExperts, gate_channels
from networks.normalize import Normalize
from networks.resize import pad_to
from networks.spatial_gate import SpatialGate
from tests.networks.conftest import assert_gradient_is_that_of_finite_differences

GATES = {
    "simple": lambda *sizes: SimpleGate(*sizes, grid=(3, 4), hidden=16),
    "classwise": lambda *sizes: ClasswiseGate(*sizes, width=4, grid=(3, 4), hidden=16),
    "spatial": lambda *sizes: SpatialGate(*sizes, width=8),
    "spatial per class": lambda *sizes: SpatialGate(*sizes, width=8, per_class=True),
}
INPUTS = ["features", "logits", "image"]
every_gate = pytest.mark.parametrize("gate", GATES)
every_input = pytest.mark.parametrize("input", INPUTS)
both_routings = pytest.mark.parametrize("routing", ["soft", "top1"])


def mixture(experts, gate="simple", input="features", num_classes=5, **keys):
    channels = gate_channels(experts, num_classes, input)
    return MixtureOfExperts(
        experts, GATES[gate](channels, len(experts), num_classes), num_classes, input=input, **keys
    )


def last_layer(gate):
    """(weight, bias) of the layer that gives the gate logits."""
    conv = getattr(gate, "expert_conv", None)
    return (conv.weight, conv.bias) if conv else (gate.expert_weight, gate.expert_bias)


def decide(model, images):
    """Makes the gate steep, and near equal weights in the mean: it decides by place or image."""
    weight, bias = last_layer(model.gate)
    with torch.no_grad():
        weight *= 30
        mean = model.gate_logits(images)[0].mean(dim=(0, 3, 4))  # [E, K]
        bias -= mean.flatten() if bias.dim() == 1 else mean.T
    return model


def images_of(number=2, height=33, width=50, dtype=torch.float32):
    return torch.rand(number, 3, height, width, dtype=dtype)


def full_resolution(toy_expert, num_classes=5):
    """An expert with logits at full resolution and features at 1/16."""

    class FullResolution(toy_expert):
        def forward_features(self, images):
            logits, features = super().forward_features(images)
            logits = F.interpolate(logits, scale_factor=4, mode="nearest")
            return logits + self.head(F.pad(pad_to(images, self.stride), (0, 0, 0, 0, 0, 5))), features

    return FullResolution(num_classes)


# --- what a gate reads


@every_gate
@every_input
def test_channels_are_those_that_the_gate_gets(toy_experts, gate, input):
    experts = toy_experts(3)
    model = mixture(experts, gate, input)
    inputs = model.gate_inputs(model.run_experts(images_of()))
    assert sum(one.shape[1] for one in inputs) == gate_channels(experts, 5, input)
    assert {tuple(one.shape[-2:]) for one in inputs} == {(3, 4)}  # the grid of the features at stride 16
    assert model(images_of()).shape == (2, 5, 33, 50)


def test_logits_and_image_reach_the_gate_as_means_of_cells(toy_experts):
    images = images_of()
    model = mixture(toy_experts(2), input="logits")
    outputs = model.run_experts(images)
    for index, pooled in enumerate(model.gate_inputs(outputs)):
        torch.testing.assert_close(pooled, F.avg_pool2d(outputs.logits[:, index], 4))
    (pooled,) = mixture(toy_experts(2), input="image").gate_inputs(outputs)
    torch.testing.assert_close(pooled, F.avg_pool2d(pad_to(Normalize()(images), 16), 16))
    features = mixture(toy_experts(2)).gate_inputs(outputs)
    assert all(one is given for one, given in zip(features, outputs.features, strict=True))


@every_input
def test_what_a_gate_does_not_read_does_not_move_it(toy_experts, input):
    model = mixture(toy_experts(2), "spatial", input)
    outputs = model.run_experts(images_of())
    weights = model.mix(outputs)[1]
    for changed in INPUTS:
        other = copy.copy(outputs)
        if changed == "features":
            other.features = [one + 1 for one in outputs.features]
        elif changed == "logits":
            other.logits = outputs.logits + torch.rand_like(outputs.logits)
        else:
            other.images = 1 - outputs.images
        assert torch.equal(model.mix(other)[1], weights) == (changed != input)


def test_calibration_does_not_change_what_a_gate_reads(toy_experts):
    model = mixture(toy_experts(2), input="logits", calibrate=True)
    images = images_of()
    before = model.inspect(images)
    model.expert_temperatures.copy_(torch.tensor([0.5, 3.0]))
    after = model.inspect(images)
    assert torch.equal(after.weights, before.weights) and not torch.equal(after.logits, before.logits)


# --- protocol of routed models


@every_gate
@every_input
@both_routings
def test_forward_is_forward_given_the_routed_gate_logits(toy_experts, gate, input, routing):
    images = images_of()
    model = decide(mixture(toy_experts(3), gate, input, routing=routing, conv=True), images).eval()
    assert model.routing == {"soft": "soft", "top1": "hard"}[routing]
    gate_logits = model.gate_logits(images)
    grid = (3, 4) if gate.startswith("spatial") else (1, 1)
    classes = 5 if gate in ("classwise", "spatial per class") else 1
    assert gate_logits.shape == (1, 2, 3, classes, *grid)
    weights = model.route(gate_logits)
    assert torch.equal(model.forward_given(images, weights), model(images))
    assert torch.equal(model.forward_given(images, weights[0]), model(images))
    torch.testing.assert_close(weights.sum(dim=2), torch.ones_like(weights[:, :, 0]))
    assert routing == "soft" or set(weights.unique().tolist()) == {0.0, 1.0}
    inspected = model.inspect(images)
    assert torch.equal(inspected.weights, weights[0]) and torch.equal(inspected.gate_logits, gate_logits)


@pytest.mark.parametrize("mix", ["logits", "log_probs", "probs"])
def test_top1_is_exactly_the_chosen_expert_in_training_and_evaluation(toy_experts, mix):
    experts, images = toy_experts(3), images_of(6)
    model = decide(mixture(experts, routing="top1", mix=mix), images)
    chosen = model.gate_logits(images)[0, :, :, 0, 0, 0].argmax(1)
    assert len(chosen.unique()) > 1
    for train in (True, False):
        given = model.train(train)(images)
        for row, index in enumerate(chosen.tolist()):
            forced = F.one_hot(chosen[row : row + 1], 3).float()[..., None, None, None]
            alone = model.forward_given(images[row : row + 1], forced)[0]
            torch.testing.assert_close(given[row], alone, rtol=1e-5, atol=1e-5)  # of a batch of one
            if mix == "logits":
                assert torch.equal(given[row], experts[f"expert{index}"](images)[row])


@every_gate
def test_top1_learns_by_the_gradient_of_soft_weights(toy_experts, gate):
    """Mixed logits are linear in the weights, so the gradients are equal, not only alike."""
    images, experts = images_of(), toy_experts(2)
    hard = decide(mixture(experts, gate, routing="top1", temperature=2.0), images).train()
    flow = copy.deepcopy(hard)
    flow.routing = "soft"
    outputs = hard.run_experts(images)
    if gate.startswith("spatial"):  # spread in two ways, equal where there is nothing to spread
        outputs.logits = outputs.logits[..., :3, :4]
    probe = torch.randn_like(outputs.logits[:, 0])
    for model in (hard, flow):
        (model.mix(outputs)[0] * probe).sum().backward()
    for (name, one), (_, other) in zip(
        hard.gate.named_parameters(), flow.gate.named_parameters(), strict=True
    ):
        assert torch.equal(one.grad, other.grad), name
        assert name.startswith("expert_") is False or one.grad.abs().sum() > 0
    assert not hard.eval().mix(outputs)[1].requires_grad


def test_temperature_makes_weights_decide_and_changes_no_choice(toy_experts):
    images, experts = images_of(4), toy_experts(3)
    model = decide(mixture(experts, "spatial"), images)
    soft, largest = model.inspect(images).weights, {}
    for temperature in (4.0, 1.0, 0.1, 1e-3):
        model.temperature = temperature
        weights = model.inspect(images).weights
        assert torch.equal(weights.argmax(1), soft.argmax(1))
        largest[temperature] = weights.amax(1).mean().item()
    assert largest[4.0] < largest[1.0] < largest[0.1] < largest[1e-3] and largest[1e-3] > 0.999


# --- experts' temperatures


@pytest.mark.parametrize("mix", ["logits", "log_probs", "probs"])
@every_gate
def test_calibration_divides_logits_and_ones_change_nothing(toy_experts, gate, mix):
    experts, images = toy_experts(3), images_of()
    plain = decide(mixture(experts, gate, mix=mix), images)
    calibrated = mixture(experts, gate, mix=mix, calibrate=True)
    calibrated.gate = plain.gate
    assert torch.equal(calibrated(images), plain(images))
    temperatures = torch.tensor([0.5, 1.0, 4.0])
    calibrated.expert_temperatures.copy_(temperatures)
    outputs = plain.run_experts(images)
    logits, weights = calibrated.combine(outputs)
    divided = copy.copy(outputs)
    divided.logits = outputs.logits / temperatures.view(1, 3, 1, 1, 1)
    assert torch.equal(logits, plain.combine(divided, weights)[0])
    one_hot = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1, 1).expand(2, -1, -1, -1, -1)
    choice = calibrated.mix(outputs, one_hot)[0].argmax(1)
    assert torch.equal(choice, outputs.logits[:, 2].argmax(1))  # an expert alone decides as before


def test_temperatures_are_stored_with_a_calibrated_gate_only(toy_experts):
    experts = toy_experts(2)
    assert "expert_temperatures" not in mixture(experts).trainable_state()
    model = mixture(experts, calibrate=True)
    model.expert_temperatures.copy_(torch.tensor([0.5, 2.0]))
    fresh = mixture(experts, calibrate=True)
    copy_tensors(fresh.trainable_state(), model.trainable_state(), "")
    assert fresh.expert_temperatures.tolist() == [0.5, 2.0]
    assert not any(parameter is model.expert_temperatures for parameter in model.parameters())


# --- training and state


@every_gate
@both_routings
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_experts_are_bit_identical_after_training_and_gates_are_not(toy_experts, gate, routing, precision):
    for input in INPUTS:
        model = mixture(toy_experts(2), gate, input, routing=routing, conv=True, calibrate=True).train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = model(images_of())
            F.cross_entropy(logits, torch.randint(5, (2, 33, 50))).backward()
            optimizer.step()
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]) == (name not in trained), (input, name)
        assert {name.split(".")[0] for name in trained} == {"gate", "conv"}


@every_gate
@every_input
def test_image_gradient_through_the_gate_is_that_of_finite_differences(toy_experts, gate, input):
    images = images_of(dtype=torch.float64)
    model = mixture(toy_experts(2), gate, input, calibrate=True, conv=True, temperature=1.5).double()
    model.expert_temperatures.copy_(torch.tensor([0.7, 1.3]))
    decide(model, images)
    probe = torch.randn(2, 5, 33, 50, dtype=torch.float64)
    assert_gradient_is_that_of_finite_differences(model, images, probe)


@every_gate
@every_input
def test_a_copy_and_a_stored_state_give_the_same_mixture(toy_experts, gate, input):
    experts, images = toy_experts(2), images_of()
    model = decide(mixture(experts, gate, input, conv=True, calibrate=True, mix="probs"), images)
    model.expert_temperatures.copy_(torch.tensor([0.5, 2.0]))
    nn.init.normal_(model.conv.weight)
    expected = model(images)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images), expected)
    with torch.no_grad():
        twin.conv.weight.zero_()
    assert torch.equal(model(images), expected)
    state = {name: tensor.clone() for name, tensor in model.trainable_state().items()}
    fresh = mixture(experts, gate, input, conv=True, calibrate=True, mix="probs")
    assert not torch.equal(fresh(images), expected)
    copy_tensors(fresh.trainable_state(), state, "")
    assert torch.equal(fresh(images), expected)


@every_gate
@pytest.mark.parametrize("mix", ["logits", "log_probs", "probs"])
def test_full_resolution_logits_beside_features_at_a_sixteenth(toy_expert, gate, mix):
    experts = {"a": full_resolution(toy_expert), "b": full_resolution(toy_expert)}
    for input in INPUTS:
        model = decide(mixture(experts, gate, input, mix=mix), images_of())
        inspected = model.inspect(images_of())
        assert inspected.expert_logits.shape == (2, 2, 5, 48, 64) and inspected.logits.shape == (2, 5, 33, 50)
        assert inspected.weights.shape[-2:] == ((3, 4) if gate.startswith("spatial") else (1, 1))
        if mix == "logits" and inspected.weights.shape[2] == 1:
            choices = inspected.expert_logits.argmax(2)[..., :33, :50]
            agree = choices[:, 0] == choices[:, 1]
            assert agree.any() and torch.equal(inspected.logits.argmax(1)[agree], choices[:, 0][agree])
