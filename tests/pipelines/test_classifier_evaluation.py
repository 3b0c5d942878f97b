"""Trained classifiers evaluated from their configs: figures, ledgers, processes, and what is refused at once."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine import config as configs
from engine.checkpoints import load_weights, save_weights
from engine.config import ConfigError, UserError, from_dict
from evaluation.classifiers import load_answers
from evaluation.ledger import read_manifest, read_units
from evaluation.plan import units_of
from pipelines.classification import train
from pipelines.classifier_evaluation import (
    as_evaluation,
    attacked_images,
    design_of,
    evaluate,
    load,
    members_of,
    rise_of,
    targets_of,
)
from pipelines.cli import Options, main
from pipelines.models import weights_file

DATA = {"name": "digits", "test_images": 1200, "val_images": 50, "pad": 1, "flip": False}
MOE = {"name": "cnn_moe", "arch": "resnet18", "ratio": 0.06, "num_experts": 2, "router_width": 0.25}
PLAIN = {"name": "cnn", "arch": "resnet18", "ratio": 0.06}
GUEST = """
import torch
from torch import nn

CLASSES = 10

class Mixture(nn.Module):
    num_experts, routing = 2, "hard"

    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(0)
        self.paths = nn.ModuleList(nn.Linear(64, classes) for _ in range(2))
        self.router = nn.Linear(64, 2)

    def gate_logits(self, images):
        return self.router(images.flatten(1) - 0.5)[None, :, :, None, None, None]

    def route(self, gate_logits):
        return torch.zeros_like(gate_logits).scatter(2, gate_logits.argmax(dim=2, keepdim=True), 1.0)

    def forward_given(self, images, weights):
        each = torch.stack([path(images.flatten(1)) for path in self.paths], dim=1)
        return (each * weights.reshape(-1, 2, 1)).sum(dim=1)

    def forward(self, images):
        return self.forward_given(images, self.route(self.gate_logits(images)))

def build(num_classes):
    return Mixture(num_classes)

def function():
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    return lambda images: images.flatten(1) @ weight.T

