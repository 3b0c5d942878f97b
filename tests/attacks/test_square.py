"""Square Attack: its schedule and moves by their formulas, what it reaches where the optimum is known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.square import bump, bumps, coloured_square, moved_bumps, side_of, square, stripes, two_bumps
from attacks.threat import Threat, sizes


def die(seed=0):
    return torch.Generator().manual_seed(seed)


class Linear:
    """Two classes whose gap is weights * images summed, plus bias: class 0 where it is above 0."""

    def __init__(self, weights, bias=0.0):
        self.weights, self.bias, self.passes = weights, bias, 0

    def __call__(self, images):
        assert not torch.is_grad_enabled()
        self.passes += 1
        gap = (images * self.weights).flatten(1).sum(dim=1) + self.bias
        return torch.stack([gap, torch.zeros_like(gap)], dim=1)

    def lowest_gap(self, images, threat):
        """Over ball and box (linf), or over the ball (l2)."""
        gap = (images * self.weights).flatten(1).sum(dim=1) + self.bias
        if threat.norm == "l2":
            return gap - threat.eps * self.weights.norm()
        low, high = (-images).clamp_min(-threat.eps), (1 - images).clamp_max(threat.eps)
        return gap + torch.minimum(self.weights * low, self.weights * high).flatten(1).sum(dim=1)


def test_the_side_of_the_squares():
    """Area 0.8 of 100 x 100, halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 of 10000 queries."""
    queries = (1, 10, 11, 50, 51, 201, 501, 1001, 2001, 4001, 6001, 8000, 8001, 9999)
    sides = [side_of(0.8, query, 10000, (100, 100)) for query in queries]
    assert sides == [89, 89, 63, 63, 45, 32, 22, 16, 11, 8, 6, 6, 4, 4]
    assert side_of(0.8, 11, 1000, (100, 100)) == side_of(0.8, 110, 10000, (100, 100)) == 45
    assert side_of(1.0, 1, 10000, (4, 9)) == 4
    assert side_of(0.0, 1, 10000, (4, 9)) == 1


def test_bump_by_hand():
    ring = 1 / 9
    assert bump(5, 5)[2].tolist() == pytest.approx([ring, ring + 1 / 4, ring + 1 / 4 + 1, ring + 1 / 4, ring])
    assert bump(5, 5)[0].tolist() == pytest.approx([ring] * 5)
    narrow = [[ring] * 2, [13 / 36] * 2, [13 / 36, 49 / 36], [13 / 36] * 2, [ring] * 2]
    torch.testing.assert_close(bump(5, 2), torch.tensor(narrow))
    assert bump(1, 1).tolist() == [[1.0]]


def test_two_bumps_face_each_other_in_both_directions():
    shapes = [two_bumps(6, die(seed)) for seed in range(20)]
    for shape in shapes:
        beside = shape if shape[0, -1] < 0 else shape.T
        assert (beside[:, :3] > 0).all() and (beside[:, 3:] < 0).all()
    assert len({tuple(shape.flatten().tolist()) for shape in shapes}) == 2


def test_stripes_are_vertical_and_reach_eps():
    image = torch.full((3, 7, 40), 0.5)
    change = stripes(image, die(), 0.25) - image
    assert change.abs().eq(0.25).all()
    assert (change == change[:, :1]).all()
    assert 20 < (change[:, 0] > 0).sum() < 100
    assert not torch.equal(change[0], change[1])


def test_a_square_changes_one_square_by_eps_in_each_channel():
    image = torch.full((3, 9, 12), 0.5)
    corners = set()
    for seed in range(200):
        changed = coloured_square(image, image, die(seed), 0.25, 4)
        places = (changed != image).all(dim=0).nonzero()
        top, left = places.amin(dim=0).tolist()
        assert len(places) == 16 and places.amax(dim=0).tolist() == [top + 3, left + 3]
        window = (changed - image)[:, top : top + 4, left : left + 4].flatten(1)
        assert window.abs().eq(0.25).all() and (window == window[:, :1]).all()
        corners.add((top, left))
    assert {row for row, _ in corners} == set(range(6))
    assert {column for _, column in corners} == set(range(9))


def test_a_square_that_would_change_nothing_is_turned_around():
    image = torch.tensor([0.5, 0.02, 0.99]).view(3, 1, 1).expand(3, 4, 4).clone()
    for seed in range(20):
        point = coloured_square(image, image, die(seed), 0.25, 4).clamp(0, 1)
        again = coloured_square(image, point, die(seed), 0.25, 4)
        assert torch.equal(
            (again - image).sign(), -(coloured_square(image, image, die(seed), 0.25, 4) - image).sign()
        )


@given(seed=st.integers(0, 10**6), side=st.integers(1, 9), channels=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_l2_moves_use_the_whole_ball(seed, side, channels):
    """A start of length eps, and moves that keep it or use what was left of it."""
    image = torch.full((channels, 9, 12), 0.5)
    start = bumps(image, die(seed), 0.5)
    assert sizes(start[None], image[None])[1].item() == pytest.approx(0.5, rel=1e-4)
    for point in (start, image, image + (start - image) / 2):
        moved = moved_bumps(image, point, die(seed), 0.5, side)
        assert sizes(moved[None], image[None])[1].item() == pytest.approx(0.5, rel=1e-4)


def test_a_move_gives_what_one_square_held_to_another():
    image = torch.full((1, 8, 8), 0.5)
    point = bumps(image, die(1), 0.5)
    before, after = point - image, moved_bumps(image, point, die(2), 0.5, 3) - image
    untouched = before == after
    emptied = (after == 0) & (before != 0)
    assert untouched.sum() >= 64 - 18
    assert emptied.any()


@pytest.mark.parametrize("box", [False, True])
def test_linf_reaches_the_optimum_of_a_linear_network(box):
    weights = torch.randn(1, 8, 8, generator=die(3))
    images = torch.rand(4, 1, 8, 8, generator=die(4)) * (1 if box else 0.4) + (0 if box else 0.3)
    network = Linear(weights, bias=20.0)
    threat = Threat(0.1, seeds=(1, 2, 3, 4))
    found = square(network, images, torch.zeros(4), threat, queries=1500)
    start = network.lowest_gap(images, threat.at(0.0))
    lowest = network.lowest_gap(images, threat)
    reached = -found.losses[-1]
    assert (reached >= lowest - 1e-4).all()
    assert ((start - reached) / (start - lowest) > 0.99).all()


def test_it_flips_what_can_be_flipped_and_nothing_else():
    weights = torch.randn(1, 6, 6, generator=die(5))
    images = torch.rand(6, 1, 6, 6, generator=die(6)) * 0.4 + 0.3
    network = Linear(weights)
    reach = 0.1 * weights.abs().sum()
    gaps = (images * weights).flatten(1).sum(dim=1)
    shift = torch.tensor([0.5, 0.9, 0.97, 1.01, 1.1, 2.0]) * reach - gaps
    network.bias = shift
    found = square(network, images, torch.zeros(6), Threat(0.1, seeds=tuple(range(6))), queries=1500)
    assert found.correct.tolist() == [0, 0, 0, 1, 1, 1]


def test_l2_comes_near_the_optimum_of_a_linear_network():
    weights = torch.randn(1, 6, 6, generator=die(7))
    images = torch.full((2, 1, 6, 6), 0.5)
    network, threat = Linear(weights, bias=20.0), Threat(0.3, "l2", seeds=(1, 2))
    found = square(network, images, torch.zeros(2), threat, queries=1500)
    start, lowest = network.lowest_gap(images, threat.at(0.0)), network.lowest_gap(images, threat)
    assert (-found.losses[-1] >= lowest - 1e-4).all()
    shares = (start + found.losses) / (start - lowest)
    assert (shares[0] < 0.5).all() and (shares[-1] > 0.75).all()


def per_pixel(images):
    """A 1 x 1 convolution with whole weights: exact in float32 on multiples of 1/256, so batches can't matter."""
    weights = torch.tensor([[3.0, -1.0, 2.0], [-2.0, 4.0, 1.0], [1.0, 1.0, -3.0]])
    return torch.einsum("kc,bchw->bkhw", weights, images) + torch.tensor([0.0, -0.5, 2.0]).view(3, 1, 1)


