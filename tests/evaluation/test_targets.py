"""Targets: what kind of thing is attacked, and what identifies it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from engine.config import UserError
from engine.steps import under_attack
from evaluation.targets import PRODUCTS, class_weights, exact_float32, kind_of, settings_of, target_of
from networks import ensemble
from tests.evaluation import robust_toy as toy


def test_kinds_follow_from_what_is_offered():
    nets = toy.Net(0), toy.Net(1), toy.Net(2)
    found = [target_of("x", model) for model in (nets[0], toy.Ensemble(*nets), toy.Mixture(*nets))]
    found += [target_of("x", toy.Mixture(*nets, routing="hard")), target_of("x", lambda images: images)]
    assert [(one.kind, one.num_experts) for one in found] == [
        ("single", 1), ("ensemble", 3), ("soft", 3), ("hard", 3), ("single", 1),
    ]  # fmt: skip


def test_routing_and_number_of_networks_must_be_told():
    mixture = toy.Mixture(toy.Net(0), toy.Net(1), routing="top1")
    with pytest.raises(UserError, match="Mixture.routing: 'top1' is unknown; allowed: soft, hard"):
        kind_of(mixture)
    ensemble = toy.Ensemble(toy.Net(0))
    del ensemble.num_experts
    with pytest.raises(UserError, match="no num_experts"):
        target_of("x", ensemble)


def test_equal_networks_are_one_target_and_any_changed_tensor_setting_or_module_is_another():
    def target(seed=0, change=lambda model: None, **about):
        model = nn.Sequential(toy.Net(seed), nn.BatchNorm2d(toy.CLASSES))
        change(model)
        return target_of("x", model, **about).identity

    def weight(model):
        with torch.no_grad():
            model[0].conv.bias[0] += 1e-7

    def buffer(model):
        model[1].running_mean += 1

    def module(model):
        model.append(nn.Dropout(0.5))

    def setting(model):
        model[0].temperature = 0.1

    def rule(model):
        model[0].rules = [max, "last"]

    same = target(class_pixels=[1, 2], gate="simple")
    assert same == target(class_pixels=(1, 2), gate="simple")
    others = [target(gate="simple", class_pixels=[1, 3]), target(gate="classwise", class_pixels=[1, 2])]
    others += [
        target(change=change, class_pixels=[1, 2], gate="simple")
        for change in (weight, buffer, module, setting, rule)
    ]
    assert all(other != same for other in others)
    assert len(set(map(str, others))) == len(others)


@pytest.mark.parametrize("name", ["mean", "_mean"])
def test_tensors_and_arrays_that_are_no_buffers_count(name):
    def target(value):
        model = toy.Net(0)
        setattr(model, name, value)
        return target_of("x", model).identity["modules"]

    numbers = np.arange(6.0).reshape(2, 3)
    values = [
        torch.arange(3), torch.arange(3.0), torch.arange(3) + 1, torch.rand(2, 3).to_sparse(), torch.ones(2, 3).mT,
        torch.ones(2, dtype=torch.complex64).conj(), torch.empty(2, device="meta"), numbers, numbers[:, ::-1],
        numbers.T, numbers.astype(">f8"), numbers.astype(np.longdouble), np.array(["a"]), np.array([None]),
    ]  # fmt: skip
    found = [target(value) for value in values]
    assert found == [target(value) for value in values]
    untold = {found[3], found[6], found[13]}  # neither bytes nor numbers
    assert len(untold) == 1 and len(set(found)) == len(values) - 2


def test_plain_settings_say_the_same_as_ever():
    """Else ledgers that were begun before would be refused."""
    model = nn.Identity()
    model.rate, model.names, model.layers = np.float64(0.5), ["a", 2], {"4": "low"}
    assert list(settings_of(model))[1:] == [".names = ['a', 2]", f".rate = {np.float64(0.5)!r}"]


def test_ensembles_of_two_rules_that_print_alike_are_two():
    models = [toy.Ensemble(toy.Net(0), toy.Net(1)) for _ in range(2)]
    models[0].combine, models[1].combine = ensemble.mean, ensemble.max
    mean, largest = (target_of("x", model).identity for model in models)
    assert mean["tensors"] == largest["tensors"] and mean["modules"] != largest["modules"]


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=40))
def test_class_weights_are_one_over_the_pixels_with_mean_1_over_them(pixels):
    weights = class_weights(pixels).double()
    counts = torch.tensor(pixels).double()
    assert (weights * counts / (weights * counts).mean() - 1).abs().max() < 1e-5
    assert abs((weights * counts).sum() / counts.sum() - 1) < 1e-5


def test_a_class_that_training_never_saw_weighs_as_the_rarest():
    assert class_weights([100, 0, 10]).tolist() == pytest.approx([0.55, 5.5, 5.5])
    with pytest.raises(UserError, match="no class has a labelled pixel"):
        class_weights([0, 0])


def test_networks_are_frozen_inside_and_as_they_were_outside_even_after_an_error():
    model = nn.Sequential(toy.Net(0), nn.Sequential(nn.BatchNorm2d(toy.CLASSES)))
    model[0].eval()
    model[1].requires_grad_(False)
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="planted"), under_attack(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise RuntimeError("planted")
    assert [module.training for module in model.modules()] == modes
    assert [one.requires_grad for one in model.parameters()] == [True, True, False, False]


@pytest.mark.parametrize(
    "roughly",
    [
        lambda: torch.set_float32_matmul_precision("medium"),  # bf16 products on CPUs, too
        lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: None,
    ],
)
def test_float32_is_exact_inside_and_the_settings_come_back(roughly):
    cudnn, products = torch.backends.cudnn, [*PRODUCTS["cuda"], *PRODUCTS["cpu"]]

    def settings():
        return [cudnn.deterministic, cudnn.benchmark, *(one.fp32_precision for one in products)]

    before, whole = settings(), torch.backends.fp32_precision
    try:
        cudnn.deterministic, cudnn.benchmark = False, True
        roughly()
        rough = settings()
        with torch.autocast("cpu", torch.bfloat16), exact_float32(torch.device("cpu")):
            assert settings() == [True, False, *["ieee"] * len(products)]
            assert toy.Net(0)(torch.rand(1, 3, 4, 4)).dtype == torch.float32
            with cudnn.flags(enabled=False):  # as networks do; it reads the older keys of the same
                pass
        assert settings() == rough
    finally:
        torch.backends.fp32_precision = whole
        cudnn.deterministic, cudnn.benchmark, *precisions = before
        for one, precision in zip(products, precisions, strict=True):
            one.fp32_precision = precision
