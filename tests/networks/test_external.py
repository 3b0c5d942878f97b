"""Anybody's network: any callable, logits of any size, weights that identify it, mistakes told with their line."""

import hashlib
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.config import UserError
from evaluation.targets import target_of
from networks.complexity import gmacs
from networks.external import External, ExternalClassifier
from networks.frrn import FRRN
from networks.moe import Frozen

LAYERS = "import torch\nfrom torch import nn\n"
BUILD = f"""{LAYERS}
def build(num_classes, width=4):
    torch.manual_seed(0)
    stem = nn.Conv2d(3, width, 3, 4, 1), nn.BatchNorm2d(width), nn.ReLU()
    return nn.Sequential(*stem, nn.Conv2d(width, num_classes, 1))

def constant():
    return lambda images: images * 2 - 1

def broken():
    return 1 / 0

def number():
    return 7
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_net.py"
    path.write_text(BUILD)
    return path


def test_smaller_logits_are_brought_to_the_size_of_the_images(file):
    network = External(5, file=str(file)).eval()
    images = torch.rand(2, 3, 37, 50)
    with torch.no_grad():
        own, features = network.forward_features(images)
        expected = F.interpolate(own, size=(37, 50), mode="bilinear", align_corners=False)
        assert torch.equal(network(images), expected)
        assert torch.equal(own, network.network(images)) and own.shape == (2, 5, 10, 13)
    assert features.shape == (2, 0, 1, 1) and network.feature_channels == 0


def test_a_plain_function_will_do(file):
    network = External(3, file=str(file), function="constant").eval()
    images = torch.rand(1, 3, 8, 9)
    assert torch.equal(network(images), images * 2 - 1)
    assert gmacs(network, (8, 8)) == 0


def test_images_are_normalised_and_padded_on_request(file):
    given = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    network = External(3, file=str(file), function="constant", stride=8, **given).eval()
    images = torch.rand(1, 3, 10, 20)
    own, _ = network.forward_features(images)
    assert own.shape == (1, 3, 16, 24)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in given.values())
    torch.testing.assert_close(network(images), (images - mean) / std * 2 - 1)
    assert (own[..., 10:, :] == -1).all()  # the mean colour, where there is no image


def test_gradient_reaches_the_image_and_weights_train(file):
    network = External(5, file=str(file)).train()
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    network(images).square().sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in network.parameters())
    before = network.network[1].running_mean.clone()
    Frozen(network).train()(images)
    assert torch.equal(network.network[1].running_mean, before)


def test_its_tensors_and_its_file_identify_it(file):
    network, again = External(5, file=str(file)), External(5, file=str(file))
    assert network.file_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert "network.0.weight" in network.state_dict()
    External(5, file=str(file), sha256=network.file_sha256)
    file.write_text(BUILD + "\n")
    with pytest.raises(
        UserError, match=f"network.sha256: {file} has .*, the config says {network.file_sha256}"
    ):
        External(5, file=str(file), sha256=network.file_sha256)


def test_the_same_file_elsewhere_is_the_same_network_under_attack(file, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    other = shutil.copy(file, tmp_path / "elsewhere" / "theirs.py")
    here, there = (target_of("x", External(5, file=str(one))).identity for one in (file, other))
    assert here == there
    assert here != target_of("x", External(5, file=str(file), stride=8)).identity


def test_arguments_and_neighbouring_files(tmp_path):
    (tmp_path / "their_layers.py").write_text(f"{LAYERS}\ndef head(k, n):\n    return nn.Conv2d(3, k, n)\n")
    file = tmp_path / "net.py"
    file.write_text("from their_layers import head\n\ndef make(kernel):\n    return head(4, kernel)\n")
    network = External(4, file=str(file), function="make", args={"kernel": 3})
    assert network.network.weight.shape == (4, 3, 3, 3)
    assert network(torch.rand(1, 3, 6, 6)).shape == (1, 4, 6, 6)
    import sys

    assert str(tmp_path) not in sys.path


def test_neighbouring_files_of_one_name_are_each_networks_own(tmp_path):
    """Two folders with a model.py, and one named like a package of ours."""
    import sys

    import metrics

    built = []
    for kernel in (1, 3):
        folder = tmp_path / str(kernel)
        folder.mkdir()
        (folder / "model.py").write_text(f"{LAYERS}\ndef head():\n    return nn.Conv2d(3, 4, {kernel})\n")
        (folder / "metrics.py").write_text(f"KERNEL = {kernel}\n")
        (folder / "net.py").write_text(
            "from metrics import KERNEL\nfrom model import head\n\ndef build():\n    return head()\n"
        )
        built.append(External(4, file=str(folder / "net.py")).network.kernel_size)
    assert built == [(1, 1), (3, 3)]
    assert sys.modules["metrics"] is metrics and not hasattr(metrics, "KERNEL")
    below = tmp_path / "3" / "below"
    below.mkdir()
    for name in ("net.py", "metrics.py"):
        (below / name).write_text((tmp_path / "3" / name).read_text())
    (below / "model.py").write_text((tmp_path / "1" / "model.py").read_text())
    assert External(4, file=str(below / "net.py")).network.kernel_size == (1, 1)
    assert External(4, file=str(tmp_path / "3" / "net.py")).network.kernel_size == (3, 3)


def test_a_neighbouring_file_is_not_taken_for_a_package_of_ours_later(tmp_path, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "reports"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "reports.py").write_text("CLASSES = 4\n")
    (tmp_path / "net.py").write_text(
        f"{LAYERS}from reports import CLASSES\n\ndef build():\n    return nn.Conv2d(3, CLASSES, 1)\n"
    )
    External(4, file=str(tmp_path / "net.py"))
    from reports.report import write_report

    assert callable(write_report)


def test_features_where_the_network_says_how_many(tmp_path):
    file = tmp_path / "ours.py"
    file.write_text(
        "from networks.frrn import FRRN\n\ndef build(num_classes):\n"
        "    return FRRN(num_classes, width=0.1, residual_channels=4)\n"
    )
    torch.manual_seed(0)
    network = External(3, file=str(file), stride=16).eval()
    torch.manual_seed(0)
    same = FRRN(3, width=0.1, residual_channels=4).eval()
    images = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        for ours, theirs in zip(network.forward_features(images), same.forward_features(images), strict=True):
            assert torch.equal(ours, theirs)
    assert network.feature_channels == same.feature_channels

    file.write_text(  # timm's networks have another forward_features, which gives no logits
        f"{LAYERS}\nclass Timm(nn.Conv2d):\n    def forward_features(self, images):\n        return images\n"
        "\ndef build():\n    return Timm(3, 3, 1)\n"
    )
    network = External(3, file=str(file))
    assert network.feature_channels == 0 and network(images).shape == (1, 3, 32, 48)


def test_what_a_routed_network_offers_is_kept(tmp_path):
    file = tmp_path / "routed.py"
    file.write_text(
        f"{LAYERS}\nclass Routed(nn.Conv2d):\n    routing = 'hard'\n    num_experts = 2\n    top_k = 1\n"
        "    def gate_logits(self, images):\n        return images.mean((2, 3))[None, :, :2, None, None, None]\n"
        "    def inspect(self, images):\n        return 'inspected'\n\n"
        "def build():\n    return Routed(3, 3, 1)\n"
    )
    network = External(3, file=str(file))
    images = torch.rand(2, 3, 8, 8)
    assert network.gate_logits(images).shape == (1, 2, 2, 1, 1, 1)
    assert (network.routing, network.num_experts, network.inspect(images)) == ("hard", 2, "inspected")
    assert network.top_k == 1
    assert not hasattr(network, "expert_logits") and not hasattr(network, "anything")
    with pytest.raises(
        UserError, match="routed.py:build returned offers gate_logits, inspect, num_experts, routing, top_k"
    ):
        External(3, file=str(file), stride=2)  # the gate would see other images than attacks do


def test_a_classifier_sees_normalised_images_on_request(file):
    file.write_text(f"{LAYERS}\ndef build():\n    return lambda images: images.mean((2, 3))\n")
    images = torch.rand(2, 3, 8, 8)
    plain = ExternalClassifier(3, file=str(file))
    assert torch.equal(plain(images), images.mean((2, 3)))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    expected = (images.mean((2, 3)) - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(ExternalClassifier(3, file=str(file), mean=mean, std=std)(images), expected)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"function": "biuld"}, r"network\.function: .*my_net\.py has no function biuld"),
        (
            {"function": "broken"},
            r"network\.file: .*my_net\.py, line 13: ZeroDivisionError: division by zero",
        ),
        ({"function": "number"}, r"my_net\.py:number returned a int; expected a callable"),
        ({"args": {"wide": 3}}, r"network\.file: .*my_net\.py: TypeError: .*'wide'"),
    ],
)
def test_what_fails_is_told_with_its_line(file, keys, message):
    with pytest.raises(UserError, match=message):
        External(5, file=str(file), **keys)


def test_files_that_are_missing_or_broken_are_told(tmp_path):
    with pytest.raises(UserError, match="network.file: no file nowhere.py; name the Python file"):
        External(5, file="nowhere.py")
    file = tmp_path / "net.py"
    file.write_text("import torch\n\nimport not_installed_anywhere\n")
    with pytest.raises(UserError, match=r"net\.py, line 3: ModuleNotFoundError: .*not_installed_anywhere"):
        External(5, file=str(file))
    file.write_text("def build(:\n")
    with pytest.raises(UserError, match=r"net\.py.*SyntaxError"):
        External(5, file=str(file))


@pytest.mark.parametrize(
    "code, message",
    [
        ("lambda images: {'out': images}", r"net\.py:build gave a dict, expected logits \[2, 3, h, w\]"),
        ("lambda images: images[:, :2]", r"gave \[2, 2, 8, 8\] float32, expected logits \[2, 3, h, w\]"),
        ("lambda images: images.mean((2, 3))", r"gave \[2, 3\] float32"),
        ("lambda images: (255 * images).int()", r"gave \[2, 3, 8, 8\] int32, expected .* in floating point"),
    ],
)
def test_what_are_no_logits_is_refused(tmp_path, code, message):
    (tmp_path / "net.py").write_text(f"def build():\n    return {code}\n")
    with pytest.raises(UserError, match=message):
        External(3, file=str(tmp_path / "net.py"))(torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize("kind", [External, ExternalClassifier])
def test_what_fails_when_it_runs_is_told_with_its_line_and_the_images(tmp_path, kind):
    file = tmp_path / "net.py"
    file.write_text(
        "import torch\n\ndef net(images):\n    return images @ torch.ones(7, 7)\n\ndef build():\n    return net\n"
    )
    message = r"^/.*net\.py, line 4: RuntimeError: .* \(images \[2, 1, 8, 8\]\)$"
    with pytest.raises(UserError, match=message):
        kind(3, file=str(file))(torch.rand(2, 1, 8, 8))


def test_multiply_adds_are_counted_in_a_real_pass(tmp_path):
    (tmp_path / "net.py").write_text(
        f"{LAYERS}\nclass Picky(nn.Conv2d):\n    def forward(self, images):\n"
        "        assert images.sum().item() == 0\n        return super().forward(images)\n"
        "\ndef build(num_classes):\n    return Picky(3, num_classes, 1)\n"
    )
    network = nn.Sequential(External(7, file=str(tmp_path / "net.py")))
    assert gmacs(network, (10, 20)) == pytest.approx(3 * 7 * 200 / 1e9)
