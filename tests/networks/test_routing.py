"""Routing by its laws: convexity, limits of the temperature, straight-through gradient, penalties by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from networks.routing import routing_penalty, soft, spread, top1

SHAPE = (2, 3, 5, 4, 6)  # B, E, K, h, w


def test_soft_weights_are_a_softmax_over_experts_and_temperature_divides_gate_logits():
    gate_logits = torch.randn(SHAPE)
    assert torch.equal(soft(gate_logits), gate_logits.softmax(dim=1))
    assert torch.equal(soft(gate_logits, 0.5), soft(2 * gate_logits))
    assert torch.equal(soft(gate_logits[None], 0.5)[0], soft(gate_logits, 0.5))
    flat = soft(gate_logits, 1e6)
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / 3), rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 2))
def test_a_falling_temperature_tends_to_top1_as_fast_as_the_gap_says(seed, temperature):
    torch.manual_seed(seed)
    gate_logits = torch.randn(SHAPE, dtype=torch.float64)
    first, second = gate_logits.topk(2, dim=1).values.unbind(1)
    bound = 2 * torch.exp(-(first - second) / temperature)  # E - 1 others, each at most so much of the best
    distance = (soft(gate_logits, temperature) - top1(gate_logits)).abs().amax(dim=1)
    assert (distance <= bound + 1e-12).all()


def test_top1_is_exactly_one_hot_at_the_largest_gate_logit_and_the_first_of_equals():
    gate_logits = torch.randn(SHAPE)
    for straight_through in (False, True):
        weights = top1(gate_logits, straight_through=straight_through)
        assert torch.equal(weights, F.one_hot(gate_logits.argmax(1), 3).movedim(-1, 1).float())
    assert top1(torch.zeros(1, 3, 1, 1, 1)).flatten().tolist() == [1, 0, 0]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_straight_through_gradient_is_that_of_soft_weights(temperature):
    gate_logits, towards = torch.randn(SHAPE).requires_grad_(), torch.randn(SHAPE)
    gradients = [
        torch.autograd.grad((towards * weights).sum(), gate_logits)[0]
        for weights in (
            soft(gate_logits, temperature),
            top1(gate_logits, temperature, straight_through=True),
        )
    ]
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0
    assert not top1(gate_logits, temperature).requires_grad


@pytest.mark.parametrize("size", [(4, 6), (8, 12), (48, 96), (13, 7), (2, 2)])
def test_spread_weights_stay_convex_and_hard_ones_hard(size):
    weights = soft(3 * torch.randn(SHAPE))
    wide = spread(weights, size)
    assert wide.shape == (2, 3, 5, *size) and (wide >= 0).all()
    torch.testing.assert_close(wide.sum(1), torch.ones(2, 5, *size))
    hard = spread(top1(weights), size, hard=True)
    assert ((hard == 0) | (hard == 1)).all() and (hard.sum(1) == 1).all()


def test_spread_weights_lie_where_the_logits_of_the_same_area_lie():
    weights = soft(torch.randn(SHAPE))
    expected = F.interpolate(weights.flatten(1, 2), size=(16, 24), mode="bilinear", align_corners=False)
    assert torch.equal(spread(weights, (16, 24)), expected.view(2, 3, 5, 16, 24))
    blocks = weights.repeat_interleave(4, 3).repeat_interleave(4, 4)
    assert torch.equal(spread(weights, (16, 24), hard=True), blocks)
    assert spread(weights[..., :1, :1], (16, 24)).shape == (2, 3, 5, 1, 1)  # for all places, as it is


def weights_of(*rows):
    """One image a row, [B, E, 1, 1, 1]."""
    return torch.tensor(rows)[:, :, None, None, None]


@pytest.mark.parametrize(
    ("weights", "variation", "entropy"),
    [
        (weights_of([1.0, 0.0], [0.0, 1.0]), 0, 0),  # decided, both experts used
        (weights_of([1.0, 0.0], [1.0, 0.0]), 1, 0),  # collapsed: E - 1
        (weights_of([0.0, 0.0, 1.0], [0.0, 0.0, 1.0]), 2, 0),
        (weights_of([0.5, 0.5], [0.5, 0.5]), 0, math.log(2)),  # undecided
        # importance (0.8, 0.2): variance 0.09, mean 0.5
        (weights_of([0.8, 0.2]), 0.36, -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))),
    ],
)
def test_penalties_by_hand(weights, variation, entropy):
    assert routing_penalty(weights) == 0
    assert routing_penalty(weights, balance=2.0).item() == pytest.approx(2 * variation, abs=1e-6)
    assert routing_penalty(weights, entropy=3.0).item() == pytest.approx(3 * entropy, abs=1e-6)
    assert routing_penalty(weights, 2.0, -1.0).item() == pytest.approx(2 * variation - entropy, abs=1e-6)


def test_penalties_are_means_over_classes_and_places():
    weights = soft(torch.randn(2, 3, 4, 6, 5, dtype=torch.float64))
    balance, entropy = [], []
    for k in range(4):
        importance = weights[:, :, k].mean((0, 2, 3)).numpy()
        balance.append(importance.var() / importance.mean() ** 2)
        entropy += (-(weights[:, :, k] * weights[:, :, k].log()).sum(1)).flatten().tolist()
    assert routing_penalty(weights, 1.0).item() == pytest.approx(sum(balance) / 4)
    assert routing_penalty(weights, 0.0, 1.0).item() == pytest.approx(sum(entropy) / len(entropy))


def test_a_step_against_each_penalty_does_what_it_is_for():
    start = torch.tensor([[2.0, 1.0], [1.0, 0.5]])
    shares, entropies = {}, {}
    for name, keys in {"balance": (1.0, 0.0), "decide": (0.0, 1.0), "even": (0.0, -1.0)}.items():
        gate_logits = start.clone().requires_grad_()
        routing_penalty(soft(gate_logits[:, :, None, None, None]), *keys).backward()
        after = (start - gate_logits.grad).softmax(1)
        shares[name] = after[:, 0].mean().item()
        entropies[name] = routing_penalty(after[:, :, None, None, None], 0.0, 1.0).item()
    before = start.softmax(1)
    undecided = routing_penalty(before[:, :, None, None, None], 0.0, 1.0).item()
    assert 0.5 < shares["balance"] < before[:, 0].mean()
    assert entropies["decide"] < undecided < entropies["even"]


def test_penalties_of_saturated_weights_have_finite_gradients():
    gate_logits = torch.tensor([[300.0, -300.0]]).requires_grad_()
    penalty = routing_penalty(soft(gate_logits[:, :, None, None, None]), 1.0, 1.0)
    penalty.backward()
    assert penalty.item() == pytest.approx(1) and gate_logits.grad.isfinite().all()
