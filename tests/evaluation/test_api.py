"""evaluate(model, loader, suite) from Python: anybody's network."""

from functools import partial

import pytest
import torch
from torch import nn

from engine.config import UserError, component
from evaluation.api import evaluate
from tests.evaluation import robust_toy as toy

FGSM = [component("attacks:ATTACKS", "fgsm")]


def loader(batch_size=4):
    return [(scene.images, scene.labels) for scene in toy.scenes(batch_size)]


def test_a_module_is_attacked_and_the_tables_come_back():
    model = toy.Net(0)
    report = evaluate(model, loader(), "none", attacks=FGSM, eps=[4 / 255], log=str)
    clean, worst = (
        next(row["value"] for row in report.rows if (row["attack"], row["metric"]) == (attack, "aacc"))
        for attack in ("clean", "worst of common")
    )
    images, labels = (torch.cat(part) for part in zip(*loader(), strict=True))
    counted = labels != 255
    assert clean == (model(images).argmax(1)[counted] == labels[counted]).double().mean().item()
    assert worst < clean - 0.03
    assert "# Robustness" in report.markdown and report.results.images[0] == "image 00000"


def test_a_function_a_mixture_and_a_generator_will_do():
    model = toy.Net(0).requires_grad_(False)
    report = evaluate(
        lambda images: model(images), iter(loader()), "none", attacks=FGSM, eps=[2 / 255], log=str
    )
    again = evaluate(model, loader(), "none", attacks=FGSM, eps=[2 / 255], log=str)
    assert report.rows == again.rows
    mixture = toy.Mixture(toy.Net(0), toy.Net(1), routing="hard")
    kinds = evaluate(mixture, loader(), "quick", eps=[1 / 255], log=str).results.targets["model"]
    assert kinds["identity"]["kind"] == "hard"
    assert [member["name"] for member in kinds["members"]][-2:] == ["soft_gate", "route_first"]


def test_class_weights_come_from_the_labels_where_none_are_given():
    lines = []
    balanced = [component("attacks:ATTACKS", "pgd", loss="balanced_masked_ce", steps=2)]
    report = evaluate(toy.Net(0), loader(), "none", attacks=balanced, eps=[1 / 255], log=lines.append)
    labels = torch.cat([labels for _, labels in loader()])
    expected = [(labels == place).sum().item() for place in range(toy.CLASSES)]
    assert report.results.targets["model"]["identity"]["class_pixels"] == expected
    assert any("class weights: from the labels of these images" in line for line in lines)


def test_a_folder_keeps_what_is_done(tmp_path, monkeypatch):
    run = {"suite": "none", "attacks": FGSM, "eps": [1 / 255], "folder": tmp_path, "log": str}
    first = evaluate(toy.Net(0), loader(), **run)
    assert (tmp_path / "robustness.md").read_text() == first.markdown
    monkeypatch.setattr("evaluation.robust.Bench.run", None)
    assert evaluate(toy.Net(0), loader(), **run).rows == first.rows
    with pytest.raises(UserError, match="identity.tensors"):
        evaluate(toy.Net(1), loader(), **run)


@pytest.mark.parametrize("wrap", ["function", "partial", "module"])
def test_a_folder_is_not_used_again_for_what_cannot_be_told_apart(tmp_path, wrap):
    """Two functions of one name, and modules that hold their network as a function."""

    class Wrapped(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.call = lambda images: network(images)

        def forward(self, images):
            return self.call(images)

    def attack(seed):
        network = toy.Net(seed).requires_grad_(False)
        models = {
            "function": lambda images: network(images),
            "partial": partial(network),
            "module": Wrapped(network),
        }
        run = {"suite": "none", "attacks": FGSM, "eps": [1 / 255], "folder": tmp_path, "checks": False}
        return evaluate(models[wrap], loader(), **run, log=str)

    before = attack(0).rows
    with pytest.raises(UserError, match="holds an evaluation already, .* take a new folder"):
        attack(1)
    tables = (tmp_path / "robustness.csv").read_text()
    assert str(before[0]["value"]) in tables


def test_blocks_are_the_units_of_intervals():
    run = {"suite": "none", "attacks": FGSM, "eps": [1 / 255], "log": str}
    alone = evaluate(toy.Net(0), loader(), **run)
    pairs = evaluate(
        toy.Net(0), loader(), **run, blocks=[f"block {place // 2}" for place in range(toy.IMAGES)]
    )
    assert (alone.rows[0]["units"], pairs.rows[0]["units"]) == (12, 6)


def test_half_precision_is_refused():
    class Half(nn.Module):
        def forward(self, images):
            return images.repeat(1, 2, 1, 1)[:, : toy.CLASSES].half()

    with pytest.raises(UserError, match="logits are torch.float16; robustness needs float32"):
        evaluate(Half(), loader(), "none", attacks=FGSM, eps=[1 / 255], log=str)


def test_the_network_itself_is_checked():
    class Brain(toy.Net):
        def forward(self, images):
            logits = nn.functional.conv2d(images.bfloat16(), self.conv.weight.bfloat16(), padding=1)
            return 8 * logits.float()

    def is_flagged(model, **more):
        report = evaluate(model, loader(), "none", attacks=FGSM, eps=[1 / 255], **more, log=str)
        return "model: float32: computes in bfloat16" in report.markdown

    assert is_flagged(Brain(0)) and not is_flagged(toy.Net(0)) and not is_flagged(Brain(0), checks=False)


@pytest.mark.parametrize(
    ("change", "told"), [({"eps": [0]}, "eps: .0. is wrong"), ({"norm": "l1"}, "norm: 'l1'")]
)
def test_a_threat_that_is_none_is_refused(change, told):
    with pytest.raises(UserError, match=told):
        evaluate(toy.Net(0), loader(), "none", **change, log=str)
