import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from engine.checkpoints import copy_tensors
from engine.config import UserError
from networks.gates import ClasswiseGate, SimpleGate, UniformGate
from networks.moe import ExpertOutputs, Frozen, MixtureOfExperts
from networks.resize import upsample
from tests.networks.conftest import assert_gradient_is_that_of_finite_differences

GATES = [SimpleGate, ClasswiseGate]


def mixture(experts, gate=SimpleGate, num_classes=5, **keys):
    """A mixture whose gate has left its nearly equal start."""
    channels = sum(expert.feature_channels for expert in experts.values())
    built = gate(channels, len(experts), num_classes)
    if hasattr(built, "expert_weight"):
        nn.init.normal_(built.expert_weight, std=1.0)
    return MixtureOfExperts(experts, built, num_classes, **keys)


def images_of(height=33, width=50, number=2, dtype=torch.float32):
    return torch.rand(number, 3, height, width, dtype=dtype)


def combined(model, expert_logits, weights, size):
    """The mixture of given expert logits under given weights."""
    return model.combine(ExpertOutputs(expert_logits, [], None, size), weights)[0]


def random_weights(experts, classes, images=2):
    return (3 * torch.randn(images, experts, classes, 1, 1)).softmax(dim=1)


# --- frozen experts


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_experts_are_bit_identical_after_gate_training(toy_experts, precision):
    model = mixture(toy_experts(2), ClasswiseGate, conv=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    # all parameters, as careless callers do: without gradients the experts' must stay
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images_of())
        F.cross_entropy(logits, torch.randint(5, (2, 33, 50))).backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("experts."), name


def test_train_cannot_wake_an_expert(toy_expert):
    expert = toy_expert(5)
    model = mixture({"a": expert, "b": toy_expert(5)})
    model.train()
    assert model.training and model.gate.training
    assert not any(module.training for module in expert.modules())
    images = images_of()
    assert torch.equal(model(images), model(images))  # no dropout
    assert torch.equal(Frozen(expert).train()(images), expert(images))


def test_no_graph_through_experts_but_a_gradient_to_the_image(toy_experts):
    model = mixture(toy_experts(2)).train()
    inspected = model.inspect(images_of())
    assert not inspected.expert_logits.requires_grad and inspected.logits.requires_grad
    images = images_of().requires_grad_()
    model(images).sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.experts.parameters())


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "keys", [{}, {"conv": True, "conv_at": "full"}, {"mix": "probs"}, {"mix": "log_probs"}]
)
def test_image_gradient_is_that_of_finite_differences(toy_experts, gate, keys):
    model = mixture(toy_experts(2), gate, **keys).double()
    images = images_of(dtype=torch.float64)
    with torch.no_grad():  # a steep gate, near equal weights, and a probe that sees them change
        model.gate.expert_weight *= 30
        model.gate.expert_bias -= model.gate_logits(images)[0, :1, :, :, 0, 0].squeeze(0).T
        first, second = (expert(images) for expert in model.experts)
    probe = first - second
    assert_gradient_is_that_of_finite_differences(model, images, probe)


# --- mixing


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(2, 6))
def test_simple_gate_never_contradicts_experts_that_agree(toy_expert_of, seed, experts, classes):
    torch.manual_seed(seed)
    model = mixture({str(i): toy_expert_of(classes) for i in range(experts)}, num_classes=classes)
    expert_logits = torch.randn(2, experts, classes, 16, 16, dtype=torch.float64)
    mixed = combined(model, expert_logits, random_weights(experts, 1).double(), (50, 64)).argmax(1)
    choices = torch.stack([upsample(one, (50, 64), 16).argmax(1) for one in expert_logits.unbind(1)])
    agree = (choices == choices[0]).all(dim=0)
    assert agree.any()
    assert torch.equal(mixed[agree], choices[0][agree])


