"""What an attack keeps of what it tried, and what it never takes for a success."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.search import Search, Trial, scores
from attacks.threat import Threat
from engine.config import UserError

IMAGES = torch.full((2, 1, 1, 4), 0.5)
LABELS = torch.tensor([[[0, 0, 0, 1]], [[0, 1, 1, 255]]])


def says(*classes):
    """Logits [B, 2, 1, 4] of these answers, a list of four per image."""
    return torch.nn.functional.one_hot(torch.tensor(classes), 2).permute(0, 2, 1).unsqueeze(2).float()


def search(model=None, threat=None, images=IMAGES, labels=LABELS):
    return Search(model, images, labels, threat or Threat(0.1))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 5), st.integers(1, 12), st.booleans())
def test_scores_by_hand(seed, count, classes, pixels, void):
    dice = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, pixels, generator=dice)
    labels = torch.randint(classes, (count, pixels), generator=dice)
    if void:
        labels[torch.rand(labels.shape, generator=dice) < 0.5] = 255
    correct, accuracy = scores(logits, labels, 255 if void else None)
    for image in range(count):
        of_class = {}
        for label, answer in zip(labels[image].tolist(), logits[image].argmax(0).tolist(), strict=True):
            if label != 255:
                of_class.setdefault(label, []).append(label == answer)
        assert correct[image] == sum(map(sum, of_class.values()))
        means = [sum(hits) / len(hits) for hits in of_class.values()]
        assert accuracy[image] == pytest.approx(sum(means) / len(means) if means else 0.0)


def test_scores_of_class_labels():
    correct, accuracy = scores(torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([0, 1]), None)
    assert correct.tolist() == [1, 0] and accuracy.tolist() == [1, 0]


def test_two_incumbents():
    """Losing the one pixel of class 1 costs a single pixel but half of the accuracy over classes."""
    found = search()
    for change, answers in (
        (0.01, ([0, 0, 0, 1], [0, 1, 1, 0])),
        (0.02, ([1, 1, 0, 1], [0, 1, 0, 0])),
        (0.03, ([0, 0, 0, 0], [0, 1, 1, 0])),
        (0.04, ([1, 0, 0, 1], [1, 1, 1, 0])),
    ):
        found.offer(IMAGES + change, says(*answers))
    found = found.found()
    assert torch.equal(found.images, IMAGES + torch.tensor([0.02, 0.02]).view(2, 1, 1, 1))
    assert found.correct.tolist() == [2, 2]
    assert torch.equal(found.balanced, IMAGES + torch.tensor([0.03, 0.04]).view(2, 1, 1, 1))
    assert found.class_accuracy.tolist() == [0.5, 0.5]


def test_points_outside_of_ball_or_box_are_no_candidates():
    wrong = says([1, 1, 1, 0], [1, 0, 0, 0])
    found = search()
    found.offer(IMAGES, says([0, 0, 0, 1], [0, 1, 1, 0]))
    found.offer(IMAGES + 0.11, wrong)
    images = torch.tensor([0.95, 0.5]).view(2, 1, 1, 1).expand_as(IMAGES).clone()
    corner = search(images=images)
    corner.offer(images, says([0, 0, 0, 1], [0, 1, 1, 0]))
    corner.offer(images + 0.09, wrong)
    assert found.found().correct.tolist() == [4, 3]
    assert corner.found().correct.tolist() == [4, 0]


@pytest.mark.parametrize("incumbent", ["best", "balanced"])
def test_an_incumbent_that_has_left_the_ball_is_a_bug_that_is_told(incumbent):
    """Such as that of an attack that goes on with the incumbent itself in place."""
    found = search()
    found.offer(IMAGES + 0.05, says([0, 0, 0, 1], [0, 1, 1, 0]))
    found.found()
    getattr(found, incumbent)[1, 0, 0, 2] += 0.06
    with pytest.raises(AssertionError, match=r"is 0.11\d* from its image \(linf\), eps 0.1"):
        found.found()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_no_success(bad):
    """argmax takes NaN for the largest: a broken pass would look like a broken network."""
    found = search()
    found.offer(IMAGES, says([0, 0, 0, 1], [0, 1, 1, 0]))
    logits = says([1, 1, 1, 0], [1, 0, 0, 0])
    logits[0, 1, 0, 2] = bad
    found.offer(IMAGES + 0.05, logits)
    assert found.found().correct.tolist() == [4, 0]
    assert torch.equal(found.found().images[0], IMAGES[0])


def test_nothing_but_nan_is_told():
    found = search()
    logits = says([0, 0, 0, 1], [0, 1, 1, 0])
    logits[1] = math.nan
    found.offer(IMAGES, logits)
    with pytest.raises(UserError, match=r"not finite at any of the points tried of images \[1\]"):
        found.found()


def test_bad_gradients_are_counted_and_never_pass():
    def objective(points, progress):
        slopes = torch.tensor([[math.nan, 2.0, -3.0, math.inf], [0.0, 0.0, 0.0, 0.0]]).view(2, 1, 1, 4)
        return Trial((points * slopes).flatten(1).sum(dim=1), says([0, 0, 0, 1], [0, 1, 1, 0]))

    found = search()
    gradient, _ = found.gradient(IMAGES, objective)
    assert gradient.flatten(1).tolist() == [[0, 2, -3, 0], [0, 0, 0, 0]]
    assert found.bad_gradients.tolist() == [1, 0] and found.zero_gradients.tolist() == [0, 1]


def test_a_loss_without_a_way_to_the_points_has_a_gradient_of_zeros():
    logits = says([0, 0, 0, 1], [0, 1, 1, 0])
    found = search()
    for loss in (torch.zeros(2), torch.zeros(2, requires_grad=True) * 2):
        gradient, _ = found.gradient(IMAGES, lambda points, progress, loss=loss: Trial(loss, logits))
        assert (gradient == 0).all()
    assert found.zero_gradients.tolist() == [2, 2]


def test_images_without_a_correct_pixel_raise_no_alarm():
    found = search(labels=torch.full((2, 1, 4), 255))
    found.gradient(IMAGES, lambda points, progress: Trial(0 * points.sum((1, 2, 3)), says([0] * 4, [1] * 4)))
    assert found.zero_gradients.tolist() == [0, 0] and not found.alive.any()
    assert found.found().correct.tolist() == [0, 0] and found.found().class_accuracy.tolist() == [0, 0]


def test_one_image_does_not_touch_anothers_gradient():
    def objective(points, progress):
        loss = points.flatten(1).sum(dim=1)
        return Trial(torch.stack([loss[0] * math.nan, loss[1]]), says([0, 0, 0, 1], [0, 1, 1, 0]))

    gradient, _ = search().gradient(IMAGES, objective)
    assert gradient.flatten(1).tolist() == [[0] * 4, [1] * 4]


def test_draws_are_averaged():
    """A network that answers right in one of three draws is wrong on the mean of its logits."""
    drawn = iter([says([0, 0, 0, 1], [0, 1, 1, 0])] + 2 * [says([1, 1, 1, 0], [1, 0, 0, 0])])
    factors = iter([1.0, 2.0, 6.0])

    def objective(points, progress):
        return Trial(next(factors) * points.flatten(1).sum(dim=1), next(drawn))

    found = search()
    gradient, tracked = found.gradient(IMAGES, objective, draws=3)
    assert torch.equal(gradient, torch.full_like(IMAGES, 3)) and tracked.tolist() == [6, 6]
    assert found.forwards == found.backwards == 3 and found.found().correct.tolist() == [0, 0]
    answers = iter(
        [says([0, 0, 0, 1], [0, 1, 1, 0]), says([0, 0, 0, 1], [0, 1, 1, 0]), says([1] * 4, [1] * 4)]
    )
    looked = search(lambda points: next(answers))
    looked.look(IMAGES, draws=3)
    assert looked.found().correct.tolist() == [4, 3] and looked.forwards == 3


def test_gradients_are_taken_wherever_it_is_called():
    def objective(points, progress):
        return Trial((points**2).flatten(1).sum(dim=1), says([0, 0, 0, 1], [0, 1, 1, 0]))

    with torch.no_grad():
        gradient, tracked = search().gradient(IMAGES, objective)
    assert torch.equal(gradient, 2 * IMAGES) and not tracked.requires_grad


def test_what_is_tracked_is_told_in_order():
    found = search()
    for change in (0.0, 0.1):
        found.gradient(
            IMAGES + change,
            lambda points, progress: Trial(
                points.sum((1, 2, 3)), says([0] * 4, [0] * 4), tracked=-points.sum((1, 2, 3))
            ),
        )
    assert found.found().losses.tolist() == [pytest.approx([-2, -2]), pytest.approx([-2.4, -2.4])]
    assert search(lambda points: says([0] * 4, [0] * 4)).losses == []


def test_another_score():
    found = Search(
        None,
        IMAGES,
        LABELS,
        Threat(0.1),
        score=lambda logits: (logits[:, 0].sum((1, 2)).long(), logits.sum((1, 2, 3)).double()),
    )
    found.offer(IMAGES, says([0] * 4, [0] * 4))
    found.offer(IMAGES + 0.05, says([0, 0, 1, 1], [0] * 4))
    assert found.found().correct.tolist() == [2, 4]
    assert found.within(Threat(0.2)).score is found.score
