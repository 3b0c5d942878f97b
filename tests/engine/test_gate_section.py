"""The keys of a gate's section: their defaults, what is refused, and what a uniform gate can't have."""

import pytest
from config_texts import MOE, refused

from engine.config import Gate, load

DEFAULTS = {
    "input": "features",
    "routing": "soft",
    "temperature": 1.0,
    "calibrate": False,
    "balance": 0.0,
    "entropy": 0.0,
}


def test_defaults_are_the_published_gate_and_a_stored_section_without_the_keys_gets_them():
    gate = Gate.model_validate({"type": "classwise", "conv": True})
    assert {key: getattr(gate, key) for key in DEFAULTS} == DEFAULTS
    assert {key: gate.plain()[key] for key in DEFAULTS} == DEFAULTS


def test_every_key_reaches_the_section(write):
    keys = {"input": "logits", "routing": "top1", "temperature": 0.5, "calibrate": True, "balance": 0.01}
    gate = load(write(MOE), {f"gate.{key}": value for key, value in keys.items()}).gate
    assert {key: getattr(gate, key) for key in keys} == keys
    spatial = {"type": "spatial", "width": 8, "per_class": True, "entropy": -0.1}
    gate = load(write(MOE), {"gate": spatial}).gate
    assert (gate.name, gate.args, gate.entropy) == ("spatial", {"width": 8, "per_class": True}, -0.1)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"input": "pixels"}, 'gate.input: "pixels" is unknown; allowed: features, logits, image'),
        ({"routing": "top2"}, "gate.routing: \"top2\" is unknown; allowed: soft, top1; did you mean 'top1'?"),
        ({"temperature": 0}, "gate.temperature: 0 is wrong; expected a number above 0"),
        ({"calibrate": 1}, "gate.calibrate: 1 is wrong; expected true or false"),
        ({"balance": -1}, "gate.balance: -1 is wrong; expected a number, 0 or more"),
        ({"entropy": "low"}, 'gate.entropy: "low" is wrong; expected a number such as 1e-4 or 8/255'),
        ({"routing": "top1", "entropy": 1}, "gate.entropy: stands beside routing: top1, whose weights have no entropy"),
    ],
)  # fmt: skip
def test_mistakes_are_told(write, change, line):
    found = refused(write(MOE), **{f"gate.{key}": value for key, value in change.items()})
    assert [told.split(": ", 1)[1] for told in found] == [line]


@pytest.mark.parametrize(
    "change",
    [{"input": "image"}, {"routing": "top1"}, {"temperature": 2.0}, {"balance": 0.1}, {"entropy": 0.1}],
)
def test_a_uniform_gate_has_nothing_to_route_by(write, change):
    (key,) = change
    (line,) = refused(write(MOE), gate={"type": "uniform", **change})
    assert line.endswith(f"gate.{key}: has no effect on a uniform gate, whose weights are always equal")


def test_a_uniform_gate_may_spell_the_defaults_out_and_be_calibrated(write):
    gate = load(write(MOE), {"gate": {"type": "uniform", **DEFAULTS, "calibrate": True}}).gate
    assert gate.calibrate and gate.name == "uniform"
