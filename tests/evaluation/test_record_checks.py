"""Checks of records: exact figures of made-up ledgers, each check seen to fire on a fault and to be silent without."""

import pytest
import torch

from evaluation.findings import Flags
from evaluation.ledger import read_manifest, read_units
from evaluation.plan import Scene
from evaluation.record_checks import PUBLISHED, check_manifest, check_records
from evaluation.robust import attack_all, unsettled
from evaluation.robust_tables import write_robust
from evaluation.suites import member
from evaluation.targets import target_of
from evaluation.traps import EPS, Trap
from tests.evaluation import robust_toy as toy

PIXELS = 1000
IMAGES = ("a", "b")


def records(attack="clean", right=(900, 900), eps=8 / 255, **changes):
    """A record per image, of 1000 pixels each, `right` of them right."""
    base = {
        "target": "net", "source": "net", "attack": attack, "settings": {"name": attack.split()[0], "steps": 100},
        "eps": 0.0 if attack == "clean" else eps, "norm": "linf", "incumbent": "pixels", "valid": PIXELS,
        "backwards": 0 if attack == "clean" else 100, "zero_gradients": 0, "bad_gradients": 0, "unsettled": 0.0,
    }  # fmt: skip
    return [
        {**base, "image": image, "cells": cells(count), "claimed_correct": count, **changes}
        for image, count in zip(IMAGES, right, strict=True)
    ]


def cells(right):
    return [[0, 0, right - 10], [1, 0, PIXELS - right], [1, 1, 10]]


COLUMNS = {"net": {"pgd": "common", "square": "common", "soft_gate": "adaptive", "gate_only": "adaptive"}}


def check(*groups, name=None, kind="soft", clean=None, **more):
    """Severities and texts of one check, or of all, on a ledger of clean images and these records."""
    whole = [one for group in (clean or records(), *groups) for one in group]
    found = check_records(whole, {"net": kind}, COLUMNS, **more)
    return [one for one in found if name is None or one.check == name]


def severity(*groups, name, **more):
    return {one.severity for one in check(*groups, name=name, **more)}


SOUND = records("pgd", (100, 300)), records("soft_gate", (120, 250))


def test_a_sound_ledger_raises_no_flag_and_no_note():
    found = check(*SOUND)
    assert {one.severity for one in found} == {"ok"}
    assert {one.check for one in found} == {
        "masking", "gradients met", "incomplete optimisation", "silent success", "plausibility"
    }  # fmt: skip


@pytest.mark.parametrize("weaker", ["square", "gate_only", "pgd for other"])
@pytest.mark.parametrize(("right", "expected"), [((97, 300), "ok"), ((95, 300), "flag"), ((100, 400), "ok")])
def test_a_weaker_attack_that_adds_more_than_a_fifth_of_a_point_is_flagged(weaker, right, expected):
    attack, _, other = weaker.partition(" for ")
    (finding,) = check(*SOUND, records(attack, right, source=other or "net"), name="weaker attacks")
    assert finding.severity == expected and finding.attack == weaker
    gain = max(0, 100 - right[0]) + max(0, 300 - right[1])
    assert (
        f"takes {100 * gain / 2000:.2f} points of accuracy from the white-box attacks' 20.00 %"
        in finding.text
    )


def test_attacks_of_another_eps_and_those_that_know_the_gate_are_not_compared():
    assert check(*SOUND, records("square", (0, 0), eps=4 / 255), name="weaker attacks") == []
    assert check(*SOUND, records("route_first", (0, 0)), name="weaker attacks") == []


def test_masking_is_flagged_with_the_gap_between_the_suites_worst_cases():
    (finding,) = check(records("pgd", (400, 300)), records("soft_gate", (350, 300)), name="masking")
    assert finding.severity == "ok"
    groups = records("pgd", (400, 300)), records("soft_gate", (500, 150))
    (finding,) = check(*groups, name="masking")
    assert finding.severity == "flag"
    assert "leaves 27.50 % of accuracy, the common one 35.00 %: 7.50 points" in finding.text
    assert severity(*groups, name="masking", kind="single") == {"note"}
    (missing,) = check(records("pgd"), name="masking")
    assert missing.severity == "flag" and "no adaptive attack was run" in missing.text
    (alone,) = check(records("pgd"), name="masking", kind="single")
    assert alone.severity == "note" and "no routes or parts to adapt to" in alone.text


