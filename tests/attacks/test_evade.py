"""Evasion: scores in closed form, and a trade of harm for a lower score."""

import math
from functools import partial

import pytest
import torch

from attacks.evade import SCORES, Said, evade, listen
from attacks.search import scores
from attacks.threat import Threat, is_inside
from engine.config import UserError
from networks.cnn_moe.model import CNNMoE

EPS = 8 / 255
IMAGES = torch.rand(3, 3, 10, 10, generator=torch.Generator().manual_seed(1))
THREAT = Threat(EPS, seeds=(0, 1, 2))


class Pair:
    """An ensemble or a mixture of two networks; the gate looks at the mean of the image."""

    num_experts, routing = 2, "soft"

    def __init__(self, first, second, gate):
        self.networks = first, second
        if gate:
            self.gate_and_mix = self._gate_and_mix
            self.gate_logits = lambda images: self._gate_and_mix(images)[0]

    def expert_logits(self, images):
        return torch.stack([network(images) for network in self.networks], dim=1)

    def combine(self, expert_logits):
        return expert_logits.mean(dim=1)

    def route(self, gate_logits):
        return gate_logits.softmax(dim=2)

    def _gate_and_mix(self, images):
        expert_logits, lead = self.expert_logits(images), 20 * (images.mean(dim=(1, 2, 3)) - 0.45)
        gate_logits = torch.stack([lead, -lead], dim=1)[None, :, :, None, None, None]
        return gate_logits, lambda weights: (weights[0] * expert_logits).sum(dim=1)

    def __call__(self, images):
        return listen(self, images).logits


@pytest.fixture(params=["single", "ensemble", "mixture"])
def network(request, segmenter):
    return (
        segmenter()
        if request.param == "single"
        else Pair(segmenter(0), segmenter(1), request.param == "mixture")
    )


def said(probabilities, experts=None, gate=None):
    """Two pixels of one image with the same probabilities."""

    def logits(values):
        return torch.tensor(values).log()

    return Said(
        logits(probabilities).view(1, -1, 1).expand(-1, -1, 2),
        None if experts is None else logits(experts).view(1, *torch.tensor(experts).shape, 1).expand(-1, -1, -1, 2),
        None if gate is None else logits(gate).view(1, 1, -1, 1, 1, 1),
    )  # fmt: skip


def test_scores_in_closed_form():
    half = said([0.25, 0.75], [[0.9, 0.1], [0.1, 0.9]], [0.5, 0.5])
    binary = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert SCORES["entropy"](half).item() == pytest.approx(binary, rel=1e-5)
    apart = 1 + 0.9 * math.log2(0.9) + 0.1 * math.log2(0.1)  # entropy of the mean, 1, minus that of each
    assert SCORES["mutual_information"](half).item() == pytest.approx(apart, rel=1e-5)
    assert SCORES["disagreement"](half).item() == pytest.approx(1 - 2 * 0.09, rel=1e-5)
    assert SCORES["contradiction"](half).item() == pytest.approx(0.09 * 0.75 + 0.09 * 0.25, rel=1e-5)
    assert SCORES["gate_entropy"](half).item() == pytest.approx(1, rel=1e-5)
    same = said([0.25, 0.75], [[0.3, 0.7], [0.3, 0.7]], [1 - 1e-9, 1e-9])
    assert SCORES["mutual_information"](same).item() == pytest.approx(0, abs=1e-6)
    assert SCORES["gate_entropy"](same).item() == pytest.approx(0, abs=1e-5)


def test_gradients_of_scores_are_finite_at_any_logits():
    for scale in (0.0, 1.0, 300.0):
        leaf = (scale * torch.randn(2, 2, 4, 5, generator=torch.Generator().manual_seed(0))).requires_grad_()
        one = Said(leaf.mean(dim=1), leaf, leaf[:, :1, :, :1, None].transpose(0, 1)[..., None])
        for name in ("entropy", "mutual_information", "disagreement", "contradiction"):
            value = SCORES[name](one)
            assert torch.isfinite(value).all() and (value > -1e-6).all() and (value < 1 + 1e-6).all()
            assert torch.isfinite(torch.autograd.grad(value.sum(), leaf)[0]).all(), name


