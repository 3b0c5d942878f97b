import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.threat import (
    Threat,
    check_inside,
    is_inside,
    lengths,
    project,
    random_point,
    refuse_bad_images,
    seed_of,
    sizes,
    steepest,
)
from engine.config import UserError

NORMS = ("linf", "l2")


def pairs(seed, spread=1.0):
    """Images in the box, points anywhere."""
    dice = torch.Generator().manual_seed(seed)
    images = torch.rand(3, 2, 4, 5, generator=dice)
    images[0] = images[0].round()  # corners of the box
    return images, images + spread * torch.randn(images.shape, generator=dice)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.floats(0, 2),
    st.sampled_from(NORMS),
    st.sampled_from([1e-3, 0.1, 10.0]),
)
def test_projected_points_are_inside_and_stay_where_they_are(seed, eps, norm, spread):
    images, points = pairs(seed, spread)
    threat = Threat(eps, norm)
    projected = project(points, images, threat)
    assert is_inside(projected, images, threat).all()
    check_inside(projected, images, threat)
    again = project(projected, images, threat)
    assert torch.equal(again, projected) if norm == "linf" else torch.allclose(again, projected, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_eps_0_gives_the_images_bit_for_bit(norm):
    images, points = pairs(1)
    assert torch.equal(project(points, images, Threat(0.0, norm)), images)
    assert torch.equal(random_point(images, Threat(0.0, norm, seeds=(1, 2, 3)), "pgd"), images)


def test_linf_projection_is_the_nearest_point():
    images, points = pairs(2)
    nearest = torch.minimum(torch.maximum(points, images - 0.1), images + 0.1).clamp(0, 1)
    assert torch.equal(project(points, images, Threat(0.1)), nearest)


def test_l2_projection_keeps_the_direction_and_has_the_length_eps():
    images = torch.full((2, 1, 2, 2), 0.5)
    points = images + torch.tensor([3.0, 0.01]).view(2, 1, 1, 1)
    change = project(points, images, Threat(0.2, "l2")) - images
    assert change[0].flatten().tolist() == pytest.approx([0.1] * 4)
    assert change[1].flatten().tolist() == pytest.approx([0.01] * 4)  # inside already


def test_sizes_and_inside():
    images = torch.full((4, 1, 1, 2), 0.5)
    changes = torch.tensor([[0.3, 0.4], [0.1, 0.0], [0.5000001, 0.0], [math.nan, 0.0]]).view(4, 1, 1, 2)
    linf, l2 = sizes(images + changes, images)
    assert linf[:3].tolist() == pytest.approx([0.4, 0.1, 0.5], abs=1e-6)
    assert l2[:3].tolist() == pytest.approx([0.5, 0.1, 0.5], abs=1e-6)
    assert is_inside(images + changes, images, Threat(0.4)).tolist() == [True, True, False, False]
    assert is_inside(images + changes, images, Threat(0.4, "l2")).tolist() == [False, True, False, False]
    assert not is_inside(images + changes, images, Threat(1.0))[2], "inside the ball, outside the box"
    with pytest.raises(AssertionError, match="0.5.* eps 0.4"):
        check_inside((images + changes)[:3], images[:3], Threat(0.4))
    with pytest.raises(AssertionError, match="nan"):
        check_inside(images + changes, images, Threat(1.0))


@pytest.mark.parametrize("norm", NORMS)
def test_random_points_depend_on_the_image_and_its_seed_only(norm):
    images, _ = pairs(3)
    threat = Threat(0.1, norm, seeds=(7, 8, 9))
    points = random_point(images, threat, "pgd", 0)
    assert is_inside(points, images, threat).all() and not torch.equal(points, images)
    turned = random_point(images.flip(0), Threat(0.1, norm, seeds=(9, 8, 7)), "pgd", 0).flip(0)
    assert torch.equal(turned, points)
    assert torch.equal(random_point(images[1:2], Threat(0.1, norm, seeds=(8,)), "pgd", 0), points[1:2])
    assert not torch.equal(random_point(images, threat, "pgd", 1), points)
    assert not torch.equal(random_point(images, Threat(0.1, norm, seeds=(1, 8, 9)), "pgd", 0)[0], points[0])


def test_random_points_are_uniform_in_the_ball():
    count = 2000
    images = torch.full((count, 1, 1, 2), 0.5)
    seeds = tuple(range(count))
    change = (random_point(images, Threat(0.1, seeds=seeds), "pgd") - images).flatten(1) / 0.1
    assert change.mean(dim=0).abs().max() < 0.05 and (change**2).mean() == pytest.approx(1 / 3, abs=0.02)
    change = (random_point(images, Threat(0.1, "l2", seeds=seeds), "pgd") - images).flatten(1) / 0.1
    area = change.square().sum(dim=1)  # of the disc up to there: uniform
    assert area.mean() == pytest.approx(0.5, abs=0.02) and (area**2).mean() == pytest.approx(1 / 3, abs=0.02)
    assert change.mean(dim=0).abs().max() < 0.05


def test_steepest_ascent():
    gradient = torch.tensor([[3e-25, -4e-25], [0.0, 0.0], [3e20, 4e20]]).view(3, 1, 1, 2)
    assert steepest(gradient, "linf").flatten(1).tolist() == [[1, -1], [0, 0], [1, 1]]
    step = steepest(gradient, "l2").flatten(1)
    assert step[0].tolist() == pytest.approx([0.6, -0.8])
    assert step[1].tolist() == [0, 0]
    assert step[2].tolist() == pytest.approx([0.6, 0.8])


def test_lengths_are_summed_in_float64():
    change = torch.full((1, 1, 2000, 2000), 1e-4)
    assert lengths(change).item() == pytest.approx(0.2, rel=1e-6)


def test_seeds():
    assert seed_of(1, "pgd", 0) != seed_of(1, "pgd", 1) != seed_of(11, "pgd", 0) and seed_of(
        1, 12
    ) != seed_of(11, 2)
    assert 0 <= seed_of("a") < 2**63 and seed_of(1, "pgd", 0) == seed_of(1, "pgd", 0)
    with pytest.raises(UserError, match="2 seeds for 3 images"):
        random_point(pairs(0)[0], Threat(0.1, seeds=(1, 2)), "pgd")


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (torch.full((1, 3, 2, 2), 1.5), r"\[1.5, 1.5\]"),
        (torch.full((1, 3, 2, 2), -0.1), r"\[-0.1, -0.1\]"),
        (torch.full((1, 3, 2, 2), math.nan), "nan"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.float16), "float16"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "uint8"),
    ],
)
def test_images_outside_of_the_box_are_refused(images, told):
    with pytest.raises(UserError, match=told):
        refuse_bad_images(images)


@pytest.mark.parametrize(("eps", "norm"), [(-0.1, "linf"), (math.nan, "linf"), (0.1, "l1")])
def test_a_threat_that_means_nothing_is_refused(eps, norm):
    with pytest.raises(UserError, match="threat: "):
        Threat(eps, norm)
