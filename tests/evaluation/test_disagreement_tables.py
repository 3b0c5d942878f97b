"""Tables of disagreement on counts set by hand: shares, accuracies, parts, and nothing lost between tables."""

import csv

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from evaluation.disagreement import (
    DISAGREEMENT_COLUMNS,
    disagreement_rows,
    error_detection,
    per_image_columns,
    per_image_rows,
)
from evaluation.tables import result_rows, write_tables
from metrics.disagreement import CASES


def lines_of(results, **wanted):
    rows = disagreement_rows(results, ["highway", "urban", "all"])
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_shares_and_accuracies_of_every_case(results_of):
    moe = {"model": "moe", "subset": "highway", "class": ""}
    (own,) = lines_of(results_of(), **moe, case="differ, own answer", answer="urban")
    assert own["pixels"] == 3 and own["share"] == pytest.approx(3 / 30)
    assert (own["right"], own["accuracy"], own["n_images"]) == (3, 1, 3)
    followed = lines_of(results_of(), **moe, case="differ, one followed", followed="")
    assert [(line["answer"], line["right"]) for line in followed] == [
        ("moe", 9),
        ("highway", 6),
        ("urban", 6),
    ]
    assert followed[0]["share"] == pytest.approx(0.6) and followed[0]["accuracy"] == pytest.approx(0.5)
    (urban,) = lines_of(results_of(), **moe, followed="urban", answer="highway")
    assert (urban["pixels"], urban["right"], urban["case"]) == (12, 3, "differ, one followed")
    (tie,) = lines_of(results_of(), **moe, followed="tie", answer="moe")
    assert (tie["case"], tie["pixels"]) == ("agree, followed", 1)


def test_cases_are_a_partition_in_every_table(results_of, tmp_path):
    results = results_of()
    for subset, pixels in (("highway", 30), ("urban", 30), ("all", 60)):
        whole = lines_of(results, model="moe", subset=subset, followed="", answer="moe")
        of_all = [line for line in whole if line["class"] == ""]
        assert [line["case"] for line in of_all] == list(CASES)
        assert sum(line["pixels"] for line in of_all) == pixels
        assert sum(line["share"] for line in of_all) == pytest.approx(1)
        for name in ("road", "sky"):
            part = [line for line in whole if line["class"] == name]
            assert sum(line["pixels"] for line in part) == pixels / 2
            assert sum(line["share"] for line in part) == pytest.approx(1)
        assert not [line for line in whole if line["class"] == "rail"]  # no pixel of it
    write_tables(tmp_path, results)
    with open(tmp_path / "disagreement.csv", newline="") as file:
        assert tuple(csv.DictReader(file).fieldnames) == DISAGREEMENT_COLUMNS
    with open(tmp_path / "disagreement_per_image.csv", newline="") as file:
        images = [row for row in csv.DictReader(file) if row["model"] == "moe"]
    assert [row["image"] for row in images] == list("abcdef") and images[3]["subset"] == "urban"
    four = ("agree_followed", "agree_contradicted", "differ_followed", "differ_own")
    for row in images:
        assert int(row["pixels"]) == sum(int(row[name]) for name in four) == 10
        assert int(row["differ_followed"]) == int(row["followed_highway"]) + int(row["followed_urban"])
    assert [row["agree_tied"] for row in images] == ["1", "0", "0", "0", "0", "0"]
    assert images[0]["followed_urban_right_highway"] == "1" and images[0]["followed_urban_right"] == "2"


def test_models_over_other_experts_share_a_table(results_of):
    results = results_of()
    rows = list(results.rows)
    rows[0] = type(rows[0])("ensemble mean", "ensemble", ("day", "night"))
    other = type(results)(**{**vars(results), "rows": tuple(rows)})
    columns = per_image_columns(other)
    assert len(columns) == len(set(columns)) and {"followed_day", "followed_urban"} <= set(columns)
    assert all(set(row) <= set(columns) for row in per_image_rows(other))


def test_auroc_of_disagreement_is_that_of_the_pixels(results_of):
    found = error_detection(results_of(), "moe", "urban")
    # per frame: agree 2 right of 2 and 1 of 1; differ 1 of 2, 2 of 4, 0 of 1
    wrong = [0, 0, 0] + [0, 1] + [0, 0, 1, 1] + [1]
    differ = [0, 0, 0] + [1] * 7
    assert found["auroc_differ"] == pytest.approx(roc_auc_score(wrong, differ))
    wrong, bins = [0] * 6 + [1] * 4, [0, 0, 0, 1, 1, 2, 1, 2, 3, 3]
    assert found["auroc_jensen_shannon"] == pytest.approx(roc_auc_score(wrong, bins))
    rows = result_rows(results_of(), ["urban"])
    values = {row["model"]: row["value"] for row in rows if row["metric"] == "auroc_jensen_shannon"}
    assert values == {name: pytest.approx(found["auroc_jensen_shannon"]) for name in ("moe", "ensemble mean")}


def test_without_an_error_there_is_no_auroc(results_of):
    results = results_of()
    results.cases["moe"][..., 1] = results.cases["moe"][..., 0]
    assert np.isnan(error_detection(results, "moe", "all")["auroc_differ"])
