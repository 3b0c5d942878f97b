"""Rows under attack: the networks behind rows, the frames that are attacked, and an evaluation as it is started."""

import csv
import shutil
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from types import SimpleNamespace

import cv2
import numpy
import pytest
import torch

from engine.checkpoints import load_metadata, load_weights, save_weights
from engine.command import run
from engine.config import UserError
from engine.errors import ConfigError
from evaluation.detectors import detection_rows
from evaluation.ledger import read_manifest, read_units
from evaluation.plan import units_of
from evaluation.robust_tables import TABLES
from evaluation.rows import Outputs
from evaluation.verify import main
from pipelines.matrix import load_zoo
from pipelines.robustness import attacked_frames, attacked_rows, attacked_subsets, is_asked, target_of_row
from tests.pipelines.test_segmentation import evaluation_of

ATTACKS = {
    "attacks": [{"name": "fgsm"}],
    "eps": ["2/255", "4/255"],
    "attack_images": 4,
    "overlays": 0,
    "attack_checks": False,
}


def attacked(workshop, name="attacked", **settings):
    config = evaluation_of(workshop, name=name)
    config["evaluate"] = {**config.get("evaluate", {}), **ATTACKS, **settings}
    return config


@pytest.fixture(scope="session")
def evaluated(workshop):
    printed = StringIO()
    with redirect_stdout(printed):
        workshop.evaluate(attacked(workshop), overwrite=True)
    return workshop.run("attacked") / "evaluation" / "test", printed.getvalue()


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def short_detectors(monkeypatch):
    """Two steps and one weight: enough for the tables."""
    short = partial(detection_rows, kappas=(1.0,), steps=2)
    monkeypatch.setattr("pipelines.robustness.detection_rows", short)


def test_checks_stand_beside_the_figures(workshop):
    config = attacked(workshop, name="checked", attack_rows=["gate"], attack_images=2, attack_checks=True)
    workshop.evaluate(config)
    folder = workshop.run("checked") / "evaluation" / "test"
    checks = {row["check"]: row for row in rows_of(folder / "checks.csv") if row["model"] == "gate"}
    assert checks["identity at eps 0"]["severity"] == checks["batch invariance"]["severity"] == "ok"
    assert "## Checks" in (folder / "robustness.md").read_text()
    assert {row["figure"] for row in rows_of(folder / "telemetry.csv")} > {"route flip rate", "gate margin"}
    assert {row["part"] for row in rows_of(folder / "components.csv")} > {"clean", "model"}


def test_transfer_and_detectors_stand_beside_the_figures_and_are_made_once(
    workshop, short_detectors, monkeypatch
):
    asked = {"transfer": {"name": "fgsm"}, "detectors": True, "eps": ["4/255"]}
    config = attacked(workshop, name="aside", attack_rows=["gate", "day"], attack_images=2, **asked)
    workshop.evaluate(config)
    folder = workshop.run("aside") / "evaluation" / "test"
    rows = rows_of(folder / "transfer.csv")
    pairs = [(source, target) for source in ("clean", "gate", "day") for target in ("gate", "day")]
    assert [(row["source"], row["target"]) for row in rows] == pairs * 2
    assert {(row["attack"], row["n_images"]) for row in rows} == {("fgsm", "2")}
    clean = {row["model"]: float(row["value"]) for row in rows_of(folder / "robustness.csv")
             if row["attack"] == "clean" and row["metric"] == "aacc"}  # fmt: skip
    assert {row["target"]: float(row["value"]) for row in rows[:2]} == pytest.approx(clean)
    scores = [(row["model"], row["score"]) for row in rows_of(folder / "detectors.csv")]
    assert ("gate", "gate_entropy") in scores and ("day", "entropy") in scores
    text = (folder / "robustness.md").read_text()
    assert "## Transfer" in text and "## Detectors" in text and "- gate: none computed" in text

    def again(*_, **__):
        raise AssertionError("made a second time")

    for name in ("transfer", "detection_rows"):
        monkeypatch.setattr(f"pipelines.robustness.{name}", again)
    for name in ("robustness.md", "robustness.csv"):
        (folder / name).unlink()
    workshop.evaluate(config)
    assert (folder / "robustness.md").read_text() == text


