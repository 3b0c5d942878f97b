"""Implanted weaknesses: they are there, gradients lead to them, and attacks that are too weak are told."""

import pytest
import torch
from torch import nn

from attacks.threat import Threat, is_inside, random_point
from evaluation.active_test import active_test, implant
from evaluation.suites import member, members
from evaluation.targets import Target, target_of
from evaluation.traps import EPS, Trap
from tests.evaluation.robust_toy import Ensemble, Net

COUNT, SIZE = 4, 12
IMAGES = torch.rand(COUNT, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 4, (COUNT, SIZE, SIZE), generator=torch.Generator().manual_seed(2))
LABELS[:, 0] = 255
THREAT = Threat(8 / 255, seeds=tuple(range(COUNT)))
PGD = member("pgd", {"name": "pgd", "loss": "masked_ce", "steps": 20}, "common", "single", 1)


def network(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 3, padding=1)
    return nn.Sequential(*layers).eval().requires_grad_(False)


def targets():
    ensemble = Ensemble(Net(0), Net(1)).requires_grad_(False)
    ensemble.combine = lambda logits: logits.amax(dim=1)
    hard, soft = (Trap("segmentation", gate).eval() for gate in ("hard", "soft"))
    return [
        target_of("net", network()),
        target_of("ensemble", ensemble),
        target_of("hard", hard),
        target_of("soft", soft),
    ]


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_witness_is_in_the_ball_and_wrong_everywhere_and_the_image_is_right(target, norm):
    threat = Threat(0.5 if norm == "l2" else EPS, norm, seeds=tuple(range(COUNT)))
    images = IMAGES if target.name in ("net", "ensemble") else target.model.samples(COUNT)[0]
    labels = LABELS if images is IMAGES else torch.randint(0, 4, (COUNT, 16, 16))
    found = implant(target, images, labels, threat)
    assert found.weak.all() and is_inside(found.witness, images, threat).all()
    copy, valid = found.target.model, labels != 255
    assert found.target.kind == target.kind
    assert (copy(images).argmax(1) == labels)[valid].all()
    assert not (copy(found.witness).argmax(1) == labels)[valid].any()
    # the place in the batch says nothing: each point belongs to the image that it is nearest to
    turned = copy(found.witness.flip(0)).flip(0)
    assert torch.allclose(turned, copy(found.witness), atol=1e-4)


def test_the_copies_keep_the_protocol():
    for target in targets()[1:]:
        images = IMAGES if target.kind == "ensemble" else target.model.samples(COUNT)[0]
        labels = torch.zeros(images[:, 0].shape, dtype=torch.int64)
        copy = implant(target, images, labels, THREAT).target.model
        points = random_point(images, THREAT, "test")
        if target.kind == "ensemble":
            assert torch.equal(copy(points), copy.combine(copy.expert_logits(points)))
            assert copy.expert_logits(points).shape[:2] == (COUNT, 2)
            continue
        gate_logits, mix = copy.gate_and_mix(points)
        assert gate_logits.shape == (1, COUNT, 2, 1, 1, 1)
        assert torch.equal(copy(points), mix(copy.route(gate_logits)))
        assert torch.equal(copy(points), copy.forward_given(points, copy.route(copy.gate_logits(points))))
        assert copy.routing == target.kind


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_the_quick_suite_finds_what_was_implanted_into_sound_targets(target):
    images = IMAGES if target.name in ("net", "ensemble") else target.model.samples(COUNT)[0]
    labels = LABELS if images is IMAGES else torch.randint(0, 4, (COUNT, 16, 16))
    (finding,) = active_test(
        target, images, labels, THREAT, members("quick", target.kind, target.num_experts)
    )
    assert finding.severity == "ok" and finding.text.startswith("attacks found 4 of 4")
    assert finding.eps == THREAT.eps


def test_plain_attacks_don_t_find_it_behind_a_hard_gate(monkeypatch):
    monkeypatch.setattr("evaluation.active_test.CANDIDATES", 30)
    target = targets()[2]
    images, labels = target.model.samples(COUNT)
    (finding,) = active_test(target, images, labels, THREAT, [PGD])
    assert finding.severity == "flag" and "too weak here" in finding.text


@pytest.mark.parametrize(
    "hide",
    [lambda images: (images * 32).round() / 32, lambda images: images.detach()],
    ids=["rounding", "detached"],
)
def test_a_network_that_hides_its_gradient_fires_it(hide):
    sound = network()
    masked = Target("masked", "single", lambda images: sound(hide(images)))
    (finding,) = active_test(masked, IMAGES, LABELS, Threat(16 / 255, seeds=THREAT.seeds), [PGD])
    assert finding.severity == "flag" and "too weak here" in finding.text


def test_an_attack_of_one_tiny_step_fires_it():
    weak = member(
        "pgd", {"name": "pgd", "steps": 1, "step_size": 1e-4, "random_start": False}, "common", "single", 1
    )
    (finding,) = active_test(targets()[0], IMAGES, LABELS, THREAT, [weak])
    assert finding.severity == "flag" and finding.text.startswith("attacks found 0 of 4")


def test_where_nothing_moves_the_outputs_there_is_nothing_to_implant():
    constant = Target("constant", "single", lambda images: network()(0 * images))
    (finding,) = active_test(constant, IMAGES, LABELS, THREAT, [PGD])
    assert finding.severity == "note" and "no weakness" in finding.text
