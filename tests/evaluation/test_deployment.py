"""Attacked images that are scored in bf16 as well: what the networks say of them then, and what becomes of figures."""

import csv
import shutil
from dataclasses import replace

import pytest
import torch

from engine.config import UserError
from evaluation.adversarials import load_adversarials
from evaluation.api import evaluate
from evaluation.deployment import CELLS, FLOAT32_ONLY
from evaluation.ledger import read_manifest, read_units
from evaluation.plan import units_of
from evaluation.robust_tables import load_robust, write_robust
from evaluation.verify import verify
from metrics.confusion import confusion
from tests.evaluation import classifier_toy, robust_toy
from tests.evaluation.test_verify import rewrite

DEPLOYED = {"deployment_precision": "bf16"}
SETTINGS = {**DEPLOYED, "adversarials": "uint8"}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployed")
    robust_toy.run(folder, **SETTINGS)
    write_robust(folder, folder / "ledger")
    return folder


def rows_of(folder):
    with open(folder / "robustness.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_records_have_what_the_network_says_of_the_same_images_in_bf16(deployed):
    models = {target.name: target.model for target in robust_toy.targets()}
    labels = {scene.names: scene.labels for scene in robust_toy.scenes()}
    manifest, units = read_manifest(deployed / "ledger"), read_units(deployed / "ledger")
    moved = 0
    for unit in units_of(manifest):
        points = load_adversarials(deployed / "ledger" / "adversarials" / f"{unit.name}.npz")
        for incumbent, images in points.items():
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                logits = models[unit.target](images)
            assert logits.dtype == torch.bfloat16 or unit.target == "gate"
            counts = confusion(logits.argmax(1), labels[unit.images], robust_toy.CLASSES)
            own = [one for one in units[unit.name] if one["incumbent"] == incumbent]
            for record, count in zip(own, counts, strict=True):
                assert record[CELLS] == [[*place, count[*place].item()] for place in count.nonzero().tolist()]
                moved += record[CELLS] != record["cells"]
    assert moved > 20


def test_attacks_and_figures_in_float32_are_those_of_a_network_that_is_not_deployed_so(deployed, tmp_path):
    robust_toy.run(tmp_path, adversarials="uint8")
    write_robust(tmp_path, tmp_path / "ledger")
    plain = rows_of(tmp_path)
    assert [row for row in rows_of(deployed) if not row["metric"].endswith("_bf16")] == plain
    assert "bf16" not in (tmp_path / "robustness.md").read_text()
    assert load_robust(tmp_path / "ledger").deployed is None


def test_the_worst_case_in_bf16_is_over_what_all_images_score_there(deployed):
    results, rows = load_robust(deployed / "ledger"), rows_of(deployed)
    attacked = [one for many in read_units(deployed / "ledger").values() for one in many]
    for target in results.targets:
        own = [one for one in attacked if one["target"] == target]
        right = {}
        for one in own:
            hits = sum(count for truth, said, count in one[CELLS] if truth == said)
            right[one["image"]] = min(hits, right.get(one["image"], hits))
        valid = {one["image"]: one["valid"] for one in own}
        eps = max(robust_toy.EPS)
        found = [
            float(row["value"])
            for row in rows
            if (row["model"], row["attack"], row["metric"]) == (target, "worst of adaptive", "aacc_bf16")
            and float(row["eps"]) == eps
        ]
        assert found == [pytest.approx(sum(right.values()) / sum(valid.values()))]
        assert results.deployed.worst(target, eps, "adaptive").figures["aacc"].value == found[0]
    metrics = {row["metric"] for row in rows if row["metric"].endswith("_bf16")}
    assert {"miou_bf16", "aacc_bf16", "aacc_image_mean_bf16"} < metrics
    assert "aacc_gate_free_bf16" not in metrics  # known in float32 alone


def test_the_table_has_both_and_their_difference(deployed):
    results = load_robust(deployed / "ledger")
    text = (deployed / "robustness.md").read_text()
    part = text.partition("## Scored in bf16")[2].partition("\n## ")[0]
    eps = max(robust_toy.EPS)
    exact, rounded = (
        one.worst("gate", eps, "adaptive").figures["miou"] for one in (results, results.deployed)
    )
    low, high = (rounded - exact).interval()
    gap = f"{100 * (rounded.value - exact.value):+.2f} [{100 * low:.1f}, {100 * high:.1f}]"
    assert f"| {100 * exact.value:.2f} | {100 * rounded.value:.2f} ({gap}) |" in part
    assert "mIoU in %" in part and "aAcc in %" in part


def test_classifiers_have_their_share_of_images(tmp_path, monkeypatch):
    plain = classifier_toy.setup
    monkeypatch.setattr(
        classifier_toy, "setup", lambda *args, **about: replace(plain(*args, **about), **DEPLOYED)
    )
    classifier_toy.run(tmp_path, auto=False)
    records = [one for many in read_units(tmp_path / "ledger").values() for one in many]
    assert all(len(one[CELLS]) == 1 for one in records)
    for one in records:  # as if the network were always wrong in bf16
        truth = one["cells"][0][0]
        one[CELLS] = [[truth, (truth + 1) % classifier_toy.CLASSES, 1]]
    units = {}
    for one in records:
        units.setdefault(one["unit"], []).append(one)
    monkeypatch.setattr("evaluation.classifier_tables.read_units", lambda folder: units)
    whole = [target for target in classifier_toy.targets() if target.role != "pathway"]
    classifier_toy.write(tmp_path, {classifier_toy.SUITE: tmp_path / "ledger"}, whole)
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rounded = [row for row in rows if row["metric"].endswith("_bf16")]
    assert {"top1_bf16", "all_paths_empirical_bf16", "top1_attack_on_router_bf16"} <= {
        row["metric"] for row in rounded
    }
    assert {float(row["value"]) for row in rounded} == {0.0}
    assert not {f"{metric}_bf16" for metric in FLOAT32_ONLY} & {row["metric"] for row in rounded}
    assert any(float(row["value"]) > 0 for row in rows if row["metric"] == "top1" and row["suite"])
    text = (tmp_path / "robustness.md").read_text()
    assert "| top-1 in % | clean | in bf16 |" in text and "| moe | 83.33 | 0.00 (-83.33) |" in text


def test_a_ledger_without_these_scores_is_not_gone_on_with(tmp_path):
    robust_toy.run(tmp_path)
    with pytest.raises(UserError, match="deployment_precision"):
        robust_toy.run(tmp_path, **DEPLOYED)


def test_it_is_verified_and_a_lie_is_found(deployed, tmp_path):
    folder = shutil.copytree(deployed, tmp_path / "submission")

    def verdict():
        targets, members = robust_toy.targets(), robust_toy.members()
        return verify(folder, targets, members, robust_toy.setup(**SETTINGS), robust_toy.scenes())

    assert verdict().problems == []

    def lie(line):
        line[CELLS] = [[truth, truth, count] for truth, _, count in line[CELLS]]

    rewrite(folder, lie)
    assert any("cells_bf16: " in problem for problem in verdict().problems)


def test_from_python(tmp_path):
    loader = [(scene.images, scene.labels) for scene in robust_toy.scenes()]
    asked = {"attacks": [{"name": "fgsm"}], "eps": [4 / 255], "checks": False, "log": str}
    report = evaluate(robust_toy.Net(0), loader, "none", **asked, **DEPLOYED)
    assert {"miou", "miou_bf16"} <= {row["metric"] for row in report.rows}
    with pytest.raises(UserError, match="deployment_precision: 'fp16' is unknown; allowed: fp32, bf16"):
        evaluate(robust_toy.Net(0), loader, "none", **asked, deployment_precision="fp16")