def test_gradients_that_were_zero_or_not_finite_are_flagged():
    def found(attack="pgd", **counts):
        return severity(records(attack, (100, 100), **counts), name="gradients met")

    assert found() == {"ok"}
    assert found(bad_gradients=1) == found("soft_gate", bad_gradients=1) == {"flag"}
    assert found(zero_gradients=5) == {"note"} and found(zero_gradients=6) == {"flag"}
    assert found("change_route", zero_gradients=5) == {"note"} and found(
        "change_route", zero_gradients=6
    ) == {"flag"}
    assert found("soft_gate", zero_gradients=100) == {"note"}  # a gate that says the same of all images
    assert found("square", backwards=0, zero_gradients=0) == set()


def test_a_loss_that_has_not_settled_is_flagged_of_long_attacks():
    def found(right=(100, 100), name="pgd", **more):
        return severity(records(name, right, **more), name="incomplete optimisation")

    assert found(unsettled=0.05) == {"ok"} and found(unsettled=0.051) == {"flag"}
    assert found(unsettled=0.5, settings={"name": "pgd", "steps": 20}) == {"note"}
    assert found(right=(51, 50), unsettled=0.5) == {"flag"}
    assert found(right=(50, 50), unsettled=0.5) == {"note"}  # hardly anything is left to find
    assert found(unsettled=None) == found(name="joint", unsettled=1.0) == set()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"name": "pgd", "loss": "ce", "restarts": 4}, "it begins several times"),
        ({"name": "apgd_targeted", "targets": 9}, "it begins several times"),
        ({"name": "pgd", "loss": "masked_ce"}, "masked_ce goes up and down by itself"),
        ({"name": "segpgd", "restarts": 1}, "segpgd goes up and down by itself"),
        ({"name": "cospgd"}, "cospgd goes up and down by itself"),
        ({"name": "apgd", "loss": "masked_ce", "track": "loss"}, "masked_ce goes up and down by itself"),
        ({"name": "apgd", "loss": "masked_ce", "track": None}, ""),
        ({"name": "apgd", "loss": "dlr"}, ""),
        ({"name": "pgd", "loss": "ce", "restarts": 1}, ""),
    ],
)
def test_losses_that_do_not_tell_are_not_judged(settings, reason):
    """20 steps four times over are no 80 steps that have not settled."""
    moving = records("own", (100, 100), unsettled=1.0, settings={**settings, "steps": 20}, backwards=80)
    (finding,) = check(moving, name="incomplete optimisation")
    assert finding.severity == "note"
    if reason:
        assert finding.text == f"not judged: own ({reason})" and finding.attack == ""
    else:
        assert finding.attack == "own" and finding.text.startswith("in the last 10 of 20 steps")


def test_images_that_are_broken_need_not_settle():
    moving, settled = records("pgd", (200, 200), unsettled=1.0), records("pgd", (200, 200), unsettled=0.0)
    moving[0]["cells"] = [[0, 1, PIXELS]]
    assert severity([moving[0], settled[1]], name="incomplete optimisation") == {"ok"}
    assert severity([settled[0], moving[1]], name="incomplete optimisation") == {
        "ok"
    }  # one of two is no majority
    assert severity(moving, name="incomplete optimisation") == {"flag"}


def test_the_range_of_the_last_ten_losses_in_units_of_all():
    rising = torch.arange(100.0)[:, None]
    losses = torch.cat([rising, rising.clamp_max(50), torch.zeros(100, 1), rising * torch.nan], dim=1)
    assert unsettled(losses) == [pytest.approx(9 / 99, rel=1e-5), 0.0, 0.0, None]
    assert unsettled(losses[:10]) == [None] * 4


