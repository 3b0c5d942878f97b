"""Telemetry and component table: exact figures of made-up records, and laws of routes on a real ledger."""

import math

import pytest

from evaluation.ledger import read_manifest, read_units
from evaluation.robust_results import RobustResults
from evaluation.telemetry import component_rows, telemetry_rows
from tests.evaluation import robust_toy as toy

HALF = math.log(2)


def record(image, attack, right, weights, *, target="moe", flips=0.0, expert_right=None, **more):
    own = {
        "target": target, "source": target, "image": image, "attack": attack, "incumbent": "pixels",
        "eps": 0.0 if attack == "clean" else 0.1, "settings": {"name": attack}, "valid": 10,
        "cells": [[0, 0, right], [0, 1, 10 - right]], "norm": "linf",
    }  # fmt: skip
    if weights is not None:
        own |= {"weights": weights, "flips": flips, "margin": 2.0, "least_margin": 1.0, "entropy": 0.5}
        own |= {"expert_right": expert_right} if expert_right else {}
    return own | more


def one_site(*shares):
    """[S, E, K] with one site, one class."""
    return [[[share] for share in shares]]


RECORDS = [
    record("a", "clean", 9, one_site(1.0, 0.0)),
    record("b", "clean", 8, one_site(0.0, 1.0)),
    record("a", "pgd", 3, one_site(0.0, 1.0), flips=1.0, expert_right=[6, 3], margin=1.0),
    record("b", "pgd", 5, one_site(0.0, 1.0), expert_right=[1, 5], margin=4.0),
    record("a", "joint", 4, one_site(0.5, 0.5), flips=1.0, expert_right=[5, 3]),
    record("b", "joint", 2, one_site(0.5, 0.5), expert_right=[4, 2]),
    record("a", "clean", 9, None, target="road"), record("b", "clean", 9, None, target="road"),
    record("a", "pgd", 1, None, target="road"), record("b", "pgd", 4, None, target="road"),
]  # fmt: skip
KINDS, EXPERTS = {"moe": "hard", "road": "single"}, {"moe": ("road", "sky")}


def figures(attack, **more):
    rows = list(telemetry_rows(RECORDS, KINDS, EXPERTS))
    assert {row["model"] for row in rows} == {"moe"}
    own = [row for row in rows if row["attack"] == attack]
    return {(row["figure"], row.get("expert")): (row["clean"], row["attacked"]) for row in own}


def test_every_figure_stands_clean_beside_attacked():
    found = figures("pgd")
    assert found["route flip rate", None] == (0.0, 0.5) == found["images with a flip", None]
    assert found["gate margin", None] == (2.0, 2.5)
    assert found["load", "road"] == (0.5, 0.0) and found["load", "sky"] == (0.5, 1.0)
    assert found["load shift", None] == (0.0, 0.5)
    assert found["largest load", None] == (0.5, 1.0)
    assert found["effective experts", None] == (pytest.approx(2), pytest.approx(1))  # all to one: 1.0
    assert not any(figure == "weight" for figure, _ in found)  # one weight for all classes


def test_kl_is_that_of_the_shares_and_finite():
    assert figures("joint")["KL(clean || attacked)", None][1] == pytest.approx(HALF, rel=1e-4)
    pgd = figures("pgd")["KL(clean || attacked)", None][1]
    assert pgd == pytest.approx(
        -math.log(1e-6) / 2, rel=1e-4
    )  # one of two images has gone from one to the other
    softened = [{**one, "shares": one_site(0.5, 0.5)} if "weights" in one else one for one in RECORDS]
    rows = telemetry_rows(softened, KINDS)
    assert all(row["attacked"] == pytest.approx(0) for row in rows if row["figure"].startswith("KL"))


def test_weights_of_each_class_have_a_row_each():
    two = [[[1.0, 0.25], [0.0, 0.75]]]
    records = [{**one, "weights": two} if "weights" in one else one for one in RECORDS]
    rows = [
        row for row in telemetry_rows(records, KINDS, EXPERTS, ("cars", "trees")) if row["figure"] == "weight"
    ]
    found = {(row["expert"], row["class"]): row["attacked"] for row in rows if row["attack"] == "pgd"}
    assert found == {
        ("road", "cars"): 1.0,
        ("road", "trees"): 0.25,
        ("sky", "cars"): 0.0,
        ("sky", "trees"): 0.75,
    }


