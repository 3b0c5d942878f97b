"""Auto-PGD: its schedule, its moves, closed forms, and the authors' attack as pyautoattack ships it."""

import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import nn

from attacks.apgd import apgd, apgd_targeted, ascend, checkpoints, climb, stages
from attacks.pgd import raise_loss
from attacks.search import Search, Trial
from attacks.threat import Threat, is_inside, project, steepest
from engine.config import UserError, component


def threat(eps, count, norm="linf", ignore_index=None):
    return Threat(eps, norm, ignore_index, tuple(range(count)))


@pytest.mark.parametrize(
    ("steps", "first", "less", "least"), [(100, 22, 3, 6), (300, 66, 9, 18), (90, 19, 2, 5), (120, 26, 3, 7)]
)
def test_checkpoints(steps, first, less, least):
    at, lengths = list(checkpoints(steps)), list(checkpoints(steps).values())
    assert at[0] == lengths[0] == first and min(lengths) >= least
    assert all(
        after == max(before - less, least) for before, after in zip(lengths[:-1], lengths[1:], strict=True)
    )
    assert [after - before for before, after in zip([0, *at[:-1]], at, strict=True)] == lengths
    assert steps - max(lengths[-1] - less, least) <= at[-1] < steps


def test_checkpoints_of_100_steps():
    assert list(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1) == {} and list(checkpoints(4)) == [1, 2, 3]


def test_red_eps_splits_the_steps():
    assert stages(300, "red_eps") == [(2.0, 90), (1.5, 90), (1.0, 120)]
    assert stages(10, "red_eps") == [(2.0, 3), (1.5, 3), (1.0, 4)]
    assert stages(3, "red_eps") == [(1.0, 3)]
    assert stages(100, "constant") == [(1.0, 100)]


def gone(search, objective, steps, **keys):
    """Every point that a climb from the images asks about, with the gradients and tracked losses there."""
    seen = []

    def watch(points, progress):
        trial = objective(points, progress)
        seen.append((points.detach().clone(), trial))
        return trial

    climb(search, watch, search.images, steps, **keys)
    points = [point for point, _ in seen]
    losses = [(trial.loss if trial.tracked is None else trial.tracked).detach() for _, trial in seen]
    return points, losses


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_first_moves_by_hand(segmenter, norm):
    torch.manual_seed(1)
    network, images, ball = segmenter(), torch.rand(2, 3, 8, 8), threat(0.02, 2, norm)
    search = Search(network, images, network(images).argmax(1), ball)
    objective = raise_loss(search, "ce")
    (first, second, third), _ = gone(search, objective, 3)

    def uphill(points):
        slope, _ = Search(network, images, search.labels, ball).gradient(points, objective)
        return project(points + 2 * ball.eps * steepest(slope, norm), images, ball)

    assert torch.equal(first, images)
    assert torch.allclose(second, uphill(images), atol=1e-7)
    expected = project(second + 0.75 * (uphill(second) - second) + 0.25 * (second - first), images, ball)
    assert torch.allclose(third, expected, atol=1e-7)


