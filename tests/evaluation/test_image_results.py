"""Robust figures of classifiers from ledgers made by hand: every set of images that is right is known."""

import numpy as np
import pytest

from evaluation.image_results import ImageResults, load_images
from evaluation.ledger import read_manifest, read_units
from evaluation.statistics import Resamples, clopper_pearson, estimate_image_mean
from tests.evaluation import image_ledgers as made
from tests.evaluation.image_ledgers import MOE, PATHS, PLAIN


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return load_images(made.suite(tmp_path_factory.mktemp("suite")))


@pytest.fixture(scope="module")
def auto(tmp_path_factory):
    return load_images(made.auto(tmp_path_factory.mktemp("auto")))


def lost(right):
    return set(np.flatnonzero(~right).tolist())


def test_worst_cases_are_over_attacks_and_all_smaller_eps_and_the_clean_image(results):
    assert lost(results.clean(MOE)) == {11}
    assert lost(results.under(MOE, 0.01, ["pgd"])) == {0, 11}
    assert lost(results.under(MOE, 0.02, ["pgd"])) == {0, 4, 11}
    assert lost(results.worst(MOE, 0.01, "common")) == {0, 11}
    assert lost(results.worst(MOE, 0.01, "adaptive")) == {0, 1, 2, 3, 11}
    assert lost(results.worst(MOE, 0.02, "adaptive")) == {0, 1, 2, 3, 4, 5, 6, 7, 11}
    assert lost(results.worst(PLAIN, 0.01, "common")) == {0, 1, 2}
    assert lost(results.under(PATHS[0], 0.01, ["apgd"])) == {10}  # wrong from the start
    for target in results.targets:
        for column in ("common", "adaptive"):
            before = lost(results.clean(target))
            for eps in made.EPS:
                now = lost(results.worst(target, eps, column))
                assert before <= now and lost(results.worst(target, eps, "common")) <= now
                before = now


def test_columns_and_kinds(results):
    assert results.members(MOE, "common") == ["pgd"]
    assert results.members(MOE) == ["pgd", "joint", "gate_only", "change_route", "experts_only"]
    assert results.of(MOE, ("change_route", "gate_only")) == ["gate_only", "change_route"]
    assert results.mixtures == [MOE] and results.whole == [MOE, PLAIN]
    assert results.pathways(MOE) == list(PATHS) and results.pathways(PLAIN) == []
    assert results.attack(MOE, "pgd") == {"name": "pgd"}


def test_all_paths_are_images_that_every_pathway_withstands(results):
    """And what breaks the mixture breaks the pathway that it led to."""
    assert lost(results.all_paths(MOE, 0.01)) == {0, 10, 2} | {1, 3, 11}
    assert lost(results.all_paths(MOE, 0.02)) == {0, 1, 10, 2, 3, 4} | {5, 6, 7, 11}
    for eps in made.EPS:
        assert lost(results.worst(MOE, eps, "adaptive")) <= lost(results.all_paths(MOE, eps))
    assert results.all_paths(PLAIN, 0.02) is None


def test_stable_are_images_whose_route_no_attack_changed(results):
    assert lost(results.stable(MOE, 0.01)) == {1, 2, 3}
    assert lost(results.stable(MOE, 0.02)) == {1, 2, 3, 7}


def test_either_incumbent_counts(tmp_path):
    """An image of which one of the two is wrong is lost."""
    folder = made.suite(tmp_path)
    units = read_units(folder)
    for records in units.values():
        for one in records:
            if (one["target"], one["eps"], one["attack"]) == (PLAIN, 0.01, "pgd") and one[
                "image"
            ] == "image_9":
                one["cells"] = [[0, 0 if one["incumbent"] == "balanced" else 1, 1]]
    found = ImageResults(read_manifest(folder), units)
    assert lost(found.under(PLAIN, 0.01, ["pgd"])) == {0, 1, 2, 9}


def test_an_attack_on_a_pathway_claims_what_the_pathway_has_right(auto):
    assert lost(auto.claimed(MOE, 0.02, "autoattack path 0")) == set(range(8))
    assert lost(auto.under(MOE, 0.02, ["autoattack path 0"])) == {1, 2}
    assert lost(auto.worst(MOE, 0.02, "adaptive")) == {0, 1, 2}
    assert lost(auto.worst(MOE, 0.02, "common")) == {0}


def test_floor_passes_and_the_same_images_of_another_ledger(results, auto):
    assert results.floor() == pytest.approx(4 / 12)
    assert auto.floor() == pytest.approx(4 / 10)
    assert results.passes(MOE, 0.01, ["pgd", "joint"]) == 4 + 7
    assert results.passes(MOE, 0.01, results.members(MOE)) == 4 + 7 + 5 + 6 + 8
    whole = results.worst(MOE, 0.02, "adaptive")
    assert results.only(auto.images, whole).tolist() == whole[:10].tolist()
    assert results.only(["image_11", "image_8"], whole).tolist() == [False, True]
    with pytest.raises(KeyError):
        results.only(["image_99"], whole)


def test_differences_are_paired(results):
    moe, plain = (results.worst(name, 0.01, "adaptive") for name in (MOE, PLAIN))
    difference = results.estimate(moe) - results.estimate(plain)
    assert difference.value == pytest.approx(moe.mean() - plain.mean())
    same = Resamples([str(place) for place in range(12)])
    expected = estimate_image_mean(same, moe.astype(float) - plain.astype(float))
    assert difference.interval() == pytest.approx(expected.interval())
    nothing = results.estimate(moe) - results.estimate(moe)
    unseen = clopper_pearson(0, 12)[1]  # no image of 12 differs: others may
    assert nothing.value == 0 and nothing.interval() == pytest.approx((-unseen, unseen))