def test_the_component_table():
    rows = list(component_rows(RECORDS, KINDS, EXPERTS))
    assert {row["eps"] for row in rows} == {0.1}
    found = {row["part"]: (row["value"], row["n_images"]) for row in rows}
    assert found == {
        "clean": (17 / 20, 2),
        "model": ((3 + 2) / 20, 2),  # a under pgd, b under joint
        "expert road, attacked by itself": (5 / 20, 2),
        "route changed at a recorded point": (0.5, 2),
        "route undecided: at no recorded point": (0.5, 2),
        "model, route changed": (0.3, 1),
        "model, route not changed": (0.2, 1),
        "best single expert of each image, same images": ((6 + 4) / 20, 2),
        "worst single expert of each image, same images": ((3 + 2) / 20, 2),
    }


def test_components_are_of_every_point_inside_the_ball():
    """Of both incumbents, and of those at smaller eps."""
    more = {"expert_right": [1, 1], "settings": {"name": "pgd"}}
    points = [
        record("b", "pgd", 1, one_site(1.0, 0.0), flips=1.0, incumbent="balanced", **more),
        record("a", "pgd", 2, one_site(1.0, 0.0), eps=0.05, **more),
        record("b", "pgd", 8, one_site(0.0, 1.0), eps=0.05, **more),
        record("a", "pgd", 0, one_site(1.0, 0.0), eps=0.2, **more),
        record("b", "pgd", 0, one_site(0.0, 1.0), eps=0.2, **more),
    ]
    rows = list(component_rows([*RECORDS, *points], KINDS, EXPERTS))
    found = {(row["eps"], row["part"]): row["value"] for row in rows}
    assert [found[eps, "model"] for eps in (0.05, 0.1, 0.2)] == [(2 + 8) / 20, (2 + 1) / 20, 0]
    changed = [found[eps, "route changed at a recorded point"] for eps in (0.05, 0.1, 0.2)]
    assert changed == [0, 1, 1]
    assert (0.05, "expert road, attacked by itself") not in found


def test_a_hard_gate_is_its_routed_expert_so_between_the_best_and_the_worst(tmp_path):
    toy.run(tmp_path)
    ledger = tmp_path / "ledger"
    results = RobustResults(read_manifest(ledger), read_units(ledger))
    records = [one for own in read_units(tmp_path / "ledger").values() for one in own]
    seen = 0
    for one in records:
        if one["target"] != "gate":
            continue
        right = sum(pixels for truth, said, pixels in one["cells"] if truth == said)
        assert right == one["expert_right"][one["route"][0][0]]
        assert sum(share for (share,) in one["shares"][0]) == pytest.approx(1, abs=1e-5)
        seen += one["expert_right"][0] != one["expert_right"][1]
    assert seen > 50
    kinds = {"first": "single", "mean": "ensemble", "gate": "hard"}
    for eps in toy.EPS:
        rows = {row["part"]: row["value"] for row in component_rows(records, kinds) if row["eps"] == eps}
        best, worst = (rows[f"{name} single expert of each image, same images"] for name in ("best", "worst"))
        assert worst <= rows["model"] <= best and rows["model"] <= rows["clean"]
        assert rows["model"] == results.worst("gate", eps, "adaptive").figures["aacc"].value
        assert rows["route changed at a recorded point"] + rows["route undecided: at no recorded point"] == 1


def test_what_is_not_finite_in_a_record_is_nan_and_nothing_else():
    """None stands for it in a ledger: the margin of a gate that masks all experts but one, all of one that says NaN."""
    masked = [{**one, "margin": None} if one["image"] == "a" else one for one in RECORDS]
    rows = {row["figure"]: row["attacked"] for row in telemetry_rows(masked, KINDS) if row["attack"] == "pgd"}
    assert math.isnan(rows["gate margin"]) and rows["least gate margin"] == 1.0
    broken = [
        {**one, "shares": one_site(None, None), "entropy": None} if one["image"] == "a" else one
        for one in RECORDS
    ]
    rows = {row["figure"]: row["attacked"] for row in telemetry_rows(broken, KINDS) if row["attack"] == "pgd"}
    assert math.isnan(rows["KL(clean || attacked)"]) and math.isnan(rows["gate entropy"])
    assert rows["route flip rate"] == 0.5 and rows["largest load"] == 1.0
    parts = {row["part"]: row["value"] for row in component_rows(broken, KINDS, EXPERTS)}
    assert parts == {row["part"]: row["value"] for row in component_rows(RECORDS, KINDS, EXPERTS)}
