"""The adversarial section and start_from of a config: defaults, the way to and from plain values, mistakes."""

import pytest
from config_texts import EXPERT, MOE, SHARED_ENCODER, refused

from engine.config import from_dict, load
from engine.errors import ConfigError

ATTACK = {"attack": "segpgd", "eps": "2/255", "steps": 3}


def test_there_is_none_unless_asked_for(write):
    train = load(write(EXPERT)).train
    assert train.adversarial == "none" and train.start_from is None
    assert load(write(EXPERT), {"train.adversarial": "none"}).train == train


@pytest.mark.parametrize("text", [EXPERT, MOE, SHARED_ENCODER])
def test_the_section_with_its_defaults_and_resolved(write, text):
    config = load(write(text), {"train.adversarial": ATTACK})
    assert config.resolved()["train"]["adversarial"] == {
        "attack": "segpgd",
        "eps": 2 / 255,
        "steps": 3,
        "step_size": None,
        "norm": "linf",
        "clean_fraction": 0.5,
        "loss": "ce",
        "beta": 6.0,
    }
    assert from_dict(config.resolved()) == config
    assert load(write(text), ["train.adversarial={attack: pgd, eps: 0.5, norm: l2, steps: 1}"])


def test_what_is_trained_on_attacked_images_has_a_ladder_of_its_own(write):
    def eps(**overrides):
        return load(write(EXPERT), overrides).evaluate.eps

    assert max(eps()) == 2 / 255
    assert eps(**{"train.adversarial": ATTACK}) == [2 / 255, 4 / 255, 8 / 255]
    assert eps(**{"train.adversarial": ATTACK, "evaluate.eps": [1 / 255]}) == [1 / 255]


def test_the_best_is_that_under_attack_where_there_is_one(write):
    def monitor(**overrides):
        return load(write(EXPERT), {f"train.{key}": value for key, value in overrides.items()}).train.monitor

    assert monitor() == "miou" and monitor(adversarial=ATTACK) == "robust_miou"
    assert monitor(adversarial=ATTACK, monitor="miou") == "miou"
    with pytest.raises(ConfigError, match="train.monitor: robust_miou is unknown as nothing attacks"):
        monitor(monitor="robust_miou")


def test_radii_of_l2_have_to_be_named(write):
    attacked = {"evaluate.suite": "quick", "evaluate.norm": "l2"}
    for training in ({}, {"train.adversarial": ATTACK}):
        with pytest.raises(
            ConfigError, match="evaluate.eps: missing; the radii that stand for it are of linf"
        ):
            load(write(EXPERT), attacked | training)
        assert load(write(EXPERT), attacked | training | {"evaluate.eps": [0.5]}).evaluate.eps == [0.5]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"attack": "apgd"}, 'attack: "apgd" is unknown; allowed: pgd, segpgd'),
        ({"eps": 0}, "eps: 0 is wrong; expected a number above 0"),
        ({"eps": 2}, "eps: 2 lets every pixel become any other, as pixels are in [0, 1]; 2/255 may be meant"),
        ({"steps": 0}, "steps: 0 is wrong; expected a whole number above 0"),
        (
            {"step_size": 1},
            "step_size: 1 lets every pixel become any other, as pixels are in [0, 1]; 1/255 may be meant",
        ),
        ({"step_size": -1}, "step_size: -1 is wrong; expected a number above 0"),
        ({"clean_fraction": 50}, "clean_fraction: 50 is wrong; expected a number from 0 to 1"),
        ({"loss": "mart"}, 'loss: "mart" is unknown; allowed: ce, trades'),
        ({"beta": 3}, "beta: has no effect without loss: trades"),
        ({"radius": 1}, "radius: unknown key"),
        (
            {"clean_fraction": 1},
            "clean_fraction: 1 leaves no image to attack; take it below 1, or adversarial: none",
        ),
        (
            {"loss": "trades", "beta": 0},
            "beta: 0 leaves nothing of loss: trades but the loss of clean images",
        ),
    ],
)
def test_mistakes_are_told(write, change, line):
    (found,) = refused(write(EXPERT), **{"train.adversarial": {**ATTACK, **change}})
    assert found.split(": ", 1)[1].startswith(f"train.adversarial.{line}")


def test_what_is_missing_is_told(write):
    (found,) = refused(write(EXPERT), **{"train.adversarial": {"attack": "pgd", "steps": 3}})
    assert "train.adversarial.eps: missing; largest change" in found
    (found,) = refused(write(EXPERT), **{"train.adversarial": "pgd"})
    assert 'train.adversarial: "pgd" is wrong; expected none, or a mapping of attack, eps, steps' in found


def test_attacked_images_have_no_cached_outputs(write):
    (found,) = refused(write(MOE), **{"train.adversarial": ATTACK, "cache": {"budget": "1GB"}})
    told = "cache: stands beside train.adversarial: what experts say changes with the attack"
    assert found.split(": ", 1)[1] == told
    load(write(MOE), {"train.adversarial": ATTACK, "cache": "none"})


def test_each_of_several_gates_starts_from_the_folder_of_its_name(write):
    assert load(write(MOE)).starts == {}
    assert load(write(MOE), {"train.start_from": "runs/moe"}).starts == {"start_from": "runs/moe"}
    gates = {"gate": None, "gates": {"a": {"type": "simple"}, "b": {"type": "classwise"}}}
    several = load(write(MOE), {**gates, "train.start_from": "runs/gates"})
    assert several.starts == {"start_from/a": "runs/gates/a", "start_from/b": "runs/gates/b"}
