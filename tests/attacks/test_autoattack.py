"""AutoAttack by its name is pyautoattack's own, on the whole network or on one pathway of a mixture."""

import logging

import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack

from attacks.autoattack import autoattack, passes_at_most
from attacks.threat import Threat, is_inside
from engine.config import UserError
from evaluation.stand_ins import count_passes
from evaluation.suites import member
from networks.cnn_moe.model import CNNMoE
from tests.evaluation.classifier_toy import CLASSES, Mixture, Plain, images


def threat(eps, norm="linf"):
    return Threat(eps, norm, None, tuple(range(6)))


def right(model, shown):
    """Labels that the model gets right, but for the first image."""
    with torch.no_grad():
        labels = model(shown).argmax(dim=1)
    labels[0] = (labels[0] + 1) % CLASSES
    return labels


def directly(model, shown, labels, eps, norm="Linf", seed=0, classes=CLASSES):
    attack = AutoAttack(model, norm=norm, eps=eps, seed=seed, version="standard", device="cpu")
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = classes - 1
    with torch.random.fork_rng():
        return attack.run_standard_evaluation(shown, labels, batch_size=len(shown))[0]


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("l2", 0.1)])
def test_it_gives_the_images_of_pyautoattack(norm, eps):
    model, shown = Mixture().requires_grad_(False).eval(), images()
    labels = right(model, shown)
    found = autoattack(model, shown, labels, threat(eps, norm), seed=3)
    raw = directly(model, shown, labels, eps, {"linf": "Linf", "l2": "L2"}[norm], seed=3)
    assert torch.allclose(found.images, raw, rtol=0, atol=1e-6)
    expected = model(raw).argmax(dim=1) == labels
    assert torch.equal(found.correct == 1, expected) and 0 < expected.sum() < 5
    assert torch.equal(found.images[0], shown[0])  # wrong from the start
    assert is_inside(found.images, shown, threat(eps, norm)).all()
    assert found.balanced is not None and torch.equal(found.images, found.balanced)


@pytest.mark.parametrize("pathway", [0, 1])
def test_on_a_pathway_it_is_autoattack_on_the_plain_network(pathway):
    model, shown = Mixture().requires_grad_(False).eval(), images()
    plain = model.pathway(pathway)
    labels = right(plain, shown)
    found = autoattack(model, shown, labels, threat(0.02), pathway=pathway)
    raw = directly(plain, shown, labels, 0.02)
    assert torch.equal(found.images, raw)
    assert torch.equal(found.correct == 1, plain(raw).argmax(dim=1) == labels)
    assert 0 < found.correct.sum() < 5


def test_on_a_pathway_of_a_cnn_it_is_autoattack_on_the_exported_cnn():
    torch.manual_seed(0)
    model = (
        CNNMoE(5, arch="resnet18", ratio=0.03, num_experts=2, router_width=0.1).requires_grad_(False).eval()
    )
    shown = torch.rand(3, 1, 8, 8)
    labels = model.pathway(1)(shown).argmax(dim=1)
    found = autoattack(model, shown, labels, threat(0.5), pathway=1)
    raw = directly(model.pathway(1), shown, labels, 0.5)
    assert torch.allclose(found.images, raw, rtol=0, atol=1e-6) and not torch.equal(raw, shown)


def test_eps_0_gives_the_images_back_for_one_look():
    model, shown = Mixture().requires_grad_(False).eval(), images()
    for pathway in (None, 1):
        found = autoattack(model, shown, right(model, shown), threat(0.0), pathway=pathway)
        assert torch.equal(found.images, shown)
        assert (found.forwards, found.backwards) == (1, 0)


class Asked:
    """A network that counts what it is asked, apart from the attack."""

    def __init__(self, network):
        self.network, self.images = network, 0

    def __call__(self, images):
        self.images += len(images)
        return self.network(images)


@pytest.mark.parametrize("version", ["standard", "rand"])
def test_passes_are_counted_and_no_more_than_was_told(version):
    """Of an image that is never lost, with as many classes as targeted attacks go for."""
    network = Plain(classes=10).requires_grad_(False)
    model, shown = Asked(network), images(1)
    found = autoattack(model, shown, network(shown).argmax(dim=1), threat(1e-6), version=version)
    assert found.correct.tolist() == [1] and found.forwards == model.images
    forwards, backwards, networks = passes_at_most("single", 1, False, version=version)
    assert 0.9 * forwards < found.forwards <= forwards == networks
    assert 0.9 * backwards < found.backwards <= backwards


def test_passes_are_the_mean_over_the_images():
    """Of six images five are wrong at once."""
    model, shown = Plain().requires_grad_(False), images()
    labels = (model(shown).argmax(dim=1) + 1) % CLASSES
    labels[2] = (labels[2] - 1) % CLASSES
    asked = Asked(model)
    found = autoattack(asked, shown, labels, threat(1e-6))
    assert found.forwards == -(-asked.images // 6) < 2000


def test_networks_that_run():
    def networks(kind, experts, active, **keys):
        return member("a", {"name": "autoattack", **keys}, "common", kind, experts, None, active)

    whole = networks("single", 1, 0)
    assert whole.network_passes == whole.forwards
    for kind, active, keys, expected in (
        ("hard", 1, {}, 1),
        ("soft", 3, {}, 3),
        ("soft", 2, {}, 2),
        ("soft", 2, {"pathway": 2}, 1),
        ("hard", 0, {"pathway": 2}, 3),
        ("ensemble", 0, {}, 3),
    ):
        assert networks(kind, 3, active, **keys).network_passes == expected * whole.forwards
    told = count_passes(networks("hard", 3, 1, version="rand").attack, "hard", 3, None, 1)
    assert told[0] == networks("hard", 3, 1, version="rand").forwards < whole.forwards


def test_the_state_of_all_dice_is_left_alone():
    model, shown = Mixture().requires_grad_(False).eval(), images()
    torch.manual_seed(5), np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = autoattack(model, shown, right(model, shown), threat(0.04))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    torch.manual_seed(6)
    again = autoattack(model, shown, right(model, shown), threat(0.04))
    assert torch.equal(first.images, again.images)
    assert torch.is_grad_enabled() and logging.getLogger("auto-attack").level == logging.ERROR


@pytest.mark.parametrize(
    ("model", "shape", "keys", "told"),
    [
        (lambda shown: shown.expand(-1, 5, -1, -1), (6, 5, 5), {}, "it is for classifiers, labels"),
        (Plain(classes=3), (6,), {}, "3 classes; its targeted attacks need 4 or more"),
        (Plain(), (6,), {"pathway": 0}, "pathway is for mixtures"),
        (Mixture(), (6,), {"pathway": 2}, "pathway 2 is wrong; expected 0 to 1"),
    ],
)
def test_what_it_is_not_for_is_refused(model, shape, keys, told):
    with pytest.raises(UserError, match=told):
        autoattack(model, images(), torch.zeros(shape, dtype=torch.int64), threat(0.1), **keys)


@pytest.mark.parametrize(
    ("kind", "experts", "told"), [("single", 1, "for mixtures"), ("hard", 2, "expected 0 to 1")]
)
def test_a_pathway_that_is_not_there_is_refused_before_anything_runs(kind, experts, told):
    with pytest.raises(UserError, match=told):
        member("a", {"name": "autoattack", "pathway": 2}, "common", kind, experts)
