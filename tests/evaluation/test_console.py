"""The printed table: the paper's rows first and in its order, then the others by kind; figures and counts."""

import re

import numpy as np
import pytest

from engine.config import ClassifierEvaluate, Evaluate
from engine.schema import ROBUST_EPS
from evaluation.console import note_idle, results_table
from evaluation.formats import percent
from evaluation.intervals import clean_estimates


def test_the_first_rows_come_first_in_their_order_and_the_others_by_kind(results_of):
    results = results_of()
    text = results_table(results, ["highway", "all"], ["moe", "ensemble mean"])
    lines = text.splitlines()
    assert "split test, 6 images" in lines[0]
    assert lines[2].split() == ["highway", "all"]
    names = [line[:21].strip() for line in lines[3:] if line]
    assert names == [
        "moe", "ensemble mean", "ceilings: may look at", "best gate, simple", "best gate, class-wise",
        "floor", "best constant class", "moe minus ensemble me",
    ]  # fmt: skip
    value = percent(results.miou("moe", "highway"))
    assert lines[3].split() == ["moe", value, "(2)", value, "(2)"]
    assert len({len(line) for line in lines[2:5]}) == 1  # columns stand below each other
    margin = 100 * (results.miou("moe", "all") - results.miou("ensemble mean", "all"))
    assert lines[-1] == f"moe minus ensemble mean (best ensemble) on all: {margin:+.2f} points"  # two units


def test_the_chosen_gate_is_marked_and_a_row_that_is_not_defined_has_a_dash(results_of):
    results = results_of()
    rows = [
        type(row)(row.name, "control", row.experts, subsets=("highway",)) if row.kind == "ensemble" else row
        for row in results.rows
    ]
    results = type(results)(**{**vars(results), "rows": tuple(rows), "chosen": "moe"})
    text = results_table(results, ["highway", "urban"], ["moe"])
    assert "moe *" in text and text.endswith("* gate chosen on val")
    (line,) = [line for line in text.splitlines() if line.startswith("ensemble mean")]
    assert line.split()[-1] == "-"
    assert text.index("controls") < text.index("ceilings") < text.index("floor")


@pytest.mark.parametrize(
    ("blocks", "units"),
    [
        ("abcdefghijkl", "12 single frames, taken as independent"),
        ("aacdefghijkl", "11 blocks of consecutive frames"),
    ],
)
def test_intervals_stand_in_the_column_of_all_and_beside_the_differences(results_of, blocks, units):
    results = results_of()
    twice = {
        "images": tuple("abcdefghijkl"),
        "subsets": results.subsets * 2,
        "luma": np.tile(results.luma, 2),
    }
    for name in ("matrices", "truth"):
        array = getattr(results, name)
        twice[name] = np.concatenate([array, array], axis=array.ndim - 3 if name == "matrices" else 0)
    for name in ("weights", "cases", "scores"):
        twice[name] = {
            row: np.tile(array, (2, *[1] * (array.ndim - 1))) for row, array in getattr(results, name).items()
        }
    results = type(results)(**{**vars(results), **twice, "blocks": tuple(blocks)})
    results.matrices[0, :6, 0, 0] -= 3
    results.matrices[0, :6, 0, 1] += 3
    text = results_table(results, ["highway", "all"], ["moe", "ensemble mean"])
    (line,) = [line for line in text.splitlines() if line.startswith("ensemble mean")]
    interval = clean_estimates(results, ["all"])["ensemble mean", "all", "miou"].interval()
    told = f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    highway, of_all = (
        percent(results.miou("ensemble mean", "highway")),
        percent(results.miou("ensemble mean", "all")),
    )
    assert " ".join(line.split()) == f"ensemble mean {highway} (2) {of_all} {told} (2)"
    assert interval[0] < interval[1]
    compared, note = text.splitlines()[-2:]
    assert re.fullmatch(r"moe minus .* points \[[\d.]+, [\d.]+\]", compared)
    assert note == f"[95 % intervals over {units}]"


@pytest.mark.parametrize(
    ("kind", "keys", "idle"),
    [
        (
            Evaluate,
            {"suite": "none", "norm": "l2", "attack_images": "blocks"},
            "norm, evaluate.attack_images",
        ),
        (Evaluate, {"eps": list(ROBUST_EPS)}, None),  # what adversarial training sets by itself
        (Evaluate, {}, None),
        (ClassifierEvaluate, {"eps": [8 / 255], "pathways": False}, "eps, evaluate.pathways"),
    ],
)
def test_keys_of_attacks_that_do_nothing_are_named(capsys, kind, keys, idle):
    settings = kind(**keys)
    note_idle(settings)
    told = capsys.readouterr().out
    assert told == "" if idle is None else f"without effect: evaluate.{idle}\n" in told
