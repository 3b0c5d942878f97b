import os
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from engine.config import UserError
from networks.complexity import gmacs, parameters
from networks.deeplab import DeepLabV3Plus
from networks.gates import SimpleGate
from networks.moe import MixtureOfExperts
from networks.normalize import IMAGENET_MEAN, IMAGENET_STD

TINY = {"backbone": "mobilenet_v2", "pretrained": "none"}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return DeepLabV3Plus(5, **TINY).eval()


@pytest.fixture(scope="module")
def weights_file():
    if "MOE_DATA" not in os.environ:
        pytest.skip("MOE_DATA is not set: no ImageNet weights to test with")
    return Path(os.environ["MOE_DATA"]) / "weights/imagenet/tf_efficientnet_lite0.safetensors"


@pytest.mark.parametrize("output_stride, rates", [(16, (6, 12, 18)), (8, (12, 24, 36))])
def test_is_the_librarys_network_after_normalisation(output_stride, rates):
    ours = DeepLabV3Plus(5, **TINY, output_stride=output_stride)
    with torch.no_grad():  # BatchNorm statistics, or nothing gets through an untrained network
        for _ in range(10):
            ours(torch.rand(2, 3, 64, 80))
    ours.eval()
    theirs = smp.DeepLabV3Plus(
        "mobilenet_v2",
        encoder_weights=None,
        encoder_output_stride=output_stride,
        decoder_atrous_rates=rates,
        decoder_aspp_separable=False,
        classes=5,
        upsampling=1,
    ).eval()
    theirs.load_state_dict(ours.network.state_dict())
    images = torch.rand(1, 3, 64, 80)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        logits, features = ours.forward_features(images)
        expected = theirs((images - mean) / std)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        upsampled = F.interpolate(expected, size=(64, 80), mode="bilinear", align_corners=False)
        torch.testing.assert_close(ours(images), upsampled, rtol=1e-4, atol=1e-5)
    assert features.shape == (1, ours.feature_channels, 64 // output_stride, 80 // output_stride)
    assert ours.aspp.project[-1].p == 0.1


def test_odd_sizes_are_padded_with_the_mean_colour_and_cropped(network):
    images = torch.rand(1, 3, 97, 131)
    padded = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1).repeat(1, 1, 112, 144)
    padded[..., :97, :131] = images
    with torch.no_grad():
        torch.testing.assert_close(network(images), network(padded)[..., :97, :131], rtol=1e-4, atol=1e-5)


def test_aspp_runs_once_per_pass_also_in_a_mixture(network):
    calls = []
    hook = network.aspp.register_forward_hook(lambda *_: calls.append(1))
    other = DeepLabV3Plus(5, **TINY)
    images = torch.rand(1, 3, 40, 64)
    with torch.no_grad():
        _, features = network.forward_features(images)
        assert len(calls) == 1
        MixtureOfExperts({"a": network, "b": other}, SimpleGate(512, 2, 5), 5).inspect(images)
        assert len(calls) == 2
        aspp = network.aspp(network.network.encoder(F.pad(network.normalize(images), (0, 0, 0, 8)))[-1])
    hook.remove()
    assert torch.equal(features, aspp)


def test_tensors_have_the_names_that_checkpoints_know(network):
    theirs = smp.DeepLabV3Plus("mobilenet_v2", encoder_weights=None, decoder_aspp_separable=False, classes=5)
    names = {"normalize.mean", "normalize.std", *(f"network.{name}" for name in theirs.state_dict())}
    assert network.state_dict().keys() == names


def test_what_is_decoded_is_what_was_encoded(network):
    """The decoder reads nothing but the state, image by image, also a single one in training."""
    images = torch.rand(3, 3, 40, 64)
    with torch.no_grad():
        logits, features = network.forward_features(images)
        encoded = network.encode(images)
        assert torch.equal(encoded.features, features) and torch.equal(network.decode(encoded), logits)
        last = type(encoded)(*(part[2:] for part in encoded))
        torch.testing.assert_close(network.decode(last), logits[2:], rtol=1e-4, atol=1e-5)
        trained = DeepLabV3Plus(5, **TINY).train()
        assert trained.decode(last).isfinite().all()


def test_gradient_reaches_the_image_in_pixel_units(network):
    """The gradient is that of images in [0, 1], so it is 1 / std of the one behind the normalisation."""
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    behind = []
    hook = network.normalize.register_forward_hook(
        lambda _, __, out: (out.retain_grad(), behind.append(out))[0]
    )
    network(images).square().sum().backward()
    hook.remove()
    torch.testing.assert_close(images.grad, behind[0].grad / torch.tensor(IMAGENET_STD).view(3, 1, 1))
    assert images.grad.abs().sum() > 0


def test_trains_on_two_images_and_refuses_one(network):
    model = DeepLabV3Plus(5, **TINY).train()
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    with pytest.raises(UserError, match=r"train\.batch_size.*batch of 1 image"):
        model(torch.rand(1, 3, 32, 32))
    with torch.no_grad():
        model.eval()(torch.rand(1, 3, 32, 32))


