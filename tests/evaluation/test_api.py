"""evaluate(model, loader, suite) from Python: anybody's network."""

import csv
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from engine.config import UserError, component
from evaluation.api import evaluate
from networks import ensemble
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


def test_a_folder_is_of_one_rule_of_an_ensemble(tmp_path):
    run = {
        "suite": "none",
        "attacks": FGSM,
        "eps": [1 / 255],
        "folder": tmp_path,
        "checks": False,
        "log": str,
    }
    model = toy.Ensemble(toy.Net(0), toy.Net(1))
    model.combine = ensemble.mean
    evaluate(model, loader(), **run)
    model.combine = ensemble.max
    with pytest.raises(UserError, match="identity.modules"):
        evaluate(model, loader(), **run)


class Classwise(toy.Mixture):
    """A weight for each class."""

    def gate_logits(self, images):
        return super().gate_logits(images) * torch.linspace(-1, 1, toy.CLASSES).view(1, 1, 1, -1, 1, 1)


def test_gradients_are_taken_whatever_is_on_outside():
    torch.manual_seed(0)
    mixture = Classwise(toy.Net(0), toy.Net(1), routing="soft")
    run = {"attacks": [{"name": "route_first", "steps": 4}], "eps": [1 / 255], "checks": False, "log": str}
    expected = evaluate(mixture, loader(), "none", **run).rows
    with torch.no_grad():
        assert evaluate(mixture, loader(), "none", **run).rows == expected
    with torch.inference_mode(), pytest.raises(UserError, match="outside of torch.inference_mode"):
        evaluate(mixture, loader(), "none", **run)


@pytest.mark.parametrize("wrap", ["function", "partial", "module", "attribute", "private"])
def test_a_folder_is_of_one_model_however_it_holds_its_weights(tmp_path, wrap):
    """Two functions of one name, modules that hold their network as a function, and tensors that are no buffers."""

    class Wrapped(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.call = lambda images: network(images)

        def forward(self, images):
            return self.call(images)

    class Moved(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.network = toy.Net(0)
            setattr(self, "mean" if wrap == "attribute" else "_mean", torch.tensor([0.1 * seed]))

        def forward(self, images):
            return self.network(images - (self.mean if wrap == "attribute" else self._mean))

    def attack(seed):
        network = toy.Net(seed).requires_grad_(False)
        models = {
            "function": lambda images: network(images),
            "partial": partial(network),
            "module": Wrapped(network),
            "attribute": Moved(seed),
            "private": Moved(seed),
        }
        run = {"suite": "none", "attacks": FGSM, "eps": [1 / 255], "folder": tmp_path, "checks": False}
        return evaluate(models[wrap], loader(), **run, log=str)

    before = attack(0).rows
    assert attack(0).rows == before
    with pytest.raises(UserError, match=r"ledger is of another evaluation: .*identity\."):
        attack(1)
    tables = (tmp_path / "robustness.csv").read_text()
    assert str(before[0]["value"]) in tables


def test_a_model_in_training_mode_is_attacked_as_it_is_and_left_so(tmp_path):
    model = nn.Sequential(toy.Net(0), nn.BatchNorm2d(toy.CLASSES))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = {"attacks": FGSM, "eps": [1 / 255], "folder": tmp_path, "checks": False, "log": str}
    rows = evaluate(model, loader(), "none", **run).rows
    assert model.training and all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    )
    assert evaluate(model, loader(), "none", **run).rows == rows


def test_arrays_will_do_and_labels_that_are_no_class_are_told():
    run = {
        "attacks": [{"name": "pgd", "loss": "balanced_masked_ce", "steps": 2}],
        "checks": False,
        "log": str,
    }
    numbers = {
        "eps": torch.tensor([2 / 255]),
        "class_pixels": np.array([4, 3, 2, 1]),
        "blocks": torch.arange(toy.IMAGES) // 2,
        "seed": np.int64(3),
    }
    plain = {key: np.asarray(value).tolist() for key, value in numbers.items()}
    found, expected = (
        evaluate(toy.Net(0), loader(), "none", **run, **keys).markdown for keys in (numbers, plain)
    )
    assert found == expected
    for wrong in (-1, toy.CLASSES):
        batches = [(images, labels.masked_fill(labels == 1, wrong)) for images, labels in loader()]
        with pytest.raises(UserError, match=f"labels from {min(wrong, 0)} to .*, allowed: 0..3 and 255"):
            evaluate(toy.Net(0), batches, "none", eps=[2 / 255], **run)


def test_every_size_of_images_is_told():
    batches = [loader()[0], tuple(part[..., :4, :6] for part in loader()[1])]
    run = {"attacks": FGSM, "eps": [1 / 255], "checks": False, "log": str}
    protocols = [
        evaluate(toy.Net(0), part, "none", **run).results.protocol for part in (batches, batches[:1])
    ]
    assert [one["image_size"] for one in protocols] == [[[6, 8], [4, 6]], [6, 8]]


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
    ("change", "told"),
    [
        ({"eps": [0]}, "eps: .0. is wrong"),
        ({"norm": "l1"}, "norm: 'l1'"),
        ({"norm": "l2"}, "eps: missing; norm l2 has no radii of its own"),
    ],
)
def test_a_threat_that_is_none_is_refused(change, told):
    with pytest.raises(UserError, match=told):
        evaluate(toy.Net(0), loader(), "none", **change, log=str)