def label_maps(count=5, seed=8):
    images = torch.randint(32, 224, (count, 3, 8, 10), generator=die(seed)) / 256
    labels = per_pixel(images).argmax(dim=1)
    labels[:, 0, :3] = 255
    return images, labels


def exact_right(images, labels, eps):
    """Pixels that no change of size eps can turn, [B]: the closed form of a per-pixel linear network (no box)."""
    logits, own = per_pixel(images), labels.clamp_max(2).unsqueeze(1)
    weights = torch.tensor([[3.0, -1.0, 2.0], [-2.0, 4.0, 1.0], [1.0, 1.0, -3.0]])
    reach = (
        (weights[:, None] - weights[None]).abs().sum(dim=2)
    )  # of a gap between two classes, per unit of eps
    gaps = logits.gather(1, own) - logits - eps * reach[own.squeeze(1)].permute(0, 3, 1, 2)
    robust = gaps.scatter(1, own, torch.inf).amin(dim=1) > 0
    return (robust & (labels != 255)).flatten(1).sum(dim=1)


@pytest.mark.parametrize("loss", ["margin", "ce", "jensen_shannon"])
def test_label_maps_come_near_the_closed_form(loss):
    images, labels = label_maps()
    threat = Threat(32 / 256, seeds=tuple(range(5)))
    found = square(per_pixel, images, labels, threat, loss=loss, queries=600)
    exact = exact_right(images, labels, threat.eps)
    clean = (labels != 255).flatten(1).sum(dim=1)
    assert (found.correct >= exact).all()
    assert ((clean - found.correct) > 0.8 * (clean - exact)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_batches_and_order_do_not_matter(norm):
    images, labels = label_maps()
    threat = Threat(16 / 256, norm, seeds=(5, 6, 7, 8, 9))
    whole = square(per_pixel, images, labels, threat, queries=40)
    for places in ([3], [4, 0], [1, 2]):
        part = Threat(16 / 256, norm, seeds=tuple(threat.seeds[place] for place in places))
        found = square(per_pixel, images[places], labels[places], part, queries=40)
        assert torch.equal(found.images, whole.images[places])
        assert torch.equal(found.correct, whole.correct[places])
    other = square(per_pixel, images, labels, Threat(16 / 256, norm, seeds=(6, 6, 7, 8, 9)), queries=40)
    assert not torch.equal(other.images[0], whole.images[0])
    assert torch.equal(other.images[1:], whole.images[1:])


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [0.0, 0.01, 0.5])
def test_budget_and_nothing_at_eps_0(norm, eps):
    images = torch.rand(2, 3, 7, 11, generator=die(9))
    found = square(
        per_pixel, images, torch.zeros(2, 7, 11).long(), Threat(eps, norm, seeds=(1, 2)), queries=30
    )
    for points in (found.images, found.balanced):
        used = sizes(points, images)[0 if norm == "linf" else 1]
        assert (used <= eps + 1e-6).all() and points.amin() >= 0 and points.amax() <= 1
        assert eps > 0 or torch.equal(points, images)


