"""A whole evaluation as it is started: the printed table, one pass, and tables of disagreement that add up."""

import csv
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest
import torch

from evaluation.results import Results
from networks.moe import Frozen
from tests.pipelines.test_segmentation import evaluation_of

SMALL = {"width": 2, "grid": [2, 2], "hidden": 8}
GATES = {
    "classwise_w_conv": {"type": "classwise", "conv": True, **SMALL},
    "classwise": {"type": "classwise", **SMALL},
    "simple_w_conv": {"type": "simple", "conv": True, **SMALL},
    "simple": {"type": "simple", **SMALL},
    "other_seed": {"type": "simple", "seed": 7, **SMALL},
}


@dataclass
class Evaluated:
    results: Results
    folder: Path
    lines: list[str]  # printed
    passes: list[int]  # images that passed each network, ascending


@pytest.fixture(scope="session")
def evaluated(workshop):
    """An evaluation of a baseline, two experts, ensembles and five gates, in another order than the paper's."""
    workshop.train(workshop.expert("both", ["day", "night"]))
    gates = workshop.gate("table")
    del gates["gate"]
    workshop.train({**gates, "gates": GATES})
    config = evaluation_of(
        workshop,
        name="table_evaluation",
        baselines={"both": str(workshop.run("both"))},
        ensembles=["vote", "max", "mean"],
        gates={name: str(workshop.run("table") / name) for name in GATES},
    )
    passes, forward = Counter(), Frozen.forward_features

    def counting(self, images):
        passes[id(self)] += len(images) * torch.is_inference_mode_enabled()  # not when GMACs are counted
        return forward(self, images)

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr(Frozen, "forward_features", counting)
        results = workshop.evaluate(config)
    folder = workshop.run("table_evaluation") / "evaluation" / "test"
    return Evaluated(results, folder, printed.getvalue().splitlines(), sorted(passes.values()))


def test_the_table_of_the_paper_is_printed_at_the_end_in_its_order(evaluated):
    results, lines = evaluated.results, evaluated.lines
    (start,) = [index for index, line in enumerate(lines) if line.split() == ["day", "night", "all"]]
    rows = [line.split("  ")[0].removesuffix(" *") for line in lines[start + 1 : start + 10]]
    assert rows == [
        "both", "day", "night", "ensemble mean", "ensemble max",
        "simple", "simple_w_conv", "classwise", "classwise_w_conv",
    ]  # fmt: skip
    assert lines[start + 10] == ""
    assert (
        f"{100 * results.miou('simple', 'night'):.2f} ({results.counted('simple', 'night')})"
        in lines[start + 6]
    )
    below = [line.split("  ")[0].removesuffix(" *") for line in lines[start + 10 :]]
    order = ["ensemble vote", "other_seed", "true subset", "best gate, simple", "best constant class"]
    assert [name for name in below if name in order] == order
    assert lines[-1] == f"evaluation: {evaluated.folder}"


def test_each_network_passes_each_frame_once_and_the_baseline_none_of_val(evaluated):
    assert evaluated.passes == [8, 8 + 8, 8 + 8]  # 8 frames of test; the gates are compared on 8 of val


def test_cases_are_a_partition_and_the_simple_gate_contradicts_nobody(evaluated):
    results = evaluated.results
    with open(evaluated.folder / "disagreement_per_image.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    models = [*results.names("ensemble"), *GATES]
    assert Counter(row["model"] for row in rows) == dict.fromkeys(models, 8)
    for row in rows:
        four = ("agree_followed", "agree_contradicted", "differ_followed", "differ_own")
        labelled = results.truth[results.images.index(row["image"])].sum()
        assert sum(int(row[name]) for name in four) == int(row["pixels"]) == labelled
        assert int(row["differ_followed"]) == int(row["followed_day"]) + int(row["followed_night"])
        if row["model"] in ("simple", "other_seed", "ensemble mean"):
            assert row["agree_contradicted"] == "0"
    right = {name: results.cases[name][:, :, :4, 1].sum() for name in models}
    assert right == {name: results.total(name, "all").trace() for name in models}


def test_gate_csv_tells_the_regret_and_luma_is_that_of_the_frames(evaluated):
    results = evaluated.results
    with open(evaluated.folder / "gate.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["class"] == "" and row["subset"] == "all"]
    assert [row["model"] for row in rows] == [name for name in GATES for _ in range(2)]
    best = results.miou("best gate, simple", "all") - results.miou("simple", "all")
    (row,) = [row for row in rows if (row["model"], row["expert"]) == ("simple", "day")]
    assert float(row["regret_miou"]) == best and "spearman_luma" in row
    # the lower third of a frame is grey 100, the rest 40 and 160 or the other way round, with noise up to 20
    assert results.luma.min() > 60 / 255 and results.luma.max() < 180 / 255
