"""What holds for every white-box attack, every network and every image."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attacks.apgd import apgd, apgd_targeted
from attacks.clean import clean
from attacks.pgd import cospgd, fgsm, pgd, segpgd
from attacks.pixel_losses import LOSSES
from attacks.search import scores
from attacks.threat import Threat, is_inside

WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 3.0])
ATTACKS = {
    "clean": clean,
    "fgsm": fgsm,
    **{f"pgd {loss}": partial(pgd, loss=loss, steps=4) for loss in LOSSES},
    "pgd, two restarts": partial(pgd, steps=3, restarts=2),
    "segpgd": partial(segpgd, steps=4),
    "cospgd": partial(cospgd, steps=4),
    "apgd": partial(apgd, steps=8),
    "apgd red_eps": partial(apgd, loss="masked_ce", steps=10, schedule="red_eps", restarts=2),
    "apgd_targeted": partial(apgd_targeted, steps=4, targets=2),
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
NETWORKS = {}


def network(kind, seed=0):
    """A small network with four classes: "pixels" label every pixel, "images" the whole image."""
    if (kind, seed) not in NETWORKS:
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)]
        if kind == "images":
            layers += [nn.Flatten(), nn.Linear(4 * 30, 4)]
        NETWORKS[kind, seed] = nn.Sequential(*layers).requires_grad_(False)
    return NETWORKS[kind, seed]


def data(kind, seed, count=3):
    """Images [count, 3, 5, 6], some at the edge of the box, and labels that the network gets right but for a few."""
    dice = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 5, 6, generator=dice)
    images[0, :, :2] = images[0, :, :2].round()
    labels = network(kind)(images).argmax(1)
    wrong = torch.rand(labels.shape, generator=dice) < 0.1
    labels = torch.where(wrong, torch.randint(4, labels.shape, generator=dice), labels)
    if kind == "pixels":
        labels[:, 0, :4] = 255
    return images, labels


def threat(kind, eps, norm, seeds):
    return Threat(eps, norm, 255 if kind == "pixels" else None, tuple(seeds), WEIGHTS)


@each_attack
@pytest.mark.parametrize("kind", ["pixels", "images"])
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.sampled_from([1 / 255, 0.05, 0.5, 2.0]),
)
def test_inside_ball_and_box_with_the_scores_that_are_told(attack, kind, seed, norm, eps):
    images, labels = data(kind, seed)
    ball = threat(kind, eps, norm, range(3))
    found = attack(network(kind), images.clone(), labels, ball)
    for points in (found.images, found.balanced):
        assert is_inside(points, images, ball).all()
        assert points.min() >= 0 and points.max() <= 1
        change = (points.double() - images).flatten(1)
        largest = change.abs().amax(dim=1) if norm == "linf" else change.norm(dim=1)
        assert (largest <= eps + 1e-6 * max(1, eps)).all()
    correct, _ = scores(network(kind)(found.images), labels, ball.ignore_index)
    _, class_accuracy = scores(network(kind)(found.balanced), labels, ball.ignore_index)
    assert torch.equal(correct, found.correct) and torch.equal(class_accuracy, found.class_accuracy)


@each_attack
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", ["pixels", "images"])
def test_eps_0_changes_nothing(attack, kind, norm):
    images, labels = data(kind, 5)
    found = attack(network(kind), images, labels, threat(kind, 0.0, norm, range(3)))
    assert torch.equal(found.images, images) and torch.equal(found.balanced, images)
    assert torch.equal(
        found.correct, clean(network(kind), images, labels, threat(kind, 0.0, norm, range(3))).correct
    )


@each_attack
@pytest.mark.parametrize("kind", ["pixels", "images"])
def test_neither_batches_nor_their_order_matter(attack, kind):
    images, labels = data(kind, 7, count=10)
    whole = attack(network(kind), images, labels, threat(kind, 0.05, "linf", range(10)))
    order = torch.tensor([3, 9, 0, 5, 1, 8, 2, 7, 6, 4])
    for size in (1, 3, 4, 7):
        for rows in order.split(size):
            part = attack(
                network(kind), images[rows], labels[rows], threat(kind, 0.05, "linf", rows.tolist())
            )
            assert torch.equal(part.correct, whole.correct[rows])
            assert torch.allclose(part.images, whole.images[rows], atol=1e-6)
            assert torch.allclose(part.class_accuracy, whole.class_accuracy[rows])


@each_attack
def test_void_pixels_change_nothing(attack):
    """Whatever stands in the labels at void pixels, and wherever the network looks there."""
    images, labels = data("pixels", 9)
    found = attack(network("pixels"), images, labels, threat("pixels", 0.05, "linf", range(3)))
    other = torch.where(labels == 255, -7, labels)
    renamed = attack(network("pixels"), images, other, Threat(0.05, "linf", -7, (0, 1, 2), WEIGHTS))
    assert torch.equal(found.images, renamed.images) and torch.equal(found.correct, renamed.correct)
    void = (labels == 255).unsqueeze(1)

    def babbling(points):
        return torch.where(void, network("pixels")(points).flip(1) + 3, network("pixels")(points))

    other = attack(babbling, images, labels, threat("pixels", 0.05, "linf", range(3)))
    assert torch.equal(found.images, other.images) and torch.equal(found.correct, other.correct)


def test_an_image_with_nothing_but_void_is_left_alone():
    images, labels = data("pixels", 3)
    labels[1] = 255
    found = pgd(
        network("pixels"), images, labels, threat("pixels", 0.05, "linf", range(3)), random_start=False
    )
    assert torch.equal(found.images[1], images[1]) and found.correct[1] == 0
    assert (found.zero_gradients == 0).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "attack",
    [pgd, partial(pgd, loss="margin"), partial(apgd, steps=40), apgd_targeted],
    ids=["ce", "margin", "apgd", "targeted"],
)
def test_without_a_limit_nothing_is_robust(attack, norm):
    images, labels = data("images", 1, count=20)
    found = attack(
        network("images"), images, labels, threat("images", 1.0 if norm == "linf" else 10.0, norm, range(20))
    )
    assert found.correct.sum() == 0


@pytest.mark.parametrize(
    "attack", [partial(pgd, loss="masked_ce", steps=60), partial(apgd, loss="masked_ce", steps=60)]
)
def test_without_a_limit_few_pixels_are_robust(attack):
    images, labels = data("pixels", 1, count=5)
    found = attack(network("pixels"), images, labels, threat("pixels", 1.0, "linf", range(5)))
    assert found.correct.sum() <= 0.1 * (labels != 255).sum()


@each_attack
def test_the_model_is_left_as_it_was(attack):
    """No gradients on weights, none asked for, and the images that were given are not written to."""
    images, labels = data("pixels", 2)
    before, model = images.clone(), network("pixels")
    attack(model, images, labels, threat("pixels", 0.05, "linf", range(3)))
    assert torch.equal(images, before) and all(weight.grad is None for weight in model.parameters())


@each_attack
def test_same_seeds_same_images(attack):
    images, labels = data("pixels", 4)
    first, again = (
        attack(network("pixels"), images, labels, threat("pixels", 0.05, "linf", range(3))) for _ in range(2)
    )
    assert torch.equal(first.images, again.images) and torch.equal(first.losses, again.losses)