def test_is_deterministic_on_request():
    model = DeepLabV3Plus(5, **TINY).train()
    torch.use_deterministic_algorithms(True)
    try:
        model(torch.rand(2, 3, 32, 32)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(isinstance(module, torch.nn.AdaptiveAvgPool2d) for module in model.aspp.modules())


def test_published_backbone_has_the_published_size():
    with torch.device("meta"):
        model = DeepLabV3Plus(38, pretrained="none")
    assert parameters(model.network.encoder)[0] == 42_500_160  # torchvision's ResNet-101 without fc
    assert parameters(model.aspp)[0] == 15_535_104
    assert 80 < gmacs(model, (480, 640)) < 92.6  # the published decoder has a full 3x3


def test_normalisation_follows_the_weights_and_can_be_given(weights_file):
    def statistics(**keys):
        model = DeepLabV3Plus(5, **keys)
        return model.normalize.mean.flatten().tolist(), model.normalize.std.flatten().tolist()

    lite = {"backbone": "tu-tf_efficientnet_lite0"}
    assert statistics(**TINY)[0] == pytest.approx(IMAGENET_MEAN)
    assert statistics(**lite, pretrained="none")[1] == pytest.approx(IMAGENET_STD)
    assert statistics(**lite, pretrained=str(weights_file))[0] == pytest.approx([0.5] * 3, abs=0.01)
    given = statistics(**lite, pretrained=str(weights_file), mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    assert given == (pytest.approx([0.1, 0.2, 0.3]), pytest.approx([1.0, 2.0, 3.0]))


def test_a_checkpoint_brings_its_normalisation():
    trained = DeepLabV3Plus(5, **TINY, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    fresh = DeepLabV3Plus(5, **TINY)
    fresh.load_state_dict(trained.state_dict())
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(fresh.eval()(images), trained.eval()(images))


def test_weights_from_a_file_in_timms_names(weights_file):
    encoder = DeepLabV3Plus(
        5, backbone="tu-tf_efficientnet_lite0", pretrained=str(weights_file)
    ).network.encoder
    stored = load_file(weights_file)
    loaded = encoder.state_dict()
    assert all(torch.equal(tensor, stored[name.removeprefix("model.")]) for name, tensor in loaded.items())


def test_weights_from_a_file_of_a_network_whose_stages_timm_flattens(tmp_path):
    full = timm.create_model("convnext_atto", pretrained=False)
    torch.save(full.state_dict(), tmp_path / "convnext.pth")
    model = DeepLabV3Plus(5, backbone="tu-convnext_atto", pretrained=str(tmp_path / "convnext.pth")).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        ours = model.network.encoder.model.stages_0(
            model.network.encoder.model.stem_1(model.network.encoder.model.stem_0(images))
        )
        assert torch.equal(ours, full.stages[0](full.stem(images)))


def test_weights_from_a_file_in_the_librarys_names(tmp_path, network):
    state = network.network.encoder.state_dict()
    head = {"classifier.1.weight": torch.rand(1000, 1280), "classifier.1.bias": torch.rand(1000)}
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    torch.save({**old, **head}, tmp_path / "encoder.pth")
    loaded = DeepLabV3Plus(5, backbone="mobilenet_v2", pretrained=str(tmp_path / "encoder.pth"))
    for name, tensor in loaded.network.encoder.state_dict().items():
        assert torch.equal(tensor, state[name]) or name.endswith("num_batches_tracked")


def test_weights_that_do_not_fit_are_refused(tmp_path, network):
    state = dict(network.network.encoder.state_dict())
    name = "features.0.0.weight"
    cases = {
        "missing": ({k: v for k, v in state.items() if k != name}, rf"1 missing \({name}\)"),
        "extra": (
            {**state, "features.99.weight": state[name].clone()},
            r"1 not part of it \(features\.99\.weight\)",
        ),
        "shape": ({**state, name: state[name][:1].clone()}, rf"1 of another shape \({name}\)"),
    }
    for case, (tensors, message) in cases.items():
        file = tmp_path / f"{case}.safetensors"
        save_file(tensors, file)
        with pytest.raises(
            UserError, match=f"{case}.safetensors doesn't hold the weights of 'mobilenet_v2': {message}"
        ):
            DeepLabV3Plus(5, backbone="mobilenet_v2", pretrained=str(file))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 truncated"])
def test_damaged_weights_are_refused(tmp_path, suffix, content):
    file = tmp_path / f"damaged.{suffix}"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"damaged.{suffix} is damaged or holds no weights"):
        DeepLabV3Plus(5, backbone="mobilenet_v2", pretrained=str(file))


def test_other_contents_and_missing_files_are_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "nested.pth")
    with pytest.raises(UserError, match="nested.pth is no mapping of names to tensors"):
        DeepLabV3Plus(5, backbone="mobilenet_v2", pretrained=str(tmp_path / "nested.pth"))
    with pytest.raises(UserError, match=r"pretrained: no file imagnet; allowed: imagenet, none"):
        DeepLabV3Plus(5, backbone="mobilenet_v2", pretrained="imagnet")


@pytest.mark.parametrize(
    "backbone, meant", [("resnet_101", "resnet101"), ("tu-tf_eficientnet_lite0", "tu-tf_efficientnet_lite0")]
)
def test_unknown_backbones_are_refused_with_a_suggestion(backbone, meant):
    with pytest.raises(
        UserError, match=rf"network\.backbone: no encoder '{backbone}'.*did you mean.*'{meant}'"
    ):
        DeepLabV3Plus(5, backbone=backbone)


@pytest.mark.parametrize("backbone", ["densenet121", "tu-vit_tiny_patch16_224"])
def test_backbones_that_cannot_be_dilated_are_refused(backbone):
    with pytest.raises(UserError, match=f"'{backbone}' has no output stride 16: "):
        DeepLabV3Plus(5, backbone=backbone, pretrained="none")


def test_without_a_connection_the_way_out_is_told(monkeypatch):
    def offline(*_, weights=None, **__):
        assert weights == "imagenet"
        raise OSError("cannot reach the hub\nand more")

    monkeypatch.setattr("networks.encoders.smp.encoders.get_encoder", offline)
    with pytest.raises(UserError, match=r"'mobilenet_v2' \(cannot reach the hub\).*`pretrained: none` or"):
        DeepLabV3Plus(5, backbone="mobilenet_v2")
