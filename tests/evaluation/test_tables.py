"""Tables on matrices set by hand: values, policies, marks, dashes, and that no digit is lost on the way."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest

from evaluation.results import FLOOR, Protocol, Results, RowInfo
from evaluation.tables import (
    RESULT_COLUMNS,
    Cost,
    classes_markdown,
    header_lines,
    matrix_rows,
    result_rows,
    write_tables,
)

CLASSES = ("road", "sky", "rail_1")
SUBSETS = ["highway", "urban", "all", "fog"]


def results(absent="nan"):
    """Two frames of highway, one of urban, one of fog. Urban has no rail, the router is undefined on fog."""
    protocol = Protocol("toy", "test", CLASSES, ("highway", "urban"), (4, 8), absent=absent)
    expert = np.zeros((4, 3, 3), np.int32)
    expert[0] = [[6, 0, 0], [0, 2, 0], [0, 0, 0]]
    expert[1] = [[4, 0, 0], [0, 2, 0], [2, 0, 0]]
    expert[2] = [[6, 2, 0], [4, 4, 0], [0, 0, 0]]
    expert[3] = [[8, 0, 0], [0, 0, 0], [0, 0, 0]]
    router = expert.copy()
    router[3] = 0
    rows = (
        RowInfo("moe", "gate", experts=("highway", "urban")),
        RowInfo("best", "ceiling"),
        RowInfo("highway", "expert", home=("highway",)),
        RowInfo("router", "control", subsets=("highway", "urban")),
        RowInfo(FLOOR, "floor"),
    )
    weights = np.zeros((4, 2, 3), np.float32)
    weights[:, 0] = np.array([0.9, 0.7, 0.2, 0.5])[:, None] + np.array([0, 0.1, -0.2])
    weights[:, 1] = 1 - weights[:, 0]
    matrices = np.stack([expert, expert, expert, router])
    return Results(
        protocol, rows, ("a", "b", "c", "d"), ("highway", "highway", "urban", "fog"), ("x", "x", "y", "z"),
        matrices, expert.sum(2, dtype=np.int64), np.full(4, 0.5), {"moe": weights}, chosen="moe",
    )  # fmt: skip


def value(rows, model, subset, metric, class_name=""):
    wanted = (model, subset, metric, class_name)
    (row,) = [r for r in rows if (r["model"], r["subset"], r["metric"], r.get("class", "")) == wanted]
    return row["value"]


def test_every_figure_of_a_row_by_hand():
    rows = result_rows(results(), SUBSETS)
    assert value(rows, "highway", "highway", "iou", "road") == pytest.approx(10 / 12)
    assert value(rows, "highway", "highway", "iou", "rail_1") == 0
    assert math.isnan(value(rows, "highway", "urban", "iou", "rail_1"))
    assert value(rows, "highway", "highway", "miou") == pytest.approx((10 / 12 + 1 + 0) / 3)
    assert value(rows, "highway", "highway", "classes_counted") == 3
    assert value(rows, "highway", "urban", "classes_counted") == 2
    assert value(rows, "highway", "highway", "aacc") == pytest.approx(14 / 16)
    assert value(rows, "highway", "highway", "aacc_image_mean") == pytest.approx((1 + 6 / 8) / 2)
    assert value(rows, "highway", "all", "aacc") == pytest.approx(24 / 32)
    assert value(rows, "highway", "all", "aacc_image_mean") == pytest.approx((1 + 6 / 8 + 10 / 16) / 3)
    assert value(rows, "highway", "urban", "macc") == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert value(rows, "highway", "fog", "fwiou") == 1
    assert value(rows, "highway", "all", "iou", "road") == pytest.approx(16 / 24)
    assert value(rows, "labels", "all", "images", "rail_1") == 1
    assert value(rows, "labels", "highway", "images", "road") == 2
    assert all(row["units"] == {"highway": 1, "all": 2}.get(row["subset"], 1) for row in rows)
    assert {row["n_images"] for row in rows if row["subset"] == "all"} == {3}


def test_common_miou_is_over_the_classes_true_in_every_compared_subset():
    two = result_rows(results(), ["highway", "urban"])  # road and sky in common
    assert value(two, "highway", "highway", "miou_common") == pytest.approx((10 / 12 + 1) / 2)
    assert value(two, "highway", "urban", "miou_common") == pytest.approx((3 / 6 + 2 / 5) / 2)
    with_fog = result_rows(results(), SUBSETS)  # only road
    assert value(with_fog, "highway", "highway", "miou_common") == pytest.approx(10 / 12)


@pytest.mark.parametrize("absent", ["nan", "zero", "one", "gt_only"])
def test_a_row_that_is_not_defined_is_a_dash_whatever_the_policy(absent, tmp_path):
    (router,) = [row for row in matrix_rows(results(absent), SUBSETS, {}) if row["model"] == "router"]
    assert math.isnan(router["miou_fog"]) and math.isnan(router["miou_common_fog"])
    assert router["miou_all"] > 0
    write_tables(tmp_path, results(absent), subsets=SUBSETS)
    (line,) = [line for line in (tmp_path / "matrix.md").read_text().splitlines() if "| router" in line]
    assert line.split(" | ")[5] == "-"


def test_rows_are_grouped_by_kind_and_costs_stand_beside_them():
    costs = {"moe": Cost(5_000_000, 1200, 1.5, 800, 100, "seed 1")}
    rows = matrix_rows(results(), ["highway", "urban"], costs)
    assert [row["model"] for row in rows] == ["highway", "moe", "router", "best", FLOOR]
    assert list(rows[0]) == [
        "model", "kind", "miou_highway", "miou_urban", "miou_common_highway", "miou_common_urban",
        "parameters", "trained_parameters", "gmacs", "images_seen", "steps", "note",
    ]  # fmt: skip
    assert rows[1]["parameters"] == 5_000_000 and rows[1]["note"] == "chosen on val; seed 1"
    assert rows[0]["parameters"] is None


def test_files_hold_fractions_in_csv_and_percent_elsewhere(tmp_path):
    found = replace(results(), dead={"moe": np.full(4, 0.25)})
    write_tables(tmp_path, found, {"moe": Cost(5_000_000, note="a & b")}, SUBSETS)
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == RESULT_COLUMNS
    (road,) = [
        r for r in rows if (r["model"], r["subset"], r["metric"], r["class"]) == ("moe", "all", "iou", "road")
    ]
    assert float(road["value"]) == 16 / 24  # not a digit lost
    empty = ("corruption", "severity", "suite", "attack", "eps", "ci_low", "ci_high", "passes_per_image")
    assert all(row[column] == "" for row in rows for column in empty)
    with open(tmp_path / "matrix.csv", newline="") as file:
        matrix = {row["model"]: row for row in csv.DictReader(file)}
    assert float(matrix["moe"]["miou_fog"]) == 1 and matrix["router"]["miou_fog"] == ""
    markdown = (tmp_path / "matrix.md").read_text()
    assert "| moe | gate | 61.11 (3) |" in markdown and "5 000 000" in markdown and "percent" in markdown
    latex = (tmp_path / "matrix.tex").read_text()
    assert r"61.11 \,(3)" in latex and r"a \& b" in latex and latex.count(r"\midrule") == 5
    assert r"mIoU\_common highway" in latex
    with open(tmp_path / "gate.csv", newline="") as file:
        assert {row["dead_share"] for row in csv.DictReader(file) if not row["class"]} == {"0.25"}


def test_the_header_tells_what_a_figure_needs():
    text = " ".join(header_lines(results(), SUBSETS))
    for fact in (
        "split test", "highway 2, urban 1, all 3, fog 1", "all = highway + urban", "4 x 8", "squash",
        "absent: nan", "resolution: native", "with ground truth: highway 3, urban 2, all 3, fog 1",
        "in every one of these subsets (1 of 3)",
    ):  # fmt: skip
        assert fact in text


def test_classes_in_few_images_are_marked():
    frames = results()
    many = Results(
        frames.protocol, frames.rows, tuple(map(str, range(40))), frames.subsets * 10, frames.blocks * 10,
        np.tile(frames.matrices, (1, 10, 1, 1)), np.tile(frames.truth, (10, 1)), np.full(40, 0.5),
    )  # fmt: skip
    lines = classes_markdown(many, ["highway", "urban"]).splitlines()
    assert "| road | 20 | 83.33 | 83.33 |" in lines and "| rail_1 | 10 | 0.00 | 0.00 |" in lines
    assert "| rail_1 * | 0 | - | - |" in lines
    assert any(line.startswith("| sky | 10 ") for line in lines)
