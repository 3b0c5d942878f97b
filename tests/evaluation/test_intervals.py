"""Intervals in the tables of an evaluation: that figures lie where they belong, of the units and classes told."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from evaluation.intervals import COMPARED, DIFFERENCES, clean_estimates, difference_rows
from evaluation.results import FLOOR, Protocol, Results, RowInfo
from evaluation.tables import header_lines, result_rows, write_tables

SUBSETS = ["highway", "urban", "all", "fog"]
CLASSES = ("road", "sky", "rail", "sign")
WITH_INTERVAL = {"miou", "miou_common", "aacc", "aacc_image_mean", "macc", "fwiou"}


def counts(level, seed, true):
    """Counts of images [N, K, K]: of `true` [N, K] pixels of each class about the share `level` [N] is right."""
    generator = np.random.default_rng(seed)
    right = np.clip(generator.normal(level, 0.1), 0.05, 0.95)[:, None, None]
    shares = right * np.eye(4) + (1 - right) * generator.dirichlet(np.ones(4), (len(true), 4))
    return np.floor(true[:, :, None] * shares).astype(np.int32) + np.diag(true.min(axis=0) > 0).astype(
        np.int32
    )


def make(absent="nan", chosen="moe"):
    """24 frames of highway in 12 blocks, 12 of urban in 12 blocks, 6 of fog in 6. No frame has a sign."""
    subsets = ("highway",) * 24 + ("urban",) * 12 + ("fog",) * 6
    blocks = [f"h{index // 2}" for index in range(24)] + [f"u{index}" for index in range(12)]
    blocks += [f"f{index}" for index in range(6)]
    true = np.random.default_rng(9).integers(100, 300, (42, 4)) * [1, 1, 1, 0]
    levels = {"one": 0.7, "two": 0.6, "highway": 0.65, "urban": 0.5, "mean": 0.66, "moe": 0.72, "moe_2": 0.8}
    kinds = ["baseline", "baseline", "expert", "expert", "ensemble", "gate", "gate"]
    levels = {name: np.full(42, level) for name, level in levels.items()}
    levels["urban"][24:36] = 0.7  # its home
    matrices = [counts(level, seed, true) for seed, level in enumerate(levels.values())]
    truth = matrices[0].sum(axis=2, dtype=np.int64)
    for own in matrices:  # rounding has lost other pixels of each row
        own[:, range(4), range(4)] += (truth - own.sum(axis=2)).astype(np.int32)
    router = matrices[3].copy()
    router[36:] = 0
    rows = [RowInfo(name, kind) for name, kind in zip(levels, kinds, strict=True)]
    rows += [RowInfo("router", "control", subsets=("highway", "urban")), RowInfo(FLOOR, "floor")]
    return Results(
        Protocol("toy", "test", CLASSES, ("highway", "urban"), (4, 8), absent=absent), tuple(rows),
        tuple(map(str, range(42))), subsets, tuple(blocks), np.stack([*matrices, router]), truth,
        np.full(42, 0.5), {name: np.full((42, 2, 1), 0.5, np.float32) for name in ("moe", "moe_2")}, chosen=chosen,
    )  # fmt: skip


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("absent", ["nan", "zero", "one", "gt_only"])
def test_an_interval_is_of_the_figure_that_it_stands_beside(absent):
    results = make(absent)
    found = clean_estimates(results, SUBSETS)
    for name in ("one", "moe", "router", FLOOR):
        for subset in SUBSETS[:3]:
            figures = results.figures(name, subset) | {"miou": results.miou(name, subset)}
            figures["miou_common"] = results.miou_common(name, subset, SUBSETS)
            assert set(figures) == WITH_INTERVAL
            for metric, value in figures.items():
                estimate = found[name, subset, metric]
                assert estimate.value == pytest.approx(value, abs=1e-14)
                low, high = estimate.interval()
                assert low <= value <= high
    assert ("router", "fog", "miou") not in found
    # signs are predicted and never there: the policy counts them in the figure, not in what is compared
    scale = {"nan": 3 / 4, "zero": 3 / 4, "one": 3 / 4, "gt_only": 1}[absent]
    policy, compared = found["moe", "all", "miou"], found["moe", "all", COMPARED]
    assert policy.replicates == pytest.approx(scale * compared.replicates, abs=1e-14)


def test_all_figures_of_results_csv_that_follow_from_pixels_have_one_where_there_are_units(tmp_path):
    write_tables(tmp_path, make(), subsets=SUBSETS)
    rows = read(tmp_path / "results.csv")
    with_interval = {(row["model"], row["subset"], row["metric"]) for row in rows if row["ci_low"]}
    names = [name for name in make().names()]
    assert with_interval == {
        (name, subset, key) for name in names for subset in SUBSETS[:3] for key in WITH_INTERVAL
    }
    assert all(bool(row["ci_low"]) == bool(row["ci_high"]) for row in rows)
    assert {row["subset"]: row["units"] for row in rows} == {
        "highway": "12",
        "urban": "12",
        "all": "24",
        "fog": "6",
    }
    for row in rows:
        if row["ci_low"]:
            assert float(row["ci_low"]) <= float(row["value"]) <= float(row["ci_high"])
    without = result_rows(make(), SUBSETS)
    assert [str(row["value"]) for row in without if row["metric"] == "aacc"] == [
        row["value"] or "nan" for row in rows if row["metric"] == "aacc"
    ]


def test_the_matrix_shows_them_and_the_header_tells_the_units(tmp_path):
    results = make()
    write_tables(tmp_path, results, subsets=SUBSETS)
    text = (tmp_path / "matrix.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| moe |")]
    cells = line.split(" | ")
    low, high = clean_estimates(results, SUBSETS)["moe", "all", "miou"].interval()
    value = 100 * results.miou("moe", "all")
    assert cells[4] == f"{value:.2f} [{100 * low:.1f}, {100 * high:.1f}] (4)"
    assert cells[5] == f"{100 * results.miou('moe', 'fog'):.2f} (4)"  # six units
    assert "[" in cells[8] and "(" not in cells[8]  # mIoU_common
    assert "highway 12, urban 12, all 24, fog 6; none for fewer than 10" in text
    assert "95 % percentile intervals over 2000 resamples" in header_lines(results, SUBSETS)[-1]
    assert header_lines(results, ["fog"])[-1].endswith("fog 6; intervals: none for fewer than 10.")
    single = replace(results, blocks=results.images)
    assert "resamples of units (single frames, taken as independent): " in header_lines(single, SUBSETS)[-1]
    assert "units (blocks of consecutive frames): " in text
    assert "[" not in (tmp_path / "matrix.tex").read_text().split(r"\midrule", 1)[1]


def test_the_chosen_gate_is_compared_with_the_best_of_each_kind(tmp_path):
    results = make()
    write_tables(tmp_path, results, subsets=SUBSETS)
    rows = read(tmp_path / "differences.csv")
    found = clean_estimates(results, SUBSETS)
    rivals = {
        "baseline": ["one"] * 4,
        "expert": ["highway", "urban", "highway", "highway"],
        "ensemble": ["mean"] * 4,
    }
    assert [(row["subset"], row["kind"], row["against"], row["metric"]) for row in rows] == [
        (subset, kind, names[place], metric)
        for place, subset in enumerate(SUBSETS)
        for kind, names in rivals.items()
        for metric in DIFFERENCES
    ]
    assert {row["row"] for row in rows} == {"moe"}  # the chosen one, not the better one
    for row in rows:
        pair = [found[name, row["subset"], row["metric"]] for name in ("moe", row["against"])]
        assert float(row["difference"]) == pair[0].value - pair[1].value
        if row["subset"] == "fog":
            assert row["ci_low"] == row["ci_high"] == "" and row["units"] == "6"
        else:
            low, high = np.quantile(pair[0].replicates - pair[1].replicates, [0.025, 0.975])
            assert [float(row["ci_low"]), float(row["ci_high"])] == pytest.approx([low, high], abs=1e-13)
    text = (tmp_path / "differences.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| all | best baseline | one | 24 |")]
    first = rows[2 * 3 * len(DIFFERENCES)]
    interval = f"[{100 * float(first['ci_low']):.1f}, {100 * float(first['ci_high']):.1f}]"
    assert line.split(" | ")[4] == f"{100 * float(first['difference']):+.2f} {interval}"
    assert "Points by which moe is above" in text and "favours it" in text


def test_without_a_gate_there_is_nothing_to_compare(tmp_path):
    results = make()
    rows = tuple(RowInfo(row.name, "control" if row.kind == "gate" else row.kind) for row in results.rows)
    results = Results(**{**vars(results), "rows": rows, "weights": {}, "chosen": ""})
    write_tables(tmp_path, results, subsets=SUBSETS)
    assert read(tmp_path / "differences.csv") == []
    assert "no gate to compare" in (tmp_path / "differences.md").read_text()
    first = make(chosen="")
    assert {row["row"] for row in difference_rows(first, ["all"], clean_estimates(first, ["all"]))} == {"moe"}


def test_the_same_evaluation_gives_the_same_bytes(tmp_path):
    for folder in ("one", "two"):
        write_tables(tmp_path / folder, make(), subsets=SUBSETS)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert {"results.csv", "differences.csv", "differences.md", "matrix.md"} <= set(files)
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
