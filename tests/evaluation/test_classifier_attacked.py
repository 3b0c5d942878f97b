"""Tables of attacked classifiers; what they write stands in test_classifier_tables."""

import pytest

from evaluation.classifier_attacked import differences
from evaluation.image_results import load_images
from tests.evaluation import image_ledgers as made
from tests.evaluation.image_ledgers import MOE, PLAIN


def test_differences_are_of_whole_models_and_paired(tmp_path):
    results = load_images(made.suite(tmp_path / "ledger"))
    found = differences(results, 0.01)
    assert list(found) == [(MOE, PLAIN)]
    assert found[MOE, PLAIN].value == pytest.approx((7 - 9) / 12)
    low, high = found[MOE, PLAIN].interval()
    assert low < (7 - 9) / 12 < high