def test_halvings_by_hand():
    """10 steps have checkpoints at 2, 3, 4, ...; eps is 0.1, so the first step is 0.2 long.

    At 2 the loss has risen once in two steps: half the step, from the best point (the one of step 1, gradient -1).
    At 3 it has risen: on with the same step. At 4 it has risen again, but not above the best, which is the same as at
    3, where the step was kept: half the step, from the best point."""
    assert list(checkpoints(10)) == [2, 3, 4, 5, 6, 7, 8, 9]
    slopes, tracked = iter([1, -1, -1, 1, 1, 1, 1, 1, 1, 1]), iter([1.0, 5.0, 2.0, 3.0, 4.0, 0, 0, 0, 0, 0])
    logits = torch.tensor([[1.0, 0.0]])

    def objective(points, progress):
        return Trial((points * next(slopes)).sum((1, 2, 3)), logits, torch.tensor([next(tracked)]))

    images = torch.full((1, 1, 1, 1), 0.5)
    search = Search(lambda points: logits, images, torch.tensor([0]), threat(0.1, 1))
    points, _ = gone(search, objective, 10, momentum=1.0)
    changes = [(point - images).item() for point in points]
    assert changes[:6] == pytest.approx([0.0, 0.1, -0.1, 0.0, 0.1, 0.05], abs=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steps_follow_the_rule_on_a_network(segmenter, norm):
    """The rule as the paper states it, applied afterwards to the losses of a run without momentum: from the sizes that
    follow, every point is where it has to be."""
    torch.manual_seed(3)
    network, images = segmenter(), torch.rand(4, 3, 8, 8)
    ball = threat(0.05 if norm == "linf" else 0.4, 4, norm)
    search = Search(network, images, network(images).argmax(1), ball)
    objective, steps, rho = raise_loss(search, "ce"), 40, 0.75
    points, losses = gone(search, objective, steps, momentum=1.0)
    slopes = [Search(network, images, search.labels, ball).gradient(point, objective)[0] for point in points]
    halvings = []
    for image in range(4):
        size, halved, best_before, checked = 2 * ball.eps, True, losses[0][image], 0
        for step in range(1, steps):
            origin, slope = points[step - 1], slopes[step - 1]
            if step - 1 in checkpoints(steps):
                best = max(range(step), key=lambda at: losses[at][image])
                rises = sum(losses[at][image] > losses[at - 1][image] for at in range(checked + 1, step))
                halved = bool(
                    rises <= rho * (step - 1 - checked) or (not halved and losses[best][image] == best_before)
                )
                if halved:
                    size, origin, slope = size / 2, points[best], slopes[best]
                    halvings.append((image, step))
                best_before, checked = losses[best][image], step - 1
            expected = project(origin + size * steepest(slope, norm), images, ball)
            assert torch.allclose(points[step][image], expected[image], atol=1e-6), (image, step)
    assert len(halvings) > 8


def test_the_point_after_the_last_step_counts(linear):
    """One step is enough for a linear network, if it is looked at."""
    network = linear(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([-0.9, 0.0]))
    images = torch.full((1, 2, 1, 1), 0.5)
    found = apgd(network, images, torch.tensor([0]), threat(0.06, 1), steps=1)
    assert found.forwards == 2 and found.backwards == 1 and found.correct.tolist() == [0]


def test_red_eps_goes_through_larger_balls(segmenter, recorder):
    torch.manual_seed(0)
    images, network = torch.rand(3, 3, 8, 8), recorder(segmenter())
    labels = segmenter()(images).argmax(1)
    found = apgd(network, images, labels, threat(0.01, 3), loss="masked_ce", steps=20, schedule="red_eps")
    assert (
        found.forwards == len(network.asked) == 20 + 3 and found.backwards == 20 and len(found.losses) == 20
    )
    spread = [(points - images).abs().max().item() for points in network.asked]
    for part, radius in ((spread[:7], 0.02), (spread[7:14], 0.015), (spread[14:], 0.01)):
        assert max(part) == pytest.approx(radius, abs=1e-6)
    assert is_inside(found.images, images, threat(0.01, 3)).all()
    counts = [(segmenter()(points).argmax(1) == labels).sum((1, 2)) for points in network.asked]
    for begin, end, ball in ((0, 7, 0.015), (7, 14, 0.01)):
        stage = torch.stack(counts[begin:end])
        best = [network.asked[begin + stage[:, image].argmin()][image] for image in range(3)]
        assert torch.equal(network.asked[end], project(torch.stack(best), images, threat(ball, 3)))
    inside = torch.stack(counts[14:]).amin(dim=0)
    assert torch.equal(found.correct, inside)


def test_progress_goes_on_through_the_balls(segmenter):
    images, told = torch.rand(1, 3, 8, 8), []
    search = Search(segmenter(), images, segmenter()(images).argmax(1), threat(0.01, 1))
    plain = raise_loss(search, "ce")

    def objective(points, progress):
        told.append(progress)
        return plain(points, progress)

    ascend(search, objective, ("test",), 20, "red_eps")
    assert told == pytest.approx([step / 20 for step in range(20)])


def test_masked_losses_are_judged_by_cross_entropy(segmenter):
    torch.manual_seed(0)
    images, network = torch.rand(2, 3, 8, 8), segmenter()
    labels = network(images).argmax(1)
    ball = threat(0.02, 2)
    entropy, masked = (
        apgd(network, images, labels, ball, loss="masked_ce", steps=3, track=track).losses
        for track in ("ce", "loss")
    )
    assert torch.equal(apgd(network, images, labels, ball, loss="masked_ce", steps=3).losses, entropy)
    assert (masked < entropy).any() and (masked <= entropy).all()
    own = apgd(network, images, labels, ball, loss="jensen_shannon", steps=3)
    assert torch.equal(
        own.losses, apgd(network, images, labels, ball, loss="jensen_shannon", steps=3, track="loss").losses
    )


@pytest.fixture(scope="module")
def hyperplanes():
    """(weight, bias, images [64, 3, 8, 8], labels) of a random linear network."""
    torch.manual_seed(0)
    weight, bias, images = torch.randn(5, 192), 0.1 * torch.randn(5), torch.rand(64, 3, 8, 8)
    return weight, bias, images, (images.flatten(1) @ weight.T + bias).argmax(1)


@pytest.mark.parametrize(("eps", "accuracy"), [(1 / 255, 0.84375), (2 / 255, 0.75), (4 / 255, 0.671875)])
def test_a_random_linear_network_is_attacked_exactly(hyperplanes, survives, linear, eps, accuracy):
    weight, bias, images, labels = hyperplanes
    network, ball = linear(weight, bias), threat(eps, 64)
    safe = survives(weight, bias, images.flatten(1), labels, eps)
    assert safe.double().mean() == accuracy
    plain = apgd(network, images, labels, ball, steps=50)
    targeted = apgd_targeted(network, images, labels, ball, steps=20)
    assert torch.equal(torch.minimum(plain.correct, targeted.correct) == 1, safe)
    assert targeted.forwards == 1 + 4 * 21 and targeted.backwards == 4 * 20  # 4 other classes, fewer than 9


def test_pixels_that_see_themselves_only(survives):
    torch.manual_seed(0)
    network = nn.Conv2d(3, 5, 1).requires_grad_(False)
    images = torch.rand(4, 3, 16, 16)
    labels = network(images).argmax(1)
    labels[:, :2] = 255
    counted = labels.flatten() != 255
    pixels = images.permute(0, 2, 3, 1).reshape(-1, 3)[counted]
    for eps in (2 / 255, 8 / 255):
        safe = survives(network.weight.flatten(1), network.bias, pixels, labels.flatten()[counted], eps)
        exact = safe.sum().item() / len(safe)
        for keys in ({}, {"loss": "masked_ce", "schedule": "red_eps"}, {"loss": "jensen_shannon"}):
            found = apgd(network, images, labels, threat(eps, 4, ignore_index=255), steps=40, **keys)
            assert exact <= found.correct.sum().item() / len(safe) <= exact + 0.005, keys
        found = apgd_targeted(network, images, labels, threat(eps, 4, ignore_index=255), steps=10, targets=2)
        assert exact <= found.correct.sum().item() / len(safe) < 1


def test_targets_are_the_likeliest_other_classes(classifier):
    """With one target it is the runner-up, also where the network is wrong about the image itself."""
    torch.manual_seed(0)
    images, network = torch.rand(20, 3, 8, 8), classifier()
    ranked = network(images).argsort(dim=1, descending=True)
    one = apgd_targeted(network, images, ranked[:, 0], threat(0.1, 20), steps=20, targets=1)
    reached = network(one.images).argmax(1)
    assert (one.correct == 0).sum() > 5
    assert torch.equal(reached[one.correct == 0], ranked[one.correct == 0, 1])
    more = apgd_targeted(network, images, ranked[:, 0], threat(0.1, 20), steps=20, targets=4)
    assert (more.correct <= one.correct).all()
    with pytest.raises(UserError, match="at least 4 classes"):
        apgd_targeted(lambda images: network(images)[:, :3], images, ranked[:, 0] % 3, threat(0.1, 20))


@pytest.fixture(scope="module")
def trained():
    """A small classifier that has learnt to tell stripes in four directions apart, with 40 images of its own."""
    torch.manual_seed(0)
    labels = torch.arange(400) % 4
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    waves = torch.stack([torch.sin(2.1 * way) for way in (rows, columns, rows + columns, rows - columns)])
    images = (0.5 + 0.08 * waves[labels].unsqueeze(1) + 0.12 * torch.randn(400, 3, 8, 8)).clamp(0, 1)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Softplus(), nn.Flatten(), nn.Linear(288, 16), nn.Softplus()
    )
    network.append(nn.Linear(16, 4))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[40:]), labels[40:]).backward()
        optimizer.step()
    return network.requires_grad_(False), images[:40], labels[:40]


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.04), ("l2", 0.4)])
def test_it_goes_the_way_of_the_authors_attack(trained, recorder, norm, eps, loss):
    """From the same start it asks about the same points, as long as an image isn't lost. At a checkpoint a loss may
    have come to rest and rise and fall by rounding errors, which differ by machine: from there on nearly all images
    for linf, none for l2, whose points are never exactly equal."""
    network, images, labels = trained
    theirs = APGDAttack(
        recorder(network), n_iter=50, norm=norm.capitalize(), eps=eps, loss=loss, device="cpu"
    )
    theirs.init_hyperparam(images)
    _, right, _, _ = theirs.attack_single_run(images, labels, x_init=images)
    search = Search(recorder(network), images, labels, threat(eps, 40, norm))
    climb(search, raise_loss(search, loss), images, 50)
    held = search.found().correct > 0
    assert torch.equal(held, right.bool()) and 0.2 < right.double().mean() < 0.8
    assert len(search.model.asked) == len(theirs.model.asked) == 51
    ours, others = torch.stack(search.model.asked), torch.stack(theirs.model.asked)
    apart = (ours - others)[:, held].abs().flatten(2).amax(2)
    assert apart[:12].max() < 1e-5
    if norm == "linf":
        assert (apart.amax(0) < 1e-5).double().mean() > 0.8


