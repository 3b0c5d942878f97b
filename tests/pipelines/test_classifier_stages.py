"""Pipelines of classifiers: stages run once, the evaluation joins them, the report shows it."""

import pytest
import yaml

from engine.config import load
from pipelines import stages as module
from pipelines.cli import Options

NETWORK = {"name": "cnn_moe", "arch": "resnet18", "ratio": 0.03, "num_experts": 2}
PLAIN = {"name": "cnn", "arch": "resnet18", "ratio": 0.03}
DATA = {"name": "digits", "test_images": 1300, "val_images": 50, "pad": 1, "flip": False}
TRAIN = {
    "method": "advmoe", "epochs": 1, "batch_size": 256, "eps": 0.1, "val_images": 20, "val_steps": 2,
    "tensorboard": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """A pipeline that has run: (its folder, what it printed is in run)."""
    folder = tmp_path_factory.mktemp("line")
    one = {"name": "one", "data": DATA, "network": NETWORK, "train": TRAIN}
    joined = {"name": "joined", "data": DATA, "models": {"x": "nowhere"}}
    joined["evaluate"] = {"suite": "quick", "eps": [0.1], "attack_images": 6, "attack_checks": False}
    stages = {
        "mixture": {"config": "one.yaml"},
        "slim": {"config": "one.yaml", "set": {"network": PLAIN, "train.method": "trades"}},
        "evaluation": {"config": "joined.yaml", "set": {"models": {"mixture": "@mixture", "slim": "@slim"}}},
    }
    pipeline = {"name": "line", "output": str(folder / "runs"), "stages": stages}
    for name, tree in (("one", one), ("joined", joined), ("pipeline", pipeline)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    run(folder)
    return folder


def run(folder, *overrides, **options):
    module.run(load(folder / "pipeline.yaml", overrides), Options(device="cpu", **options))


def test_every_stage_leaves_its_results_and_the_report_shows_them(line):
    base = line / "runs" / "line"
    for stage in ("mixture", "slim"):
        assert (base / stage / "checkpoints" / "best.safetensors").exists()
    results = (base / "evaluation" / "evaluation" / "test" / "results.csv").read_text()
    assert "\nmixture,cnn_moe," in results and "\nslim,cnn," in results and "worst of adaptive" in results
    page = (base / "report.html").read_text()
    for text in (
        "evaluation: classifiers",
        "Robustness of the classifiers",
        "mixture path 0",
        "oracle route",
    ):
        assert text in page, text
    assert page.count("data:image/png") == 2  # routes by label, progress
    assert "Mixture of segmentation experts" not in page


def test_what_is_done_stays_and_what_changed_runs_again(line, capsys):
    run(line)
    assert capsys.readouterr().out.count("done already") == 3
    run(line, why=True)
    assert capsys.readouterr().out.count(": done") == 3
    run(line, "stages.evaluation.set.evaluate.eps=[0.05]", why=True)
    told = capsys.readouterr().out
    assert told.count(": done") == 2 and "config.evaluate.eps changed from" in told
    run(line, "set={train.beta: 3}", why=True)
    told = capsys.readouterr().out
    assert "config.train.beta changed from 6.0 to 3" in told and "mixture runs before it" in told
    run(line, "set={evaluate.suite: standard}", why=True)  # nothing to a training
    told = capsys.readouterr().out
    assert "mixture: done" in told and "evaluation: to run" in told


def test_run_folders_that_moved_are_still_the_same_runs(line, capsys):
    (line / "runs").rename(line / "elsewhere")
    try:
        run(line, f"output={line / 'elsewhere'}", why=True)
        assert capsys.readouterr().out.count(": done") == 3
    finally:
        (line / "elsewhere").rename(line / "runs")


def test_a_dry_run_says_what_waits(line, capsys):
    run(line, "name=other", dry_run=True)
    told = capsys.readouterr().out
    assert "GMACs per image" in told and "waits for the weights of mixture, slim" in told
