"""Sentences follow from the numbers, whichever way these turn out."""

from dataclasses import replace

import numpy as np
import pandas

from evaluation.gate_table import regret
from evaluation.results import main_subset
from reports.findings import findings

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


def test_experts_are_not_compared_without_classes_in_common(results_of):
    results = results_of()
    lines = headlines(replace(results, truth=np.zeros_like(results.truth)))
    assert not any("nan" in line or " expert is " in line for line in lines)


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
        f"On all the MoE moe_classwise reaches {iou(0.95):.2f} mIoU over the 2 classes with ground truth, above"
    )
    assert gains[1].endswith("above the best of 2 of 3 other kinds of rows.")
    assert gains[2].endswith("above the best of 0 of 3 other kinds of rows.")
    detail = findings(results_of(gate=0.4), COLUMNS)[2].detail
    assert f"{iou(0.8) - iou(0.4):.2f} points below the best baseline (baseline)" in detail
    assert "chosen on the validation split" in detail
    level = findings(results_of(gate=0.9), COLUMNS)[2].detail
    assert "level with the best control (true subset)" in level


def test_a_class_that_is_only_answered_changes_no_comparison(results_of):
    """One stray pixel of a third class, by the gate alone: its clean mIoU is over three classes then, the comparison
    with other rows over the two that have ground truth."""
    results = results_of(gate=0.95)
    wider = np.zeros((*results.matrices.shape[:2], 3, 3), results.matrices.dtype)
    wider[:, :, :2, :2] = results.matrices
    place = results.by_name["moe_classwise"]
    wider[place, 0, 0, 0] -= 1
    wider[place, 0, 0, 2] += 1
    protocol = replace(results.protocol, classes=("road", "sky", "ghost"))
    strayed = replace(results, matrices=wider, protocol=protocol)
    assert strayed.miou("moe_classwise", "all") < 0.7 * results.miou("moe_classwise", "all")
    assert strayed.miou_gt_only("moe_classwise", "all") > 0.99 * results.miou("moe_classwise", "all")
    assert headlines(strayed)[2].endswith(
        "over the 2 classes with ground truth, above the best row of every other kind."
    )
    assert regret(strayed, "moe_classwise", "all")["miou"] < 0.01


def test_regret_is_the_distance_to_the_best_gate_of_the_same_kind(results_of):
    line = headlines(results_of(gate=0.85))[3]
    assert f"{iou(0.95):.2f} mIoU on all" in line and f"{iou(0.95) - iou(0.85):.2f} points" in line
    results = results_of(gates=("simple",))
    results.matrices[results.by_name["best gate, class-wise"]] = 0  # the simple gate must not look there
    assert f"{iou(0.95):.2f} mIoU" in headlines(results)[3]
    others = [
        replace(row, experts=("day", "night")) if row.kind == "ceiling" else row for row in results.rows
    ]
    assert not any("perfect" in line for line in headlines(replace(results, rows=tuple(others))))


def about(results, start, columns=COLUMNS):
    (finding,) = [finding for finding in findings(results, columns) if finding.headline.startswith(start)]
    return finding


def test_regret_is_told_in_pixel_accuracy_too(results_of):
    assert about(results_of(gate=0.85), "The best weights").detail.startswith(
        "In pixel accuracy 10.00 points."
    )


def test_what_the_gate_makes_of_disagreement(results_of):
    found = about(results_of(), "On all the experts")
    assert found.headline == (
        "On all the experts differ on 35.0 % of the pixels; there moe_classwise is right on 50.0 %."
    )
    assert "highway on 42.9 %, urban on 21.4 %" in found.detail
    assert "Where they agree, it is right on 87.7 %" in found.detail
    assert (
        "contradicts experts that agree on 5.0 % of the pixels and is right on 40.0 % of these (they: 20.0 %)"
        in (found.detail)
    )
    # 149 of 200 are right, 114 of these where the experts agree; wrong: 16 of 51
    assert f"AUROC of {(1 + 35 / 51 - 35 / 149) / 2:.2f}" in found.detail
    assert f"probabilities {(120 * 30 + (120 * 20 + 30 * 30) / 2) / 150 / 50:.2f}" in found.detail
    results = results_of()
    results.cases["moe_classwise"][:, :, 1] = 0
    assert "It never contradicts experts that agree." in about(results, "On all the experts").detail
    results.cases["moe_classwise"][:, :, 2:] = 0
    assert "agree on every pixel" in about(results, "On all the experts").headline


def test_gates_tell_the_subsets_apart_and_a_collapse_is_told(results_of):
    results = results_of()
    found = about(results, "moe_simple")
    assert found.headline == "moe_simple tells the subsets apart by 0.70."
    assert found.detail.startswith("Its mean weight for highway is 0.90 on highway and 0.20 on urban.")
    assert "below the best gate of its kind" in found.detail
    assert f"{iou(0.95) - iou(0.85):.2f} points of mIoU (10.00 of pixel accuracy)" in found.detail
    assert not any("collapsed" in line for line in headlines(results))
    results.weights["moe_simple"][:] = np.array([0.97, 0.03])[None, :, None]
    assert "moe_simple has collapsed." in headlines(results)


def test_whether_a_gate_reads_the_light(results_of):
    results = results_of()
    assert "luma" not in about(results, "moe_simple").detail  # one weight on all images of a subset
    weights = results.weights["moe_simple"]
    for order, verdict in (
        ([0, 1, 2, 3], "1.00 within highway, 1.00 within urban; it goes with the light."),
        ([3, 2, 1, 0], "-1.00 within highway, -1.00 within urban; it goes with the light."),
        ([1, 2, 0, 3], "0.40 within highway, 0.40 within urban; it goes with the light in part."),
        ([1, 3, 0, 2], "0.00 within highway, 0.00 within urban; it hardly goes with the light."),
    ):
        weights[:, 0, 0] = np.tile(order, 3) / 20 + np.repeat([0.7, 0.125, 0.3], 4)
        weights[:, 1] = 1 - weights[:, 0]
        detail = about(results, "moe_simple").detail
        assert verdict in detail and " over all, " in detail
    over_all = pandas.Series(weights[:8, 0, 0]).corr(pandas.Series(results.luma[:8]), method="spearman")
    assert f"luma of the image: {over_all:.2f} over all" in detail
    one = about(results, "moe_simple", ["urban", "fog"])
    assert one.headline == "moe_simple gives highway a mean weight of 0.20 on urban."
    assert "over all" not in one.detail and "within urban" in one.detail


def test_nothing_is_said_of_what_is_not_there(results_of):
    assert headlines(results_of(experts=(), gates=())) == []
    assert headlines(results_of(gates=()))[2:] == []
    assert results_of(gates=()).lead_gate == ""
    assert main_subset(["fog", "urban"]) == "fog" and main_subset(COLUMNS) == "all"