def test_success_that_is_lost_is_flagged_and_rounding_is_told():
    worse = records("pgd", (100, 300), claimed_correct=90)
    (finding,) = check(worse, name="silent success")
    assert finding.severity == "flag" and "2 of 2 images" in finding.text and "210 at most" in finding.text
    assert severity(worse, name="silent success", quantised=True) == {"note"}
    assert severity(records("pgd", (100, 300), claimed_correct=400), name="silent success") == {"ok"}
    assert severity(records("hide", (100, 300), claimed_correct=0), name="silent success") == set()


def test_what_nobody_has_reached_is_not_plausible():
    def found(right, **more):
        eps = more.pop("eps", 8 / 255)
        return severity(records("pgd", right, eps=eps, **more.pop("own", {})), name="plausibility", **more)

    assert found((810, 810)) == {"ok"} and found((811, 811)) == {"flag"}  # of 900
    assert found((811, 811), eps=0.5 / 255) == {"note"} == found((811, 811), dataset="mnist", eps=0.1)
    constant = records(cells=[[0, 0, 900], [1, 0, 100]])  # the same answer everywhere
    assert found((811, 811), clean=constant) == {"note"}
    assert found((760, 760)) == {"ok"} == found((730, 730), dataset="cifar10")
    assert found((760, 760), dataset="cifar10") == {"flag"}
    assert found((760, 760), dataset="cifar10", eps=4 / 255) == {"ok"}  # published for 8/255
    assert found((760, 760), dataset="cifar10", own={"norm": "l2"}) == {"ok"}
    assert PUBLISHED["cifar10", "linf"] == (8 / 255, 0.7371)


def test_a_gate_that_gives_all_to_one_expert_has_one_effective_expert():
    def found(*weights):
        return found_of_sites(*([one] for one in weights))

    def found_of_sites(*weights):
        group = records()
        for one, sites in zip(group, weights, strict=True):
            one["weights"] = [[[first], [second]] for first, second in sites]
        (finding,) = [
            one for one in check_records(group, {"net": "hard"}, COLUMNS) if one.check == "gate collapse"
        ]
        return finding

    all_to_one = found((1, 0), (1, 0))
    assert all_to_one.severity == "flag" and all_to_one.eps is None
    assert all_to_one.text.startswith("expert 0 has 100.00 % of the weight over 2 clean images")
    assert "effective number of experts 1.00 of 2" in all_to_one.text
    even = found((0, 1), (1, 0))
    assert even.severity == "ok" and "2.00 of 2" in even.text
    assert found((None, 1), (1, 0)).severity == "flag"
    fixed = found_of_sites([(1, 0), (0, 1)], [(1, 0), (0, 1)])  # no route hangs on the image
    assert fixed.severity == "flag"
    assert fixed.text.startswith("some expert has over 95 % of the weight at 2 of 2 sites and classes over 2")
    assert fixed.text.endswith("effective number of experts 1.00 of 2, mean of these")
    half = found_of_sites([(1, 0), (0, 1)], [(1, 0), (1, 0)])
    assert half.severity == "ok" and "at 1 of 2 sites" in half.text and "1.50 of 2" in half.text


def test_the_trap_in_a_real_ledger_is_flagged_and_its_soft_control_is_not(tmp_path):
    flagged = {}
    for gate in ("hard", "soft"):
        model = Trap("segmentation", gate).eval()
        images, labels = model.samples(2)
        target = target_of("trap", model)
        kind = (target.kind, target.num_experts)
        own = {
            "trap": [
                member("pgd", {"name": "pgd", "steps": 10}, "common", *kind),
                member("soft_gate", {"name": "soft_gate", "steps": 12}, "adaptive", *kind),
            ]
        }
        scenes = [Scene(images, labels, ("a", "b"), ("a", "b"))]
        setup = toy.setup(eps=(EPS,))
        folder = tmp_path / gate
        attack_all(folder, scenes, [target], own, setup, log=str)
        found = check_manifest(read_manifest(folder), read_units(folder))
        flagged[gate] = {one.check: one.text for one in found if one.severity == "flag"}
    # the gate of all clean images is at the first expert, which is what the trap is made for
    assert set(flagged["hard"]) == {"masking", "gate collapse"}
    assert "leaves 0.00 % of accuracy, the common one 100.00 %: 100.00 points" in flagged["hard"]["masking"]
    assert flagged["soft"] == {}


