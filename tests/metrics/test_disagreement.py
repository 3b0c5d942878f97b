"""Each case of the disagreement map on pixels set by hand."""

import numpy as np

from metrics.disagreement import case_names, disagreement


def test_every_case_of_two_experts():
    labels = np.array([[1, 1, 1, 1, 1, 255]])
    first = np.array([[1, 0, 0, 1, 2, 1]])
    second = np.array([[1, 0, 2, 0, 1, 1]])
    case = disagreement(np.stack([first, second]), labels)
    assert case.dtype == np.uint8 and case.tolist() == [[0, 1, 2, 3, 4, 255]]
    names = case_names(["highway", "urban"])
    assert names[3:] == ["only highway right", "only urban right"]


def test_three_experts_know_several_right_from_all_and_from_one():
    labels = np.array([1, 1, 1, 1])
    predictions = np.array([[1, 1, 0, 2], [1, 0, 0, 2], [1, 1, 1, 0]])
    assert disagreement(predictions, labels).tolist() == [0, 6, 5, 2]
    assert case_names(["a", "b", "c"])[6] == "several right"