class Odd(toy.Mixture):
    """A gate with other logits: NaN, or -inf for the experts that the bottom half of brightness masks."""

    def __init__(self, *networks, routing, logits):
        super().__init__(*networks, routing=routing)
        self.change = {"nan": self.nan, "masked": self.masked, "always masked": self.always}[logits]

    def gate_logits(self, images):
        return self.change(super().gate_logits(images), images)

    def nan(self, gate_logits, images):
        return gate_logits * torch.nan

    def masked(self, gate_logits, images):
        dark = images.mean(dim=(1, 2, 3)).view(1, -1, 1, 1, 1, 1) < 0.5
        return torch.cat([gate_logits[:, :, :1].masked_fill(dark, -torch.inf), gate_logits[:, :, 1:]], dim=2)

    def always(self, gate_logits, images):
        return torch.cat([gate_logits[:, :, :-1], torch.full_like(gate_logits[:, :, -1:], -torch.inf)], dim=2)


def figures_of(folder, attack):
    with open(folder / "telemetry.csv", newline="", encoding="utf-8") as file:
        return {
            (row["figure"], row["expert"]): row["attacked"]
            for row in csv.DictReader(file)
            if row["attack"] == attack
        }


def test_a_gate_that_says_nan_is_told_and_never_crashes(tmp_path):
    """Of hard routing its answers are finite nevertheless."""
    model = Odd(toy.Net(0), toy.Net(1), routing="hard", logits="nan")
    run = {"eps": [2 / 255], "folder": tmp_path, "log": str}
    report = evaluate(model, loader(), "quick", **run)
    assert "gate logits: gate logits not finite on 12 images" in report.markdown
    assert "the gate's logits are not finite: it has no direction" in report.markdown
    told = figures_of(tmp_path, "route_first")
    assert {told[name, ""] for name in ("gate margin", "gate entropy")} == {""}  # NaN
    assert told["load", "0"] == "1.0" and told["route flip rate", ""] == "0.0"
    worst = report.results.worst("model", 2 / 255, "adaptive").figures["aacc"].value
    assert worst < report.results.clean("model")["aacc"].value - 0.02
    assert evaluate(model, loader(), "quick", **run).rows == report.rows  # goes on from the ledger


