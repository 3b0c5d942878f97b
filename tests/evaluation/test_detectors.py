"""Detectors: counted scores, and that an attacker who knows one does better than one who doesn't."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from attacks.evade import SCORES, Said
from evaluation.detectors import DETECTORS, cost, detection_rows, detection_table, scores_of, side_by_side
from evaluation.plan import Setup
from evaluation.targets import target_of
from tests.evaluation import robust_toy as toy

SETUP = Setup(classes=tuple("abcd"), eps=(8 / 255,), seed=3)


def one_hot(answers, classes=3):
    return 50 * torch.nn.functional.one_hot(torch.tensor(answers), classes).float()


def test_shares_of_pixels_are_counted():
    # four pixels, two experts: agree and followed, agree and contradicted, differ, differ
    experts = torch.stack([one_hot([0, 1, 2, 0]), one_hot([0, 1, 0, 1])])[None].transpose(
        2, 3
    )  # [1, E, K, 4]
    said = Said(one_hot([0, 2, 2, 2])[None].transpose(1, 2), experts)
    assert DETECTORS["disagreement"](said).tolist() == [0.5]
    assert DETECTORS["contradiction"](said).tolist() == [0.25]
    for name in ("disagreement", "contradiction"):  # what an attacker lowers tends to what is counted
        assert SCORES[name](said).item() == pytest.approx(DETECTORS[name](said).item(), abs=1e-6)


def test_each_kind_has_its_scores():
    first, mean, gate = toy.targets()
    assert scores_of(first) == ["entropy"]
    assert scores_of(mean) == ["entropy", "mutual_information", "disagreement", "contradiction"]
    assert scores_of(gate) == [*scores_of(mean), "gate_entropy"]


@pytest.fixture(scope="module")
def rows():
    return [
        row
        for target in toy.targets()
        for row in detection_rows(target, toy.scenes(), SETUP, 8 / 255, kappas=(1.0, 30.0), steps=8)
    ]


def test_every_score_has_a_row_for_each_attacker(rows):
    assert len(rows) == (1 + 4 + 5) * 3
    assert {row["n_images"] for row in rows} == {toy.IMAGES}
    for row in rows:
        assert 0 <= row["auroc"] <= 1 and 0 <= row["fpr95"] <= 1 and row["units"] == toy.IMAGES
        assert 0 <= row["ci_low"] <= row["auroc"] <= row["ci_high"] <= 1
        assert row["attacked"] < row["clean"] or row["kappa"] > 0


def test_an_attacker_who_knows_the_detector_is_never_the_weaker_one(rows):
    pairs = side_by_side(rows)
    assert len(pairs) == 10
    for pair in pairs:
        assert pair["adaptive"]["auroc"] <= pair["plain"]["auroc"] and pair["plain"]["kappa"] == 0
        kept = pair["adaptive"]["clean"] - pair["adaptive"]["attacked"]
        assert kept >= 0.5 * (pair["plain"]["clean"] - pair["plain"]["attacked"])
    assert sum(pair["adaptive"]["auroc"] < pair["plain"]["auroc"] - 0.05 for pair in pairs) >= 4
    assert len(detection_table(rows)) == 2 + 10


def test_a_score_that_is_no_number_flags_nothing():
    """Of a gate that says NaN, with answers that are finite nevertheless: no detector at all."""
    gate = toy.targets()[2]

    class Silent(type(gate.model)):
        def gate_logits(self, images):
            return super().gate_logits(images) * torch.nan

    model = Silent(*gate.model.networks, routing="hard").eval()
    found = detection_rows(target_of("gate", model), toy.scenes(), SETUP, 8 / 255, kappas=(1.0,), steps=3)
    silent = [row for row in found if row["score"] == "gate_entropy"]
    assert [(row["auroc"], row["fpr95"]) for row in silent] == [(0.5, 1.0)] * 2
    assert any(row["auroc"] != 0.5 for row in found)
    assert silent[0]["attacked"] < silent[0]["clean"] and "nan" not in " ".join(detection_table(found))


def test_an_attack_that_hides_by_doing_nothing_doesn_t_count():
    def row(kappa, attacked, auroc):
        return {
            "model": "m",
            "eps": 0.1,
            "score": "s",
            "kappa": kappa,
            "clean": 0.9,
            "attacked": attacked,
            "auroc": auroc,
        }

    (pair,) = side_by_side([row(0, 0.1, 0.9), row(1, 0.2, 0.8), row(10, 0.49, 0.6), row(100, 0.6, 0.5)])
    assert pair["adaptive"]["kappa"] == 10
    (pair,) = side_by_side([row(0, 0.1, 0.4), row(1, 0.2, math.nan), row(10, 0.1, 0.6)])
    assert pair["adaptive"]["kappa"] == 0
    (pair,) = side_by_side([row(0, 0.902, 0.5), row(1, 0.903, 0.4)])  # the attack even helps, by chance
    assert pair["adaptive"]["kappa"] == 0


def test_batches_don_t_matter_and_the_cost_is_as_told():
    asked = []
    target = toy.targets()[0]
    target.model.register_forward_hook(lambda *given: asked.append(len(given[1][0])))
    few = detection_rows(target, toy.scenes(3), SETUP, 4 / 255, kappas=(2.0,), steps=3)
    assert sum(asked) == toy.IMAGES * cost(target, (2.0,), 3)
    whole = detection_rows(toy.targets()[0], toy.scenes(toy.IMAGES), SETUP, 4 / 255, kappas=(2.0,), steps=3)
    for one, other in zip(few, whole, strict=True):
        assert np.isclose(one["auroc"], other["auroc"]) and one["attacked"] == other["attacked"]


def test_no_interval_over_fewer_than_ten_blocks(rows):
    few = [replace(scene, blocks=("road",) * len(scene.names)) for scene in toy.scenes()]
    (row, _) = detection_rows(toy.targets()[0], few, SETUP, 8 / 255, kappas=(1.0,), steps=8)
    assert row["units"] == 1 and row["ci_low"] is row["ci_high"] is None and row["auroc"] == rows[0]["auroc"]
    told = detection_table(rows)[2]
    assert f" {rows[0]['auroc']:.3f} [{rows[0]['ci_low']:.3f}, {rows[0]['ci_high']:.3f}] |" in told
    assert f" {row['auroc']:.3f} |" in detection_table([row])[2]


def test_clean_images_can_t_be_told_from_themselves():
    (plain, adaptive) = detection_rows(toy.targets()[0], toy.scenes(), SETUP, 0.0, kappas=(1.0,), steps=2)
    assert plain["auroc"] == adaptive["auroc"] == 0.5 and plain["attacked"] == plain["clean"]


def test_attacked_images_are_rounded_where_the_setup_keeps_bytes():
    """At 1.4/255 an attack moves by a byte at most."""
    listened = []

    class Listening(toy.Net):
        def forward(self, images):
            if not torch.is_grad_enabled():
                listened.append(images)
            return super().forward(images)

    one = target_of("net", Listening(0))
    for kept in ("none", "uint8"):
        listened.clear()
        detection_rows(one, toy.scenes(), toy.setup(adversarials=kept), 1.4 / 255, kappas=(1.0,), steps=2)
        off = [((points * 255) - (points * 255).round()).abs().max() > 1e-3 for points in listened]
        # of each batch: the clean images, then the last look of each attack and what is measured of it
        assert off[:5] == (
            [False, True, True, True, True] if kept == "none" else [False, True, False, True, False]
        )