@pytest.fixture(scope="module")
def toy_expert_of():
    """Hypothesis asks for a fixture that lives longer than one example."""
    from types import SimpleNamespace

    class Named(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.__dict__.update(
                vars(SimpleNamespace(num_classes=num_classes, feature_channels=6, stride=16))
            )

    return Named


def test_classwise_gate_sometimes_contradicts_experts_that_agree(toy_experts):
    model = mixture(toy_experts(2), ClasswiseGate)
    expert_logits = torch.randn(2, 2, 5, 64, 64)
    mixed = combined(model, expert_logits, random_weights(2, 5), (64, 64)).argmax(1)
    first, second = expert_logits.argmax(2).unbind(1)
    share = (mixed != first)[first == second].float().mean()
    assert 0 < share < 0.3


def test_classwise_mixing_depends_on_offsets_of_logits_and_simple_mixing_does_not(toy_experts):
    experts = toy_experts(2)
    expert_logits = torch.randn(2, 2, 5, 64, 64)
    shifted = expert_logits.clone()
    shifted[:, 0] += 3 * torch.randn(2, 1, 64, 64)  # changes nothing in that expert's probabilities

    def changed(classes, mix):
        model = mixture(experts, mix=mix)
        weights = random_weights(2, classes)
        decisions = [combined(model, z, weights, (64, 64)).argmax(1) for z in (expert_logits, shifted)]
        return (decisions[0] != decisions[1]).float().mean().item()

    assert changed(1, "logits") < 1e-3  # rounding
    assert changed(5, "logits") > 0.1
    assert changed(5, "log_probs") < 1e-3
    assert changed(5, "probs") < 1e-3


@pytest.mark.parametrize("mix", ["logits", "log_probs", "probs"])
def test_one_hot_weights_are_that_expert(toy_experts, mix):
    experts = toy_experts(3)
    model = mixture(experts, mix=mix)
    images = images_of()
    for index, expert in enumerate(experts.values()):
        weights = F.one_hot(torch.tensor([index] * 2), 3).float()[..., None, None, None]
        expected = expert.forward_features(images)[0]
        expected = upsample(expected if mix == "logits" else expected.log_softmax(1), (33, 50), 16)
        torch.testing.assert_close(
            model.forward_given(images, weights),
            expected,
            **({"rtol": 0, "atol": 0} if mix == "logits" else {}),
        )


def test_a_saturated_gate_is_that_expert(toy_experts):
    experts = toy_experts(3)
    model = mixture(experts)
    with torch.no_grad():
        model.gate.expert_bias[:, 1] = 1e4
    assert torch.equal(model(images_of()), experts["expert1"](images_of())) is False  # other images
    images = images_of()
    assert torch.equal(model(images), experts["expert1"](images))


def test_mixed_probabilities_against_the_formula(toy_experts):
    model = mixture(toy_experts(3), mix="probs")
    expert_logits, weights = torch.randn(2, 3, 5, 16, 16), random_weights(3, 5)
    expected = (weights * expert_logits.softmax(2)).sum(1).log()
    torch.testing.assert_close(combined(model, expert_logits, weights, (16, 16)), expected)


@pytest.mark.parametrize("mix", ["logits", "log_probs", "probs"])
def test_stored_bf16_logits_are_mixed_in_float32(toy_experts, mix):
    model = mixture(toy_experts(3), mix=mix)
    expert_logits, weights = torch.randn(2, 3, 5, 16, 16).bfloat16(), random_weights(3, 5)
    expected = combined(model, expert_logits.float(), weights, (16, 16))
    assert torch.equal(combined(model, expert_logits, weights, (16, 16)), expected)


def test_mixed_probabilities_stay_finite_where_they_underflow(toy_experts):
    model = mixture(toy_experts(2), mix="probs")
    expert_logits = torch.zeros(1, 2, 5, 16, 16)
    expert_logits[:, :, 0] = 500.0
    expert_logits[:, 1, 2] = 1000.0  # where the expert with the weight has a probability of exp(-500)
    weights = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1, 1).requires_grad_()
    logits = combined(model, expert_logits, weights, (16, 16))
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], torch.full((1, 16, 16), -500.0))
    logits.sum().backward()
    assert weights.grad.isfinite().all()


@pytest.mark.parametrize("conv_at", ["logits", "full"])
@pytest.mark.parametrize("gate", GATES)
def test_conv_starts_as_the_identity(toy_experts, gate, conv_at):
    model = mixture(toy_experts(2), gate)
    with_conv = mixture(toy_experts(2), gate, conv=True, conv_at=conv_at)
    with_conv.gate, with_conv.experts = model.gate, model.experts
    images = images_of()
    torch.testing.assert_close(with_conv(images), model(images), rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(with_conv(images), model(images), rtol=1e-6, atol=1e-6)


def test_conv_mixes_the_mixed_logits_before_or_after_upsampling(toy_experts):
    experts = toy_experts(2)
    images = images_of(32, 48)
    for conv_at in ("logits", "full"):
        model = mixture(experts, conv=True, conv_at=conv_at)
        nn.init.normal_(model.conv.weight)
        mixed = (model.inspect(images).weights * model.inspect(images).expert_logits).sum(1)
        if conv_at == "logits":
            expected = upsample(F.conv2d(mixed, model.conv.weight, padding=1), (32, 48), 16)
        else:
            expected = F.conv2d(upsample(mixed, (32, 48), 16), model.conv.weight, padding=1)
        torch.testing.assert_close(model(images), expected)


# --- one pass, several ways


@pytest.mark.parametrize("gate", [SimpleGate, ClasswiseGate, UniformGate])
@pytest.mark.parametrize("number", [2, 3, 4])
def test_forward_is_forward_given_the_routed_gate_logits(toy_experts, gate, number):
    model = mixture(toy_experts(number), gate, conv=True)
    images = images_of()
    gate_logits = model.gate_logits(images)
    assert gate_logits.shape == (1, 2, number, 5 if gate is ClasswiseGate else 1, 1, 1)
    weights = model.route(gate_logits)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones_like(weights[:, :, 0]))
    assert torch.equal(model.forward_given(images, weights), model(images))
    assert torch.equal(model.forward_given(images, weights[0]), model(images))


