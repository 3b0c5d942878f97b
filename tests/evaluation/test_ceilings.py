"""Ceilings against brute force over weights, and the order that they must keep."""

from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.ceilings import (
    ExpertPixels,
    best_gate_classwise,
    best_gate_simple,
    ceilings_for,
    oracle_expert_image,
    oracle_expert_pixel,
)

CLASSES = 4


@st.composite
def pixels(draw, num_experts=2):
    """expert_logits [1, E, C, 1, n] of small whole numbers, so that ties are common, and labels [1, 1, n]."""
    count = draw(st.integers(1, 6))
    size = num_experts * CLASSES * count
    values = draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size))
    labels = draw(st.lists(st.sampled_from([*range(CLASSES), 255]), min_size=count, max_size=count))
    logits = torch.tensor(values, dtype=torch.float32).reshape(1, num_experts, CLASSES, 1, count)
    return logits, torch.tensor(labels, dtype=torch.uint8).reshape(1, 1, count)


def pixels_of(logits):
    return ExpertPixels(logits, logits.argmax(dim=2))


def first_largest(values):
    return values.index(max(values))


def can_win_simple(first, second, label):
    """Exact: the winner is constant between neighbouring breakpoints, where two classes tie."""
    breakpoints = {Fraction(0), Fraction(1)}
    for a, b in product(range(CLASSES), repeat=2):
        slope = (first[a] - first[b]) - (second[a] - second[b])
        if slope and 0 <= (w := Fraction(second[b] - second[a], slope)) <= 1:
            breakpoints.add(w)
    ordered = sorted(breakpoints)
    inside = [(low + high) / 2 for low, high in zip(ordered, ordered[1:], strict=False)]

    def mixed(w):
        return [w * a + (1 - w) * b for a, b in zip(first, second, strict=True)]

    strictly = any(sum(x >= mixed(w)[label] for x in mixed(w)) == 1 for w in [*ordered, *inside])
    return strictly or any(first_largest(mixed(w)) == label for w in (0, 1, Fraction(1, 2)))


@settings(max_examples=150, deadline=None)
@given(pixels())
def test_best_simple_gate_equals_a_search_over_all_breakpoints(case):
    logits, labels = case
    answer = best_gate_simple(pixels_of(logits), labels)
    for pixel in range(labels.shape[-1]):
        label = labels[0, 0, pixel].item()
        if label == 255:
            continue
        first, second = logits[0, :, :, 0, pixel].int().tolist()
        mean = first_largest([a + b for a, b in zip(first, second, strict=True)])
        assert answer[0, 0, pixel] == (label if can_win_simple(first, second, label) else mean)


@settings(max_examples=60, deadline=None)
@given(pixels(num_experts=3))
def test_best_classwise_gate_equals_a_search_over_the_vertices(case):
    """Every class's weights are one-hot at the best: linear in each class's own weights."""
    logits, labels = case
    answer = best_gate_classwise(pixels_of(logits), labels)
    for pixel in range(labels.shape[-1]):
        label = labels[0, 0, pixel].item()
        if label == 255:
            continue
        experts = logits[0, :, :, 0, pixel].int().tolist()
        strictly = any(
            all(experts[vertex[label]][label] > experts[vertex[k]][k] for k in range(CLASSES) if k != label)
            for vertex in product(range(3), repeat=CLASSES)
        )
        alone = any(first_largest(expert) == label for expert in experts)
        mean = first_largest([sum(values) for values in zip(*experts, strict=True)])
        assert answer[0, 0, pixel] == (label if strictly or alone else mean)


@settings(max_examples=60, deadline=None)
@given(pixels())
def test_each_ceiling_is_at_least_as_right_as_the_one_below(case):
    logits, labels = case
    answers = [*logits.argmax(dim=2).unbind(dim=1)]
    ceilings, said = ceilings_for(["a", "b"]), pixels_of(logits)
    bounds = [decide(said.answers, labels) for decide in ceilings.oracles.values()]
    bounds += [decide(said, labels) for decide in ceilings.best_gates.values()]
    image, pixel, simple, classwise = (((bound == labels) & (labels != 255)).sum() for bound in bounds)
    assert image >= max((answer == labels).sum() for answer in answers)
    assert (logits.mean(dim=1).argmax(dim=1) == labels).sum() <= simple
    assert image <= pixel <= simple <= classwise


def test_random_gates_never_beat_the_best_gate_of_their_kind():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, 5, 20, 20, generator=generator)
    labels = torch.randint(0, 5, (1, 20, 20), generator=generator)
    said = pixels_of(logits)
    simple = best_gate_simple(said, labels) == labels
    classwise = best_gate_classwise(said, labels) == labels
    reached = torch.zeros_like(simple)
    for w in torch.linspace(0, 1, 2001):
        reached |= (w * logits[:, 0] + (1 - w) * logits[:, 1]).argmax(1) == labels
    assert (simple >= reached).all() and (simple & ~reached).sum() <= 1  # the grid misses next to nothing
    for _ in range(50):
        w = torch.rand(5, 1, 1, generator=generator)
        assert (classwise >= ((w * logits[:, 0] + (1 - w) * logits[:, 1]).argmax(1) == labels)).all()
    assert classwise.sum() > simple.sum() > oracle_expert_pixel(said.answers, labels).eq(labels).sum()


def test_oracles_on_four_pixels():
    first = torch.tensor([[3.0, 0], [3, 0], [3, 0], [0, 3]])  # says 0 0 0 1
    second = torch.tensor([[0.0, 3], [0, 3], [0, 3], [0, 3]])  # says 1 1 1 1
    logits = torch.stack([first, second]).permute(0, 2, 1)[None, :, :, None]  # [1, 2, 2, 1, 4]
    labels = torch.tensor([[[0, 0, 1, 0]]])
    answers = logits.argmax(dim=2)
    assert oracle_expert_image(answers, labels).tolist() == [[[0, 0, 0, 1]]]  # first: 2 right, second: 1
    assert oracle_expert_pixel(answers, labels).tolist() == [[[0, 0, 1, 1]]]  # the last one nobody knows
    assert oracle_expert_image(answers.flip(1), labels).tolist() == [[[0, 0, 0, 1]]]


def test_a_class_that_the_experts_agree_on_wins_where_they_differ_on_the_others():
    """2 0 1 and 0 2 1: the third class is no expert's nor the mean's, but wins against the smaller logits."""
    logits = torch.tensor([[2.0, 0, 1], [0, 2, 1]])[None, :, :, None, None]
    labels = torch.tensor([[[2]]])
    assert best_gate_classwise(pixels_of(logits), labels).item() == 2
    assert best_gate_simple(pixels_of(logits), labels).item() == 0  # equal weights give a tie at best


@pytest.mark.parametrize("num_experts", [2, 3])
def test_the_simple_gate_is_left_out_with_three_experts(num_experts):
    ceilings = ceilings_for(["a", "b", "c"][:num_experts])
    assert ("best gate, simple" in ceilings.best_gates) == (num_experts == 2)
    assert [info.experts for info in ceilings.infos] == [ceilings.experts] * (num_experts == 2 and 4 or 3)
