"""Gate statistics on weights whose figures are known."""

import math

import numpy as np
import pandas
import pytest

from metrics.gate import (
    COLLAPSE,
    effective_experts,
    gate_statistics,
    is_collapsed,
    mean_effective_experts,
    pearson,
    spearman,
)


def test_a_gate_that_decides_by_image_one_that_never_decides_and_one_that_collapsed():
    decides = np.array([[1, 0], [0, 1]] * 5, dtype=float)
    idle = np.full((10, 2), 0.5)
    collapsed = np.tile([0.98, 0.02], (10, 1))
    statistics = gate_statistics(np.stack([decides, idle, collapsed], axis=-1))  # one class each
    assert statistics.images == 10
    assert statistics.mean == pytest.approx(np.array([[0.5, 0.5, 0.98], [0.5, 0.5, 0.02]]))
    assert statistics.std == pytest.approx(np.array([[0.5, 0, 0], [0.5, 0, 0]]))
    low = -(0.98 * np.log(0.98) + 0.02 * np.log(0.02))
    assert statistics.entropy_of_mean == pytest.approx(np.array([np.log(2), np.log(2), low]))
    assert statistics.mean_entropy == pytest.approx(np.array([0, np.log(2), low]))
    assert statistics.entropy_max == pytest.approx(np.log(2))
    assert statistics.collapsed.tolist() == [False, False, True]


def test_entropy_of_the_mean_is_never_below_the_mean_of_entropies_nor_above_log_of_experts():
    weights = np.random.default_rng(0).dirichlet(np.full(4, 0.3), size=(7, 5)).swapaxes(1, 2)  # [N, E, K]
    statistics = gate_statistics(weights)
    assert (statistics.entropy_of_mean >= statistics.mean_entropy).all()  # Jensen
    assert (statistics.entropy_of_mean <= np.log(4)).all() and (statistics.mean_entropy > 0).all()
    assert statistics.mean.sum(axis=0) == pytest.approx(np.ones(5))


@pytest.mark.parametrize(("weight", "alarm"), [(COLLAPSE, False), (COLLAPSE + 0.001, True)])
def test_the_alarm_rings_above_its_limit_whichever_expert_it_is(weight, alarm):
    weights = np.tile([[1 - weight], [weight]], (4, 1, 1))
    assert gate_statistics(weights).collapsed.tolist() == [alarm]


def test_a_gate_decides_at_each_place_or_not_at_all():
    fixed, routed = np.array([[1.0, 0.0], [0.04, 0.96]]), np.array([[1.0, 0.0], [0.5, 0.5]])
    low = math.exp(-0.04 * math.log(0.04) - 0.96 * math.log(0.96))
    assert mean_effective_experts(fixed) == pytest.approx((1 + low) / 2)
    assert mean_effective_experts(routed) == pytest.approx(1.5)
    assert (
        is_collapsed(fixed)
        and not is_collapsed(routed)
        and not is_collapsed(np.array([[COLLAPSE, 1 - COLLAPSE]]))
    )


def test_correlations_are_those_of_pandas_with_ties_and_all():
    random = np.random.default_rng(0)
    luma = random.random(40).round(1)  # many equal values
    weights = (0.7 * luma + 0.2 * random.random(40)).astype(np.float32)
    table = pandas.DataFrame({"luma": luma, "weight": weights.astype(float)})
    assert pearson(weights, luma) == pytest.approx(table.corr()["luma"]["weight"])
    assert spearman(weights, luma) == pytest.approx(table.corr(method="spearman")["luma"]["weight"])
    steep = np.exp(9 * luma)
    assert spearman(steep, luma) == pytest.approx(1) and pearson(steep, luma) < 0.9
    assert pearson(1 - weights, luma) == pytest.approx(-pearson(weights, luma), abs=1e-6)


def test_a_gate_that_is_constant_but_for_rounding_has_no_correlation():
    luma = np.linspace(0, 1, 10)
    saturated = np.float32(1) - np.linspace(0, 2e-7, 10).astype(np.float32)
    for correlation in (pearson, spearman):
        assert math.isnan(correlation(saturated, luma))
        assert math.isnan(correlation(luma[:2], luma[:2]))  # two images always lie on a line
        assert correlation(luma[:3], luma[:3]) == pytest.approx(1)


def test_effective_experts_are_one_where_one_has_all_and_all_where_all_have_alike():
    load = np.array([[1.0, 0.25, 0.5], [0.0, 0.25, 0.5], [0.0, 0.25, 0.0], [0.0, 0.25, 0.0]])  # [E, K]
    assert effective_experts(load) == pytest.approx([1, 4, 2])
