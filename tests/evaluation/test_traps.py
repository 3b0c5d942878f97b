"""The hard-route trap and its controls: published as an example, so its figures are held here."""

import pytest
import torch

from attacks.search import scores
from attacks.threat import Threat
from evaluation import traps
from evaluation.image_results import load_images
from evaluation.traps import CLASSES, EPS, GATE_AWARE, GATES, MARGIN, TASKS, Trap, plain_attacks


@pytest.fixture(scope="module")
def outcomes():
    return {(task, gate): traps.spring(task, gate) for task in TASKS for gate in GATES}


@pytest.mark.parametrize("task", TASKS)
def test_a_hard_gate_is_robust_to_plain_attacks_and_falls_to_those_that_know_it(outcomes, task):
    found = outcomes[task, "hard"]
    assert (found.clean, found.plain, found.aware, found.flips) == (1, 1, 0, 1)
    assert found.flag == "gate-aware attacks find 100.0 points more; the loss has no gradient by the gate"
    assert all(found.each[name] == 1 for name in plain_attacks(task))
    assert ("autoattack" in found.each) == (task == "classification")
    through_the_gate = {"soft_gate", "route_first", "joint", "weakest_expert", "gate_only"}
    assert {name for name in GATE_AWARE if found.each[name] == 0} == through_the_gate
    assert all(found.each[name] == 1 for name in GATE_AWARE.keys() - through_the_gate)  # the expert is robust


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("gate", ["soft", "straight-through"])
def test_the_same_gate_with_a_gradient_falls_to_plain_attacks(outcomes, task, gate):
    found = outcomes[task, gate]
    assert (found.clean, found.plain, found.aware, found.flag) == (1, 0, 0, "")
    assert found.each["pgd"] == found.each.get("autoattack", 0) == 0


@pytest.mark.parametrize("task", TASKS)
def test_the_trap_is_what_it_says(task):
    """The gate turns where every value moves by more than nine tenths of eps, against its sign; the first expert is
    right by far, the second never."""
    model = Trap(task, "hard")
    images, labels = model.samples()
    assert images.amin() > 0.05 and images.amax() < 0.95
    for factor, route in ((0.99, 0), (1.01, 1)):
        moved = images - factor * MARGIN * EPS * model.signs
        assert (model.gate_logits(moved).argmax(2) == route).all()
        assert scores(model(moved), labels, None)[0].sum() == (1 - route) * labels.numel()
    noise = images + EPS * (2 * torch.rand(images.shape) - 1)
    assert (model.gate_logits(noise).argmax(2) == 0).all()
    first, second = (
        model.forward_given(images, weights) for weights in torch.eye(2).view(2, 1, 1, 2, 1, 1, 1)
    )
    assert torch.equal(second.argmax(1), (labels + 1) % CLASSES)
    weights = Trap(task, "soft").route(model.gate_logits(images))
    torch.testing.assert_close(weights[0, :, 0].flatten(), torch.full((8,), 0.70), rtol=0, atol=0.01)
    assert torch.equal(first, model(images))


@pytest.mark.parametrize("gate", GATES)
def test_traps_obey_the_protocol(gate):
    model = Trap("segmentation", gate)
    images, _ = model.samples()
    gate_logits, mix = model.gate_and_mix(images)
    assert torch.equal(mix(model.route(gate_logits)), model(images))
    assert torch.equal(model.forward_given(images, model.route(gate_logits)), model(images))


def test_the_flag():
    assert traps.masking(0.5, 0.499, blind=False) == ""
    assert traps.masking(0.5, 0.49, blind=False) == "gate-aware attacks find 1.0 points more"
    assert traps.masking(0.4, 0.5, blind=False) == ""
    assert traps.masking(0.4, 0.5, blind=True) == "the loss has no gradient by the gate"


@pytest.mark.parametrize(("slope", "blind"), [(30, False), (1e6, True)])
def test_a_soft_gate_that_is_decided_to_the_last_bit_is_blind_too(monkeypatch, slope, blind):
    monkeypatch.setattr(traps, "SLOPE", slope)
    model = Trap("segmentation", "soft")
    images, labels = model.samples()
    assert traps.gate_is_blind(model, images, labels, Threat(EPS, ignore_index=None)) is blind


@pytest.mark.parametrize("gate", GATES)
def test_evaluated_as_a_classifier_the_tables_say_why_it_is_not_robust(gate, tmp_path):
    """The standard suite takes all of them to 0; of the hard gate alone the checks say that plain attacks are blind."""
    results = traps.report(gate, tmp_path)
    assert results.clean("trap").all()
    assert not results.worst("trap", EPS, "adaptive").any()
    assert results.worst("trap", EPS, "common").all() == (gate == "hard")
    auto = load_images(tmp_path / "ledger_autoattack")
    assert auto.under("trap", EPS, ["autoattack"]).all() == (gate == "hard")
    text = (tmp_path / "robustness.md").read_text()
    for told in (
        "gradients are masked, the common figure means nothing",
        "an attack on the gate alone takes 100.00 points of accuracy from the white-box attacks' 100.00 %",
        "the router hides its gradient from AutoAttack, whose figure means nothing",
    ):
        assert (told in text) == (gate == "hard")
    (row,) = [line for line in text.splitlines() if line.startswith("| trap ")][:1]
    adaptive = row.split("|")[6].split()[0]
    assert adaptive == "0.00*"


def test_what_is_printed(outcomes, monkeypatch, capsys):
    monkeypatch.setattr(traps, "spring", lambda task, gate: outcomes[task, gate])
    assert traps.main([]) == 0
    head, titles, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("eps 8/255 (linf), 8 images of 16 x 16")
    assert titles.split("  ")[0] == "task" and titles.endswith("masking flag")
    for task, line in zip(TASKS, lines[:6:3], strict=True):
        auto = ["100.0", "%"] if task == "classification" else ["-"]
        expected = [task, "hard", "100.0", "%", "100.0", "%", *auto, "0.0", "%", "100.0", "%", "RAISED:"]
        assert line.split()[: len(expected)] == expected
    assert lines[1].split()[:8] == ["classification", "soft", "100.0", "%", "0.0", "%", "0.0", "%"]
    assert sum("RAISED" in line for line in lines) == 2
    place = lines.index("adaptive worst case: 0.0 %")
    assert any("whose figure means nothing" in line for line in lines[place:])