def test_a_replaced_ledger_is_checked_by_its_own_units_alone(tmp_path):
    """The ledger keeps the units of more images, other weights, attacks that are gone and another name of one."""
    toy.run(tmp_path / "replaced")
    own, kind = toy.members(), {target.name: (target.kind, target.num_experts) for target in toy.targets()}
    for name, (first, *_, last) in own.items():
        own[name] = [member("renamed", first.attack, "common", *kind[name]), last]
    targets = toy.targets()
    targets[1] = target_of("mean", toy.Ensemble(toy.Net(7), toy.Net(8)), role="ensemble")
    found = []
    for folder in (tmp_path / "replaced", tmp_path / "fresh"):
        ledger = folder / "ledger"
        attack_all(ledger, toy.scenes()[:2], targets, own, toy.setup(), replace=True, log=str)
        found.append(check_manifest(read_manifest(ledger), read_units(ledger)))
        write_robust(folder, ledger)
    assert found[0] == found[1]
    assert {one.attack for one in found[0]} == {"", "renamed", "own"}
    assert (tmp_path / "replaced/checks.csv").read_bytes() == (tmp_path / "fresh/checks.csv").read_bytes()


def test_flags_of_a_toy_ledger_are_beside_their_rows(tmp_path):
    toy.run(tmp_path)
    found = check_manifest(read_manifest(tmp_path / "ledger"), read_units(tmp_path / "ledger"))
    assert {one.target for one in found} == {"first", "mean", "gate"}
    marked = {
        (target, eps)
        for target in ("first", "mean", "gate")
        for eps in toy.EPS
        if Flags(found).mark(target, eps)
    }
    flagged = {
        (one.target, eps)
        for one in found
        for eps in toy.EPS
        if one.severity == "flag" and one.eps in (None, eps)
    }
    assert marked == flagged


def test_gate_logits_that_are_not_finite_are_flagged_for_as_many_images():
    def gate(*shares):
        return {"weights": [[[1.0], [0.0]]], "shares": [[[one] for one in shares]], "flips": 0.0}

    fine, broken = gate(1.0, 0.0), gate(None, None)  # a mask of -inf has a share of 0
    assert not check(records(**fine), records("pgd", **fine), name="gate logits")
    attacked = [{**one, **(broken if one["image"] == "a" else fine)} for one in records("pgd")]
    (finding,) = check(records(**fine), attacked, name="gate logits")
    assert (finding.severity, finding.eps) == ("flag", 8 / 255)
    assert finding.text.startswith("gate logits not finite on 1 images")
    clean, other = check(records(**broken), attacked, name="gate logits")
    assert clean.eps is None and clean.text.startswith("gate logits not finite on 2 images")


@pytest.mark.parametrize(
    ("eps", "used", "quantised", "told"),
    [
        (16 / 255, 8 / 255, False, True),
        (8 / 255, 8 / 255, False, False),
        (4 / 255, 4 / 255, False, False),  # scaled down
        (1.5 / 255, 1 / 255, True, False),  # what bytes leave of it
        (1.5 / 255, 1 / 255, False, True),
    ],
)
def test_a_universal_perturbation_in_a_larger_ball_tells_its_own(eps, used, quantised, told):
    own = [{**one, "eps": eps, "linf": used} for one in records("universal")]
    found = check(own, name="universal radius", quantised=quantised)
    assert [one.severity for one in found] == ["note"] * told
    if told:
        assert f"by {255 * used:.0f}/255 at most" in found[0].text and found[0].eps == eps


def test_logits_that_are_not_finite_are_flagged():
    assert not check(*SOUND, name="logits")
    broken = records("pgd", (100, 300))
    broken[1]["status"] = "logits not finite"
    (finding,) = check(broken, name="logits")
    assert (finding.severity, finding.attack) == ("flag", "pgd")
    assert finding.text == "logits are not finite on 1 of 2 images"
    (finding,) = check_records(records(status="logits not finite"), {"net": "single"}, COLUMNS)
    assert (finding.severity, finding.attack, finding.eps) == ("flag", "clean", 0.0)
