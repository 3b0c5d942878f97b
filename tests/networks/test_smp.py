"""Networks of segmentation_models_pytorch: any size, gradients, features of one stride, the library's own numbers."""

import pytest
import segmentation_models_pytorch
import torch
import torch.nn.functional as F

from engine.config import UserError
from networks.complexity import gmacs
from networks.gates import SimpleGate
from networks.moe import Frozen, MixtureOfExperts
from networks.normalize import IMAGENET_MEAN, IMAGENET_STD
from networks.shared_encoder import SharedEncoderMixture
from networks.smp import ARCHITECTURES, SMP

TINY = {"backbone": "tu-mobilenetv3_small_050", "pretrained": "none"}
ALL = [name for name in ARCHITECTURES if name != "dpt"]


@pytest.mark.parametrize("architecture", ALL)
def test_any_size_any_architecture(architecture):
    network = SMP(5, architecture=architecture, **TINY).eval()
    small, stride = (131, 140) if architecture == "pan" else (37, 50), network.stride
    for size in (small, (128, 160)):
        images = torch.rand(2, 3, *size, requires_grad=True)
        logits, features = network.forward_features(images)
        padded = [-(-side // stride) * stride for side in size]
        assert features.shape[:2] == (2, network.feature_channels)
        factor = 8 if architecture in ("pspnet", "deeplabv3") else 16
        assert list(features.shape[2:]) == [side // factor for side in padded]
        assert logits.shape[:2] == (2, 5) and padded[0] / logits.shape[2] == padded[1] / logits.shape[3]
        whole = network(images)
        assert whole.shape == (2, 5, *size)
        (gradient,) = torch.autograd.grad(whole.square().sum(), images)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("architecture", ALL)
def test_is_the_librarys_network_after_normalisation(architecture):
    ours = SMP(4, architecture=architecture, **TINY).eval()
    theirs = ARCHITECTURES[architecture](TINY["backbone"], encoder_weights=None, classes=4).eval()
    names = set(theirs.state_dict())
    theirs.load_state_dict(ours.network.state_dict())
    assert ours.state_dict().keys() == {
        "normalize.mean",
        "normalize.std",
        *(f"network.{name}" for name in names),
    }
    theirs.segmentation_head[1] = torch.nn.Identity()
    images = torch.rand(1, 3, 128, 128)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        logits = ours.forward_features(images)[0]
        torch.testing.assert_close(logits, theirs((images - mean) / std))
        upsampled = F.interpolate(logits, size=(128, 128), mode="bilinear", align_corners=False)
        torch.testing.assert_close(ours(images), upsampled)


def test_odd_sizes_are_padded_with_the_mean_colour_and_cropped():
    network = SMP(5, **TINY).eval()
    images = torch.rand(1, 3, 45, 70)
    padded = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1).repeat(1, 1, 64, 96)
    padded[..., :45, :70] = images
    with torch.no_grad():
        torch.testing.assert_close(network(images), network(padded)[..., :45, :70], rtol=1e-4, atol=1e-5)


def test_an_encoder_that_ends_sooner_gives_its_last_map():
    network = SMP(3, architecture="FPN", options={"encoder_depth": 3}, **TINY).eval()
    with torch.no_grad():
        features = network.forward_features(torch.rand(1, 3, 64, 64))[1]
    assert features.shape == (1, network.feature_channels, 8, 8) and network.stride == 16


def test_frozen_it_stays_as_it_is_and_in_training_its_statistics_move():
    network = SMP(3, **TINY)
    images = torch.rand(2, 3, 64, 64)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    Frozen(network).train()(images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    network = SMP(3, **TINY).train()
    network(images).sum().backward()
    assert any(network.state_dict()[name].abs().sum() > 0 for name in before if name.endswith("running_mean"))


@pytest.mark.parametrize("architecture", ["DeepLabV3", "UPerNet"])
def test_a_batch_of_one_is_refused_where_batchnorm_would_fail(architecture):
    network = SMP(3, architecture=architecture, **TINY).train()
    network(torch.rand(2, 3, 64, 64)).sum().backward()
    with pytest.raises(UserError, match=r"train\.batch_size: \w+ can't be trained on a batch of 1 image"):
        network(torch.rand(1, 3, 64, 64))
    SMP(3, architecture="Unet", **TINY).train()(torch.rand(1, 3, 64, 64))


def test_experts_of_a_mixture_and_decoders_on_one_encoder():
    torch.manual_seed(0)
    experts = {name: SMP(3, **TINY).eval() for name in ("a", "b")}
    channels = experts["a"].feature_channels
    mixture = MixtureOfExperts(experts, SimpleGate(2 * channels, 2, 3), 3).eval()
    images = torch.rand(2, 3, 50, 60)
    assert mixture(images).shape == (2, 3, 50, 60)
    shared = SharedEncoderMixture(experts, SimpleGate(channels, 2, 3), 3).eval()
    with torch.no_grad():
        own = shared.decoder_of("b")(images)
        second = SMP(3, **TINY).eval()
        second.load_state_dict(experts["a"].state_dict())
        parts = {
            name: tensor
            for name, tensor in experts["b"].state_dict().items()
            if name.startswith(("network.decoder", "network.segmentation_head"))
        }
        second.load_state_dict(parts, strict=False)
        torch.testing.assert_close(own, second(images))


def test_multiply_adds_are_counted_without_a_pass():
    assert gmacs(SMP(3, **TINY), (64, 64)) > 0.05


def test_normalisation_can_be_given_and_weights_come_from_a_file(tmp_path):
    first = SMP(3, backbone="resnet18", pretrained="none", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    assert first.normalize.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    torch.save(first.network.encoder.state_dict(), tmp_path / "encoder.pth")
    second = SMP(3, architecture="FPN", backbone="resnet18", pretrained=str(tmp_path / "encoder.pth"))
    stored = first.network.encoder.state_dict()
    assert all(
        torch.equal(tensor, stored[name]) for name, tensor in second.network.encoder.state_dict().items()
    )


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            {"architecture": "Unett"},
            r"network\.architecture: 'Unett' is unknown; allowed: Unet, .*; did you mean 'Unet'",
        ),
        ({"architecture": "DPT"}, r"'DPT' is unknown"),
        ({"backbone": "resnet_18"}, r"network\.backbone: no encoder 'resnet_18'"),
        ({"options": {"decoder_chanels": 3}}, r"network: Unet can't be built on .*decoder_chanels"),
        ({"architecture": "Linknet", "backbone": "mit_b0"}, r"Linknet can't be built on 'mit_b0'"),
    ],
)
def test_mistakes_are_told(keys, message):
    with pytest.raises(UserError, match=message):
        SMP(3, **{**TINY, **keys})


def test_without_a_connection_the_way_out_is_told(monkeypatch):
    def offline(*_, weights=None, **__):
        raise OSError("cannot reach the hub\nand more")

    monkeypatch.setattr(segmentation_models_pytorch.decoders.unet.model, "get_encoder", offline)
    with pytest.raises(UserError, match=r"OSError: cannot reach the hub; without .* `pretrained: none`"):
        SMP(3, backbone="resnet18")
