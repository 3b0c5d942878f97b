"""Ledgers of classifiers made by hand: who is right under which attack is written down image by image."""

from evaluation.ledger import Ledger
from evaluation.plan import units_of

LABELS = [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 2]
IMAGES = [f"image_{place}" for place in range(len(LABELS))]
EPS = (0.01, 0.02)
MOE, PATHS, PLAIN = "moe", ("moe path 0", "moe path 1"), "plain"


def wrong(*places):
    """Which images are lost; the others are right."""
    return [place not in places for place in range(len(LABELS))]


def member(name, column, forwards=4, **attack):
    attack = {"name": name, **attack}
    return {
        "name": name,
        "column": column,
        "attack": attack,
        "version": 1,
        "forwards": forwards,
        "backwards": 3,
        "network_passes": forwards,
    }


def target(name, role, kind, members):
    return {"name": name, "role": role, "identity": {"kind": kind, "networks": 1}, "members": members}


def manifest(targets, eps, suite, **protocol):
    classes = {"classes": list("abcd"), "ignore_index": -1, "dataset": "toy", **protocol}
    images = [
        {"name": name, "sha256": name, "block": name, "batch": place // 5}
        for place, name in enumerate(IMAGES)
    ]
    return {
        "protocol": classes,
        "suite": suite,
        "subset": "test",
        "eps": list(eps),
        "targets": targets,
        "images": images,
    }


def record(unit, image, right, attack, kind, claimed=None, flips=None):
    """As attacks leave it; said is the next class where it is wrong."""
    place = IMAGES.index(image)
    truth = LABELS[place]
    claimed = right if claimed is None else claimed
    source = (
        unit.target
        if "pathway" not in attack["attack"]
        else f"{unit.target} path {attack['attack']['pathway']}"
    )
    found = {
        "target": unit.target, "source": source, "attack": unit.member, "settings": attack["attack"], "eps": unit.eps,
        "norm": "linf", "image": image, "cells": [[truth, truth if right else (truth + 1) % 4, 1]], "valid": 1,
        "claimed_correct": int(claimed), "forwards": attack["forwards"], "backwards": attack["backwards"],
        "zero_gradients": 0, "bad_gradients": 0, "unsettled": 0.0, "status": "ok",
    }  # fmt: skip
    if kind == "hard":
        found |= {"flips": float(bool(flips)), "weights": [[[1.0], [0.0]]], "shares": [[[0.9], [0.1]]],
                  "margin": 1.0, "least_margin": 1.0, "entropy": 0.1, "expert_right": [1, 0]}  # fmt: skip
    return found


def write(folder, plan, right, *, claimed=None, flips=None):
    """A complete ledger. right: (target, eps, member) -> bool of each image, all right where it isn't there; flips,
    claimed likewise."""
    kinds = {one["name"]: one["identity"]["kind"] for one in plan["targets"]}
    attacks = {(one["name"], own["name"]): own for one in plan["targets"] for own in one["members"]}
    with Ledger(folder, plan) as ledger:
        for unit in units_of(ledger.manifest):
            key = (unit.target, unit.eps, unit.member)
            attack = attacks.get(key[::2], {"attack": {"name": "clean"}, "forwards": 1, "backwards": 0})
            records = []
            for incumbent in ("pixels", "balanced"):
                for image in unit.images:
                    place = IMAGES.index(image)
                    own = right.get(key, wrong())[place]
                    said = (claimed or {}).get(key)
                    flipped = (flips or {}).get(key, [False] * len(IMAGES))[place]
                    one = record(unit, image, own, attack, kinds[unit.target], said and said[place], flipped)
                    records.append({**one, "incumbent": incumbent})
            ledger.add(unit.name, records, 1.0)
    return folder


def suite_plan():
    routed = [member("pgd", "common"), member("joint", "adaptive", 7), member("gate_only", "adaptive", 5),
              member("change_route", "adaptive", 6), member("experts_only", "adaptive", 8)]  # fmt: skip
    single = [member("pgd", "common"), member("apgd", "adaptive", 9)]
    targets = [target(MOE, "cnn_moe", "hard", routed), *(target(path, "pathway", "single", single) for path in PATHS),
               target(PLAIN, "cnn", "single", single)]  # fmt: skip
    return manifest(targets, EPS, "standard", norm="linf", seed=3)


RIGHT = {
    (MOE, 0.0, "clean"): wrong(11),
    (MOE, 0.01, "pgd"): wrong(0, 11),
    (MOE, 0.01, "joint"): wrong(1, 11),
    (MOE, 0.01, "gate_only"): wrong(2, 11),
    (MOE, 0.01, "change_route"): wrong(11),
    (MOE, 0.01, "experts_only"): wrong(3, 11),
    (MOE, 0.02, "pgd"): wrong(4, 11),  # not 0, which it took at the smaller eps
    (MOE, 0.02, "joint"): wrong(5, 6, 11),
    (MOE, 0.02, "gate_only"): wrong(11),
    (MOE, 0.02, "change_route"): wrong(7, 11),
    (MOE, 0.02, "experts_only"): wrong(11),
    (PATHS[0], 0.0, "clean"): wrong(10),
    (PATHS[0], 0.01, "pgd"): wrong(0, 10),
    (PATHS[0], 0.02, "apgd"): wrong(1, 10),
    (PATHS[1], 0.01, "apgd"): wrong(2),
    (PATHS[1], 0.02, "pgd"): wrong(3, 4),
    (PLAIN, 0.01, "pgd"): wrong(0, 1, 2),
    (PLAIN, 0.02, "apgd"): wrong(3, 4, 5, 6, 7, 8),
}
FLIPS = {
    (MOE, 0.01, "joint"): [place == 1 for place in range(12)],
    (MOE, 0.01, "gate_only"): [place in (2, 3) for place in range(12)],
    (MOE, 0.02, "change_route"): [place == 7 for place in range(12)],
}


def auto_plan():
    own = [member("autoattack", "common", 100, seed=3)]
    paths = [
        {**member("autoattack", "adaptive", 90, seed=3, pathway=one), "name": f"autoattack path {one}"}
        for one in (0, 1)
    ]
    targets = [target(MOE, "cnn_moe", "hard", own + paths), target(PLAIN, "cnn", "single", own)]
    plan = manifest(targets, EPS[1:], "autoattack", norm="linf", seed=3, batch=5)
    return {**plan, "images": plan["images"][:10]}


AUTO_RIGHT = {
    (MOE, 0.02, "autoattack"): wrong(0),
    (MOE, 0.02, "autoattack path 0"): wrong(1, 2),
    (MOE, 0.02, "autoattack path 1"): wrong(),
    (PLAIN, 0.02, "autoattack"): wrong(*range(10)),
}
AUTO_CLAIMED = {
    (MOE, 0.02, "autoattack path 0"): wrong(*range(8)),
    (MOE, 0.02, "autoattack path 1"): wrong(9),
}


def suite(folder):
    return write(folder, suite_plan(), RIGHT, flips=FLIPS)


def auto(folder):
    return write(folder, auto_plan(), AUTO_RIGHT, claimed=AUTO_CLAIMED)
