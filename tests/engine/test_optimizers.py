"""Learning rates step by step against their closed forms, and what the builders pass on or refuse."""

import math

import pytest
import torch

from engine.config import UserError, component
from engine.optimizers import adamw, cosine, poly, sgd, step

LR = 0.2


def rates(schedule, steps, **arguments) -> list[float]:
    """The rate that each optimiser step runs at."""
    optimizer = sgd([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = schedule(optimizer, steps, **arguments)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("power", [0.9, 2.0])
@pytest.mark.parametrize("minimum", [0.0, 0.25])
def test_poly_law(power, minimum):
    law = [LR * (minimum + (1 - minimum) * (1 - index / 10) ** power) for index in range(11)]
    assert rates(poly, 11, power=power, min_factor=minimum) == pytest.approx(law)


def test_poly_has_power_09_by_default():
    assert rates(poly, 11)[5] == pytest.approx(LR * (0.01 + 0.99 * 0.5**0.9))


@pytest.mark.parametrize("minimum", [0.0, 0.25])
def test_cosine_law(minimum):
    law = [LR * (minimum + (1 - minimum) * (1 + math.cos(math.pi * index / 10)) / 2) for index in range(11)]
    assert rates(cosine, 11, min_factor=minimum) == pytest.approx(law)


def test_step_law():
    assert rates(step, 8, milestones=(0.5, 0.75), gamma=0.1) == pytest.approx(
        [LR] * 4 + [LR * 0.1] * 2 + [LR * 0.01] * 2
    )


@pytest.mark.parametrize("schedule", [poly, cosine, step])
@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("steps", [5, 12])
def test_warmup_is_linear_then_starts_as_configured_and_ends_at_the_minimum(schedule, warmup, steps):
    seen = rates(schedule, steps, warmup_steps=warmup)
    assert seen[:warmup] == pytest.approx([LR * (index + 1) / (warmup + 1) for index in range(warmup)])
    assert seen[warmup] == pytest.approx(LR)
    if steps - warmup > 1:
        assert seen[-1] == pytest.approx(LR * 0.01)
        assert sorted(seen[warmup:], reverse=True) == seen[warmup:]


@pytest.mark.parametrize("schedule", [poly, cosine, step])
def test_every_group_keeps_its_own_rate(schedule):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 1.0)]
    optimizer = sgd(groups, lr=LR)
    scheduler = schedule(optimizer, 9)
    for _ in range(9):
        low, high = (group["lr"] for group in optimizer.param_groups)
        assert high == pytest.approx(10 * low)
        optimizer.step()
        scheduler.step()


def test_a_warmup_as_long_as_the_training_is_refused():
    with pytest.raises(UserError, match="warmup_steps: 10 is wrong; expected fewer than the 10 steps"):
        rates(poly, 10, warmup_steps=10)


def test_sgd_follows_its_law():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = sgd([weight], lr=0.1, momentum=0.5, weight_decay=0.01)
    velocity, expected = 0.0, 2.0
    for _ in range(3):
        optimizer.zero_grad()
        (3 * weight).sum().backward()
        optimizer.step()
        velocity = 0.5 * velocity + 3 + 0.01 * expected
        expected -= 0.1 * velocity
        assert weight.item() == pytest.approx(expected)


def test_adamw_follows_its_law():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = adamw([weight], lr=0.1, betas=(0.8, 0.9), weight_decay=0.02)
    mean = square = 0.0
    expected = 2.0
    for count in range(1, 4):
        optimizer.zero_grad()
        (count * weight).sum().backward()
        optimizer.step()
        mean, square = 0.8 * mean + 0.2 * count, 0.9 * square + 0.1 * count**2
        expected *= 1 - 0.1 * 0.02
        expected -= 0.1 * mean / (1 - 0.8**count) / (math.sqrt(square / (1 - 0.9**count)) + 1e-8)
        assert weight.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("table", "name", "arguments", "message"),
    [
        ("OPTIMIZERS", "sgd", {"nesterov": True, "momentum": 0}, "needs momentum above 0"),
        ("OPTIMIZERS", "adamw", {"betas": [0.9, 1.0]}, r"betas \[0.9, 1.0\]: expected"),
        ("SCHEDULES", "step", {"milestones": [0.5, 1.5]}, r"milestones \[0.5, 1.5\]: expected"),
    ],
)
def test_refusals_name_the_key_and_the_value(table, name, arguments, message):
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    given = (parameters,) if table == "OPTIMIZERS" else (sgd(parameters), 10)
    with pytest.raises(UserError, match=message):
        component(f"engine:{table}", name, **arguments).build(*given)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["poly", "cosine", "step"])
def test_every_optimizer_and_schedule_is_built_from_a_config(name, schedule):
    optimizer = component("engine:OPTIMIZERS", name).build([torch.nn.Parameter(torch.zeros(1))])
    before = optimizer.param_groups[0]["lr"]
    scheduler = component("engine:SCHEDULES", schedule).build(optimizer, 100)
    assert scheduler.get_last_lr() == [before]