@pytest.mark.parametrize("logits", ["masked", "always masked"])
@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_an_expert_that_a_gate_masks_is_no_fault(tmp_path, routing, logits):
    model = Odd(*map(toy.Net, range(3)), routing=routing, logits=logits)
    more = [{"name": name, "steps": 6} for name in ("joint", "stay_route", "gate_only", "change_route")]
    more.append({"name": "evade", "score": "gate_entropy", "steps": 3})
    report = evaluate(
        model, loader(), "quick", eps=[4 / 255], attacks=more, folder=tmp_path, log=str, checks=False
    )
    checks = (tmp_path / "checks.csv").read_text()
    assert "not finite" not in checks
    for attack in ("soft_gate", "joint", "gate_only"):
        told = figures_of(tmp_path, attack)
        assert 0 <= float(told["gate entropy", ""]) <= math.log(3) and float(told["gate margin", ""]) > 0
        single = report.results.single("model", 4 / 255, attack)["aacc"].value
        assert attack == "gate_only" or single < report.results.clean("model")["aacc"].value - 0.02


@pytest.mark.parametrize("logits", ["masked", "always masked"])
def test_checks_of_a_network_know_masks(logits):
    model = Odd(*map(toy.Net, range(3)), routing="soft", logits=logits)
    report = evaluate(model, loader(), "none", eps=[4 / 255], attacks=FGSM, log=str)
    gate = [line for line in report.markdown.splitlines() if "gate gradient" in line or "active test" in line]
    assert gate and not any("flag" in line or line.startswith("- !") for line in gate)


@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_a_mixture_of_one_expert_goes_through_a_whole_suite(routing):
    """Its gate has nothing to choose: the attacks on it are plain ones."""
    model = toy.Mixture(toy.Net(0), routing=routing)
    report = evaluate(model, loader(), "quick", eps=[2 / 255], log=str, attacks=ROUTED_ATTACKS)
    assert "gate gradient: there is one expert: the gate has nothing to choose" in report.markdown
    assert "gate direction: there is one expert" in report.markdown
    assert "Nothing wrong: active test: model." in report.markdown
    plain = evaluate(toy.Net(0), loader(), "quick", eps=[2 / 255], log=str, checks=False).results
    assert report.results.clean("model")["aacc"].value == plain.clean("model")["aacc"].value
    for attack in ("soft_gate", "route_first"):
        assert (
            report.results.single("model", 2 / 255, attack)["aacc"].value < plain.clean("model")["aacc"].value
        )


ROUTED_ATTACKS = [
    {"name": name, "steps": 3}
    for name in (
        "joint", "stay_route", "weakest_expert", "each_path", "all_to_one_wrong", "gate_only", "experts_only",
        "change_route", "evade",
    )
]  # fmt: skip


IMAGES_OF_ONE = torch.rand(2, 3, *toy.SIZE, generator=torch.Generator().manual_seed(3))
LABELS_OF_ONE = torch.zeros(2, *toy.SIZE, dtype=torch.long)


