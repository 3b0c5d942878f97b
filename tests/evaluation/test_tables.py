"""Tables on matrices set by hand: values, policies, marks, dashes, and that no digit is lost on the way."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest

from engine.command import run
from engine.config import UserError
from evaluation.findings import FINDING_COLUMNS, Finding, finding_rows
from evaluation.formats import csv_text
from evaluation.results import FLOOR, Protocol, Results, RowInfo
from evaluation.seeds import main, summary
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


def matrix_file(folder, values):
    folder.mkdir(parents=True)
    lines = ["model,kind,miou_all,miou_common_all,parameters"]
    lines += [f"{name},gate,{miou},{common},1" for name, (miou, common) in values.items()]
    (folder / "matrix.csv").write_text("\n".join(lines) + "\n")


def test_mean_and_spread_over_seeds(tmp_path, capsys):
    matrix_file(tmp_path / "a" / "evaluation" / "x", {"moe": (0.5, 0.6), "router": ("", 0.1), "old": (1, 1)})
    matrix_file(tmp_path / "b" / "evaluation" / "x", {"moe": (0.6, 0.6), "router": (0.2, 0.1)})
    matrix_file(tmp_path / "c", {"moe": (0.7, 0.6), "router": (0.3, 0.1)})
    text = summary([tmp_path / name for name in "abc"])
    assert "| moe | 60.00 ± 10.00 (50.00 .. 70.00) | 60.00 ± 0.00 (60.00 .. 60.00) |" in text
    assert "| router | - |" in text and "| model | mIoU all | mIoU_common all |" in text
    assert "Not in every run: old." in text
    matrix_file(tmp_path / "again", {"moe": (0.7, 0.6), "router": (0.3, 0.1)})
    with pytest.raises(
        UserError, match=r"again/matrix\.csv: says the same as .*c/matrix\.csv, byte for byte"
    ):
        summary([tmp_path / name for name in ("a", "c", "again")])
    assert main([str(tmp_path / "a"), str(tmp_path / "c")]) == 0
    assert "2 runs" in capsys.readouterr().out


def test_mean_and_spread_of_attacked_figures(tmp_path, capsys):
    def row(model, suite, attack, eps, metric, value, kind="cnn"):
        return {
            "model": model,
            "kind": kind,
            "suite": suite,
            "attack": attack,
            "eps": eps,
            "metric": metric,
            "value": value,
        }

    for name, value in (("a", 0.5), ("b", 0.6)):
        rows = [
            row("moe", "", "", "", "top1", 0.99),  # of all images
            row("moe", "", "", "", "rise", value / 100),
            row("moe", "", "", "", "effective_experts", 1 + value),
            row("moe", "", "", "", "load_0", 0.7),
            row("moe", "quick", "clean", 0.0, "top1", value),
            row("moe", "quick", "pgd ce", 0.1, "top1", 0.77),
            row("moe", "quick", "worst of adaptive", 0.1, "top1", value / 2),
            row("moe", "quick", "change_route", 0.1, "top1_attack_on_router", 0.4),
            row("moe", "autoattack", "clean", 0.0, "top1", 0.98),
            row("moe", "autoattack", "autoattack", 0.1, "top1", 0.2),
            row("moe", "autoattack", "worst of adaptive", 0.1, "top1", 0.1),
            row("moe", "autoattack", "worst of all", 0.1, "top1", 0.05),
            row("moe", "autoattack", "autoattack", 0.1, "top1_suite_minus_autoattack", 0.3),
            row("plain", "quick", "clean", 0.0, "top1", 0.9),
            row("moe - plain", "quick", "worst of adaptive", 0.1, "top1", 0.1, "difference"),
            row(FLOOR, "quick", "", "", "top1", 0.1, "floor"),
            row(FLOOR, "", "", "", "top1", 0.1, "floor"),
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.csv").write_text(csv_text(RESULT_COLUMNS, rows))
    text = summary([tmp_path / "a", tmp_path / "b"], attacked=True)
    assert summary([tmp_path / "a", tmp_path / "b"]) == text  # classifiers have no other table
    told, _, head, _, moe, plain, _, ended = text.splitlines()
    assert ended.startswith("rise: ") and "where it is 0.5 points or more in a run, or not known" in ended
    assert told.endswith("percent; effective experts: a number.")
    titles = [
        "top-1, whole split",
        "rise",
        "effective experts",
        "top-1 clean",
        "top-1 PGD 25.5/255",
        "top-1 adaptive 25.5/255",
        "router attacked 25.5/255",
    ]
    titles += ["top-1 AutoAttack 25.5/255", "top-1 worst of all 25.5/255"]
    assert head == f"| model | {' | '.join(titles)} |"
    assert moe.startswith(
        "| moe | 99.00 ± 0.00 (99.00 .. 99.00) | 0.55 ± 0.07 (0.50 .. 0.60) | 1.55 ± 0.07 (1.50 .. 1.60) | "
        "55.00 ± 7.07 (50.00 .. 60.00) | 77.00 ± 0.00 (77.00 .. 77.00) | 27.50 ± 3.54 "
    )
    assert moe.endswith(" | 20.00 ± 0.00 (20.00 .. 20.00) | 5.00 ± 0.00 (5.00 .. 5.00) |")
    assert plain == "| plain | - | - | - | 90.00 ± 0.00 (90.00 .. 90.00) | - | - | - | - | - |"
    found = [
        Finding("masking", "plain", 0.1, "", "flag", "a gap"),
        Finding("masking", "moe", 0.1, "", "ok", ""),
    ]
    (tmp_path / "b" / "checks.csv").write_text(csv_text(FINDING_COLUMNS, finding_rows(found)))
    lines = summary([tmp_path / "a", tmp_path / "b"], attacked=True).splitlines()
    assert lines[4] == moe and lines[5] == plain.replace("plain", "plain !")
    assert (
        lines[-3]
        == "!: a check raised a flag against figures of it in one of these runs; see their checks.csv."
    )
    assert run(main, ["--attacked", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    without = [one for one in rows if one["suite"] != "autoattack"]  # too dear for every seed
    (tmp_path / "b" / "results.csv").write_text(csv_text(RESULT_COLUMNS, without))
    lines = summary([tmp_path / "a", tmp_path / "b"]).splitlines()
    assert lines[2] == f"| model | {' | '.join(titles[:-2])} |"
    assert lines[-1] == "Not in every run: top-1 AutoAttack 25.5/255, top-1 worst of all 25.5/255."
    other = [row("moe", "quick", "clean", 0.0, "top1", 0.6), row("moe", "quick", "pgd ce", 0.3, "top1", 0.2)]
    (tmp_path / "b" / "results.csv").write_text(csv_text(RESULT_COLUMNS, other))
    with pytest.raises(UserError, match=r"b/results\.csv: has other columns than .*a/results\.csv"):
        summary([tmp_path / "a", tmp_path / "b"], attacked=True)  # of another eps
    (tmp_path / "b" / "results.csv").write_text(csv_text(RESULT_COLUMNS, [row("moe", "", "", "", "miou", 1)]))
    with pytest.raises(UserError, match="holds no attacked figures"):
        summary([tmp_path / "a", tmp_path / "b"], attacked=True)


def test_seeds_tell_what_is_wrong(tmp_path, capsys):
    matrix_file(tmp_path / "a", {"moe": (0.5, 0.6)})
    matrix_file(tmp_path / "two" / "x", {"moe": (0.5, 0.6)})
    matrix_file(tmp_path / "two" / "y", {"moe": (0.5, 0.6)})
    matrix_file(tmp_path / "other", {"moe": (0.5, 0.6)})
    other = tmp_path / "other" / "matrix.csv"
    other.write_text(other.read_text().replace("miou_all", "miou_fog"))
    for folders, message in (
        (["a"], "at least two"),
        (["a", "a"], "each once"),
        (["a", "two/x", "a"], "each once"),
        (["a", "nowhere"], "no matrix.csv"),
        (["a", "two"], "several evaluations"),
        (["a", "other"], "other columns"),
    ):
        with pytest.raises(UserError, match=message):
            summary([tmp_path / folder for folder in folders])
    assert run(main, [str(tmp_path / "nowhere")]) == 2
    assert "no matrix.csv" in capsys.readouterr().err
