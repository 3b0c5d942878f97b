"""Corruptions: closed forms, laws of each kind, and that only seed, name, corruption and severity decide."""

import importlib
import inspect
import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image

from dataloaders import CORRUPTIONS, EXTRA_CORRUPTIONS
from dataloaders.corruptions import SEVERITIES, corrupt, ice, plasma, shuffled, smeared, zoomed
from engine.config import UserError

ALL = [*CORRUPTIONS, *EXTRA_CORRUPTIONS]
RANDOM = sorted(
    set(ALL)
    - {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    - {"gaussian_blur", "saturate"}
)
LOCAL_MEANS = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur", "pixelate")


def scene(seed, height=72, width=96):
    """Colours that change as in photographs: most at large scales, less at small ones."""
    random = np.random.default_rng(seed)
    total = np.full((height, width, 3), 0.45)
    for cells in (2, 4, 8, 16, 32):
        coarse = random.normal(size=(cells, cells, 3)).astype(np.float32)
        total += 0.3 * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR) / cells**0.5
    return (255 * total.clip(0, 1)).astype(np.uint8)


def flat(height, width, colour):
    return np.tile(np.array(colour, np.uint8), (height, width, 1))


def damage(corruption, severity, images):
    """Mean absolute change in grey levels."""
    changed = [corrupt(image, corruption, severity, name=str(place)) for place, image in enumerate(images)]
    return np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(changed, images, strict=True)])


def test_there_are_fifteen_and_four():
    assert (len(CORRUPTIONS), len(EXTRA_CORRUPTIONS), len(set(ALL))) == (15, 4, 19)
    for spec in (CORRUPTIONS | EXTRA_CORRUPTIONS).values():
        module, function = spec.split(":")
        parameters = inspect.signature(getattr(importlib.import_module(module), function)).parameters
        assert list(parameters) == ["image", "severity", "random"]


@pytest.mark.parametrize("corruption", ALL)
@settings(max_examples=12, deadline=None)
@given(
    height=st.integers(1, 50),
    width=st.integers(1, 50),
    severity=st.sampled_from(SEVERITIES),
    seed=st.integers(0, 99),
)
def test_any_size_stays_what_it_is_and_the_input_is_left_alone(corruption, height, width, severity, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    before = image.copy()
    changed = corrupt(image, corruption, severity, name="frame", seed=seed)
    assert changed.dtype == np.uint8 and changed.shape == image.shape
    assert np.array_equal(image, before)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255)])
@pytest.mark.parametrize("corruption", ALL)
def test_black_and_white_images_do_no_harm(corruption, colour):
    with np.errstate(divide="raise", invalid="raise"):
        for severity in SEVERITIES:
            assert corrupt(flat(20, 31, colour), corruption, severity, name="a").shape == (20, 31, 3)


@pytest.mark.parametrize("corruption", ALL)
def test_seed_and_name_decide_and_nothing_else(corruption):
    image = scene(0)
    once = corrupt(image, corruption, 3, name="a", seed=5)
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    corrupt(scene(1), corruption, 2, name="b", seed=5)  # what came before doesn't matter
    again = corrupt(image.copy(), corruption, 3, name="a", seed=5)
    assert np.array_equal(once, again)
    assert np.array_equal(np.random.get_state()[1], state)
    others = [corrupt(image, corruption, 3, name=name, seed=seed) for name, seed in (("b", 5), ("a", 6))]
    assert [not np.array_equal(once, other) for other in others] == [corruption in RANDOM] * 2


def test_strided_images_are_as_good_as_others():
    channels_first = np.ascontiguousarray(scene(0).transpose(2, 0, 1))
    for corruption in ALL:
        strided = corrupt(channels_first.transpose(1, 2, 0), corruption, 3, name="a")
        assert np.array_equal(strided, corrupt(scene(0), corruption, 3, name="a"))


@pytest.mark.parametrize("corruption", sorted(set(ALL) - {"fog", "frost", "spatter", "saturate"}))
def test_damage_grows_with_severity(corruption):
    images = [scene(seed) for seed in range(8)]
    grown = [damage(corruption, severity, images) for severity in SEVERITIES]
    assert grown[0] > 0.3 and grown == sorted(grown)


