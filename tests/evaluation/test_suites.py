"""Suites: what they cost, that the cost is real, and that all kinds of targets get the same."""

import importlib

import pytest
import torch

from attacks.threat import Threat
from engine.config import UserError, component
from evaluation.stand_ins import count_passes
from evaluation.suites import (
    COMMON,
    ON_GATES,
    ON_MEMBERS,
    attacks_for,
    by_number,
    describe,
    extra_members,
    main,
    members,
    needs_class_weights,
    refuse_for_label_maps,
)
from evaluation.targets import kind_of
from tests.evaluation import robust_toy as toy

BUDGETS = {"quick": 60, "standard": 400, "sea": 1100}
KINDS = ("single", "soft", "hard", "ensemble")


def sums(suite, kind, experts=1, parity=1, column=None):
    """(forward, backward) passes."""
    own = [one for one in members(suite, kind, experts, parity) if column in (None, one.column)]
    return sum(one.forwards for one in own), sum(one.backwards for one in own)


@pytest.mark.parametrize("suite", BUDGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_suite_takes_as_many_gradients_as_its_name_promises(suite, kind):
    forwards, backwards = sums(suite, kind, 1 if kind == "single" else 2)
    assert backwards == BUDGETS[suite]
    assert backwards < forwards <= 1.16 * backwards  # last points, and passes over the clean images


@pytest.mark.parametrize("suite", BUDGETS)
@pytest.mark.parametrize("experts", [2, 3, 5])
def test_gradients_are_equal_counted_in_networks(suite, experts):
    """A single network beside mixtures of E networks, the mixtures, and ensembles of as many; up to a restart."""
    wanted = {kind: experts * sums(suite, kind, experts)[1] for kind in KINDS[1:]}
    alone = sums(suite, "single", 1, parity=experts)[1]
    restart = sums(suite, "single", column="adaptive")[1]
    assert len(set(wanted.values())) == 1
    assert wanted["soft"] <= alone < wanted["soft"] + restart


@pytest.mark.parametrize("suite", BUDGETS)
def test_common_members_are_the_same_for_every_kind_and_adaptive_ones_are_not(suite):
    common = {
        kind: [one.about for one in members(suite, kind, 2, 2) if one.column == "common"] for kind in KINDS
    }
    assert all(own == common["single"] for own in common.values())
    adaptive = {
        kind: {one.name for one in members(suite, kind, 2) if one.column == "adaptive"} for kind in KINDS
    }
    assert adaptive["soft"] == adaptive["hard"]
    assert not adaptive["soft"] & adaptive["ensemble"] and not adaptive["soft"] & adaptive["single"]
    for own in (members(suite, kind, 2) for kind in KINDS):
        assert len({one.name for one in own}) == len(own)


def test_sea_is_three_losses_of_300_steps_with_shrinking_balls():
    common = [one.attack.args for one in members("sea", "single", 1) if one.column == "common"]
    assert {args["loss"] for args in common} == {"masked_ce", "balanced_masked_ce", "jensen_shannon"}
    assert all((args["steps"], args["schedule"], args["restarts"]) == (300, "red_eps", 1) for args in common)
    assert [needs_class_weights(one) for one in members("sea", "single", 1)][:3] == [False, True, False]


@pytest.mark.parametrize("suite", ["quick", "standard"])
def test_passes_told_beforehand_are_those_that_attacks_count_on_real_networks(suite):
    (scene,) = toy.scenes(2, images=2)
    threat = Threat(0.5 / 255, seeds=(0, 1), class_weights=torch.ones(toy.CLASSES))
    for target in toy.targets():
        for one in members(suite, target.kind, target.num_experts, 2):
            found = one.attack.build(target.model, scene.images, scene.labels, threat)
            assert found.correct.min() > 0  # else it ends sooner
            assert (found.forwards, found.backwards) == (one.forwards, one.backwards), one.name


def test_passes_of_single_attacks():
    def of(name, **args):
        return count_passes(component("attacks:ATTACKS", name, **args), "single", 1)[:2]

    assert of("clean") == (1, 0)
    assert of("fgsm") == (2, 1)
    assert of("pgd", steps=7, restarts=3) == (24, 21)
    assert of("pgd", steps=5, draws=4) == (24, 20)
    assert of("square", queries=50) == (50, 0)


def test_attacks_of_a_config_are_further_members_and_clean_is_none():
    given = [
        component("attacks:ATTACKS", name, **args)
        for name, args in (("clean", {}), ("fgsm", {}), ("pgd", {"steps": 3}), ("pgd", {"steps": 4}))
    ]
    found = extra_members(given, "soft", 2, (6, 8), 4)
    assert [one.name for one in found][:2] == ["fgsm", "pgd"]
    assert found[2].name.startswith("pgd (loss ce, steps 4, ")
    assert {one.column for one in found} == {"common"}
    with pytest.raises(UserError, match="stands there twice"):
        extra_members([given[2]] * 3, "single", 1, (6, 8), 4)


def test_attacks_that_know_what_they_attack_are_adaptive_and_for_targets_that_have_it():
    routed, ensemble = (
        [component("attacks:ATTACKS", name.split()[0], steps=30) for name in group["standard"]]
        for group in (ON_GATES, ON_MEMBERS)
    )
    plain = [component("attacks:ATTACKS", one["name"]) for own in COMMON.values() for one in own.values()]
    given = attacks_for([*routed, *plain, *ensemble], {kind: kind for kind in KINDS})
    wanted = {"single": plain, "soft": [*routed, *plain], "ensemble": [*plain, *ensemble]}
    assert given == {**wanted, "hard": wanted["soft"]}
    for kind, own in (("soft", routed), ("hard", routed), ("ensemble", ensemble)):
        assert {one.column for one in extra_members(own[:5], kind, 2, (6, 8), 4)} == {"adaptive"}
    for own, told in ((routed, "soft_gate is for routed models"), (ensemble, "member_sum is for ensembles")):
        with pytest.raises(UserError, match=f"evaluate.attacks: {told}, and none of day, night is one"):
            attacks_for([*plain, *own], {"day": "single", "night": "single"})
    with pytest.raises(UserError, match="for routed models"):
        extra_members(routed, "single", 1, (6, 8), 4)


def test_a_file_belongs_to_a_member_by_its_contents(tmp_path, monkeypatch):
    file = tmp_path / "delta.safetensors"
    about = []
    for content in (b"one", b"two"):
        file.write_bytes(content)
        attack = component("attacks:ATTACKS", "universal", file=str(file))
        monkeypatch.setattr("evaluation.suites.count_passes", lambda *given: (1, 0, 1))
        (one,) = extra_members([attack], "single", 1, (6, 8), 4)
        about.append(one.about)
    assert about[0] != about[1]


def test_passes_are_of_so_many_classes():
    def of(name, num_classes, **args):
        return count_passes(component("attacks:ATTACKS", name, **args), "single", 1, num_classes=num_classes)[
            :2
        ]

    assert of("hide", 55, class_id=45, steps=3)[1] == 3
    with pytest.raises(UserError, match="class_id 38 .* 0..37"):
        of("hide", 38, class_id=38)
    goals = {classes: of("apgd_targeted", classes, targets=99, steps=2)[1] for classes in (4, 11, 55, 150)}
    assert goals == {classes: 2 * min(99, classes - 1) for classes in goals}


def test_what_is_for_classifiers_alone_is_refused_for_label_maps():
    given = [component("attacks:ATTACKS", name) for name in ("pgd", "autoattack")]
    refuse_for_label_maps(given[:1], "evaluate.attacks")
    for key in ("evaluate.attacks", "evaluate.transfer"):
        with pytest.raises(UserError, match=f"{key}: autoattack is for classifiers; label maps have"):
            refuse_for_label_maps(given, key)


def test_none_is_empty_and_others_are_unknown():
    assert members("none", "soft", 2) == []
    with pytest.raises(UserError, match="'slow' is unknown; allowed: none, quick, standard, sea"):
        members("slow", "soft", 2)


def test_the_command_prints_members_steps_and_sums(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line in BUDGETS] == list(BUDGETS)
    quick = describe("quick")
    assert quick[0].split("  ")[0] == "member" and all(line in lines for line in quick)
    (backwards,) = [line for line in quick if line.startswith("of these with a backward pass")]
    assert backwards.split()[-5:] == ["60", "120", "60", "60", "60"]
    (row,) = [line for line in quick if line.startswith("cospgd")]
    assert row.split() == ["cospgd", "common", "20", "x", "1", *["21"] * 5]


def test_stand_ins_are_of_the_kinds_that_they_stand_for():
    from evaluation.stand_ins import STAND_INS

    assert {kind: kind_of(build(2, 4)) for kind, build in STAND_INS.items()} == {kind: kind for kind in KINDS}


@pytest.mark.parametrize("module", ["suites", "traps"])
def test_the_commands_have_help_and_refuse_arguments(module, capsys):
    command = importlib.import_module(f"evaluation.{module}").main
    with pytest.raises(SystemExit) as ended:
        command(["--help"])
    assert ended.value.code == 0 and f"python -m evaluation.{module}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        command(["quick"])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and "unrecognized arguments: quick" in printed.err and not printed.out


def test_a_class_is_hidden_by_its_name_too():
    named, numbered = (component("attacks:ATTACKS", "hide", class_id=one) for one in ("sky", 1))
    others = [component("attacks:ATTACKS", "pgd")]
    assert by_number([named, *others], ("road", "sky"), "evaluate.attacks") == [numbered, *others]
    with pytest.raises(
        UserError, match="evaluate.attacks: hide: class_id: .*skye.* is unknown; .*mean 'sky'"
    ):
        by_number(
            [component("attacks:ATTACKS", "hide", class_id="skye")], ("road", "sky"), "evaluate.attacks"
        )
    for wrong in (-1, True, 1.0, ""):
        with pytest.raises(UserError, match="expected a class by its number, 0 or more, or by its name"):
            component("attacks:ATTACKS", "hide", class_id=wrong)


@pytest.mark.parametrize(
    ("name", "key"),
    [("soft_gate", "temperatures"), ("joint", "strengths"), ("smooth_ensemble", "temperatures")],
)
def test_a_sweep_of_nothing_is_refused_when_it_is_read(name, key):
    with pytest.raises(UserError, match=rf"{name}: {key}: \[\] is wrong; expected at least 1 entries"):
        component("attacks:ATTACKS", name, **{key: []})
    assert component("attacks:ATTACKS", name, **{key: [0.5]}).args[key] == (0.5,)