def seven():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
"""
ATTACKS = {
    "attacks": [{"name": "pgd", "steps": 2}], "eps": [0.1, 0.3], "attack_images": 6, "attack_batch_size": 4,
    "attack_checks": False,
}  # fmt: skip


class Bench:
    """A folder with two trained classifiers and the means to evaluate them."""

    def __init__(self, folder):
        self.folder = folder
        self.guest = folder / "my_net.py"
        self.guest.write_text(GUEST)
        for name, network in (("moe", MOE), ("plain", PLAIN), ("stage", {**MOE, "granularity": "stage"})):
            train(self.training(name, network), Options(device="cpu"))

    def training(self, name, network, epochs=6, lr=0.05):
        own = {"method": "standard", "epochs": epochs, "batch_size": 64, "val_eps": 0.1, "val_images": 10,
               "val_steps": 1, "tensorboard": False, "optimizer": {"name": "sgd", "lr": lr}}  # fmt: skip
        plain = {"name": name, "output": str(self.folder), "data": DATA, "network": network, "train": own}
        return from_dict(plain)

    def config(self, name, models=("moe", "plain"), data=None, **settings):
        if not isinstance(models, dict):
            models = {one: str(self.folder / one) for one in models}
        return from_dict(
            {
                "name": name,
                "output": str(self.folder),
                "data": {**DATA, **(data or {})},
                "models": models,
                "evaluate": {"batch_size": 500, **settings},
            }
        )

    def evaluate(self, *args, options=None, **settings):
        return evaluate(self.config(*args, **settings), options or Options(device="cpu"))

    def at(self, name, split="test"):
        return self.folder / name / "evaluation" / split


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("classifiers"))


WHOLE = {**ATTACKS, "suite": "quick", "attacks": [], "eps": [0.3], "autoattack": 3, "autoattack_batch_size": 2,
         "attack_seed": 5}  # fmt: skip


@pytest.fixture(scope="module")
def whole(bench):
    bench.evaluate("whole", **WHOLE)
    return bench.at("whole")


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def tables(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()
            if path.is_file() and path.name not in ("timing.csv", "config.yaml")}  # fmt: skip


def network_of(bench, name, network):
    images = bench.config("x").data.build("unused")
    model = bench.training(name, network).network.build(10)
    model.load_state_dict(load_weights(bench.folder / name / "checkpoints" / "best.safetensors")[0])
    return model.eval(), images.split("test")


def test_clean_figures_are_those_of_the_network(bench, whole):
    rows = {(row["model"], row["metric"]): row for row in rows_of(whole / "results.csv") if not row["suite"]}
    for name, network in (("moe", MOE), ("plain", PLAIN)):
        model, split = network_of(bench, name, network)
        images = torch.from_numpy(split.images).float() / 255
        with torch.no_grad():
            right = model(images).argmax(dim=1).numpy() == split.labels
        assert float(rows[name, "top1"]["value"]) == right.mean()
        assert rows[name, "top1"]["n_images"] == "1200" and rows[name, "top1"]["kind"] == network["name"]
    with torch.no_grad():
        for expert in (0, 1):
            plain, split = network_of(bench, "moe", MOE)
            said = plain.pathway(expert)(images).argmax(dim=1).numpy()
            assert float(rows["moe", f"constant_{expert}"]["value"]) == (said == split.labels).mean()
    assert "| moe | 2 x resnet18 / 0.06 | standard |" in (whole / "classifiers.md").read_text()
    names, labels, found = load_answers(whole / "per_image.npz")
    assert list(found) == ["moe", "plain"] and names.tolist() == list(split.names)
    assert (labels == split.labels).all() and found["plain"].alone is None


def test_what_attacks_leave_stands_beside_it(bench, whole):
    rows = [row for row in rows_of(whole / "results.csv") if row["suite"]]
    assert {row["model"] for row in rows} >= {"moe", "moe path 0", "moe path 1", "plain", "moe - plain"}
    value = {(row["suite"], row["model"], row["attack"], row["metric"]): float(row["value"]) for row in rows}
    _, labels, found = load_answers(whole / "per_image.npz")
    for suite, ledger, count in (("quick", "ledger", 6), ("autoattack", "ledger_autoattack", 3)):
        manifest = read_manifest(whole / ledger)
        places = [int(one["name"].removeprefix("digit_")) - 597 for one in manifest["images"]]
        assert len(places) == count and places != sorted(places)
        for model in ("moe", "plain"):
            clean = (found[model].said == labels)[places].mean()
            assert value[suite, model, "clean", "top1"] == pytest.approx(clean)
        assert manifest["protocol"]["seed"] == 5 and manifest["protocol"]["image_size"] == [8, 8]
        units = read_units(whole / ledger)
        assert all(unit.name in units for unit in units_of(manifest))
    attacked, auto = (read_manifest(whole / name) for name in ("ledger", "ledger_autoattack"))
    names = [[one["name"] for one in manifest["images"]] for manifest in (attacked, auto)]
    assert names[0][:3] == names[1]  # the first ones of those attacked
    assert {one["batch"] for one in auto["images"]} == {0, 1}
    members = {one["name"]: one["members"] for one in auto["targets"]}
    assert [one["name"] for one in members["moe"]] == ["autoattack", "autoattack path 0", "autoattack path 1"]
    assert {one["attack"]["seed"] for own in members.values() for one in own} == {5}
    suite = {one["name"]: sum(own["network_passes"] for own in one["members"]) for one in attacked["targets"]}
    assert suite["plain"] >= suite["moe"] > suite["moe path 0"]
    assert "seed 5, in batches of 2" in (whole / "robustness.md").read_text()


def test_complete_it_is_not_done_again_and_overwritten_it_is_the_same(bench, whole, monkeypatch, capsys):
    with pytest.raises(
        UserError, match=r"whole/evaluation/test: holds an evaluation already; .* --overwrite"
    ):
        bench.evaluate("whole", **WHOLE)
    before = tables(whole)
    monkeypatch.setattr("evaluation.robust.Bench.run", None)
    bench.evaluate("whole", options=Options(device="cpu", overwrite=True), **WHOLE)
    assert tables(whole) == before
    (whole / "results.csv").unlink()
    bench.evaluate("whole", **WHOLE)
    assert tables(whole) == before
    assert "evaluation: " in capsys.readouterr().out


def test_interrupted_it_goes_on_and_another_config_is_refused_before_anything_changes(bench, whole, capsys):
    before = tables(whole)
    config = (whole / "config.yaml").read_bytes()
    (whole / "results.csv").unlink()
    segment = whole / "ledger_autoattack" / "segment_000.jsonl"
    segment.write_bytes(segment.read_bytes()[: segment.stat().st_size * 3 // 5])
    kept = tables(whole)
    for change, told in (
        ({"attack_seed": 6}, r"protocol.seed \(was 5, is 6\)"),
        ({"eps": [0.2, 0.3]}, r"eps \(was \[0.3\], is \[0.2, 0.3\]\)"),
        ({"autoattack_batch_size": 3}, r"ledger_autoattack: .*protocol.batch \(was 2, is 3\)"),
        ({"images_seed": 1}, r"protocol.images_seed \(was 0, is 1\)"),
    ):
        with pytest.raises(UserError, match=told):
            bench.evaluate("whole", **{**WHOLE, **change})
        assert tables(whole) == kept and (whole / "config.yaml").read_bytes() == config
    with pytest.raises(UserError, match="targets.stage"):
        bench.evaluate("whole", ("moe", "plain", "stage"), **WHOLE)
    capsys.readouterr()
    bench.evaluate("whole", **WHOLE)
    printed = capsys.readouterr().out
    assert ", 0 to do here" in printed and tables(whole) == before
    assert "clean images: done before" in printed


def test_clean_images_are_asked_again_where_anything_is_another(bench, capsys):
    clean = {"suite": "none", "autoattack": 0}

    def done_before(**settings):
        capsys.readouterr()
        again = Options(device="cpu", overwrite=True)
        bench.evaluate("asked", ("plain",), options=again, **{**clean, **settings})
        return "clean images: done before" in capsys.readouterr().out

    assert [done_before(), done_before(), done_before(images_seed=1), done_before(images_seed=1)] == [
        False, True, False, True
    ]  # fmt: skip
    path = bench.at("asked") / "per_image.npz"
    assert done_before(images_seed=1, attack_images=7)
    assert configs.load(path.parent / "config.yaml").evaluate.attack_images == 7
    for broken in (b"", path.read_bytes()[:-9]):
        path.write_bytes(broken)
        assert not done_before(images_seed=1) and done_before(images_seed=1)


def test_a_dry_run_tells_the_cost_and_changes_nothing(bench, capsys):
    bench.evaluate("dry", options=Options(device="cpu", dry_run=True), **WHOLE)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("dry: digits: ") and "suite:" in lines and "autoattack:" in lines
    (row,) = [line.split() for line in lines if line.startswith("moe path 0 ")]
    assert row[3:5] == ["single", "3"]
    assert [line for line in lines if line.startswith("3 images: at most ")]
    assert not (bench.folder / "dry").exists()


def test_attacks_that_know_the_router_are_for_mixtures_and_adaptive(bench):
    config = bench.config("x", **{**ATTACKS, "attacks": [{"name": "fgsm"}, {"name": "joint", "steps": 3}]})
    images = config.data.build(config.data.cache_dir)
    models = {name: load(source, name, images) for name, source in config.models.items()}
    own = members_of(config.evaluate, targets_of(models, True), images.size, images.num_classes)
    columns = {name: {one.name: one.column for one in members} for name, members in own.items()}
    assert columns.pop("moe") == {"fgsm": "common", "joint": "adaptive"}
    assert len(columns) == 3 and all(found == {"fgsm": "common"} for found in columns.values())


def test_deployed_in_bf16_its_worst_case_stands_beside_that_of_float32(bench, whole):
    bench.evaluate("deployed", **WHOLE, deployment_precision="bf16")
    both, exact = rows_of(bench.at("deployed") / "results.csv"), rows_of(whole / "results.csv")
    assert [row for row in both if not row["metric"].endswith("_bf16")] == exact
    worst = [row for row in both if row["metric"] == "top1_bf16" and row["attack"] == "worst of adaptive"]
    assert {row["model"] for row in worst} >= {"moe", "plain", "moe - plain"}
    assert all(row["suite"] == "quick" for row in both if row["metric"].endswith("_bf16"))
    assert "## Scored in bf16" in (bench.at("deployed") / "robustness.md").read_text()


def test_clean_alone_needs_no_images_to_attack(bench):
    """attack_images is 1000 unless said otherwise, and a split may have fewer."""
    bench.evaluate("clean", ("plain",), split="val")
    folder = bench.at("clean", "val")
    assert {path.name for path in folder.iterdir()} == {
        "classifiers.md", "config.yaml", "findings.json", "per_image.npz", "results.csv", "routes.csv",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (
            {"restarts": 2},
            "evaluate.attacks alone attacks here (evaluate.suite: none), without effect: evaluate.restarts",
        ),
        ({"suite": "quick", "restarts": 2, "attack_images": 7}, ""),
        ({"attacks": [], "restarts": 2}, "nothing attacks here"),
        (
            {"attacks": [], "autoattack": 5, "attack_images": 3, "attack_checks": True},
            "AutoAttack alone attacks here (evaluate.suite: none), without effect: evaluate.attack_images",
        ),
    ],
)
def test_keys_of_attacks_that_are_not_made_are_named(bench, capsys, settings, note):
    bench.evaluate("idle", options=Options(device="cpu", dry_run=True), **{**ATTACKS, **settings})
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == bool(note) and all(line.startswith(f"note: {note}") for line in notes)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"attack_rows": ["mole"]}, "evaluate.attack_rows: there is no model 'mole'; allowed: moe, plain"),
        (
            {"attack_images": 1201},
            "evaluate.attack_images: 1201 is more than the 1200 test images; all takes them all$",
        ),
        ({"autoattack": 7}, "evaluate.autoattack: 7 of evaluate.attack_images, 6"),
        (
            {"autoattack": 1, "autoattack_eps": 8 / 255},
            "evaluate.autoattack_eps: 8/255 is none of evaluate.eps; allowed: 25.5/255, 76.5/255",
        ),
        ({"attacks": [], "autoattack": 1201}, "evaluate.autoattack: 1201 is more than the 1200 test images$"),
        (
            {"autoattack_batch_size": 5},
            "evaluate.autoattack_batch_size: has no effect without evaluate.autoattack",
        ),
        (
            {"attacks": [{"name": "pgd", "step_size": 2}]},
            "step_size: 2 crosses all of .* 2/255 may be meant",
        ),
        ({"attacks": [{"name": "autoattack", "pathway": 0}]}, "autoattack: pathway is for mixtures"),
        ({"attacks": [{"name": "gate_only"}], "attack_rows": ["plain"]}, "gate_only is for routed models"),
        ({"attacks": [{"name": "member_sum"}]}, "for ensembles, and none of moe, .*plain is one"),
        ({"attacks": [{"name": "hide", "class_id": 1}]}, "evaluate.attacks: hide is for label maps"),
        (
            {"attacks": [{"name": "pgd", "loss": "balanced_masked_ce"}]},
            "pgd: loss balanced_masked_ce .* label maps",
        ),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_what_cannot_be_attacked_is_told_before_any_work(bench, settings, told, dry):
    options = Options(device="cpu", dry_run=dry)
    with pytest.raises(UserError, match=told) as error:
        bench.evaluate("refused", options=options, **{**ATTACKS, **settings})
    assert "\n" not in str(error.value)
    assert not (bench.folder / "refused").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"attack_image": 3}, "evaluate.attack_image: .*did you mean 'attack_images'"),
        ({"suite": "sea"}, "evaluate.suite: "),
        ({"attack_images": 0}, "evaluate.attack_images: .*all, or a whole number above 0"),
        ({"eps": [0.1, 0.1]}, "evaluate.eps"),
        ({"attack_seed": -1}, "evaluate.attack_seed"),
        (
            {"autoattack": 3, "eps": [0.1], "deployment_precision": "bf16"},
            "deployment_precision: needs attacks beside it",
        ),
        ({"attacks": ["clean"], "deployment_precision": "bf16"}, "deployment_precision: needs attacks"),
        ({"deployment_precision": "fp16"}, "evaluate.deployment_precision"),
        ({"autoattack_eps": 0.1, "eps": [0.1]}, "evaluate.autoattack_eps: has no effect without"),
        ({"attacks": [{"name": "pgd", "stepps": 2}]}, "stepps"),
    ],
)
def test_misspelt_keys_and_values_are_refused(bench, settings, told):
    with pytest.raises(ConfigError, match=told):
        bench.config("x", **settings)


def test_models_that_are_none_are_refused(bench):
    def refused(models, **more):
        with pytest.raises(UserError) as error:
            bench.evaluate("refused", models, **more)
        assert not (bench.folder / "refused").exists()
        return str(error.value)

    assert "models.moe: no checkpoint at " in refused({"moe": str(bench.folder / "nowhere")})
    (bench.folder / "cut.safetensors").write_bytes(b"123")
    both = refused({"moe": str(bench.folder / "cut.safetensors"), "plain": str(bench.folder / "nowhere")})
    assert [line.split(" ")[0] for line in both.splitlines()] == ["models.moe:", "models.plain:"]
    assert "cut.safetensors: damaged, or no safetensors file" in both
    with pytest.raises(ConfigError, match="models: nothing to evaluate"):
        bench.config("x", {})
    with pytest.raises(ConfigError, match="models.x: .*a run folder, a checkpoint file, or a network"):
        bench.config("x", {"x": 7})
    with pytest.raises(ConfigError, match="models.x.*no weights of its own|models.x.name"):
        bench.config("x", {"x": {"name": "cnn", "arch": "resnet18"}})
    images = bench.config("x").data.build("unused")
    other = replace(images, classes=tuple("abcdefghij"))
    with pytest.raises(UserError, match="models.moe: .* was trained on another class list"):
        load(str(bench.folder / "moe"), "models.moe", other)
    guest = {"name": "external", "file": str(bench.guest), "function": "seven"}
    told = refused({"guest": guest})
    assert told.endswith("my_net.py:seven gave [1, 7] float32, expected logits [1, 10] in floating point")
    told = refused({"guest": {**guest, "function": "nope"}})
    assert told == f"models.guest.function: {bench.guest} has no function nope"


def test_networks_of_others_are_models_and_their_routers_are_known(bench):
    guest = {"name": "external", "file": str(bench.guest)}
    models = {"theirs": guest, "function": {**guest, "function": "function"}}
    bench.evaluate("guests", models, **{**WHOLE, "eps": [0.9]})
    folder = bench.at("guests")
    targets = {one["name"]: one for one in read_manifest(folder / "ledger")["targets"]}
    assert {name: (one["role"], one["identity"]["kind"]) for name, one in targets.items()} == {
        "theirs": ("external", "hard"), "function": ("external", "single"),
    }  # fmt: skip
    assert targets["theirs"]["identity"]["networks"] == 2  # it runs both, whatever the route
    rows = {(row["model"], row["metric"]): row for row in rows_of(folder / "results.csv") if not row["suite"]}
    assert ("theirs", "oracle_route") in rows and ("function", "oracle_route") not in rows
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    split = bench.config("x").data.build("unused").split("test")
    said = (torch.from_numpy(split.images).float().flatten(1) / 255 @ weight.T).argmax(dim=1).numpy()
    assert float(rows["function", "top1"]["value"]) == pytest.approx((said == split.labels).mean())
    assert "| theirs | external | - |" in (folder / "classifiers.md").read_text()


def test_stages_that_choose_by_themselves_have_no_pathway_rows(bench):
    bench.evaluate("by_stage", ("stage", "moe"), **ATTACKS)
    targets = [one["name"] for one in read_manifest(bench.at("by_stage") / "ledger")["targets"]]
    assert targets == ["stage", "moe", "moe path 0", "moe path 1"]
    bench.evaluate(
        "no_paths", ("moe",), **{**ATTACKS, "attacks": [], "autoattack": 1, "pathways": False, "eps": [0.9]}
    )
    (target,) = read_manifest(bench.at("no_paths") / "ledger_autoattack")["targets"]
    assert [one["name"] for one in target["members"]] == ["autoattack"]
    assert "robust" in (bench.at("no_paths") / "robustness.md").read_text()


def test_a_mixture_of_the_k_best_has_no_rows_of_single_paths(bench):
    network = {**MOE, "num_experts": 3, "top_k": 2}
    train(bench.training("best", network, epochs=1), Options(device="cpu"))
    bench.evaluate(
        "best_only", ("best",), **{**ATTACKS, "eps": [0.3], "autoattack": 1, "attack_checks": True}
    )
    folder = bench.at("best_only")
    for ledger in ("ledger", "ledger_autoattack"):
        (target,) = read_manifest(folder / ledger)["targets"]
        assert target["name"] == "best" and not [one for one in target["members"] if " path " in one["name"]]
    rows = [row for row in rows_of(folder / "results.csv") if row["model"] == "best"]
    assert not {row["metric"] for row in rows} & {
        "oracle_route",
        "random_route",
        "constant_0",
        "all_paths_empirical",
    }
    assert sum(float(row["value"]) for row in rows if row["metric"].startswith("load_")) == pytest.approx(1)
    assert "| best | 3 x resnet18 / 0.06, top 2 | standard |" in (folder / "classifiers.md").read_text()
    (check,) = [row for row in rows_of(folder / "checks.csv") if row["check"] == "gate gradient"]
    assert check["severity"] == "ok"


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (PLAIN, "resnet18 / 0.06"),
        ({**PLAIN, "name": "sparse_cnn"}, "sparse resnet18 / 0.06"),
        (MOE, "2 x resnet18 / 0.06"),
        ({**MOE, "granularity": "stage", "top_k": 1}, "2 x resnet18 / 0.06, by stage"),
        ({**MOE, "granularity": "layer", "top_k": 2}, "2 x resnet18 / 0.06, by layer, top 2"),
        ({"name": "external", "file": "x.py"}, "external"),
    ],
)
def test_a_design_tells_what_sets_it_apart(network, told):
    assert design_of(network) == told


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("name", ["body.head.weight", "body.stem.bn.running_var"])
def test_weights_that_are_not_finite_are_refused(bench, tmp_path, name, dry):
    tensors, metadata = load_weights(weights_file(bench.folder / "plain"))
    tensors[name].view(-1)[0] = float("nan")
    save_weights(tmp_path / "broken.safetensors", tensors, metadata)
    with pytest.raises(
        UserError, match=rf"^models.x: .*broken.safetensors has NaN or inf in 1 tensors \({name}\)"
    ):
        bench.evaluate(
            "broken", {"x": str(tmp_path / "broken.safetensors")}, options=Options(device="cpu", dry_run=dry)
        )
    assert not (bench.folder / "broken").exists()


def test_only_the_rows_asked_for_are_attacked(bench):
    bench.evaluate("some", **{**ATTACKS, "attack_rows": ["plain"]})
    assert [one["name"] for one in read_manifest(bench.at("some") / "ledger")["targets"]] == ["plain"]
    models = {row["model"] for row in rows_of(bench.at("some") / "results.csv") if not row["suite"]}
    assert models >= {"moe", "plain"}


def test_networks_are_checked_on_two_images(bench):
    train(bench.training("fresh", MOE, epochs=1, lr=1e-4), Options(device="cpu"))  # no gate is saturated yet
    bench.evaluate("checked", ("fresh",), **{**ATTACKS, "attack_checks": True, "pathways": False})
    rows = rows_of(bench.at("checked") / "checks.csv")
    checks = {row["check"]: row["severity"] for row in rows if row["model"] == "fresh"}
    assert checks["batch invariance"] == checks["identity at eps 0"] == checks["float32"] == "ok"
    assert checks["gate gradient"] == "ok"  # straight-through


@pytest.mark.parametrize("last", [0, 1])
def test_two_processes_share_the_batches_and_whoever_is_last_writes_the_tables(
    bench, monkeypatch, last, capsys
):
    name, folder = f"shared_{last}", bench.at(f"shared_{last}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    both = {**ATTACKS, "autoattack": 3, "autoattack_batch_size": 2, "eps": [0.3]}
    for rank in (1 - last, last):
        assert not (folder / "results.csv").exists()
        monkeypatch.setenv("RANK", str(rank))
        found = bench.evaluate(name, **both)
        assert (found is None) == (rank != last)
    assert "other processes are still at work" in capsys.readouterr().out
    for ledger in ("ledger", "ledger_autoattack"):
        segments = sorted(path.name for path in (folder / ledger).glob("segment_*") if path.stat().st_size)
        assert segments == ["segment_000.jsonl", "segment_001.jsonl"]
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    bench.evaluate("alone", options=Options(device="cpu", overwrite=True), **both)
    assert tables(folder) == tables(bench.at("alone"))


def test_without_the_clean_pass_of_the_first_process_no_tables_are_written(bench, monkeypatch, capsys):
    bench.evaluate("early", ("plain",), **ATTACKS)
    for name in ("results.csv", "per_image.npz"):
        (bench.at("early") / name).unlink()
    monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.setenv("RANK", "1")
    assert bench.evaluate("early", ("plain",), **ATTACKS) is None
    assert "the first process is still at work" in capsys.readouterr().out
    assert not (bench.at("early") / "results.csv").exists()


def test_a_training_s_config_evaluates_its_own_network(bench, tmp_path, capsys):
    path = tmp_path / "moe.yaml"
    path.write_text(
        f"name: moe\noutput: {bench.folder}\n"
        "data: {name: digits, test_images: 1200, val_images: 50}\n"
        "network: {name: cnn_moe, arch: resnet18, ratio: 0.06, num_experts: 2, router_width: 0.25}\n"
        "train: {method: standard, epochs: 1}\n"
    )
    assert main("", "evaluate_cnn_moe", argv=[str(path), "--device", "cpu"]) == 0
    assert "top-1 in %" in capsys.readouterr().out
    assert (bench.folder / "moe" / "evaluation" / "test" / "results.csv").exists()
    assert main("", "evaluate_cnn_moe", argv=[str(path), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_training_s_config_of_another_network_is_refused(bench, tmp_path, capsys):
    path = tmp_path / "plain.yaml"
    path.write_text(
        f"name: plain\noutput: {bench.folder}\n"
        "data: {name: digits, test_images: 1200, val_images: 50}\n"
        "network: {name: cnn, arch: resnet18, ratio: 0.06}\n"
        "train: {method: standard, epochs: 1}\n"
    )
    for change, told in (
        ("network.ratio=0.1", "network.ratio: 0.06, the config says 0.1"),
        ("network.arch=resnet34", "network.arch: resnet18, the config says resnet34"),
    ):
        for dry in ([], ["--dry-run"]):
            assert main("", "evaluate_cnn_moe", argv=[str(path), change, "--device", "cpu", *dry]) == 2
            assert (
                capsys.readouterr().err
                == f"network: {weights_file(bench.folder / 'plain')} was built with {told}\n"
            )
    assert not bench.at("plain").exists()


def test_a_training_is_attacked_at_the_eps_of_its_validation(bench):
    plain = bench.training("run", {"name": "cnn", "arch": "resnet18"}).plain()
    assert as_evaluation(from_dict(plain)).evaluate.eps == [0.1]
    assert as_evaluation(from_dict(plain | {"evaluate": {"eps": [0.2, 0.3]}})).evaluate.eps == [0.2, 0.3]
    with pytest.raises(ConfigError, match="evaluate.eps: missing; attacks need it"):
        from_dict(plain | {"evaluate": {"autoattack": 5, "norm": "l2"}})
    plain["train"]["val_eps"] = None
    plain["train"].pop("val_steps")
    with pytest.raises(ConfigError, match="evaluate.eps: missing; attacks need it"):
        from_dict(plain | {"evaluate": {"autoattack": 5}})


def test_a_model_of_images_of_another_size_is_refused(bench, tmp_path):
    tensors, metadata = load_weights(weights_file(bench.folder / "plain"))
    save_weights(tmp_path / "other.safetensors", tensors, metadata | {"image_size": [1, 28, 28]})
    with pytest.raises(
        UserError, match="models.x: .* was trained on images of 1 x 28 x 28, digits has 1 x 8 x 8"
    ):
        bench.evaluate("sizes", {"x": str(tmp_path / "other.safetensors")})


def test_images_to_attack_follow_from_the_seed(bench):
    split = bench.config("x").data.build("unused").split("test")

    def names(**settings):
        return list(attacked_images(split, bench.config("x", eps=[0.1], **settings).evaluate).names)

    few, more = (names(suite="quick", attack_images=count) for count in (5, 9))
    assert more[:5] == few != names(suite="quick", attack_images=5, images_seed=1)
    assert len(names(suite="quick", attack_images="all")) == 1200
    assert names() == [] and names(autoattack=5) == few
    order = np.random.default_rng(0).permutation(1200)
    assert few == [split.names[place] for place in order[:5]]


def test_how_much_validation_rose_over_the_last_fifth(tmp_path):
    def rose(values):
        path = tmp_path / "metrics.csv"
        path.write_text(
            "epoch,robust_top1\n" + "".join(f"{epoch},{one}\n" for epoch, one in enumerate(values, 1))
        )
        return rise_of(path, len(values))

    assert rose([0.1, 0.5, 0.4, 0.3, 0.6]) == pytest.approx(0.1)
    assert rose([0.1, 0.5, 0.4, 0.3, 0.2]) == 0
    assert rose([0.1] * 8 + [0.3, 0.2]) == pytest.approx(0.2)
    assert rose(["", 0.1, 0.2, 0.3, 0.4, 0.9]) == pytest.approx(0.6)
    assert rose(["", 0.1, "", 0.3, "", 0.4, "", 0.6]) == pytest.approx(0.2)  # validated at every other epoch
    assert rose([0.1]) is None and rose(["", ""]) is None and rise_of(tmp_path / "none.csv", 8) is None
    assert rose([0.1] * 8) == 0
    for epochs in (9, 60, None):  # interrupted, stopped early, or of a checkpoint that doesn't tell
        assert rise_of(tmp_path / "metrics.csv", epochs) is None
