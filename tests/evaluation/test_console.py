"""The printed table: the paper's rows first and in its order, then the others by kind; figures and counts."""

from evaluation.console import results_table
from evaluation.formats import percent


def test_the_first_rows_come_first_in_their_order_and_the_others_by_kind(results_of):
    results = results_of()
    text = results_table(results, ["highway", "all"], ["moe", "ensemble mean"])
    lines = text.splitlines()
    assert "split test, 6 images" in lines[0]
    assert lines[2].split() == ["highway", "all"]
    names = [line[:21].strip() for line in lines[3:] if line]
    assert names == [
        "moe", "ensemble mean", "ceilings: may look at", "best gate, simple", "best gate, class-wise",
        "floor", "best constant class",
    ]  # fmt: skip
    value = percent(results.miou("moe", "highway"))
    assert lines[3].split() == ["moe", value, "(2)", value, "(2)"]
    assert len({len(line) for line in lines[2:5]}) == 1  # columns stand below each other


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
