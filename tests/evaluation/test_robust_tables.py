"""Robust figures from a ledger whose every count is known."""

import csv
import re
from itertools import product

import numpy as np
import pytest

from evaluation.beside import Beside
from evaluation.certificate import Certified
from evaluation.findings import Finding, Flags
from evaluation.formats import eps_text
from evaluation.ledger import INCUMBENTS
from evaluation.plan import units_of
from evaluation.results import FLOOR
from evaluation.robust_results import RobustResults, within_floor
from evaluation.robust_tables import (
    add_to_results,
    in_words,
    robust_markdown,
    robust_rows,
    robust_summary,
    timing_rows,
    verdict,
    winner_rows,
)
from evaluation.statistics import Estimate, Resamples
from evaluation.tables import RESULT_COLUMNS

SMALL, LARGE = 1 / 255, 2 / 255
IMAGES = [f"frame {place}" for place in range(12)]
SIZE = 10  # pixels of class 0; as many of class 1


def cells(right, sizes):
    """Cells of an image with (pixels of class 0, of class 1) right; the others are told for the other class."""
    counts = [[0, 0, right[0]], [0, 1, sizes[0] - right[0]], [1, 0, sizes[1] - right[1]], [1, 1, right[1]]]
    return [cell for cell in counts if cell[2]]