@pytest.mark.parametrize("corruption", ["fog", "frost", "spatter"])
def test_less_of_the_image_is_left_at_severity_5(corruption):
    """Where the kind changes on the way (water, then mud) or the change of mean brightness says little."""
    images = [scene(seed) for seed in range(8)]

    def left(severity):
        changed = [corrupt(image, corruption, severity, name=str(i)) for i, image in enumerate(images)]
        pairs = zip(images, changed, strict=True)
        return np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs])

    assert left(1) > left(5)
    assert damage(corruption, 1, images) > 0.3


@given(
    colour=st.tuples(*[st.integers(0, 255)] * 3),
    height=st.integers(1, 40),
    severity=st.sampled_from(SEVERITIES),
)
@settings(max_examples=25, deadline=None)
def test_means_of_neighbours_leave_a_flat_image_as_it_is(colour, height, severity):
    image = flat(height, 33, colour)
    for corruption in (*LOCAL_MEANS, "elastic_transform", "contrast"):
        changed = corrupt(image, corruption, severity, name="a").astype(int)
        assert np.abs(changed - image).max() <= (1 if corruption == "glass_blur" else 0), corruption


def test_brightness_is_value_in_hsv():
    image = scene(3)
    image[0, :3] = [[0, 0, 0], [7, 7, 7], [255, 0, 10]]
    for severity, more in zip(SEVERITIES, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True):
        hsv = rgb_to_hsv(image / 255)
        hsv[..., 2] = (hsv[..., 2] + more).clip(0, 1)
        expected = 255 * hsv_to_rgb(hsv)
        assert np.abs(corrupt(image, "brightness", severity, name="a") - expected).max() < 0.51
    assert corrupt(flat(2, 2, (51, 51, 51)), "brightness", 1, name="a").tolist()[0][0] == [77, 77, 77]


def test_saturate_is_saturation_in_hsv():
    image = scene(4)
    image[0, :3] = [[0, 0, 0], [90, 90, 90], [255, 0, 10]]
    levels = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))
    for severity, (factor, more) in zip(SEVERITIES, levels, strict=True):
        hsv = rgb_to_hsv(image / 255)
        hsv[..., 1] = (hsv[..., 1] * factor + more).clip(0, 1)
        expected = 255 * hsv_to_rgb(hsv)
        assert np.abs(corrupt(image, "saturate", severity, name="a") - expected).max() < 0.51


def test_contrast_pulls_towards_the_mean_colour():
    image = scene(5)
    mean = image.mean(axis=(0, 1))
    for severity, kept in zip(SEVERITIES, (0.4, 0.3, 0.2, 0.1, 0.05), strict=True):
        expected = mean + kept * (image - mean)
        assert np.abs(corrupt(image, "contrast", severity, name="a") - expected).max() < 0.51


def test_pixelate_shows_means_as_blocks():
    image = scene(6, 40, 60)
    blocks = image.reshape(20, 2, 30, 2, 3).mean(axis=(1, 3)).repeat(2, axis=0).repeat(2, axis=1)
    assert np.abs(corrupt(image, "pixelate", 2, name="a") - blocks).max() <= 0.51
    quarters = image.reshape(10, 4, 15, 4, 3).mean(axis=(1, 3)).repeat(4, axis=0).repeat(4, axis=1)
    assert np.abs(corrupt(image, "pixelate", 5, name="a") - quarters).max() <= 0.51
    odd = Image.fromarray(image[:37, :51]).resize((int(51 * 0.6), int(37 * 0.6)), Image.BOX)
    expected = np.asarray(odd.resize((51, 37), Image.NEAREST)).astype(int)
    ours = corrupt(image[:37, :51], "pixelate", 1, name="a")
    assert np.abs(ours - expected).mean() < 3  # Pillow counts pixels by their centres, not by their areas
    assert (np.diff(ours.astype(int), axis=1) == 0).all(axis=(0, 2)).sum() == 51 - int(51 * 0.6)


