"""8-bit adversarial images: on the grid, inside the ball, as near as that allows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attacks.quantise import quantised
from attacks.threat import Threat, check_inside, project, random_point
from engine.config import UserError

SHAPE = (2, 3, 4, 5)


def levels(seed):
    return torch.randint(0, 256, SHAPE, generator=torch.Generator().manual_seed(seed))


def images_of(seed):
    return levels(seed).float() / 255


def is_on_grid(points):
    return torch.equal((points.double() * 255).round().float() / 255, points)


@given(
    seed=st.integers(0, 10**6),
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.one_of(st.floats(0, 0.2), st.integers(0, 16).map(lambda level: level / 255)),
)
def test_laws(seed, norm, eps):
    images, threat = images_of(seed), Threat(eps, norm, seeds=(seed, seed + 1))
    points = random_point(images, threat)
    found = quantised(points, images, threat)
    assert is_on_grid(found)
    check_inside(found, images, threat)
    assert torch.equal(quantised(found, images, threat), found)
    assert torch.equal(quantised(images, images, threat), images)
    moved, wanted = (found - images).double() * 255, (points - images).double() * 255
    assert ((moved - wanted).abs() < 1 + 1e-3).all()
    assert (moved.sign() * wanted.sign() >= 0).all()
    within = (wanted.abs() <= int(eps * 255 + 1e-3)) if norm == "linf" else torch.zeros_like(moved).bool()
    assert ((moved - wanted).abs()[within] <= 0.5 + 1e-3).all()


@pytest.mark.parametrize("level", range(256))
def test_whole_levels_survive_exactly(level):
    images = images_of(1)
    signs = torch.randint(0, 2, SHAPE, generator=torch.Generator().manual_seed(2)) * 2 - 1
    threat = Threat(level / 255)
    points = project(images + threat.eps * signs, images, threat)
    expected = (levels(1) + level * signs).clamp(0, 255)
    assert torch.equal((quantised(points, images, threat) * 255).round(), expected.float())


@pytest.mark.parametrize("count", range(1, 60))
def test_whole_levels_survive_in_l2(count):
    """As many values as eps allows, each changed by one level."""
    images = levels(4).float().clamp(1, 254) / 255
    signs = torch.zeros(2, 60)
    signs[:, :count] = (
        torch.randint(0, 2, (2, count), generator=torch.Generator().manual_seed(count)) * 2.0 - 1
    )
    signs = signs.view(SHAPE)
    found = quantised(images + signs / 255, images, Threat(count**0.5 / 255, "l2"))
    assert torch.equal((found * 255).round(), levels(4).float().clamp(1, 254) + signs)


def test_what_does_not_survive():
    """0.03 is 7.65 levels: 7 are left, as 8 would leave the ball; half a level leaves the image."""
    images = torch.full((1, 3, 2, 2), 100 / 255)
    assert (quantised(images + 0.03, images, Threat(0.03)) * 255).round().eq(107).all()
    assert (quantised(images - 0.03, images, Threat(0.03)) * 255).round().eq(93).all()
    assert torch.equal(quantised(images + 0.5 / 255, images, Threat(0.5 / 255)), images)


def test_inside_the_ball_it_is_the_nearest_multiple():
    images = torch.full((1, 1, 1, 3), 100 / 255)
    points = images + torch.tensor([2.4, -2.6, 0.2]) / 255
    for threat in (Threat(8 / 255), Threat(8 / 255, "l2")):
        assert (quantised(points, images, threat) * 255).round().flatten().tolist() == [102, 97, 100]


def test_l2_rounds_up_as_long_as_the_ball_allows():
    """Of changes 1.9, 1.8 and 1.6 the first two are rounded up (4 + 4 + 1 = 9), the third is cut."""
    images = torch.full((1, 1, 1, 3), 100 / 255)
    points = images + torch.tensor([1.8, -1.6, 1.9]) / 255
    threat = Threat((1.8**2 + 1.6**2 + 1.9**2) ** 0.5 / 255, "l2")
    assert threat.eps * 255 < 3.08
    assert (quantised(points, images, threat) * 255).round().flatten().tolist() == [102, 99, 102]


def test_bytes_computed_otherwise_are_bytes_too():
    images = levels(3).float() * (1 / 255)
    threat = Threat(8 / 255)
    found = quantised(project(images + 8 / 255, images, threat), images, threat)
    assert torch.equal((found * 255).round(), (levels(3) + 8).clamp(0, 255).float())
    assert torch.equal(quantised(images, images, threat.at(0.0)), images)


def test_images_that_are_no_bytes_are_refused():
    images = torch.full((1, 3, 2, 2), 100.5 / 255)
    with pytest.raises(UserError, match="no multiples of 1/255.*float32"):
        quantised(images, images, Threat(8 / 255))
