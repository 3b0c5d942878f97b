"""Laws of the mixture with a shared encoder, on both families."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.config import UserError
from networks.complexity import parameters
from networks.deeplab import DeepLabV3Plus
from networks.frrn import FRRN
from networks.gates import ClasswiseGate, SimpleGate
from networks.moe import ExpertOutputs, gate_channels
from networks.shared_encoder import SharedEncoderMixture, decoder_parts

NETWORKS = {
    "deeplab": lambda: DeepLabV3Plus(3, backbone="mobilenet_v2", pretrained="none"),
    "frrn A": lambda: FRRN(3, width=0.1, residual_channels=4),
    "frrn B": lambda: FRRN(3, variant="B", width=0.1, residual_channels=4),
}
NAMES = ("highway", "urban", "rural")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # in float64: batches of another size differ in the last bits


@pytest.fixture(params=NETWORKS, scope="module")
def networks(request):
    """Three networks of one family, their BatchNorm statistics away from the start."""
    torch.manual_seed(0)
    found = {name: NETWORKS[request.param]() for name in NAMES}
    for network in found.values():
        with torch.no_grad():
            for _ in range(8):
                network(torch.rand(2, 3, 32, 48))
    return found


def mixture_of(networks, gate=SimpleGate, **keys):
    """A mixture in evaluation mode whose gate has left its nearly equal start."""
    readers = networks if keys.get("input") == "logits" else {"first": networks[NAMES[0]]}
    channels = gate_channels(readers, 3, keys.get("input", "features"))
    head = gate(channels, len(networks), 3, width=2, grid=(2, 2), hidden=8)
    nn.init.normal_(head.expert_weight, std=1.0)
    return SharedEncoderMixture(networks, head, 3, **keys).eval()


def images_of(number=2, height=33, width=50):
    return torch.rand(number, 3, height, width)


def whole(networks, name):
    """The network of that name as it would be with the encoder of the first: what its decoder has to equal."""
    network, first = deepcopy(networks[name]), networks[NAMES[0]].state_dict()
    inside = tuple(f"{part}." for part in decoder_parts(network))
    of_encoder = {key: tensor for key, tensor in first.items() if not key.startswith(inside)}
    assert 0 < len(of_encoder) < len(first)
    network.load_state_dict(of_encoder, strict=False)
    return network.eval()


# --- what it computes


@torch.no_grad()
def test_one_hot_weights_are_that_decoder_on_the_encoder_of_the_first(networks):
    mixture, images = mixture_of(networks), images_of()
    answers = []
    for index, name in enumerate(NAMES):
        weights = F.one_hot(torch.tensor([index] * 2), 3).float()[..., None, None, None]
        expected = whole(networks, name)(images)
        assert torch.equal(mixture.forward_given(images, weights), expected)
        assert torch.equal(mixture.decoder_of(name)(images), expected)
        answers.append(expected)
    assert not torch.equal(answers[0], answers[1])


@torch.no_grad()
def test_a_decoder_is_a_network_that_shares_its_tensors(networks):
    mixture, images = mixture_of(networks), images_of()
    expert = mixture.decoder_of("urban")
    logits, features = expert.forward_features(images)
    outputs = mixture.run_experts(images)
    assert torch.equal(logits, outputs.logits[:, 1]) and torch.equal(features, outputs.features[0])
    assert features.shape[1] == expert.feature_channels == mixture.feature_channels
    assert (expert.num_classes, expert.stride) == (3, mixture.stride)
    assert expert.encoder is mixture.encoder and not expert.training
    own = {parameter.data_ptr() for parameter in expert.parameters()}
    assert own < {parameter.data_ptr() for parameter in mixture.parameters()}


@torch.no_grad()
@pytest.mark.parametrize("number", [2, 3])
def test_the_encoder_runs_once_whatever_the_number_of_decoders(networks, number):
    mixture = mixture_of({name: networks[name] for name in NAMES[:number]}, conv=True)
    images, passes = images_of(), []
    weights = mixture.inspect(images).weights
    hook = mixture.encoder.normalize.register_forward_hook(lambda *_: passes.append(1))
    for run in (
        mixture,
        mixture.inspect,
        mixture.run_experts,
        mixture.gate_logits,
        lambda images: mixture.forward_given(images, weights),
        lambda images: mixture.forward_own(images, [1, 0]),
    ):
        passes.clear()
        run(images)
        assert len(passes) == 1
    hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("keys", [{}, {"conv": True}, {"input": "logits"}, {"input": "image"}])
@pytest.mark.parametrize("gate", [SimpleGate, ClasswiseGate])
def test_forward_is_forward_given_the_routed_gate_logits(networks, gate, keys):
    mixture, images = mixture_of(networks, gate, **keys), images_of()
    gate_logits = mixture.gate_logits(images)
    assert gate_logits.shape == (1, 2, 3, 3 if gate is ClasswiseGate else 1, 1, 1)
    assert torch.equal(mixture.forward_given(images, mixture.route(gate_logits)), mixture(images))
    inspected = mixture.inspect(images)
    assert len(inspected.features) == 1
    # as an evaluation has it, which runs the decoders as networks
    logits, features = zip(
        *(mixture.decoder_of(name).forward_features(images) for name in NAMES), strict=True
    )
    outputs = ExpertOutputs(torch.stack(logits, dim=1).float(), list(features), images, (33, 50))
    assert torch.equal(mixture.combine(outputs)[0], inspected.logits)


# --- each image through its own decoder


@torch.no_grad()
def test_every_image_gets_the_answer_of_its_own_decoder_in_batch_order(networks):
    mixture, images = mixture_of(networks).double(), images_of(5).double()
    decoders = [2, 0, 2, 1, 0]
    found = mixture.forward_own(images, decoders)
    for index, decoder in enumerate(decoders):
        expected = mixture.decoder_of(NAMES[decoder])(images[index : index + 1])
        torch.testing.assert_close(found[index : index + 1], expected, **CLOSE)
    assert not torch.allclose(found[0], mixture.decoder_of(NAMES[0])(images[:1])[0], **CLOSE)


def test_a_decoder_learns_from_its_own_images_only(networks):
    """Gradient and BatchNorm statistics of a decoder are those of a batch of its own images alone."""
    mixture, images = mixture_of(networks).double(), images_of(4).double()
    target = torch.randn(4, 3, 33, 50).double()
    mixture.decoders.train()  # the encoder stays in evaluation mode, where it treats images one by one
    alone = deepcopy(mixture)
    decoders = [1, 0, 1, 0]
    (mixture.forward_own(images, decoders) * target).sum().backward()
    (alone.decoder_of("urban")(images[::2]) * target[::2]).sum().backward()
    (trained, resting), (expected, _) = (one.decoders[1:] for one in (mixture, alone))
    for (name, found), wanted in zip(trained.named_parameters(), expected.parameters(), strict=True):
        assert wanted.grad.abs().sum() > 0, name
        torch.testing.assert_close(found.grad, wanted.grad, rtol=0, atol=1e-9 * wanted.grad.abs().max())
    for found, wanted in zip(trained.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)
    assert all(parameter.grad is None for parameter in resting.parameters())
    before = deepcopy(networks["rural"]).double().state_dict()
    for name, tensor in resting.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_single_image_is_enough_for_a_decoder_in_training(networks):
    mixture = mixture_of(networks).train()
    logits = mixture.forward_own(images_of(3), [1, 1, 0])
    logits.square().mean().backward()
    for index in (0, 1):
        gradients = [parameter.grad for parameter in mixture.decoders[index].parameters()]
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(parameter.grad is not None for parameter in mixture.encoder.parameters())


def test_the_loss_of_the_mixture_reaches_everything(networks):
    mixture = mixture_of(networks, ClasswiseGate, conv=True).train()
    probe = torch.randn(2, 3, 33, 50)
    (mixture(images_of()) * probe).sum().backward()
    assert all(parameter.grad is not None for parameter in mixture.parameters())
    for part in (mixture.encoder, *mixture.decoders, mixture.gate, mixture.conv):
        assert sum(parameter.grad.abs().sum() for parameter in part.parameters()) > 0


# --- what it is made of


def test_it_holds_one_encoder_and_a_decoder_each(networks):
    mixture = mixture_of(networks, conv=True)
    first = networks[NAMES[0]]
    total = parameters(first)[0]
    decoder = sum(parameters(first.get_submodule(part))[0] for part in decoder_parts(first))
    gate = parameters(mixture.gate)[0] + 9 * 3 * 3
    assert 0 < decoder < total
    assert parameters(mixture)[0] == parameters(mixture)[1] == total + 2 * decoder + gate
    tensors = mixture.state_dict().values()
    assert len({tensor.data_ptr() for tensor in tensors if tensor.numel()}) == len(tensors)
    assert {name.split(".")[0] for name in mixture.state_dict()} == {"encoder", "decoders", "gate", "conv"}
    starts = [next(one.parameters()) for one in mixture.decoders]
    assert not torch.equal(starts[0], starts[1])  # first weights of their own


@torch.no_grad()
def test_its_state_comes_back_bit_by_bit(networks):
    mixture, images = mixture_of(networks, conv=True), images_of()
    other = mixture_of(dict(zip(NAMES, reversed(networks.values()), strict=True)), conv=True)
    assert not torch.equal(other(images), mixture(images))
    other.load_state_dict(mixture.state_dict())
    assert torch.equal(other(images), mixture(images))


def test_the_networks_that_it_is_made_of_stay_as_they_are(networks):
    before = {name: tensor.clone() for name, tensor in networks["urban"].state_dict().items()}
    mixture = mixture_of(networks).train()
    mixture(images_of())
    assert networks["urban"].state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in networks["urban"].state_dict().items())


def test_networks_that_do_not_fit_are_refused(networks):
    with pytest.raises(UserError, match="at least 2 are needed, got 1: highway"):
        mixture_of({"highway": networks["highway"]})
    with pytest.raises(UserError, match=r"experts\.urban: 7 classes.*3"):
        mixture_of({"highway": networks["highway"], "urban": FRRN(7, width=0.1)})
