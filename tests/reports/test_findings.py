"""Sentences follow from the numbers, whichever way these turn out."""

from dataclasses import replace

import numpy as np

from reports.findings import chosen_gate, findings, main_subset

COLUMNS = ["highway", "urban", "all", "fog"]


def iou(share):
    """mIoU in percent of two classes of equal size with this share of right pixels."""
    return 100 * share / (2 - share)


def headlines(results, columns=COLUMNS):
    return [finding.headline for finding in findings(results, columns)]


def test_experts_are_compared_at_home(results_of):
    margin = f"{iou(0.9) - iou(0.5):.2f} points"
    lines = headlines(results_of())
    assert lines[0] == f"On highway the highway expert is {margin} above the urban expert."
    assert lines[1] == f"On urban the urban expert is {margin} above the highway expert."


def test_only_experts_from_elsewhere_are_rivals(results_of):
    results = results_of(experts=("highway", "urban", "fog"))
    wider = [replace(row, home=("urban", "fog")) if row.name == "fog" else row for row in results.rows]
    lines = headlines(replace(results, rows=tuple(wider)))
    assert [line for line in lines if line.startswith("On urban the urban")] == [
        f"On urban the urban expert is {iou(0.9) - iou(0.5):.2f} points above the highway expert."
    ]
    alone = [replace(row, home=("highway", "urban")) for row in results.rows]
    assert not any(" expert is " in line for line in headlines(replace(results, rows=tuple(alone))))


def test_a_control_that_is_not_defined_is_no_rival(results_of):
    (verdict, *_) = findings(results_of(), ["fog"])
    assert "control" not in verdict.detail


def test_a_gate_above_everything_and_one_below(results_of):
    gains = [headlines(results_of(gate=share))[2] for share in (0.95, 0.85, 0.4)]
    assert gains[0].startswith(
        f"On all the MoE moe_classwise reaches {iou(0.95):.2f} mIoU, above the best row"
    )
    assert gains[1].endswith("above the best of 2 of 3 other kinds of rows.")
    assert gains[2].endswith("above the best of 0 of 3 other kinds of rows.")
    detail = findings(results_of(gate=0.4), COLUMNS)[2].detail
    assert f"{iou(0.8) - iou(0.4):.2f} points below the best baseline (baseline)" in detail
    assert "chosen on the validation split" in detail
    level = findings(results_of(gate=0.9), COLUMNS)[2].detail
    assert "level with the best control (true subset)" in level


def test_regret_is_the_distance_to_the_best_gate_of_the_same_kind(results_of):
    line = headlines(results_of(gate=0.85))[3]
    assert f"{iou(0.95):.2f} mIoU on all" in line and f"{iou(0.95) - iou(0.85):.2f} points" in line
    results = results_of(gates=("simple",))
    results.matrices[results.by_name["best gate, class-wise"]] = 0  # the simple gate must not look there
    assert f"{iou(0.95):.2f} mIoU" in headlines(results)[3]


def test_weights_tell_the_subsets_apart_and_a_collapse_is_told(results_of):
    results = results_of()
    found = findings(results, COLUMNS)[4]
    assert found.headline == "moe_simple tells the subsets apart by 0.70."
    assert found.detail == "Its mean weight for highway is 0.90 on highway and 0.20 on urban."
    assert not any("collapsed" in line for line in headlines(results))
    results.weights["moe_simple"][:] = np.array([0.97, 0.03])[None, :, None]
    assert "moe_simple has collapsed." in headlines(results)


def test_nothing_is_said_of_what_is_not_there(results_of):
    assert headlines(results_of(experts=(), gates=())) == []
    assert headlines(results_of(gates=()))[2:] == []
    assert chosen_gate(results_of(gates=())) == ""
    assert main_subset(["fog", "urban"]) == "fog" and main_subset(COLUMNS) == "all"
