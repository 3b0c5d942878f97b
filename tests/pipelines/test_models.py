"""A gate's section becomes the mixture that it describes."""

from pathlib import Path

import pytest
import torch

from engine.config import Gate, component
from networks.moe import Frozen
from pipelines.models import NETWORKS, Trained, build_mixture, load_network


@pytest.fixture(scope="module")
def experts():
    torch.manual_seed(0)
    deeplab = component(NETWORKS, "deeplabv3plus", backbone="resnet18", pretrained="none")
    networks = {name: Frozen(deeplab.build(3)) for name in ("day", "night")}
    return {
        name: Trained(Path(name), network, {"classes": ["a", "b", "c"]}, name)
        for name, network in networks.items()
    }


@pytest.mark.parametrize(("input", "channels"), [("features", 512), ("logits", 6), ("image", 3)])
@pytest.mark.parametrize("kind", ["simple", "classwise", "spatial"])
def test_a_gate_has_the_channels_of_what_it_reads(experts, kind, input, channels):
    mixture = build_mixture(experts, Gate.model_validate({"type": kind, "input": input}))
    assert mixture.gate.conv.in_channels == channels and mixture.input == input
    assert mixture(torch.rand(1, 3, 32, 48)).shape == (1, 3, 32, 48)


def test_every_key_of_the_section_reaches_the_mixture(experts):
    keys = {"conv": True, "conv_at": "full", "mix": "probs", "routing": "top1", "temperature": 0.5}
    mixture = build_mixture(experts, Gate.model_validate({"type": "spatial", "calibrate": True, **keys}))
    assert mixture.conv.weight.shape == (3, 3, 3, 3) and mixture.conv_at == "full"
    assert (mixture.mixing, mixture.routing, mixture.temperature) == ("probs", "hard", 0.5)
    assert mixture.calibrate and mixture.expert_temperatures.tolist() == [1.0, 1.0]
    plain = build_mixture(experts, Gate.model_validate({"type": "simple"}))
    assert (
        isinstance(plain.conv, torch.nn.Identity) and plain.conv_at == "logits" and plain.mixing == "logits"
    )
    assert (plain.routing, plain.temperature, plain.calibrate) == ("soft", 1.0, False)


def test_a_per_class_spatial_gate_weighs_places_and_classes(experts):
    mixture = build_mixture(experts, Gate.model_validate({"type": "spatial", "per_class": True, "width": 4}))
    assert mixture.inspect(torch.rand(2, 3, 32, 48)).weights.shape == (2, 2, 3, 2, 3)


def test_an_external_network_is_its_settings_and_the_contents_of_the_files_it_names(tmp_path):
    """Not the places where these lie."""

    def written(folder, scale, weights):
        folder.mkdir()
        (folder / "net.py").write_text(NET.format(scale=scale))
        (folder / "w.pt").write_text(weights)
        return folder

    def identity(folder, **keys):
        args = {"weights": str(folder / "w.pt"), **keys.pop("args", {})}
        given = component(NETWORKS, "external", file=str(folder / "net.py"), args=args, **keys)
        return load_network(given, "experts.guest", "abc").sha256

    first = identity(written(tmp_path / "first", 1, "one"))
    assert identity(written(tmp_path / "same", 1, "one")) == first
    others = [
        identity(written(tmp_path / "code", 2, "one")),
        identity(written(tmp_path / "weights", 1, "two")),
        identity(tmp_path / "first", args={"flip": True}),
        identity(tmp_path / "first", function="other"),
        identity(tmp_path / "first", stride=2),
    ]
    assert len({first, *others}) == 6


NET = """
def build(weights, flip=False):
    return lambda images: {scale} * images


def other(weights, flip=False):
    return lambda images: -images
"""
