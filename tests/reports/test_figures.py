"""Pictures show what they are given: colours of classes, of cases, of experts."""

import cv2
import numpy as np
import pytest

from evaluation.evaluate import Sample
from evaluation.results import RowInfo
from reports import charts
from reports.figures import CASE_COLORS, EXPERT_COLORS, lead_mixture, overlay, shown_rows

PALETTE = [(10, 200, 30), (250, 20, 120)]


def picture(png):
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def area(image, color):
    return int((image == np.array(color, np.uint8)).all(axis=2).sum())


def sample(results, label, predictions, image=None, cases=None):
    names = [*results.names("baseline"), *results.names("expert"), *results.names("gate")]
    return Sample(
        "f", "highway", np.full((8, 12, 3), 90, np.uint8) if image is None else image, label,
        {name: predictions.get(name, label) for name in names},
        {gate: weights[0] for gate, weights in results.weights.items()},
        {name: np.zeros_like(label) if cases is None else cases for name in results.cases},
    )  # fmt: skip


def test_classes_have_their_colours_in_truth_and_in_every_answer(results_of):
    label = np.zeros((8, 12), np.uint8)
    label[:, 6:] = 1
    results = results_of()
    both = picture(overlay(sample(results, label, {}), results, PALETTE))
    panel = 400 * 267  # pixels of a panel
    assert area(both, PALETTE[0]) == pytest.approx(4 * panel / 2, rel=0.05)  # truth, gate, two experts
    wrong = {"urban": np.zeros_like(label)}
    one = picture(overlay(sample(results, label, wrong), results, PALETTE))
    assert area(one, PALETTE[0]) == pytest.approx(5 * panel / 2, rel=0.05)


def shown_as(image, color):
    return int((np.abs(image.astype(int) - color).max(axis=2) < 2).sum())


@pytest.mark.parametrize("case", range(5))
def test_the_map_of_cases_is_in_their_colours_full_where_the_mixture_is_wrong(results_of, case):
    """Contradicted, own answer, and the colour of the expert that is followed; pale where it is right."""
    label, results = np.zeros((8, 12), np.uint8), results_of()
    color = (*CASE_COLORS, *EXPERT_COLORS)[case]
    full = 0.9 * np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) + 0.1 * 90
    base = 0.35 * 90 + 0.65 * 255
    pale = np.full(3, base) if case == 0 else 0.55 * base + 0.45 * (full - 9) / 0.9
    cases = np.full_like(label, case)
    panel = 0.95 * 400 * 267
    right = picture(overlay(sample(results, label, {}, cases=cases), results, PALETTE))
    assert shown_as(right, pale) > panel > 10_000 > shown_as(right, full)
    wrong = {results.chosen: label + 1}
    shown = picture(overlay(sample(results, label, wrong, cases=cases), results, PALETTE))
    assert shown_as(shown, full) > panel > 10_000 > shown_as(shown, pale)


def test_the_map_is_of_the_chosen_gate_else_of_the_first_gate_else_of_an_ensemble():
    rows = [
        RowInfo("a", "expert"), RowInfo("alone", "ensemble", ("a",)), RowInfo("mean", "ensemble", ("a", "b")),
        RowInfo("first", "gate", ("a", "b")), RowInfo("b", "baseline"), RowInfo("c", "control", ("a", "b")),
    ]  # fmt: skip
    assert lead_mixture(rows, "second") == "second"
    assert lead_mixture(rows, "") == "first"
    assert lead_mixture(rows[:3], "") == "mean"
    assert lead_mixture(rows[:2], "") == ""
    assert shown_rows(rows, "second") == {"second", "a", "b"}


def test_ignored_pixels_and_large_frames_and_any_rows(results_of):
    label = np.full((1208, 1920), 255, np.uint8)
    image = np.full((480, 640, 3), 90, np.uint8)
    for options in (
        {"experts": ("highway", "urban", "fog")},
        {"gates": ("simple",)},
        {"gates": ()},
        {"experts": (), "gates": ()},
    ):
        results = results_of(**options)
        frame = sample(results, label, dict.fromkeys(results.by_name, np.zeros_like(label)), image)
        png = overlay(frame, results, PALETTE)
        shown = picture(png)
        assert area(shown, PALETTE[0]) > 200_000 or not options.get("experts", True)
        assert area(shown, (225, 225, 225)) > 90_000  # no label
        assert png == overlay(frame, results, PALETTE)  # the same picture, byte for byte


def test_charts_of_all_sizes(results_of):
    validated = {"epoch": "2", "step": "20", "loss": "1", "lr": "0.1", "miou": "0.5"}
    rows = ({"epoch": "1", "step": "10", "loss": "2", "lr": "0.1", "miou": ""}, validated)
    runs = [charts.Run("highway", "networks", rows), charts.Run("moe", "gates", rows[:1])]
    for results in (results_of(), results_of(experts=("highway", "urban", "fog"))):
        subsets = ["highway", "urban", "fog"]
        for png in (
            charts.progress(runs, results.names("expert")),
            charts.progress(runs[:1], []),
            charts.gate_histograms(results, subsets),
            charts.gate_by_class(results, "moe_classwise", subsets),
            charts.matrix_heatmap(results, [*subsets, "all"]),
        ):
            assert picture(png).std() > 5