@pytest.mark.parametrize(
    ("batches", "told"),
    [
        ([], "loader: gives no batch"),
        ([(IMAGES_OF_ONE, LABELS_OF_ONE + 255)], "no pixel of its 2 images has a label other than 255"),
        (
            [(IMAGES_OF_ONE, LABELS_OF_ONE[:, None])],
            r"labels \[2, 1, 6, 8\], expected whole numbers \[2, 6, 8\]",
        ),
        ([(IMAGES_OF_ONE, LABELS_OF_ONE[:, :3])], r"batch 0: labels \[2, 3, 8\], expected .* \[2, 6, 8\]"),
        ([(IMAGES_OF_ONE, LABELS_OF_ONE.float())], "of torch.float32, expected whole numbers"),
        ([(IMAGES_OF_ONE, LABELS_OF_ONE[:, 0, 0])], "are of whole images, .*evaluate_cnn_moe.py"),
        (
            [(IMAGES_OF_ONE, LABELS_OF_ONE), (IMAGES_OF_ONE, LABELS_OF_ONE[:1])],
            r"batch 1: labels \[1, 6, 8\]",
        ),
        ([IMAGES_OF_ONE], "batch 0: is no pair"),
        ([(IMAGES_OF_ONE[0], LABELS_OF_ONE)], r"images \[3, 6, 8\], expected \[B, 3, H, W\]"),
        ([((255 * IMAGES_OF_ONE).byte(), LABELS_OF_ONE)], r"must be float32 in \[0, 1\], found torch.uint8"),
    ],
)
def test_batches_that_cannot_be_attacked_are_refused_first(tmp_path, batches, told):
    asked = []
    model = lambda images: asked.append(1) or toy.Net(0)(images)  # noqa: E731
    with pytest.raises(UserError, match=told):
        evaluate(model, batches, "quick", folder=tmp_path / "new", log=str)
    assert not asked and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"blocks": ["a"] * 11}, "blocks: 11 names for 12 images"),
        ({"blocks": ["a"] * 13}, "blocks: 13 names for 12 images"),
        ({"classes": ["road", "sky"]}, "classes: 2 of them, and the model has logits of 4 classes"),
        ({"class_pixels": [1, 2, 3]}, "class_pixels: 3 of them"),
        ({"eps": [8]}, "eps: 8 lets every pixel become any other, .* 8/255 may be meant"),
        ({"eps": [float("nan")]}, r"eps: \[nan\] is wrong"),
        ({"eps": ["2/255", "two"]}, r"eps: \['2/255', 'two'\] is wrong; expected numbers"),
        ({"device": "gpu"}, "^device gpu: is wrong; allowed: auto, cpu, cuda, cuda:N"),
        ({"class_pixels": [1, 2, 3, -1]}, "class_pixels: -1 is wrong; expected 0 or more of each class"),
        ({"classes": "road"}, "classes: 'road' is wrong; expected the name of each class"),
        ({"eps": 8 / 255}, r"eps: 0.03.* expected several numbers, such as \[0.03"),
        ({"attacks": [{"name": "pgdd"}]}, "attacks.0.name: \"pgdd\" is unknown; .* did you mean 'pgd'"),
        ({"attacks": [{"name": "pgd", "step": 2}]}, "attacks.0.step: unknown key of pgd; .*'steps'"),
        ({"attacks": ["pgd"]}, 'attacks.0: "pgd" is wrong; expected a mapping such as {name: clean}'),
        ({"attacks": [{"name": "autoattack"}]}, "attacks: autoattack is for classifiers"),
    ],
)
def test_settings_that_do_not_fit_are_refused_first(tmp_path, keys, told):
    with pytest.raises(UserError, match=told):
        evaluate(toy.Net(0), loader(), "none", folder=tmp_path / "new", **keys, log=str)
    assert not (tmp_path / "new").exists()


def test_weights_in_other_than_float32_are_refused_first():
    with pytest.raises(UserError, match="model: has weights in float16; robustness needs float32"):
        evaluate(toy.Net(0).half(), loader(), "none", log=str)
    counting = toy.Net(0)
    counting.places = torch.nn.Parameter(torch.arange(3), requires_grad=False)
    evaluate(counting, loader(), "none", attacks=FGSM, eps=iter([1 / 255]), checks=False, log=str)


def test_radii_may_be_written_as_in_yaml():
    run = {"attacks": FGSM, "checks": False, "log": str}
    found = [evaluate(toy.Net(0), loader(), "none", eps=eps, **run).rows for eps in (["2/255"], [2 / 255])]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (lambda images: images[:, :, ::2, ::2], r"model: logits \[1, 3, 3, 4\] of images \[1, 3, 6, 8\]"),
        (lambda images: images.mean(dim=(2, 3)), r"logits \[1, 3\] .* expected \[B, K, 6, 8\]"),
        (lambda images: {"out": images}, "model: gives a dict, expected a tensor of logits"),
    ],
)
def test_logits_that_are_none_of_each_pixel_are_refused(model, told):
    with pytest.raises(UserError, match=told):
        evaluate(model, loader(), "none", attacks=FGSM, log=str)


def test_attacks_may_be_as_in_yaml():
    run = {"eps": [2 / 255], "log": str, "checks": False}
    given = {"name": "pgd", "steps": 3, "step_size": "1/255"}
    made = component("attacks:ATTACKS", "pgd", steps=3, step_size=1 / 255)
    rows = [evaluate(toy.Net(0), loader(), "none", attacks=[one], **run).rows for one in (given, made)]
    assert rows[0] == rows[1]
    evaluate(toy.Net(0), loader(), "none", attacks=FGSM, eps=[8], norm="l2", log=str, checks=False)