def test_it_stays_inside_and_counts_what_it_asks(network):
    labels = network(IMAGES).argmax(dim=1)
    found = evade(network, IMAGES, labels, THREAT, steps=6)
    assert is_inside(found.images, IMAGES, THREAT).all()
    assert (found.forwards, found.backwards) == (7, 6)
    assert torch.equal(found.images, found.balanced)
    assert torch.equal(found.correct, scores(network(found.images), labels, 255)[0])
    still = evade(network, IMAGES, labels, THREAT.at(0.0), steps=2)
    assert torch.equal(still.images, IMAGES)


@pytest.mark.parametrize(
    "score", ["entropy", "mutual_information", "disagreement", "contradiction", "gate_entropy"]
)
def test_kappa_trades_harm_for_a_lower_score(score, segmenter):
    model = Pair(segmenter(0), segmenter(1), gate=True)
    labels = model(IMAGES).argmax(dim=1)
    harm, hidden = [], []
    for kappa in (0.0, 1000.0):
        found = evade(model, IMAGES, labels, THREAT, score=score, kappa=kappa, steps=20, loss="ce")
        harm.append(found.correct.sum().item())
        hidden.append(SCORES[score](listen(model, found.images)))
    assert harm[0] < harm[1]
    assert (hidden[1] < hidden[0]).all()
    assert (hidden[1] < SCORES[score](listen(model, IMAGES)) + 1e-6).all()


def test_the_incumbent_has_the_highest_of_what_is_raised(segmenter):
    model, seen = segmenter(), []
    labels = model(IMAGES).argmax(dim=1)

    def watched(points):
        logits = model(points)
        with torch.no_grad():
            plain = torch.nn.functional.cross_entropy(logits, labels, reduction="none").mean(dim=(1, 2))
            seen.append(plain - 5 * SCORES["entropy"](Said(logits)))
        return logits

    found = evade(watched, IMAGES, labels, THREAT, kappa=5.0, steps=12, restarts=2)
    best = torch.stack(seen).amax(dim=0)
    watched(found.images)
    assert torch.allclose(seen[-1], best, atol=1e-5)


@pytest.mark.parametrize("silent", [[True, True, True], [False, True, False]])
def test_where_a_score_is_no_number_the_task_is_attacked_as_without_it(silent, segmenter):
    """Of a gate that says NaN about some images, which then have a fixed weight."""
    model = Pair(segmenter(0), segmenter(1), gate=True)
    labels, plain = model(IMAGES).argmax(dim=1), model.gate_and_mix

    def gate_and_mix(images):
        gate_logits, _ = plain(images)
        factor = torch.where(torch.tensor(silent), torch.nan, 1.0).view(1, -1, 1, 1, 1, 1)
        return gate_logits * factor, lambda _: model.expert_logits(images).mean(dim=1)

    model.gate_and_mix, model.gate_logits = gate_and_mix, lambda images: gate_and_mix(images)[0]
    found, without = (
        evade(model, IMAGES, labels, THREAT, score="gate_entropy", kappa=kappa, steps=8) for kappa in (50, 0)
    )
    alike = [torch.equal(one, other) for one, other in zip(found.images, without.images, strict=True)]
    assert alike == silent and not found.bad_gradients.any()
    assert (found.correct < labels[0].numel()).all()


def test_a_score_that_a_network_doesn_t_have_is_refused(segmenter):
    labels = torch.zeros(3, 10, 10, dtype=torch.int64)
    attack = partial(evade, segmenter(), IMAGES, labels, THREAT)
    with pytest.raises(UserError, match="a single network has entropy only"):
        attack(score="disagreement")
    with pytest.raises(UserError, match="gate_entropy is for routed models"):
        attack(score="gate_entropy")


@pytest.mark.parametrize("score", SCORES)
def test_classifiers_have_one_answer_for_an_image(score):
    torch.manual_seed(0)
    model = CNNMoE(4, arch="resnet18", ratio=0.05).eval()
    images, labels = torch.rand(3, 3, 8, 8), torch.randint(4, (3,))
    found = evade(
        model, images, labels, Threat(0.1, ignore_index=None, seeds=(0, 1, 2)), score=score, steps=2
    )
    assert found.correct.shape == (3,) and torch.isfinite(found.images).all()
