"""The sentence of the alarm, on weights whose collapse is known."""

import numpy as np

from metrics.gate import gate_statistics
from metrics.gate_alarm import collapse_warning


def test_the_warning_names_expert_and_classes_of_a_collapse_and_nothing_else():
    fine = gate_statistics(np.array([[[0.97], [0.03]], [[0.9], [0.1]]]))
    assert collapse_warning("moe", fine, ["highway", "urban"], ["road", "sky"]) == ""
    simple = gate_statistics(np.array([[[0.03], [0.97]], [[0.01], [0.99]]]))
    assert collapse_warning("moe", simple, ["highway", "urban"], ["road", "sky"]) == (
        "gate moe has collapsed: more than 95 % of the weight over 2 images goes to expert urban"
    )
    first = np.array([[0.99, 0.5, 0.02, 0.96], [0.97, 0.6, 0.03, 0.98]])  # of two images, by class
    classwise = gate_statistics(np.stack([first, 1 - first], axis=1))
    assert collapse_warning("moe", classwise, ["highway", "urban"], ["road", "sky", "car", "sign"]) == (
        "gate moe has collapsed in 3 of 4 classes: more than 95 % of the weight over 2 images goes "
        "to expert highway for road, sign; to expert urban for car"
    )