def test_inspection_and_combine_come_from_one_pass_and_change_nothing(toy_experts):
    experts = toy_experts(3)
    model = mixture(experts, ClasswiseGate, conv=True)
    images = images_of()
    inspected = model.inspect(images)
    assert [expert.passes for expert in experts.values()] == [1, 1, 1]
    kept = inspected.expert_logits.clone()
    outputs = ExpertOutputs(inspected.expert_logits, inspected.features, None, (33, 50))
    logits, weights = model.combine(outputs)
    assert torch.equal(logits, inspected.logits) and torch.equal(weights, inspected.weights)
    assert torch.equal(logits, model(images))
    assert torch.equal(inspected.expert_logits, kept)
    for index, expert in enumerate(experts.values()):
        expert_logits, features = expert.forward_features(images)
        assert torch.equal(inspected.expert_logits[:, index], expert_logits)
        assert torch.equal(inspected.features[index], features)
        assert torch.equal(upsample(inspected.expert_logits[:, index], (33, 50), 16), expert(images))


@pytest.mark.parametrize("conv_at", ["logits", "full"])
def test_the_mix_upsampled_to_its_grid_and_cropped_is_the_combination(toy_experts, conv_at):
    model = mixture(toy_experts(2), conv=True, conv_at=conv_at)
    nn.init.normal_(model.conv.weight)
    outputs = model.run_experts(images_of(33, 50))
    mixed, weights = model.mix(outputs)
    assert mixed.shape == (2, 5, 12, 16) and model.grid(outputs.size) == (48, 64)
    full = F.interpolate(mixed, size=model.grid((33, 50)), mode="bilinear")[..., :33, :50]
    logits, routed = model.combine(outputs)
    torch.testing.assert_close(logits, full if conv_at == "logits" else model.conv(full))
    assert torch.equal(weights, routed)
    given = random_weights(2, 1)
    assert torch.equal(model.mix(outputs, given)[1], given)
    assert torch.equal(model.combine(outputs, given)[0], model.forward_given(outputs.images, given))


def test_a_single_expert_under_the_uniform_gate_is_that_expert(toy_experts):
    experts = toy_experts(1)
    model = mixture(experts, UniformGate, conv=True)
    images = images_of()
    torch.testing.assert_close(model(images), experts["expert0"](images))


# --- state and refusals


def test_trainable_state_holds_gate_and_conv_and_comes_back(toy_experts):
    model = mixture(toy_experts(2), ClasswiseGate, conv=True)
    state = {name: tensor.clone() for name, tensor in model.trainable_state().items()}
    assert {name.split(".")[0] for name in state} == {"gate", "conv"}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == state.keys()
    fresh = MixtureOfExperts(
        dict(zip("ab", model.experts, strict=True)), ClasswiseGate(12, 2, 5), 5, conv=True
    )
    images = images_of()
    assert not torch.equal(fresh(images), model(images))
    copy_tensors(fresh.trainable_state(), state, "")
    assert torch.equal(fresh(images), model(images))


@pytest.mark.parametrize(
    "stored", [{"conv": True}, {"gate": SimpleGate}, {"gate": UniformGate}, {"number": 3}]
)
def test_state_of_another_gate_is_refused(toy_experts, stored):
    model = mixture(toy_experts(2), ClasswiseGate)
    before = {name: tensor.clone() for name, tensor in model.trainable_state().items()}
    keys = {"gate": ClasswiseGate, **stored}
    other = mixture(toy_experts(keys.pop("number", 2)), **keys)
    with pytest.raises(UserError, match="gates.a: of another network"):
        copy_tensors(model.trainable_state(), other.trainable_state(), "gates.a")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.trainable_state().items())


def test_experts_that_do_not_fit_are_refused(toy_expert):
    with pytest.raises(UserError, match=r"experts\.urban: 7 classes.*5"):
        mixture({"highway": toy_expert(5), "urban": toy_expert(7)})
    with pytest.raises(UserError, match="at least 2 are needed, got 1: highway"):
        mixture({"highway": toy_expert(5)})
    coarse = toy_expert(5)
    coarse.stride = 32
    with pytest.raises(UserError, match="padded to different multiples.*'urban': 32"):
        mixture({"highway": toy_expert(5), "urban": coarse})


def test_experts_with_different_grids_are_refused(toy_expert):
    odd = toy_expert(5)
    odd.stem[0] = nn.Conv2d(3, 8, 8, stride=8)
    model = mixture({"highway": toy_expert(5), "urban": odd})
    with pytest.raises(
        UserError, match=r"logits have different grids.*'highway': \(12, 16\), 'urban': \(6, 8\)"
    ):
        model(images_of())
