"""Tables of clean classifiers, every figure known."""

import math
from dataclasses import replace

import numpy as np
import pytest

from evaluation.classifier_clean import share, told
from evaluation.classifier_tables import write_classifier_tables
from evaluation.classifiers import Answers
from tests.evaluation.classifier_folder import ABOUTS, clean, exact_interval, rows_of
from tests.evaluation.image_ledgers import MOE


@pytest.mark.parametrize(("hits", "images"), [(0, 12), (1, 12), (7, 12), (12, 12), (41, 60)])
def test_shares_have_their_exact_interval(hits, images):
    counted = np.array([True] * images + [False] * 3)
    right = np.array([place < hits for place in range(images)] + [True] * 3)
    found = share(counted, right)
    assert found[0] == hits / images and found[3] == images
    assert found[1:3] == pytest.approx(exact_interval(hits, images), abs=1e-9)
    low, high = exact_interval(hits, images)
    assert told(counted, right) == f"{100 * hits / images:.2f} [{100 * low:.1f}, {100 * high:.1f}]"
    assert math.isnan(share(~counted, np.zeros_like(right))[0]) == (images == 0)
    assert told(np.zeros_like(counted), right) == "-"


def test_a_mixture_of_several_experts_at_once_has_loads_and_no_routes(tmp_path):
    both = clean()
    weights = np.tile(np.float32([0.25, 0.75]), (12, 1, 1))
    both.answers[MOE] = Answers(both.answers[MOE].ranked, weights=weights)
    write_classifier_tables(tmp_path, both, ABOUTS, "toy", {})
    figures = {
        row["metric"]: row["value"] for row in rows_of(tmp_path / "results.csv") if row["model"] == MOE
    }
    assert set(figures) == {"top1", "rise", "load_0", "load_1", "effective_experts"}
    assert float(figures["rise"]) == 0.004
    assert (float(figures["load_0"]), float(figures["load_1"])) == (0.25, 0.75)
    text = (tmp_path / "classifiers.md").read_text()
    assert f"| {MOE} | 1.75 | 25.00 | - | - | 75.00 | - | - | - | - | 91.67 | - |" in text
    assert "takes none of these routes; load is the share of the weight there" in text
    assert "images of each label" not in text and rows_of(tmp_path / "routes.csv") == []


@pytest.mark.parametrize("sites", [1, 2])
def test_a_mixture_that_sends_all_images_one_way_is_marked_without_attacks_too(sites, tmp_path):
    """Of two sites each has an expert of its own: loads alike, and a plain network all the same."""
    both, text = clean(), "moe: gate collapse: one expert has over 95 % of the 12 clean images at every site"
    own = both.answers[MOE]
    for name, route in (("routed", own.routes[:, 0]), ("collapsed", np.zeros(12, int))):
        both.answers[MOE] = replace(own, routes=np.stack([route, 1 - route][:sites], axis=1))
        told = write_classifier_tables(tmp_path / name, both, ABOUTS, "toy", {})
        lines = (tmp_path / name / "classifiers.md").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith((f"| {MOE} | 1.", f"| {MOE} ! | 1."))]
        found = [
            line.startswith(f"| {MOE} ! | 1.00 |"),
            f"!1 {text}" in told,
            any("91.67 !1" in one for one in told),
        ]
        assert found == [name == "collapsed"] * 3
        assert (tmp_path / name / "checks.csv").exists() == (name == "collapsed")
        assert any("!: at every site one expert has over 95 % of them" in line for line in lines)


def test_where_routes_have_several_sites_the_tables_say_what_an_image_counts_for(tmp_path):
    one, several = clean(), clean()
    own = one.answers[MOE]
    several.answers[MOE] = replace(own, routes=np.repeat(own.routes, 4, axis=1))
    texts = []
    for place, both in enumerate((one, several)):
        write_classifier_tables(tmp_path / str(place), both, ABOUTS, "toy", {})
        texts.append((tmp_path / str(place) / "classifiers.md").read_text())
    assert (
        f"## {MOE}: images of each label that take each expert\n" in texts[0]
        and "most of its sites" not in texts[0]
    )
    assert f"## {MOE}: images of each label that take each expert at most sites\n" in texts[1]
    assert "is that of the one which most of its sites take" in texts[1]