def test_jpeg_is_that_of_another_encoder():
    image = scene(7)
    for severity, quality in zip(SEVERITIES, (25, 18, 15, 10, 7), strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        expected = np.asarray(Image.open(file)).astype(int)
        ours = corrupt(image, "jpeg_compression", severity, name="a")
        assert np.abs(ours - expected).mean() < 0.5


def test_noise_has_the_published_strength():
    grey = flat(200, 200, (128, 128, 128))
    tables = {
        "gaussian_noise": lambda severity: (0.08, 0.12, 0.18)[severity - 1],
        "speckle_noise": lambda severity: (0.15, 0.2, 0.35)[severity - 1] * 128 / 255,
        "shot_noise": lambda severity: (128 / 255 / (60, 25, 12)[severity - 1]) ** 0.5,
    }
    for corruption, deviation in tables.items():
        for severity in (1, 2, 3):
            changed = corrupt(grey, corruption, severity, name="a") / 255
            assert changed.std() == pytest.approx(deviation(severity), rel=0.03)
            assert changed.mean() == pytest.approx(128 / 255, abs=0.005)
    for severity, share in zip(SEVERITIES, (0.03, 0.06, 0.09, 0.17, 0.27), strict=True):
        changed = corrupt(grey, "impulse_noise", severity, name="a")
        assert set(np.unique(changed)) == {0, 128, 255}
        for value in (0, 255):
            assert (changed == value).mean() == pytest.approx(share / 2, rel=0.06)


def test_shot_noise_is_relative_to_the_light():
    assert np.array_equal(corrupt(flat(9, 9, (0, 0, 0)), "shot_noise", 5, name="a"), flat(9, 9, (0, 0, 0)))
    dark, bright = (corrupt(flat(200, 200, (v,) * 3), "shot_noise", 1, name="a").std() for v in (20, 80))
    assert bright / dark == pytest.approx(2, rel=0.05)


def point(size=61):
    image = np.zeros((size, size, 3), np.uint8)
    image[size // 2, size // 2] = 255
    return image


def test_defocus_is_a_disk():
    for severity, radius in zip(SEVERITIES, (3, 4, 6, 8, 10), strict=True):
        lit = np.argwhere(corrupt(point(), "defocus_blur", severity, name="a")[..., 0] > 0) - 30
        distances = np.hypot(*lit.T)
        assert radius - 1 <= distances.max() <= radius + 1.5
        area = np.pi * radius**2
        assert 255 / corrupt(point(), "defocus_blur", severity, name="a").max() == pytest.approx(
            area, rel=0.35
        )


def test_motion_blur_is_a_line_of_its_direction():
    field = np.zeros((81, 81), np.float32)
    field[40, 40] = 1
    for degrees in (0, 30, -45, 120):
        line = smeared(field, 10, 12, degrees)
        assert line.sum() == pytest.approx(1, rel=1e-5)
        places = np.argwhere(line > 1e-4) - 40  # what is less is rounding of a Fourier transform
        length = np.hypot(*places.T).max()
        assert length == pytest.approx(20, abs=1)
        normal_ = np.array([np.cos(np.radians(degrees)), -np.sin(np.radians(degrees))])
        assert np.abs(places @ normal_).max() <= 0.75
        along = places @ [-np.sin(np.radians(degrees)), -np.cos(np.radians(degrees))]
        assert along.min() >= -1e-6 and line[40, 40] > 0.02  # begins in the pixel itself, to one side


def test_zoom_about_the_centre():
    random = np.random.default_rng(0)
    small = random.random((5, 7)).astype(np.float32)
    assert np.array_equal(zoomed(small, 1), small)
    assert zoomed(small, 3)[2, 3] == pytest.approx(small[2, 3], abs=1e-6)
    ramp = np.tile(np.arange(41, dtype=np.float32), (9, 1))
    np.testing.assert_allclose(zoomed(ramp, 2)[4], 20 + (np.arange(41) - 20) / 2, atol=0.05)
    mirrored = zoomed(np.ascontiguousarray(small[::-1, ::-1]), 1.3)
    np.testing.assert_allclose(mirrored[::-1, ::-1], zoomed(small, 1.3), atol=0.05)


@given(
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    reach=st.integers(1, 4),
    rounds=st.integers(1, 3),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_swaps_at_once_are_swaps_one_by_one(height, width, reach, rounds, seed):
    got = shuffled(height, width, reach, rounds, np.random.default_rng(seed))
    random = np.random.default_rng(seed)
    source = np.arange(height * width).reshape(height, width)
    for _ in range(rounds):
        for top in range(2 * reach, 0, -1):
            for left in range(2 * reach, 0, -1):
                pixels = [
                    (row, column)
                    for row in range(reach + top, height - reach + 1, 2 * reach)
                    for column in range(reach + left, width - reach + 1, 2 * reach)
                ]
                down, across = random.integers(-reach, reach, (2, len(pixels)))
                for (row, column), d, a in zip(pixels, down, across, strict=True):
                    here, there = (row, column), (row + d, column + a)
                    source[here], source[there] = source[there], source[here]
    assert np.array_equal(got, source.ravel())
    assert np.array_equal(np.sort(got), np.arange(height * width))


def test_glass_swaps_nearly_every_pixel_with_a_near_one():
    for reach, rounds in ((1, 2), (2, 1), (4, 2)):
        source = shuffled(80, 90, reach, rounds, np.random.default_rng(0))
        rows, columns = np.divmod(source, 90)
        distance = np.maximum(
            np.abs(rows - np.arange(7200) // 90), np.abs(columns - np.arange(7200) % 90)
        ).reshape(80, 90)
        inside = distance[2 * reach : -2 * reach, 2 * reach : -2 * reach]
        assert (inside > 0).mean() > 0.75 and np.percentile(inside, 90) <= 3 * reach


def test_fog_keeps_the_brightest_and_takes_contrast():
    image = scene(8)
    for severity in SEVERITIES:
        changed = corrupt(image, "fog", severity, name="a")
        assert int(changed.max()) <= int(image.max()) + 1
    even = flat(64, 64, (100, 150, 200))
    spread = np.ptp(corrupt(even, "fog", 3, name="a").astype(int), axis=2)
    assert spread.max() <= 100 * (200 / 255) / (200 / 255 + 2.5) + 1.5  # colours come together by this factor


def test_heights_of_fog_span_all_and_are_rougher_where_they_decay_less():
    smooth, rough = (plasma(100, decay, np.random.default_rng(0)) for decay in (2, 1.4))
    for heights in (smooth, rough):
        assert heights.shape == (128, 128) and (heights.min(), heights.max()) == (0, 1)
        steps = np.abs(np.diff(np.concatenate([heights, heights[:1]]), axis=0)).mean(axis=1)
        assert steps[-1] < 3 * steps[:-1].mean()  # no seam: a torus
    assert np.abs(np.diff(rough)).mean() > 2 * np.abs(np.diff(smooth)).mean()


def test_ice_is_a_texture_of_middling_brightness():
    for seed in range(5):
        texture = ice(60, 90, np.random.default_rng(seed))
        assert texture.shape == (60, 90, 3) and texture.min() >= 0 and texture.max() <= 1
        assert 0.4 < texture.mean() < 0.6 and texture.std() > 0.1
        assert (texture[..., 2] >= texture[..., 0]).all()


def test_snow_brightens_and_spatter_adds_water_then_mud():
    image = scene(9)
    assert (corrupt(image, "snow", 1, name="a").astype(int) >= image.astype(int) - 1).all()
    assert (corrupt(image, "spatter", 3, name="a").astype(int) >= image.astype(int) - 1).all()
    white = flat(72, 96, (255, 255, 255))
    assert (corrupt(white, "spatter", 5, name="a") < 100).any(axis=2).mean() > 0.02
    assert np.array_equal(corrupt(white, "spatter", 3, name="a"), white)


def test_elastic_reach_grows_with_the_image_and_stays_small():
    for height, width in ((48, 64), (240, 320)):
        ramp = np.tile(np.linspace(0, 255, width), (height, 1)).astype(np.uint8)
        image = np.repeat(ramp[..., None], 3, axis=2)
        moved = np.abs(corrupt(image, "elastic_transform", 5, name="a").astype(int) - image)[:, 8:-8]
        pixels = moved.max() * width / 255
        assert 0.004 * width < pixels < 0.1 * width


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"corruption": "fogg"}, "'fogg' is unknown; allowed: gaussian_noise, .*saturate"),
        ({"severity": 6}, "severity 6 is unknown; allowed: 1 to 5"),
        ({"severity": 0}, "severity 0 is unknown"),
        ({"image": np.zeros((4, 4, 3), np.float32)}, "a is float32"),
        ({"image": np.zeros((4, 4), np.uint8)}, r"a is uint8 \(4, 4\)"),
    ],
)
def test_mistakes_are_told(changes, message):
    call = {"image": scene(0), "corruption": "fog", "severity": 1, **changes}
    with pytest.raises(UserError, match=message):
        corrupt(call["image"], call["corruption"], call["severity"], name="a")
