"""What is told of gates: statistics of weights, their correlation with the light, regret, and the warning."""

from dataclasses import replace

import numpy as np
import pandas
import pytest

from evaluation.gate_table import collapse_warnings, gate_rows, regret
from metrics.confusion import miou


def keyed(rows):
    return {(row["subset"], row["class"], row["expert"]): row for row in rows}


def classwise():
    """Weights of highway by frame, with an offset by class."""
    first = np.array([0.9, 0.7, 0.8, 0.2, 0.3, 0.25])[:, None] + np.array([0, 0.05, -0.2])
    return np.stack([first, 1 - first], axis=1)


def test_gate_rows_per_subset_class_and_expert(results_of):
    results = replace(results_of(weights=classwise()), dead={"moe": np.array([0, 1, 0.5, 0.5, 0.25, 0.25])})
    by_key = keyed(gate_rows(results, ["highway", "urban"]))
    assert len(by_key) == 2 * 4 * 2
    assert by_key["highway", "", "highway"]["mean"] == pytest.approx(0.8 - 0.05)
    assert by_key["urban", "", "highway"]["mean"] == pytest.approx(0.25 - 0.05)
    assert by_key["highway", "sky", "highway"]["mean"] == pytest.approx(0.85)
    assert by_key["highway", "sky", "urban"]["std"] == pytest.approx(np.std([0.9, 0.7, 0.8]))
    shares = results.dead["moe"]
    for subset in ("highway", "urban"):
        assert by_key[subset, "", "urban"]["dead_share"] == shares[results.mask(subset)].mean()
    assert by_key["highway", "", "urban"]["dead_share"] != by_key["urban", "", "urban"]["dead_share"]
    assert "dead_share" not in by_key["highway", "sky", "urban"]
    assert by_key["highway", "", "urban"]["n_images"] == 3
    assert not [key for key, row in by_key.items() if row["collapsed"]]
    high = keyed(gate_rows(results_of(weights=np.clip(classwise() * [[2], [0]], 0, 1)), ["highway"]))
    assert {key[1] for key, row in high.items() if row["collapsed"]} == {"", "road", "sky", "rail"}


def test_weights_are_correlated_with_the_light_within_and_over_subsets(results_of):
    """On highway the weight falls with the light, on urban it rises; over all it follows the subset."""
    results = results_of()
    by_key = keyed(gate_rows(results, ["highway", "urban", "all"]))
    for subset, expected in (("highway", -1), ("urban", 1)):
        row = by_key[subset, "", "highway"]
        assert row["pearson_luma"] == pytest.approx(expected)
        assert row["spearman_luma"] == pytest.approx(expected)
        assert by_key[subset, "", "urban"]["pearson_luma"] == pytest.approx(-expected)
    series = pandas.DataFrame({"luma": results.luma, "weight": results.weights["moe"][:, 0, 0]})
    row = by_key["all", "", "highway"]
    assert row["pearson_luma"] == pytest.approx(series.corr()["luma"]["weight"])
    assert row["spearman_luma"] == pytest.approx(series.corr(method="spearman")["luma"]["weight"])
    per_class = keyed(gate_rows(results_of(weights=classwise()), ["highway"]))
    assert per_class["highway", "sky", "urban"]["spearman_luma"] == pytest.approx(0.5)


def test_regret_is_the_distance_to_the_best_gate_of_the_kind(results_of):
    results = results_of(gate_right=6, ceiling_right=8)
    found = regret(results, "moe", "urban")
    assert found["aacc"] == pytest.approx(0.2)
    best, own = results.total("best gate, simple", "urban"), results.total("moe", "urban")
    assert found["miou"] == pytest.approx(float(miou(best) - miou(own)))
    rows = keyed(gate_rows(results, ["urban"]))
    assert rows["urban", "", "highway"]["regret_aacc"] == pytest.approx(0.2)
    assert rows["urban", "", "urban"]["regret_miou"] == pytest.approx(found["miou"])
    both = results_of(weights=classwise())
    both.matrices[both.by_name["best gate, simple"]] = 0  # the class-wise gate has another bound
    assert regret(both, "moe", "urban")["aacc"] == pytest.approx(0.2)
    assert "regret_aacc" not in keyed(gate_rows(both, ["urban"]))["urban", "sky", "urban"]


def test_there_is_no_regret_against_a_bound_over_other_experts(results_of):
    results = results_of()
    rows = [
        type(row)(row.name, row.kind, ("day", "night")) if row.kind == "ceiling" else row
        for row in results.rows
    ]
    assert regret(type(results)(**{**vars(results), "rows": tuple(rows)}), "moe", "urban") == {}
    swapped = [type(row)(row.name, row.kind, row.experts[::-1]) for row in results.rows]
    assert regret(type(results)(**{**vars(results), "rows": tuple(swapped)}), "moe", "urban")["aacc"] > 0


def test_a_collapse_is_told_over_all_training_frames_and_for_classes_that_are_there(results_of):
    at_home = np.array([0.99, 0.99, 0.99, 0.01, 0.01, 0.01])
    assert collapse_warnings(results_of(np.stack([at_home, 1 - at_home], 1)[:, :, None]), ["all"]) == []
    always = np.full(6, 0.97)
    (warning,) = collapse_warnings(results_of(np.stack([always, 1 - always], 1)[:, :, None]), ["urban"])
    assert warning.startswith("gate moe has collapsed: more than 95 %") and warning.endswith("highway")
    weights = np.full((6, 2, 3), 0.5)
    weights[:, :, 2] = [1, 0]  # of rail, which no frame has
    assert collapse_warnings(results_of(weights), ["highway", "urban", "all"]) == []
    weights[:, :, 1] = [0, 1]
    (warning,) = collapse_warnings(results_of(weights), ["highway", "urban", "all"])
    assert "1 of 2 classes" in warning and warning.endswith("urban for sky")
    assert collapse_warnings(results_of(weights), []) == []
