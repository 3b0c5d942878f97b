"""Hiding a class: its goal map by brute force, its loss by hand, what it reaches on a per-pixel network."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.hide import Aim, aim_at, fill, hide
from attacks.search import scores
from attacks.threat import Threat, check_inside
from engine.config import UserError


def maps(seed, classes=3, size=(5, 7)):
    return torch.randint(0, classes, size, generator=torch.Generator().manual_seed(seed))


def test_a_hole_takes_the_nearest_class():
    classes = torch.tensor([[0, 9, 9, 9, 1], [0, 9, 9, 9, 1], [2, 2, 9, 1, 1]])
    holes = classes == 9
    filled = fill(classes, holes, ~holes, torch.zeros_like(classes))
    assert filled[:, 1].tolist() == [0, 0, 2]
    assert filled[:, 3].tolist() == [1, 1, 1]
    assert torch.equal(filled[~holes], classes[~holes])


@given(seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_goal_by_brute_force(seed):
    """Every hidden pixel gets a class of one of its nearest counted pixels of another class; the rest stays."""
    labels, class_id = maps(seed, classes=4)[None], 1
    labels[labels == 3] = 255
    logits = torch.nn.functional.one_hot(maps(seed + 1), 3).permute(2, 0, 1)[None].float()
    for source, before in (("prediction", logits.argmax(dim=1)[0]), ("labels", labels[0])):
        aim = aim_at(class_id, logits, labels, source, 255)
        counted = labels[0] != 255
        assert torch.equal(aim.hidden[0], counted & (before == class_id))
        assert torch.equal(aim.kept[0], counted & (before != class_id))
        assert torch.equal(aim.goal[0][aim.kept[0]], before[aim.kept[0]])
        others = aim.kept[0].nonzero()
        for place in aim.hidden[0].nonzero():
            if len(others):
                distances = (others - place).square().sum(dim=1)
                nearest = others[distances == distances.min()]
                assert aim.goal[0][tuple(place)] in before[nearest[:, 0], nearest[:, 1]]
            assert aim.goal[0][tuple(place)] != class_id


def test_where_nothing_else_is_seen_the_second_best_class_fills():
    logits = torch.tensor([0.0, 5.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    aim = aim_at(1, logits, torch.ones(1, 2, 2).long())
    assert aim.goal.eq(2).all() and aim.hidden.all() and not aim.kept.any()


def an_aim():
    """Two pixels to hide (class 1, to become 0), one to keep (0), one ignored."""
    hidden, kept = torch.tensor([[[True, True, False, False]]]), torch.tensor([[[False, False, True, False]]])
    return Aim(1, torch.tensor([[[0, 0, 0, 1]]]), hidden, kept)


def test_loss_by_hand():
    """Cross-entropies to class 0 of two classes: log(1 + e^gap). The mean over the hidden, and the kept pixel."""
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 1, 0] = torch.tensor([2.0, -3.0, 1.0, 50.0])
    far, near, other = (torch.tensor(gap).exp().log1p().item() for gap in (2.0, -3.0, 1.0))
    loss = an_aim().loss(logits, 0.25, 1.0).item()
    assert loss == pytest.approx(0.25 * (far + near) / 2 + 0.75 * other, rel=1e-5)
    masked = an_aim().loss(logits, 0.25, 0.75).item()
    assert masked == pytest.approx(0.25 * far / 2 + 0.75 * other, rel=1e-5)


def test_gradients_go_where_the_weights_say():
    def gradient(omega, confidence=1.0):
        logits = torch.zeros(1, 2, 1, 4)
        logits[0, 1, 0] = torch.tensor([2.0, -3.0, 1.0, 50.0])
        logits.requires_grad_()
        an_aim().loss(logits, omega, confidence).sum().backward()
        return (logits.grad[0].abs().sum(dim=0) > 0).flatten().tolist()

    assert gradient(0.5) == [True, True, True, False]
    assert gradient(0.5, 0.75) == [True, False, True, False]
    assert gradient(1.0) == [True, True, False, False]
    assert gradient(0.0) == [False, False, True, False]


def test_shares_and_failures_by_hand():
    said = torch.tensor([1, 0, 1, 0])
    logits = torch.nn.functional.one_hot(said, 2).T.view(1, 2, 1, 4).float()
    aim = an_aim()
    gone, unchanged = aim.shares(logits)
    assert (gone.item(), unchanged.item()) == (0.5, 0.0)
    missed, mean = aim.failures(logits)
    assert (missed.item(), mean.item()) == (2, 0.75)
    nothing = Aim(1, aim.goal, torch.zeros_like(aim.hidden), aim.kept)
    assert [share.item() for share in nothing.shares(logits)] == [1.0, 0.0]


def per_pixel(images):
    """Class k has the logit 8 * channel k: a pixel's class is its strongest channel."""
    return 8 * images


def scene():
    """Road (0) and sky (2) with a person (1), which 0.2 more in one channel and less in another makes vanish."""
    labels = torch.zeros(2, 6, 8).long()
    labels[:, :2] = 2
    labels[0, 2:4, 3:6] = 1
    labels[1, 3, 0] = 255
    images = torch.full((2, 3, 6, 8), 0.4)
    return images.scatter(1, labels.clamp_max(2)[:, None], 0.6), labels


def outcome(points, images, labels, goal="prediction"):
    """(failures, mean share of them) per image, of hiding class 1."""
    missed, mean = aim_at(1, per_pixel(images), labels, goal).failures(per_pixel(points))
    return missed.tolist(), mean.tolist()


