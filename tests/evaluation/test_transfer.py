"""The transfer matrix: its diagonal is the white box, its counts those of a direct look, its figures by hand."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from attacks.pgd import pgd
from attacks.threat import Threat
from engine.config import UserError, component
from evaluation.targets import Target
from evaluation.transfer import (
    Transfer,
    below_worst_case,
    cross_counts,
    stronger_than_white_box,
    transfer,
    transfer_table,
)
from metrics.confusion import confusion

CLASSES = 3


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, CLASSES, 3, padding=1))


def target(name, seed):
    return Target(name, "single", network(seed))


def batches(counts=(3, 2), eps=8 / 255):
    """Labels are what the network of seed 1 says, some pixels ignored."""
    generator, teacher, made = torch.Generator().manual_seed(7), network(1), []
    for start, count in enumerate(counts):
        images = torch.rand(count, 3, 6, 8, generator=generator)
        labels = teacher(images).argmax(dim=1)
        labels[:, 0, 0] = 255
        made.append((images, labels, Threat(eps, seeds=tuple(range(10 * start, 10 * start + count)))))
    return made


ATTACK = component("attacks:ATTACKS", "pgd", steps=4)


def test_the_diagonal_is_the_white_box():
    targets = [target("first", 1), target("second", 2)]
    found = transfer(targets, ATTACK, batches(), CLASSES)
    assert found.sources == ("clean", "first", "second") and found.targets == ("first", "second")
    assert found.counts.shape == (3, 2, 5, CLASSES, CLASSES)
    start = 0
    for images, labels, threat in batches():
        part = slice(start, start := start + len(images))
        for place, one in enumerate(targets):
            own = pgd(one.model, images, labels, threat, steps=4)
            counts = found.counts[place + 1, place, part]
            assert counts.diagonal(axis1=1, axis2=2).sum(axis=1).tolist() == own.correct.tolist()
            for other, shown in enumerate(targets):
                said = shown.model(own.images).argmax(dim=1)
                expected = confusion(said, labels, CLASSES).numpy()
                assert np.array_equal(found.counts[place + 1, other, part], expected)
            clean = confusion(one.model(images).argmax(dim=1), labels, CLASSES).numpy()
            assert np.array_equal(found.counts[0, place, part], clean)
    assert (found.counts.sum(axis=(3, 4)) == 6 * 8 - 1).all()


def test_the_attack_works_on_its_source_only():
    """White box is below clean; images made for another network do less."""
    found = transfer([target("first", 1), target("second", 2)], ATTACK, batches(), CLASSES)
    rows = found.rows(list("vwxyz"))
    right = {(row["source"], row["target"]): row["value"] for row in rows if row["metric"] == "aacc"}
    assert right["clean", "first"] == 1.0
    assert right["first", "first"] < right["second", "first"]
    assert right["second", "second"] < min(right["first", "second"], right["clean", "second"])


def test_identical_networks_transfer_fully():
    found = transfer([target("one", 1), target("twin", 1)], ATTACK, batches(), CLASSES)
    assert (found.counts[:, 0] == found.counts[:, 1]).all()
    assert (found.counts[1] == found.counts[2]).all()
    assert stronger_than_white_box(found.rows(list("vwxyz"))) == []


def test_nothing_transfers_at_eps_0():
    found = transfer([target("first", 1), target("second", 2)], ATTACK, batches(eps=0.0), CLASSES)
    assert (found.counts == found.counts[:1]).all()


def test_the_images_with_the_fewest_right_pixels_are_shown():
    class Attack:
        def build(self, model, images, labels, threat):
            return SimpleNamespace(images=images * 0.9, balanced=1 - images)

    one, (images, labels, threat) = target("first", 1), batches()[0]
    found = transfer([one], Attack(), [(images, labels, threat)], CLASSES)
    expected = confusion(one.model(images * 0.9).argmax(dim=1), labels, CLASSES).numpy()
    assert np.array_equal(found.counts[1, 0], expected)


def test_networks_are_left_as_they_were():
    model = nn.Sequential(network(1), nn.BatchNorm2d(CLASSES), nn.Dropout())
    before = copy.deepcopy(model.state_dict())
    in_training = transfer([Target("one", "single", model.train())], ATTACK, batches()[:1], CLASSES)
    assert model.training
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    in_use = transfer([Target("one", "single", model.eval())], ATTACK, batches()[:1], CLASSES)
    assert np.array_equal(in_training.counts, in_use.counts)


def test_without_ignored_label_every_pixel_counts():
    images, labels, _ = batches()[0]
    counts = cross_counts([target("first", 1)], {"clean": images}, labels.clamp_max(2), CLASSES, None)
    assert counts.shape == (1, 1, 3, CLASSES, CLASSES)
    assert (counts.sum(axis=(3, 4)) == 48).all()


def by_hand():
    """Two images, two targets a and b; images made for b turn more of a than its own."""

    def one(right, wrong):
        return [[right, wrong], [0, 0]]

    clean = [[one(4, 0), one(2, 2)], [one(4, 0), one(4, 0)]]
    for_a = [[one(3, 1), one(2, 2)], [one(4, 0), one(3, 1)]]
    for_b = [[one(1, 3), one(2, 2)], [one(0, 4), one(0, 4)]]
    return Transfer(("clean", "a", "b"), ("a", "b"), np.array([clean, for_a, for_b]))


def test_figures_by_hand():
    rows = by_hand().rows(["one", "two"])
    assert len(rows) == 2 * 3 * 2
    values = [row["value"] for row in rows]
    assert values[:6] == values[6:] == [6 / 8, 1.0, 5 / 8, 7 / 8, 3 / 8, 0.0], "one class with ground truth"
    assert rows[3] == {
        "source": "a", "target": "b", "metric": "aacc", "value": 7 / 8, "ci_low": None, "ci_high": None, "units": 2,
        "against_own": 7 / 8, "against_own_low": None, "against_own_high": None,
    }  # fmt: skip
    assert [(row["source"], row["target"]) for row in stronger_than_white_box(rows)] == [("b", "a")]
    assert transfer_table(rows, "aacc")[2:] == [
        "| clean | 75.00 | 100.00 |",
        "| a | 62.50 | 87.50 |",
        "| b | 37.50 | 0.00 |",
    ]


def test_a_worst_case_above_what_transfers_is_flagged():
    rows = [row | {"eps": 0.1, "attack": "pgd"} for row in by_hand().rows(["one", "two"])]
    found = below_worst_case(rows, lambda target, eps: {"a": 0.5, "b": 0.0}[target])
    (flag,) = found
    assert (flag.check, flag.target, flag.eps, flag.severity) == ("weaker attacks", "a", 0.1, "flag")
    assert "made for b leave 37.50 % of accuracy, the worst case of the suite is 50.00 %" in flag.text
    within = {"a": 3 / 8 + 0.001, "b": 0.0}
    assert below_worst_case(rows, lambda target, eps: within[target]) == []


def test_intervals_are_over_blocks_and_differences_paired():
    """by_hand ten times over: twenty blocks. What two images say is still too little for a difference of 2 pixels of
    8 where one image has all of it; a difference that every image has is beyond chance."""
    whole = by_hand()
    many = Transfer(whole.sources, whole.targets, np.tile(whole.counts, (1, 1, 10, 1, 1)))
    rows = {
        (row["source"], row["target"]): row
        for row in many.rows([f"{place}" for place in range(20)])
        if row["metric"] == "aacc"
    }
    own, other = rows["a", "a"], rows["b", "a"]
    assert own["against_own"] == own["against_own_low"] == own["against_own_high"] == 0
    assert other["ci_low"] < other["value"] == 3 / 8 < other["ci_high"] and other["units"] == 20
    assert other["against_own_low"] < other["against_own"] == -2 / 8 < other["against_own_high"] < 0
    assert stronger_than_white_box(rows.values()) == [other]
    few = many.rows(["first"] * 10 + ["second"] * 10)
    assert {row["ci_low"] for row in few} == {None}
    fragile = dict(other, against_own_high=0.01)
    assert stronger_than_white_box([fragile]) == []


def test_refusals():
    with pytest.raises(UserError, match="own names"):
        transfer([target("first", 1), target("first", 2)], ATTACK, batches(), CLASSES)
    with pytest.raises(UserError, match="none of them clean"):
        transfer([target("clean", 1)], ATTACK, batches(), CLASSES)
    with pytest.raises(UserError, match="no images"):
        transfer([target("first", 1)], ATTACK, [], CLASSES)


def test_images_are_shown_as_bytes_where_these_are_kept():
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(256, (4, 3, 6, 8), generator=generator).float() / 255
    labels = target("first", 1).model(images).argmax(dim=1)
    shown = []

    class Listening(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = target("first", 1).model

        def forward(self, points):
            if not torch.is_grad_enabled():
                shown.append(points.detach())
            return self.network(points)

    threat = Threat(2.5 / 255, seeds=tuple(range(4)))
    for as_bytes in (False, True):
        shown.clear()
        transfer(
            [Target("one", "single", Listening())], ATTACK, [(images, labels, threat)], CLASSES, as_bytes
        )
        levels = shown[-1] * 255
        on_grid = bool((levels - levels.round()).abs().max() < 1e-3)
        assert on_grid == as_bytes and not torch.equal(shown[-1], images)