def test_whole_attacks_leave_the_same_accuracy(trained):
    network, images, labels = trained
    for eps in (0.03, 0.04, 0.05):
        common = {"n_iter": 30, "norm": "Linf", "eps": eps, "device": "cpu"}
        theirs = APGDAttack(network, **common).perturb(images, labels)
        plain = apgd(network, images, labels, threat(eps, 40), steps=30)
        assert plain.correct.sum().item() == (network(theirs).argmax(1) == labels).sum().item()
        theirs = APGDAttack_targeted(network, n_target_classes=3, **common).perturb(images, labels)
        targeted = apgd_targeted(network, images, labels, threat(eps, 40), steps=30, targets=3)
        assert targeted.correct.sum().item() == (network(theirs).argmax(1) == labels).sum().item()


def test_configs_build_them(segmenter):
    images, network = torch.rand(1, 3, 8, 8), segmenter()
    labels = network(images).argmax(1)
    keys = {"loss": "masked_ce", "track": "ce", "steps": 6, "restarts": 2, "schedule": "red_eps", "rho": 0.5}
    attack = component("attacks:ATTACKS", "apgd", momentum=0.9, draws=2, **keys)
    found = attack.build(network, images, labels, threat(0.02, 1))
    assert found.correct.item() < 64 and found.backwards == 24 and found.forwards == 36
    attack = component("attacks:ATTACKS", "apgd_targeted", targets=2, steps=3)
    assert attack.build(network, images, labels, threat(0.02, 1)).backwards == 6
