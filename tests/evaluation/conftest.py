"""An evaluation of two experts and a gate set by hand: every count is known."""

import numpy as np
import pytest

from evaluation.results import FLOOR, Protocol, Results, RowInfo

CLASSES = ("road", "sky", "rail")
SUBSETS = ("highway", "highway", "highway", "urban", "urban", "urban")
LUMA = np.array([0.6, 0.7, 0.8, 0.2, 0.3, 0.4])


def make_results(weights=None, gate_right=6, ceiling_right=8) -> Results:
    """Six frames of 10 pixels, five of road and five of sky. The ensemble is right on five pixels of a frame, the
    gate on `gate_right`, the best gates on `ceiling_right`; `weights` of the gate, [6, 2, K]."""

    def matrices(right):
        """`right` pixels right, of road as far as there are some; wrong ones are told for the other class."""
        road, sky = min(right, 5), max(right - 5, 0)
        one = np.array([[road, 5 - road, 0], [5 - sky, sky, 0], [0, 0, 0]], np.int32)
        return np.tile(one, (6, 1, 1))

    if weights is None:
        first = np.array([0.9, 0.8, 0.7, 0.2, 0.3, 0.4])
        weights = np.stack([first, 1 - first], axis=1)[:, :, None]
    experts = ("highway", "urban")
    # pixels, right ones of the combination, of highway, of urban
    cases = np.zeros((6, 3, 7, 4), np.int32)
    cases[:, 0, 0] = [2, 2, 2, 2]  # agree, followed
    cases[:, 0, 1] = [1, 1, 0, 0]  # agree, contradicted
    cases[:, 0, 2] = cases[:, 0, 5] = [2, 1, 1, 0]  # differ, highway followed
    cases[:, 1, 2] = cases[:, 1, 6] = [4, 2, 1, 2]  # differ, urban followed
    cases[:, 1, 3] = [1, 0, 0, 1]  # differ, own answer
    cases[0, 0, 4] = [1, 1, 1, 1]  # one of the followed by a tie
    scores = np.zeros((6, 2, 4), np.int32)
    scores[:, 0], scores[:, 1] = [3, 2, 1, 0], [0, 1, 1, 2]
    rows = (
        RowInfo("ensemble mean", "ensemble", experts),
        RowInfo("moe", "gate", experts),
        RowInfo("best gate, simple", "ceiling", experts),
        RowInfo("best gate, class-wise", "ceiling", experts),
        RowInfo(FLOOR, "floor"),
    )
    return Results(
        protocol=Protocol("toy", "test", CLASSES, experts, (2, 5)),
        rows=rows,
        images=tuple("abcdef"),
        subsets=SUBSETS,
        blocks=SUBSETS,
        matrices=np.stack(
            [matrices(5), matrices(gate_right), matrices(ceiling_right), matrices(ceiling_right)]
        ),
        truth=np.tile([5, 5, 0], (6, 1)),
        luma=LUMA,
        weights={"moe": np.asarray(weights, np.float32)},
        cases={"ensemble mean": cases, "moe": cases},
        scores={"ensemble mean": scores, "moe": scores},
    )


@pytest.fixture
def results_of():
    return make_results