def test_queries_are_the_forward_passes():
    network = Linear(torch.ones(1, 6, 6), bias=100.0)
    images = torch.full((2, 1, 6, 6), 0.5)
    found = square(network, images, torch.zeros(2), Threat(0.1, seeds=(1, 2)), queries=17, restarts=2)
    assert (found.forwards, found.backwards, network.passes) == (34, 0, 34)
    assert found.losses.shape == (34 - 2, 2)


def test_it_stops_when_no_image_has_a_right_pixel():
    network = Linear(torch.ones(1, 6, 6), bias=-100.0)
    images = torch.full((2, 1, 6, 6), 0.5)
    found = square(network, images, torch.zeros(2), Threat(0.1, seeds=(1, 2)), queries=17)
    assert (found.forwards, found.correct.tolist()) == (1, [0, 0])


def test_points_without_finite_logits_are_never_taken():
    """The network answers at the second point only."""
    points_seen = []

    def network(points):
        points_seen.append(points)
        gap = torch.full((len(points),), 1.0 if len(points_seen) == 2 else torch.nan)
        return torch.stack([gap, gap - 1], dim=1)

    images = torch.full((1, 1, 6, 6), 0.5)
    found = square(network, images, torch.zeros(1), Threat(0.1, seeds=(1,)), queries=20)
    assert torch.equal(found.images, points_seen[1])
    assert found.losses[-1].item() == -1
