"""Means over runs of one pipeline: of files made by hand, every figure known."""

import pytest

from engine.command import run
from engine.config import UserError
from evaluation.findings import FINDING_COLUMNS, Finding, finding_rows
from evaluation.formats import csv_text
from evaluation.results import FLOOR
from evaluation.seeds import main, summary
from evaluation.tables import RESULT_COLUMNS


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
    matrix_file(tmp_path / "none", {"router": (0.5, 0.6)})
    with pytest.raises(UserError, match="none.matrix.csv: no model is in all of them"):
        summary([tmp_path / "a", tmp_path / "none"])
    for name, images in (("nine", 9), ("four", 4)):
        (tmp_path / name).mkdir()
        row = {
            "model": "moe",
            "suite": "quick",
            "attack": "clean",
            "eps": 0.0,
            "metric": "top1",
            "value": 0.5,
        }
        text = csv_text(RESULT_COLUMNS, [{**row, "subset": "test", "n_images": images}])
        (tmp_path / name / "results.csv").write_text(text)
    with pytest.raises(
        UserError, match="results.csv: 4 images under suite quick, but 9 in .*nine.results.csv"
    ):
        summary([tmp_path / "nine", tmp_path / "four"])
    assert run(main, [str(tmp_path / "nowhere")]) == 2
    assert "no matrix.csv" in capsys.readouterr().err