def ledger(
    right,
    members=(("fast", "common"), ("sly", "adaptive")),
    targets=("mean", "moe"),
    blocks=IMAGES,
    sizes=(SIZE, SIZE),
    gate_free=None,
    keys=None,
):
    """(manifest, units) where `right(target, eps, attack, image index, incumbent)` says what is right, and
    `gate_free` of the same what every gate leaves right. keys: of all attacks."""
    roles = {"mean": "ensemble", "moe": "gate", "other": "gate", "theirs": "baseline"}
    manifest = {
        "protocol": {"classes": ["road", "sky", "rail"], "seed": 7, "threads": 1, "split": "test"},
        "suite": "quick",
        "subset": "all",
        "eps": [SMALL, LARGE],
        "targets": [
            {
                "name": name,
                "role": roles[name],
                "identity": {"kind": "ensemble" if name == "mean" else "soft", "experts": 2},
                "members": [
                    {
                        "name": attack,
                        "column": column,
                        "attack": {"name": attack, **(keys or {})},
                        "version": 1,
                        "forwards": 5,
                        "network_passes": 10,
                    }
                    for attack, column in members
                ],
            }
            for name in targets
        ],
        "images": [
            {"name": name, "sha256": name, "block": block, "batch": place // 5}
            for place, (name, block) in enumerate(zip(IMAGES, blocks, strict=True))
        ],
    }
    units = {
        unit.name: [
            {
                "image": image,
                "incumbent": incumbent,
                "cells": cells(
                    right(unit.target, unit.eps, unit.member, IMAGES.index(image), incumbent), sizes
                ),
                "forwards": 1 if unit.member == "clean" else 5,
                **(
                    {
                        "gate_free": gate_free(
                            unit.target, unit.eps, unit.member, IMAGES.index(image), incumbent
                        )
                    }
                    if gate_free and unit.target == "moe"
                    else {}
                ),
            }
            for incumbent, image in product(INCUMBENTS, unit.images)
        ]
        for unit in units_of(manifest)
    }
    return manifest, units


def steps(target, eps, attack, image, incumbent):
    """fast takes half of class 0 at the small eps from even images, nothing at the large one; sly takes most of
    class 1 at the large one from odd images, a pixel more at the balanced incumbent."""
    if attack == "fast" and eps == SMALL and image % 2 == 0:
        return 5, 10
    if attack == "sly" and eps == LARGE and image % 2 and target == "moe":
        return 10, 2 - (incumbent == "balanced")
    return 10, 10


def results(right=steps, **keys):
    return RobustResults(*ledger(right, **keys))


def test_a_protocol_in_words_leaves_out_what_says_nothing():
    protocol = {
        "norm": "linf",
        "image_size": [8, 9],
        "classes": ["a"],
        "ignore_index": 255,
        "adversarials": "none",
    }
    assert in_words(protocol) == "norm linf, image size 8 x 9"


def test_some_images_alone_count_on_request():
    even = RobustResults(*ledger(steps), only=IMAGES[::2])
    assert even.images == tuple(IMAGES[::2]) and even.resamples.units == 6
    assert even.worst("moe", LARGE, "common").figures["aacc"].value == 15 / 20


def test_the_worst_case_is_that_of_each_image_and_smaller_eps_are_candidates():
    found = results()
    assert found.clean("moe")["aacc"].value == found.clean("moe")["miou"].value == 1
    small, large = (found.worst("moe", eps, "common").figures["aacc"].value for eps in (SMALL, LARGE))
    assert small == large == (6 * 15 + 6 * 20) / 240  # the images of the small eps are inside the large ball
    assert found.single("moe", LARGE, "fast")["aacc"].value == 1
    adaptive = found.worst("moe", LARGE, "adaptive")
    assert (
        adaptive.figures["aacc"].value == adaptive.figures["aacc_image_mean"].value == (6 * 15 + 6 * 11) / 240
    )
    assert found.worst("mean", LARGE, "adaptive").figures["aacc"].value == large
    # class 0: 90 of 120 right and 54 of class 1 told for it; the other way round
    expected = (90 / (120 + 54) + 66 / (120 + 30)) / 2
    assert adaptive.figures["miou"].value == pytest.approx(expected)
    assert adaptive.bracket.lower <= adaptive.figures["miou"].value
    assert found.counted.tolist() == [0, 1]  # no pixel is of class 2


def test_the_gate_free_floor_is_that_of_the_images_of_the_worst_case():
    def free(target, eps, attack, image, incumbent):
        return {"clean": 13, "fast": 7, "sly": 3 + (incumbent == "balanced")}[attack]

    found = results(gate_free=free)
    # clean images are the worst case of the odd ones at the small eps; of even ones it is always fast's
    assert found.gate_free("moe", 0.0).value == 13 / 20
    assert found.gate_free("moe", SMALL).value == (6 * 7 + 6 * 13) / 240
    assert (
        found.gate_free("moe", LARGE).value == (6 * 7 + 6 * 4) / 240
    )  # sly's balanced images have fewer right
    assert found.gate_free("moe", LARGE, "common").value == found.gate_free("moe", SMALL).value
    assert found.gate_free("mean", LARGE) is None
    low, high = found.gate_free("moe", LARGE).interval()
    assert low < found.gate_free("moe", LARGE).value < high
    row = next(row for row in robust_rows(found) if row["metric"] == "aacc_gate_free" and row["eps"] == SMALL)
    assert (row["model"], row["value"]) == ("moe", 120 / 240)
    row = next(row for row in robust_rows(found) if row["metric"] == "aacc_gate_free" and row["eps"] == 0)
    assert (row["model"], row["attack"], row["value"]) == ("moe", "clean", 13 / 20)
    table = robust_markdown(found).splitlines()
    assert next(line for line in table if line.startswith("| moe")).split(" | ")[10] == "50.00 (clean 65.00)"
    assert next(line for line in table if line.startswith("| mean")).split(" | ")[10] == "-"
    why = results(gate_free=lambda *_: "none: why")
    assert "| 27.50 (clean 65.00) |" in robust_markdown(found)  # 66 of 240
    assert why.gate_free("moe", LARGE) == "none: why" and "| none: why |" in robust_markdown(why)
    assert not any(row["metric"] == "aacc_gate_free" for row in robust_rows(why))


def test_what_stands_beside_is_told_with_the_rest():
    own = {"mean": 0.5, "moe": 0.4}
    rows = [
        {"source": source, "target": target, "metric": metric, "value": value, "eps": LARGE, "attack": "pgd",
         "n_images": 12, "units": 12, "against_own": value - own[target], "against_own_low": value - own[target] - 0.02,
         "against_own_high": value - own[target] + 0.02}
        for metric in ("aacc", "miou")
        for source, values in {"clean": (0.9, 0.8), "mean": (0.5, 0.3), "moe": (0.6, 0.4)}.items()
        for target, value in zip(("mean", "moe"), values, strict=True)
    ]  # fmt: skip
    beside = Beside(
        [Finding("masking", "moe", LARGE, "", "flag", "a gap")],
        [Certified("mean", SMALL, 0.25, "", 12), Certified("mean", LARGE, 0.125, "", 12)]
        + [Certified("moe", eps, None, "none computed: why", 0) for eps in (SMALL, LARGE)],
        rows,
    )
    text = robust_markdown(results(), beside)
    assert "- mean: at 1/255 25.00 % of the pixels, at 2/255 12.50 % of the pixels." in text
    assert "- moe: none computed: why." in text
    assert (
        "| mean | 50.00 | 30.00 |" in text
        and "made for mean, shown to moe, -10.00 points [-12.0, -8.0]." in text
    )
    assert "| moe !1 |" in text and "## Checks" in text and "## Detectors" not in text
    found = [row for row in robust_rows(results(), beside.certificates) if row["metric"] == "aacc_certified"]
    assert [(row["model"], row["eps"], row["value"]) for row in found] == [
        ("mean", SMALL, 0.25),
        ("mean", LARGE, 0.125),
    ]
    assert all(set(row) <= set(RESULT_COLUMNS) for row in found)


def test_of_a_single_attack_accuracy_is_that_of_one_incumbent_and_miou_the_lower_of_both():
    single = results().single("moe", LARGE, "sly")
    assert single["aacc"].value == (6 * 20 + 6 * 12) / 240
    assert single["miou"].value == pytest.approx((120 / (120 + 54) + 66 / 120) / 2)


def test_worst_cases_never_rise_with_eps_or_attacks():
    dice = np.random.default_rng(3)
    table = dice.integers(2, 11, (2, 3, 3, len(IMAGES), 2, 2))

    def right(target, eps, attack, image, incumbent):
        place = (
            ("mean", "moe").index(target),
            (0.0, SMALL, LARGE).index(eps),
            ("clean", "fast", "sly").index(attack),
        )
        return table[(*place, image, INCUMBENTS.index(incumbent))].tolist() if eps else (9, 9)

    found = results(right)
    for target, name in product(("mean", "moe"), ("aacc", "aacc_image_mean", "miou")):
        worst = {
            (eps, column): found.worst(target, eps, column).figures[name].value
            for eps, column in product((SMALL, LARGE), ("common", "adaptive"))
        }
        assert worst[LARGE, "adaptive"] <= min(worst[LARGE, "common"], worst[SMALL, "adaptive"])
        assert max(worst[LARGE, "common"], worst[SMALL, "adaptive"]) <= worst[SMALL, "common"]
        singles = [found.single(target, LARGE, one)[name].value for one in ("fast", "sly")]
        assert worst[LARGE, "adaptive"] <= min(*singles, found.clean(target)[name].value)


def test_the_floor_is_the_best_constant_answer():
    found = results(lambda *given: (3, 3), sizes=(12, 4)).floor()
    assert found == {"aacc": 0.75, "aacc_image_mean": 0.75, "miou": 0.375}
    resamples = Resamples(IMAGES)
    near = Estimate(0.52, np.linspace(0.4, 0.6, 2000), resamples)
    far = Estimate(0.7, np.linspace(0.6, 0.8, 2000), resamples)
    assert within_floor(near, 0.5) and not within_floor(far, 0.5)
    few = Estimate(0.52, near.replicates, Resamples(["a", "b"] * 6))
    assert not within_floor(few, 0.5) and within_floor(few, 0.52)  # no interval


def test_differences_are_paired_and_equal_models_differ_by_nothing():
    same = results(lambda target, *rest: steps("moe", *rest)).differences(LARGE, "adaptive")["moe", "mean"]
    assert all(gap.value == 0 and gap.interval() == (0, 0) for gap in same.values())
    gap = results().differences(LARGE, "adaptive")["moe", "mean"]["aacc"]
    assert gap.value == pytest.approx(-6 * 9 / 240) and gap.interval()[1] < 0
    assert [verdict(low, high, floor) for low, high, floor in (
        (0.1, 0.2, False), (-0.2, -0.1, False), (-0.1, 0.1, False), (0.1, 0.2, True), (np.nan, np.nan, False),
    )] == [
        "the gate is more robust on data like these", "the gate is less robust on data like these",
        "these data can't tell", "both are at the floor, nothing can be said", "too few blocks of images to tell",
    ]  # fmt: skip


def test_rows_are_tidy_and_complete():
    found = results()
    rows = robust_rows(found)
    assert all(set(row) <= set(RESULT_COLUMNS) for row in rows)
    assert {(row["suite"], row["subset"], row["n_images"], row["units"]) for row in rows} == {
        ("quick", "all", 12, 12)
    }
    keys = [(row["model"], row.get("attack", ""), row.get("eps"), row["metric"]) for row in rows]
    assert len(set(keys)) == len(keys)
    value = {key: row for key, row in zip(keys, rows, strict=True)}
    worst = value["moe", "worst of adaptive", LARGE, "aacc"]
    assert worst["value"] == (6 * 15 + 6 * 11) / 240 and worst["passes_per_image"] == 10
    assert worst["ci_low"] < worst["value"] < worst["ci_high"]
    assert value["moe", "worst of common", SMALL, "miou"]["passes_per_image"] == 5
    assert (
        value["moe", "fast", SMALL, "aacc"]["kind"] == "gate"
        and value["mean", "clean", 0.0, "miou"]["value"] == 1
    )
    assert value[FLOOR, "", None, "miou"]["value"] == 0.25
    assert value["moe - mean", "worst of adaptive", LARGE, "aacc"]["kind"] == "difference"
    bound = value["moe", "worst of adaptive", LARGE, "miou_search_bound"]["value"]
    assert bound <= value["moe", "worst of adaptive", LARGE, "miou"]["value"]


def test_what_class_hiding_hid_is_told_before_and_after():
    def seen(target, eps, attack, image, incumbent):
        """Of ten pixels of sky one is missed on the clean images, and six when it is hidden from even ones."""
        return (10, 4 if attack == "hide" and image % 2 == 0 and incumbent == "pixels" else 9)

    def hidden(class_id):
        members = (("fast", "common"), ("hide", "common"))
        rows = robust_rows(results(seen, members=members, keys={"class_id": class_id}))
        return [row for row in rows if row["metric"].startswith("hidden")]

    rows = hidden(1)
    found = {(row["model"], row["attack"], row["eps"]): (row["metric"], row["value"]) for row in rows}
    before, after = ("hidden_sky", 0.1), ("hidden_sky", (6 + 1) / 20)
    assert found == {
        (model, attack, eps): after if eps else before
        for model in ("mean", "moe")
        for attack, eps in (("clean", 0.0), ("hide", SMALL), ("hide", LARGE))
    }
    assert len(rows) == len(found) and not hidden(2)  # no image has the third class


def test_winners_are_named_for_each_image():
    rows = [
        row for row in winner_rows(results())
        if (row["model"], row["eps"], row["column"], row["figure"]) == ("moe", LARGE, "adaptive", "aacc")
    ]  # fmt: skip
    assert [row["image"] for row in rows] == IMAGES
    assert {(row["attack"], row["attack_eps"], row["incumbent"]) for row in rows[::2]} == {
        ("fast", SMALL, "pixels")
    }
    assert {(row["attack"], row["attack_eps"], row["incumbent"]) for row in rows[1::2]} == {
        ("sly", LARGE, "balanced")
    }


def test_what_attacks_find_that_know_the_gate_has_an_interval():
    found = results()
    gap = found.gaps("moe", LARGE)["aacc"]
    assert gap.value == (6 * 15 + 6 * 20) / 240 - (6 * 15 + 6 * 11) / 240 == pytest.approx(0.225)
    low, high = gap.interval()
    assert 0 <= low < gap.value < high
    (row,) = [
        row for row in robust_rows(found)
        if (row["model"], row.get("eps"), row["metric"], row["kind"]) == ("moe", LARGE, "aacc", "difference")
    ]  # fmt: skip
    assert row["attack"] == "worst of common - worst of adaptive"
    assert (row["value"], row["ci_low"], row["ci_high"]) == (gap.value, low, high)
    assert {one.value for one in found.gaps("mean", LARGE).values()} == {0}
    assert "Common minus adaptive worst case" not in robust_markdown(results(targets=("mean",)))


def test_a_mixture_of_others_is_compared_as_one_whatever_its_role():
    found = results(targets=("mean", "theirs"))
    assert found.mixtures == ["theirs"] and found.rivals == ["mean"]
    assert set(found.differences(LARGE, "adaptive")) == {("theirs", "mean")}
    text = robust_markdown(found)
    assert "- theirs: " in text[text.index("Common minus adaptive worst case") :]
    assert "theirs - mean = " in text


def test_seconds_stand_in_a_table_of_their_own():
    found = results()
    rows = list(timing_rows(found, dict.fromkeys(found.seconds_of, 2.0)))
    assert {row["seconds"] for row in rows} == {6.0}  # three batches
    assert {row["passes"] for row in rows if row["attack"] == "sly"} == {5}


def test_the_page_says_what_figures_need():
    text = robust_markdown(results())
    for fact in (
        "Suite quick on 12 images of all; seed 7, threads 1, split test.",
        "the 2 classes with ground truth in these images, of 3", "95 % bootstrap over 12 blocks",
        "## eps 1/255: worst case", "## eps 2/255: single attacks", "| 5 / 10 | 100.00 |",
        "aAcc, adaptive: moe - mean = -22.50 [", "the gate is less robust", "moe: fast at 1/255 6, sly 6",
        "Common minus adaptive worst case", "22.50 [", ", ".join(IMAGES), f"| {FLOOR} | floor | - | 25.00 |",
    ):  # fmt: skip
        assert fact in text, fact
    assert "favours" not in text
    intervals = re.findall(r" \[(-?[0-9.]+), (-?[0-9.]+)\]", text)
    assert intervals and {len(edge.partition(".")[2]) for pair in intervals for edge in pair} == {1}
    two = robust_markdown(
        results(lambda target, *rest: steps("moe", *rest), targets=("mean", "moe", "other"))
    )
    assert "The gate is the best of several on these very images" in two
    few = robust_markdown(results(blocks=["a", "b"] * 6))
    assert "none, as there are 2 blocks of images and 10 are needed" in few and "too few blocks" in few
    flags = Flags([Finding("masking", "moe", LARGE, "", "flag", "a gap")])
    head, *lines, _, flag = robust_summary(results(), flags)
    assert " ".join(head.split()) == "mIoU in % clean eps 1/255 eps 2/255"
    (gate,) = [line.split() for line in lines if line.startswith("moe ")]
    assert gate[-1] == "!1" and gate.count("!1") == 1 and flag.startswith("!1 moe, eps 2/255: masking: a gap")
    assert not any("!" in line for line in robust_summary(results(), Flags([])))


def test_eps_is_shown_as_people_write_it():
    assert [eps_text(eps) for eps in (8 / 255, 0.25 / 255, 0.1, 0.5)] == [
        "8/255",
        "0.25/255",
        "25.5/255",
        "127.5/255",
    ]
    assert eps_text(0.1234567) == "0.1235"


def test_robust_rows_stand_behind_clean_ones_once(tmp_path):
    def write(name, rows):
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, RESULT_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write("results.csv", [{"model": "moe", "metric": "miou", "value": "0.5"}])
    attacked = [{"model": "moe", "metric": "miou", "suite": "quick", "value": "0.1"}]
    add_to_results(tmp_path / "results.csv", attacked)
    once = (tmp_path / "results.csv").read_bytes()
    with open(tmp_path / "results.csv", newline="") as file:
        assert [(row["suite"], row["value"]) for row in csv.DictReader(file)] == [
            ("", "0.5"),
            ("quick", "0.1"),
        ]
    add_to_results(tmp_path / "results.csv", attacked)
    assert (tmp_path / "results.csv").read_bytes() == once