def test_a_person_vanishes_and_the_rest_stays():
    images, labels = scene()
    threat = Threat(0.15, seeds=(1, 2))
    found = hide(per_pixel, images, labels, threat, class_id=1, steps=20)
    said = per_pixel(found.images).argmax(dim=1)
    assert not (said == 1).any()
    assert torch.equal(said[labels != 1], per_pixel(images).argmax(dim=1)[labels != 1])
    assert said[0, 2:4, 4].tolist() == [2, 0]
    assert (
        outcome(found.images, images, labels) == outcome(found.balanced, images, labels) == ([0, 0], [0, 0])
    )
    check_inside(found.images, images, threat)
    assert torch.equal(found.images[1], images[1]), "nothing to hide there"


def test_too_small_a_ball_hides_nothing_and_changes_nothing_else():
    images, labels = scene()
    found = hide(per_pixel, images, labels, Threat(0.09, seeds=(1, 2)), class_id=1)
    assert (
        outcome(found.images, images, labels) == outcome(found.balanced, images, labels) == ([6, 0], [0.5, 0])
    )


def test_counts_are_those_of_every_attack():
    images, labels = scene()
    found = hide(per_pixel, images, labels, Threat(0.15, seeds=(1, 2)), class_id=1)
    correct, _ = scores(per_pixel(found.images), labels, 255)
    _, accuracy = scores(per_pixel(found.balanced), labels, 255)
    assert torch.equal(found.correct, correct) and torch.equal(found.class_accuracy, accuracy)
    assert found.correct.tolist() == [48 - 6, 48 - 1]


def test_both_incumbents():
    """The network's one pixel of the class vanishes only when two others change: fewest failures is to leave it,
    the lower mean of the shares to hide it."""
    images, labels = scene()
    labels[0, 2:4, 3:6] = 0
    images = torch.full((2, 3, 6, 8), 0.4).scatter(1, labels.clamp_max(2)[:, None], 0.6)
    labels[0, 3, 3] = 1
    images[0, :, 3, 3] = torch.tensor([0.4, 0.6, 0.4])

    def tied(points):
        logits = per_pixel(points).clone()
        lost = logits[:, 0, 3, 3] - logits[:, 1, 3, 3]
        logits[:, 2, 5, :2] = logits[:, 0, 5, :2] + (lost + 0.2)[:, None]
        return logits

    found = hide(tied, images, labels, Threat(0.15, seeds=(1, 2)), class_id=1, omega=1.0)
    aim = aim_at(1, tied(images), labels)
    pixels, balanced = (aim.failures(tied(points)) for points in (found.images, found.balanced))
    assert (pixels[0][0].item(), balanced[0][0].item()) == (1, 2)
    assert balanced[1][0] < pixels[1][0]


@pytest.mark.parametrize("random_start", [False, True])
def test_nothing_at_eps_0(random_start):
    images, labels = scene()
    found = hide(
        per_pixel, images, labels, Threat(0.0, seeds=(1, 2)), class_id=1, steps=2, random_start=random_start
    )
    assert torch.equal(found.images, images) and torch.equal(found.balanced, images)


def test_the_labels_can_be_the_goal():
    """The network takes a pixel of road for sky: with the labels as goal that pixel is to become road."""
    images, labels = scene()
    images[0, :, 5, 7] = torch.tensor([0.5, 0.4, 0.55])
    threat = Threat(0.15, seeds=(1, 2))
    for goal, wanted in (("prediction", 2), ("labels", 0)):
        found = hide(per_pixel, images, labels, threat, class_id=1, goal=goal)
        assert per_pixel(found.images).argmax(dim=1)[0, 5, 7] == wanted
        assert outcome(found.images, images, labels, goal)[0] == [0, 0]


@pytest.mark.parametrize("random_start", [False, True])
def test_an_image_without_the_class_stays_as_it_is(random_start):
    """The network is wrong about a pixel of the second image, whose labels have nothing to hide."""
    images, labels = scene()
    images[1, :, 5, 7] = torch.tensor([0.5, 0.4, 0.55])
    options = {"class_id": 1, "goal": "labels", "random_start": random_start}
    found = hide(per_pixel, images, labels, Threat(0.15, seeds=(1, 2)), **options)
    assert torch.equal(found.images[1], images[1]) and torch.equal(found.balanced[1], images[1])
    assert not torch.equal(found.images[0], images[0])
    assert found.correct[1] == 48 - 2 and found.zero_gradients[1] == 0


def test_ignored_pixels_do_not_count():
    images, labels = scene()
    labels[0, 2:4, 3:6] = 255
    found = hide(per_pixel, images, labels, Threat(0.15, seeds=(1, 2)), class_id=1)
    assert torch.equal(found.images, images)


def test_restarts_begin_elsewhere(recorder):
    images, labels = scene()
    network = recorder(per_pixel)
    hide(network, images, labels, Threat(0.05, seeds=(1, 2)), class_id=1, steps=1, restarts=3)
    starts = network.asked[1::2][:3]
    assert torch.equal(starts[0], images)
    assert not torch.equal(starts[1], images) and not torch.equal(starts[2], starts[1])


def test_passes_are_counted():
    images, labels = scene()
    found = hide(per_pixel, images, labels, Threat(0.05, seeds=(1, 2)), class_id=1, steps=7, restarts=2)
    assert (found.forwards, found.backwards) == (1 + 2 * 8 + 2, 2 * 7)


def test_refusals():
    images, labels = scene()
    with pytest.raises(UserError, match=r"class_id 3 is no class; allowed: 0\.\.2"):
        hide(per_pixel, images, labels, Threat(0.1, seeds=(1, 2)), class_id=3)
    with pytest.raises(UserError, match="a label per pixel"):
        aim_at(1, torch.zeros(2, 3), torch.zeros(2).long())
