"""PGD and its kin where the worst case is known."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attacks.pgd import cospgd, fgsm, pgd, segpgd
from attacks.threat import Threat
from engine.config import component

FIXTURE = (torch.tensor([[1, -2, 0.5], [0, 1, -1], [-1, 0, 2]]), torch.tensor([0.1, 0, -0.1]))
IMAGE = torch.tensor([0.6, 0.2, 0.5]).view(1, 3, 1, 1)
LABEL = torch.tensor([0])


def threat(eps, count, norm="linf", ignore_index=None):
    return Threat(eps, norm, ignore_index, tuple(range(count)))


def test_the_linear_fixture(linear):
    assert linear(*FIXTURE)(IMAGE).flatten().tolist() == pytest.approx([0.55, -0.3, 0.3])


@pytest.mark.parametrize(
    ("rival", "norm", "eps"),
    [(2, "linf", 0.0454545), (2, "l2", 0.0780869), (1, "linf", 0.1545455), (1, "l2", 0.242857)],
)
def test_the_smallest_eps_of_a_linear_network(linear, rival, norm, eps):
    """eps* = margin / dual norm of the difference of the weights; class 2 is the nearest, class 1 without it."""
    network = linear(*(one[: rival + 1] for one in FIXTURE))
    for factor, correct in ((0.999, 1), (1.001, 0)):
        found = pgd(network, IMAGE, LABEL, threat(factor * eps, 1, norm), loss="margin", random_start=False)
        assert found.correct.tolist() == [correct]
        assert network(found.images).argmax(1).tolist() == [0 if correct else rival]


def test_the_box_counts(linear, survives):
    """At x = 0.02 the first input can fall by 0.02 only: a ball without the box would break it."""
    weight, bias, image = (
        torch.tensor([[1.0, 0.0], [-1.0, 0.0]]),
        torch.tensor([0.05, 0.0]),
        torch.tensor([[0.02, 0.5]]),
    )
    for shift, safe in ((0.0, True), (-0.06, False)):
        moved = bias + torch.tensor([shift, 0.0])
        assert survives(weight, moved, image, LABEL, 0.1).item() is safe
        found = pgd(linear(weight, moved), image.view(1, 2, 1, 1), LABEL, threat(0.1, 1))
        assert found.correct.item() == safe


def test_fgsm_is_exact_on_a_binary_linear_network(linear, survives):
    torch.manual_seed(0)
    weight, bias = torch.randn(2, 48), torch.randn(2)
    images = torch.rand(200, 3, 4, 4)
    network = linear(weight, bias)
    labels = network(images).argmax(1)
    for eps in (0.01, 0.03, 0.1):
        safe = survives(weight, bias, images.flatten(1), labels, eps)
        found = fgsm(network, images, labels, threat(eps, 200))
        assert 0.05 < safe.double().mean() < 0.95 and torch.equal(found.correct == 1, safe)
        assert found.forwards == 2 and found.backwards == 1


@pytest.fixture(scope="module")
def flat():
    """(network whose pixels see themselves only, images, labels with every tenth at random and some void)."""
    torch.manual_seed(0)
    network = nn.Conv2d(3, 5, 1).requires_grad_(False)
    images = torch.rand(4, 3, 16, 16)
    labels = network(images).argmax(1)
    labels = torch.where(torch.rand(labels.shape) < 0.1, torch.randint(5, labels.shape), labels)
    labels[:, :2] = 255
    return network, images, labels


@pytest.mark.parametrize("attack", [pgd, segpgd, cospgd])
def test_pixels_that_see_themselves_only(flat, survives, attack):
    """Each pixel is a linear classifier. No attack gets below what is exactly possible, a good one gets near it, and
    weights of pixels make no difference where pixels share nothing: all three find the same."""
    network, images, labels = flat
    pixels = images.permute(0, 2, 3, 1).reshape(-1, 3)
    counted = labels.flatten() != 255
    for eps in (0, 2 / 255, 4 / 255, 8 / 255, 16 / 255):
        safe = survives(
            network.weight.flatten(1), network.bias, pixels[counted], labels.flatten()[counted], eps
        )
        found = attack(network, images, labels, threat(eps, 4, ignore_index=255), steps=40)
        accuracy, exact = found.correct.sum().item() / len(safe), safe.sum().item() / len(safe)
        assert exact <= accuracy <= exact + (0.005 if eps else 0)
        plain = pgd(network, images, labels, threat(eps, 4, ignore_index=255), steps=40)
        assert torch.equal(found.correct, plain.correct)


def test_more_steps_of_the_same_length_are_never_worse(segmenter):
    images, network = torch.rand(3, 3, 8, 8), segmenter()
    labels = network(images).argmax(1)
    before = torch.full((3,), 64)
    for steps in (1, 2, 5, 9, 16):
        found = pgd(network, images, labels, threat(0.03, 3), steps=steps, step_size=0.01)
        assert (found.correct <= before).all()
        before = found.correct
    assert (before < 64).all()


def test_a_longer_run_goes_the_way_of_the_shorter_one(segmenter, recorder):
    images = torch.rand(2, 3, 8, 8)
    short, long = recorder(segmenter()), recorder(segmenter())
    labels = segmenter()(images).argmax(1)
    pgd(short, images, labels, threat(0.02, 2), steps=4, step_size=0.005)
    pgd(long, images, labels, threat(0.02, 2), steps=9, step_size=0.005)
    assert len(short.asked) == 5 and all(map(torch.equal, short.asked, long.asked))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_first_steps_by_hand(segmenter, recorder, norm):
    images, eps = torch.rand(2, 3, 8, 8) * 0.5 + 0.25, 0.02
    network = recorder(segmenter())
    labels = segmenter()(images).argmax(1)
    found = pgd(network, images, labels, threat(eps, 2, norm), steps=2, step_size=0.004, random_start=False)
    points = images.clone().requires_grad_()
    F.cross_entropy(segmenter()(points), labels).backward()
    direction = points.grad.sign() if norm == "linf" else F.normalize(points.grad.flatten(1)).view_as(images)
    assert torch.equal(network.asked[0], images)
    assert torch.allclose(network.asked[1], images + 0.004 * direction, atol=1e-7)
    assert len(network.asked) == 3 == found.forwards and found.backwards == 2 and found.losses.shape == (2, 2)


def test_default_step():
    """2.5 eps / steps: enough to reach any point of the ball from any other."""
    asked = []

    def network(images):
        asked.append(images.detach())
        return torch.stack([images.sum(dim=(1, 2, 3)), torch.zeros(len(images))], dim=1)

    images = torch.full((1, 1, 1, 1), 0.5)
    pgd(network, images, LABEL, threat(0.1, 1), steps=10, random_start=False)
    falls = [before.item() - after.item() for before, after in zip(asked[:-1], asked[1:], strict=True)]
    assert falls == pytest.approx([0.025] * 4 + [0.0] * 6, abs=1e-6)


def test_images_without_a_correct_pixel_stay_and_all_of_them_end_it(linear, recorder):
    weight, bias = FIXTURE
    images = IMAGE.repeat(2, 1, 1, 1)
    network = recorder(linear(weight, bias))
    found = pgd(
        network, images, torch.tensor([0, 1]), threat(0.5, 2), steps=8, step_size=0.01, random_start=False
    )
    assert all(torch.equal(points[1], images[1]) for points in network.asked)
    assert torch.equal(found.images[1], images[1]) and found.correct.tolist() == [0, 0]
    assert len(network.asked) == found.forwards < 9, "both are wrong before the last step"
    restarts = pgd(network, images, torch.tensor([1, 2]), threat(0.1, 2), restarts=5)
    assert restarts.forwards == 1


def test_restarts_begin_elsewhere_and_are_never_worse(segmenter, recorder):
    images, network = torch.rand(2, 3, 8, 8), recorder(segmenter())
    labels = segmenter()(images).argmax(1)
    once = pgd(network, images, labels, threat(0.02, 2), steps=3)
    twice = pgd(network, images, labels, threat(0.02, 2), steps=3, restarts=2)
    assert (twice.correct <= once.correct).all() and twice.forwards == 2 * once.forwards == 8
    assert torch.equal(network.asked[0], network.asked[4]) and not torch.equal(
        network.asked[4], network.asked[8]
    )


@pytest.mark.parametrize("random_start", [False, True])
def test_a_restart_is_never_the_run_before_it(random_start, segmenter, recorder):
    images, network = torch.rand(2, 3, 8, 8), recorder(segmenter())
    labels = segmenter()(images).argmax(1)
    pgd(network, images, labels, threat(0.02, 2), steps=1, restarts=3, random_start=random_start)
    first = network.asked[::2]
    assert torch.equal(first[0], images) != random_start
    assert not torch.equal(first[1], first[0]) and not torch.equal(first[2], first[1])


def test_draws_see_through_noise(linear):
    """A single gradient of a network that turns its logits round in two of five draws points the wrong way as often."""
    dice = torch.Generator().manual_seed(0)
    steady = linear(*FIXTURE)

    def noisy(images):
        return steady(images) * (1.3 if torch.rand((), generator=dice) < 0.6 else -1.0)

    found = pgd(noisy, IMAGE, LABEL, threat(0.05, 1), steps=10, draws=50, loss="margin", random_start=False)
    assert found.forwards == found.backwards == 7 * 50  # over at the seventh point
    assert steady(found.images).argmax(1).item() == 2
    assert pgd(noisy, IMAGE, LABEL, threat(0.01, 1), steps=3, draws=4).forwards == 16


@pytest.mark.parametrize("name", ["segpgd", "cospgd"])
def test_presets_are_pgd_with_their_loss(name, segmenter):
    images, network = torch.rand(2, 3, 8, 8), segmenter()
    given = network, images, network(images).argmax(1), threat(0.01, 2)
    found, same = (component("attacks:ATTACKS", *key).build(*given) for key in ((name,), ("pgd",)))
    ours = component("attacks:ATTACKS", "pgd", loss=name).build(*given)
    assert torch.equal(found.images, ours.images) and not torch.equal(found.images, same.images)


RUNS = {"steps": 3, "restarts": 2}


@pytest.mark.parametrize(
    ("name", "keys", "backwards"),
    [
        ("fgsm", {}, 1),
        ("pgd", {**RUNS, "step_size": "1/255", "random_start": False, "draws": 2}, 12),
        ("segpgd", RUNS, 6),
        ("cospgd", RUNS, 6),
    ],
)
def test_configs_build_them(name, keys, backwards, segmenter):
    images, network = torch.rand(1, 3, 8, 8), segmenter()
    found = component("attacks:ATTACKS", name, **keys).build(
        network, images, network(images).argmax(1), threat(0.02, 1)
    )
    assert found.correct.item() < 64 and found.backwards == backwards


def test_segpgd_and_cospgd_are_pgd_with_their_loss(segmenter):
    images, network = torch.rand(2, 3, 8, 8), segmenter()
    labels = network(images).argmax(1)
    for attack, loss in ((segpgd, "segpgd"), (cospgd, "cospgd")):
        found = attack(network, images, labels, threat(0.02, 2), steps=4)
        assert torch.equal(
            found.images, pgd(network, images, labels, threat(0.02, 2), loss=loss, steps=4).images
        )
        assert not torch.equal(found.images, pgd(network, images, labels, threat(0.02, 2), steps=4).images)