def test_no_table_of_an_earlier_evaluation_stands_beside_a_new_one(workshop, short_detectors):
    asked = {"transfer": {"name": "fgsm"}, "detectors": True, "eps": ["4/255"], "attack_images": 2}
    asked |= {"attack_rows": ["gate", "day"], "corruptions": {"names": ["fog"], "severities": [1]}}
    workshop.evaluate(attacked(workshop, name="tables", **asked))
    workshop.evaluate(attacked(workshop, name="clean", attacks=[]))
    before, clean = (workshop.run(name) / "evaluation" / "test" for name in ("tables", "clean"))
    files = {path.name for path in clean.iterdir()}
    tables = {path.name for path in before.iterdir() if path.suffix in (".csv", ".md")} - files
    assert tables == {*TABLES, "corruptions.csv", "corruptions.md"}
    ledger = (before / "ledger" / "segment_000.jsonl").read_bytes()
    workshop.evaluate(attacked(workshop, name="tables", attacks=[]), overwrite=True)
    assert {path.name for path in before.iterdir() if path.suffix in (".csv", ".md")} < files
    assert (before / "ledger" / "segment_000.jsonl").read_bytes() == ledger


def test_a_submission_is_verified_from_its_folder_and_the_command_line(workshop, capsys, tmp_path):
    config = attacked(
        workshop, name="submitted", attack_rows=["gate", "day"], attack_images=2, adversarials="uint8"
    )
    workshop.evaluate(config)
    folder = workshop.run("submitted") / "evaluation" / "test"
    capsys.readouterr()
    assert main([str(folder)]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == "verified, but for the attacks: none was run again (--rerun N)"
    )
    assert main([str(folder), "--rerun", "3"]) == 0
    printed = capsys.readouterr().out
    assert "units of work run again" in printed and printed.endswith("\nverified\n")
    assert run(main, [str(folder), "--rerun", "-1"]) == 2
    assert "--rerun: -1 is wrong" in capsys.readouterr().err
    tensors, metadata = load_weights(workshop.run("gate") / "checkpoints" / "best.safetensors")
    (tmp_path / "checkpoints").mkdir()
    changed = {name: one + 0.01 if one.is_floating_point() else one for name, one in tensors.items()}
    save_weights(tmp_path / "checkpoints" / "best.safetensors", changed, metadata)
    assert main([str(folder), f"gates.gate={tmp_path}"]) == 2
    printed = capsys.readouterr().out
    assert "wrong: gate: other weights or another network" in printed and printed.endswith("refused\n")
    assert run(main, [str(folder), "evaluate.attack_imagse=3"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_all_rows_are_attacked_and_stand_behind_the_clean_ones(evaluated):
    folder, printed = evaluated
    rows = rows_of(folder / "results.csv")
    robust = rows_of(folder / "robustness.csv")
    assert [row for row in rows if row["suite"]] == robust and not rows[0]["suite"]
    models = {row["model"] for row in robust}
    assert {"day", "night", "gate", "ensemble mean", "ensemble max", "best constant class"} <= models
    assert "true subset" not in models
    value = {(row["model"], row["attack"], row["eps"], row["metric"]): float(row["value"]) for row in robust}
    for model in ("day", "gate", "ensemble mean"):
        clean, small, large = (
            value[model, attack, eps, "aacc"]
            for attack, eps in (
                ("clean", "0.0"), ("worst of common", str(2 / 255)), ("worst of common", str(4 / 255)),
            )
        )  # fmt: skip
        assert clean >= small >= large and clean > large
    assert "robustness: " in printed and "mIoU in %" in printed
    assert read_manifest(folder / "ledger")["protocol"]["dataset"]


def test_killed_in_the_middle_it_goes_on_and_complete_it_is_not_done_again(workshop, evaluated, monkeypatch):
    folder, _ = evaluated
    with pytest.raises(UserError, match="--overwrite"):
        workshop.evaluate(attacked(workshop))
    before = (folder / "robustness.md").read_bytes()
    segment = folder / "ledger" / "segment_000.jsonl"
    text = segment.read_bytes()
    (folder / "robustness.csv").unlink()
    segment.write_bytes(text[: len(text) * 3 // 5])
    workshop.evaluate(attacked(workshop))
    assert (folder / "robustness.md").read_bytes() == before
    assert segment.stat().st_size < 1.2 * len(text)  # what was there was not done again
    (folder / "robustness.csv").unlink()
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="attack_seed|seed"):
        workshop.evaluate(attacked(workshop, attack_seed=1))
    assert {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file()
    } == kept  # nothing is lost
    workshop.evaluate(attacked(workshop, attack_seed=0), overwrite=True)


def test_the_network_behind_a_row_says_what_the_row_says(workshop):
    config = workshop.load(evaluation_of(workshop))
    zoo = load_zoo(config, config.data.build())
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    from evaluation.enlarge import Enlargements
    from networks.resize import upsample

    networks = {name: trained.network for name, trained in zoo.networks.items()}
    kinds = {}
    for row in zoo.rows(controls=False):
        target = target_of_row(zoo, row.name)
        with torch.no_grad():
            outputs = Outputs(networks, images, "fp32", Enlargements(upsample, torch.device("cpu")))
            said = row.predict(outputs, SimpleNamespace(frames=[None, None]))
            logits = said.logits if said.stride is None else upsample(said.logits, (32, 48), said.stride)
            assert torch.allclose(target.model(images), logits, atol=1e-4)
        kinds[row.name] = (target.kind, target.role, target.num_experts)
    assert kinds["day"] == ("single", "expert", 1) and kinds["ensemble max"] == ("ensemble", "ensemble", 2)
    assert kinds["gate"] == ("soft", "gate", 2)
    identities = [str(target_of_row(zoo, name).identity) for name in kinds]
    assert len(set(identities)) == len(kinds)


def test_class_pixels_are_stored_with_every_network_and_used(workshop):
    pixels = {}
    for name in ("day", "night", "gate"):
        metadata = load_metadata(workshop.run(name) / "checkpoints" / "best.safetensors")
        pixels[name] = metadata["class_pixels"]
        assert len(pixels[name]) == 3 and min(pixels[name]) > 0
    config = workshop.load(evaluation_of(workshop))
    zoo = load_zoo(config, config.data.build())
    assert target_of_row(zoo, "night").class_pixels == tuple(pixels["night"])
    both = tuple(sum(pair) for pair in zip(pixels["day"], pixels["night"], strict=True))
    assert target_of_row(zoo, "ensemble mean").class_pixels == both


def test_networks_without_class_pixels_get_those_of_the_data_with_a_note(workshop, capsys):
    balanced = [{"name": "pgd", "loss": "balanced_masked_ce", "steps": 2}]
    config = workshop.load(attacked(workshop, attacks=balanced, attack_rows=["night", "day"]))
    index = config.data.build()
    zoo = load_zoo(config, index)
    stored = zoo.networks["day"].metadata.pop("class_pixels")
    targets, _ = attacked_rows(config, index, zoo)
    assert "class weights of day: from the training split" in capsys.readouterr().out
    night, day = targets
    assert list(night.class_pixels) != list(day.class_pixels)
    assert sum(day.class_pixels) == 2 * sum(stored)  # of both subsets, equal in size


def test_only_the_rows_asked_for_are_attacked(workshop):
    config = workshop.load(attacked(workshop, attack_rows=["gate", "ensemble max"]))
    zoo = load_zoo(config, config.data.build())
    targets, own = attacked_rows(config, config.data.build(), zoo)
    assert [target.name for target in targets] == ["gate", "ensemble max"] == list(own)
    config = workshop.load(attacked(workshop, attack_rows=["gait"]))
    with pytest.raises(UserError, match="no row 'gait'; allowed: day, night, ensemble mean"):
        attacked_rows(config, config.data.build(), zoo)


def test_attacks_that_know_the_gate_are_for_rows_with_one_and_adaptive(workshop):
    asked = {"attacks": [{"name": "fgsm"}, {"name": "joint", "steps": 3}, {"name": "member_sum", "steps": 2}]}
    config = workshop.load(attacked(workshop, **asked))
    index = config.data.build()
    zoo = load_zoo(config, index)
    targets, own = attacked_rows(config, index, zoo)
    knowing = {"soft": {"joint": "adaptive"}, "ensemble": {"member_sum": "adaptive"}, "single": {}}
    for target in targets:
        columns = {one.name: one.column for one in own[target.name]}
        assert columns == {"fgsm": "common", **knowing[target.kind]}
    assert {target.kind for target in targets} == set(knowing)
    with pytest.raises(
        UserError, match="evaluate.attacks: joint is for routed models, and none of day, night is one"
    ):
        attacked_rows(workshop.load(attacked(workshop, attack_rows=["day", "night"], **asked)), index, zoo)


@pytest.mark.parametrize("dry", [True, False])
def test_a_transfer_that_a_row_cannot_take_is_told_before_any_work(workshop, dry):
    config = attacked(workshop, name="refused", transfer={"name": "joint", "steps": 3})
    alone = attacked(workshop, name="alone", attack_rows=["day"], transfer={"name": "fgsm"})
    with pytest.raises(UserError, match="evaluate.transfer: there is one row; .* name more"):
        workshop.evaluate(alone, dry_run=dry)
    with pytest.raises(UserError, match="evaluate.transfer: joint is for routed models, and row day is none"):
        workshop.evaluate(config, dry_run=dry)
    assert not workshop.run("refused").exists()


def test_a_transfer_that_weighs_classes_gets_the_pixels_of_the_data(workshop):
    balanced = {"name": "pgd", "loss": "balanced_masked_ce", "steps": 2}
    config = workshop.load(attacked(workshop, transfer=balanced, attack_rows=["day", "night"]))
    index = config.data.build()
    zoo = load_zoo(config, index)
    del zoo.networks["day"].metadata["class_pixels"]
    ((day, _), _) = attacked_rows(config, index, zoo)
    assert len(day.class_pixels) == len(index.classes)


def test_a_dry_run_tells_the_cost_and_writes_nothing(workshop, capsys):
    workshop.evaluate(attacked(workshop, name="dry", suite="quick", attacks=[]), dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    (day,) = [line.split() for line in lines if line.startswith("day ") and " single " in line]
    # 2 x 21 common passes, four restarts beside mixtures of 2, at two eps and one clean pass
    assert day[1:] == ["single", "3", "126", "253", "253"]
    (total,) = [line for line in lines if line.startswith("4 images: at most ")]
    assert not workshop.run("dry").exists()
    assert total.endswith("network passes") and not any(
        line.startswith(("transfer", "detectors")) for line in lines
    )


def test_a_dry_run_tells_what_stands_beside_the_ledger(workshop, capsys):
    more = {"transfer": {"name": "pgd", "steps": 3}, "detectors": True}
    workshop.evaluate(attacked(workshop, name="dry", suite="quick", attacks=[], **more), dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    (transfer,) = [line for line in lines if line.startswith("transfer")]
    (detectors,) = [line for line in lines if line.startswith("detectors")]
    rows = len(detectors.split(": ")[1].split(", "))
    # three steps and a last look at the images of each row; then clean and attacked ones, shown to each
    passes = rows * 4 + rows * (rows + 1)
    assert transfer.endswith(f"pgd on each row, its images shown to every row: {passes} passes per image")
    # a clean look; an attack that knows of no detector and three that do, of 20 steps and two looks
    assert detectors.startswith("detectors, at the largest eps, passes per image: day 89, ")


FRAMES = [SimpleNamespace(name=f"{block}{place}", block=block) for block in "abcde" for place in range(5)]


@pytest.mark.parametrize(
    ("images", "names"),
    [
        ("all", [frame.name for frame in FRAMES]),
        ("blocks", ["a2", "b2", "c2", "d2", "e2"]),
        (5, ["a2", "b2", "c2", "d2", "e2"]),
        (2, ["b2", "d2"]),
        (1, ["c2"]),
        (25, [frame.name for frame in FRAMES]),
    ],
)
def test_attacked_frames(images, names):
    settings = SimpleNamespace(split="test", attack_images=images)
    index = SimpleNamespace(select=lambda split, subsets: FRAMES)
    config = SimpleNamespace(evaluate=settings)
    assert [frame.name for frame in attacked_frames(config, index, ["all"])] == names
    settings.attack_images = 26
    with pytest.raises(UserError, match="attack_images: 26 of 25 test frames"):
        attacked_frames(config, index, ["all"])


def test_training_subsets_are_attacked_together():
    assert attacked_subsets(["highway", "urban", "all", "ambiguous"]) == ["all"]
    assert attacked_subsets(["fog", "night"]) == ["fog", "night"]


def test_clean_alone_asks_for_nothing(workshop):
    def asked(**settings):
        return is_asked(workshop.load({**evaluation_of(workshop), "evaluate": settings}).evaluate)

    assert not asked() and not asked(attacks=[{"name": "clean"}])
    assert asked(suite="quick") and asked(attacks=[{"name": "clean"}, {"name": "fgsm"}])


def test_scores_in_bf16_without_attacks_are_refused(workshop):
    with pytest.raises(ConfigError, match="evaluate.deployment_precision: needs attacks beside it"):
        workshop.load({**evaluation_of(workshop), "evaluate": {"deployment_precision": "bf16"}})


def test_all_rows_are_scored_in_bf16_where_they_are_deployed_so(workshop, evaluated):
    workshop.evaluate(attacked(workshop, name="deployed", deployment_precision="bf16"))
    folder = workshop.run("deployed") / "evaluation" / "test"
    rows = rows_of(folder / "robustness.csv")
    rounded = [row for row in rows if row["metric"].endswith("_bf16")]
    assert {row["model"] for row in rounded if row["kind"] != "difference"} == set(
        read_models(folder / "ledger")
    )
    keys = ("model", "attack", "eps", "metric")
    own = {tuple(row[key] for key in keys): float(row["value"]) for row in rows if row["value"]}
    both = [key for *key, name in own if name == "aacc_bf16"]
    gaps = [abs(own[(*key, "aacc")] - own[(*key, "aacc_bf16")]) for key in both]
    assert 0 < max(gaps) < 0.2
    plain = rows_of(evaluated[0] / "robustness.csv")
    assert [row for row in rows if not row["metric"].endswith("_bf16")] == plain


def read_models(ledger):
    return [target["name"] for target in read_manifest(ledger)["targets"]]


def test_two_processes_share_an_evaluation(workshop, evaluated, monkeypatch):
    config = attacked(workshop, name="shared", attack_batch_size=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    folder = workshop.run("shared") / "evaluation" / "test"
    monkeypatch.setenv("RANK", "1")
    assert workshop.evaluate(config) is None
    assert not (folder / "results.csv").exists() and not (folder / "robustness.csv").exists()
    monkeypatch.setenv("RANK", "0")
    assert workshop.evaluate(config) is not None
    assert (folder / "robustness.csv").exists()
    units = read_units(folder / "ledger")
    assert all(unit.name in units for unit in units_of(read_manifest(folder / "ledger")))
    monkeypatch.delenv("WORLD_SIZE")
    workshop.evaluate({**config, "name": "attacked_alone"})
    alone = workshop.run("attacked_alone") / "evaluation" / "test"
    for name in ("results.csv", "robustness.csv", "robustness.md", "winners.csv"):
        assert (folder / name).read_bytes() == (alone / name).read_bytes()


@pytest.mark.parametrize("dry", [True, False])
def test_frames_without_a_labelled_pixel_are_refused_before_any_work(workshop, tmp_path, dry):
    config = attacked(workshop, name="unlabelled")
    config["output"] = str(tmp_path / "runs")
    root = shutil.copytree(config["data"]["root"], tmp_path / "data")
    for path in (root / "labels").glob("*_test_*.png"):
        cv2.imwrite(str(path), numpy.full((24, 40), 255, numpy.uint8))
    config["data"] = {**config["data"], "root": str(root)}
    with pytest.raises(
        UserError, match=r"none of the 4 test frames to attack has a labelled pixel \(all are 255\)"
    ):
        workshop.evaluate(config, dry_run=dry)
    assert not (tmp_path / "runs").exists()


def test_a_class_is_hidden_by_its_name(workshop):
    def own(**settings):
        config = workshop.load(attacked(workshop, attack_rows=["day", "night"], **settings))
        index = config.data.build()
        _, members = attacked_rows(config, index, load_zoo(config, index))
        return [one.about for one in members["day"]]

    hide = {"name": "hide", "steps": 2}
    named, numbered = (own(attacks=[{**hide, "class_id": one}]) for one in ("left", 1))
    assert named == numbered  # the same ledger
    own(transfer={**hide, "class_id": "left"})
    for key, given in (
        ("attacks", [{**hide, "class_id": "lift"}]),
        ("transfer", {**hide, "class_id": "lift"}),
    ):
        with pytest.raises(
            UserError, match=f"evaluate.{key}: hide: class_id: .lift. is unknown; .*mean 'left'"
        ):
            own(**{key: given})


def test_what_stands_beside_a_ledger_of_bytes_is_of_bytes(workshop, short_detectors, monkeypatch):
    asked = {"transfer": {"name": "fgsm"}, "detectors": True, "eps": ["4/255"], "adversarials": "uint8"}
    config = attacked(workshop, name="bytes", attack_rows=["gate", "day"], attack_images=2, **asked)
    given = []
    monkeypatch.setattr(
        "evaluation.transfer.quantised", lambda points, *_: given.append("transfer") or points
    )
    monkeypatch.setattr(
        "evaluation.detectors.quantised", lambda points, *_: given.append("detectors") or points
    )
    workshop.evaluate(config)
    assert set(given) == {"transfer", "detectors"}


def test_one_network_with_a_convolution_goes_through_suite_and_checks(workshop):
    """baseline_w_conv of the main pipelines: a uniform gate over one expert."""
    gate = {"type": "uniform", "conv": True}
    workshop.train(
        {**workshop.gate("w_conv"), "experts": {"day": str(workshop.run("day"))}, "gate": gate},
        overwrite=True,
    )
    asked = {"suite": "quick", "attacks": [], "eps": ["4/255"], "attack_images": 2, "attack_checks": True}
    config = attacked(workshop, name="of_one", attack_rows=["w_conv"], **asked)
    workshop.evaluate({**config, "gates": {"w_conv": str(workshop.run("w_conv"))}})
    folder = workshop.run("of_one") / "evaluation" / "test"
    checks = {row["check"]: row for row in rows_of(folder / "checks.csv") if row["model"] == "w_conv"}
    for name in ("gate gradient", "gate direction"):
        assert checks[name]["text"] == "there is one expert: the gate has nothing to choose"
    assert "active test" in checks
