"""Images and labels stay aligned under every change, and randomness depends on (seed, epoch, index) only."""

from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import albumentations
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataloaders.frames import IGNORE
from dataloaders.transforms import (
    PADDING,
    Color,
    augmentation,
    augmented,
    nearest,
    only_flips,
    resize_image,
    resize_label,
    valid_window,
    was_flipped,
)

NOTHING = {"scale": (1.0, 1.0), "flip": 0.0, "color": 0.0, "blur": 0.0}
sides = st.integers(1, 60)


def pipeline(size, **changes):
    return augmentation(SimpleNamespace(**{**NOTHING, **changes}), size)


def noise(height, width, seed=0):
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    labels = random.integers(0, 9, (height, width), dtype=np.uint8)
    image.flags.writeable = labels.flags.writeable = False
    return image, labels


def stripes(length, across, axis):
    """Ids 0 and 1 in stripes along one axis, and an image that shows them as 0 and 200."""
    line = np.random.default_rng(length).integers(0, 2, length).astype(np.uint8)
    labels = np.repeat(line[:, None], across, axis=1)
    labels = labels if axis == 0 else labels.T
    return np.repeat(labels[..., None] * np.uint8(200), 3, axis=2), np.ascontiguousarray(labels)


# Resizing


def test_window_of_an_a2d2_frame():
    assert valid_window((1208, 1920), (480, 640), "squash") == (0, 0, 480, 640)
    assert valid_window((1208, 1920), (480, 640), "letterbox") == (38, 0, 403, 640)
    assert valid_window((1920, 1208), (480, 640), "letterbox") == (0, 169, 480, 302)


@given(native=st.tuples(sides, sides), size=st.tuples(sides, sides))
def test_letterbox_keeps_the_aspect_fills_one_side_and_is_centred(native, size):
    top, left, height, width = valid_window(native, size, "letterbox")
    assert 1 <= height <= size[0] and 1 <= width <= size[1]
    assert height == size[0] or width == size[1]
    zoom = min(Fraction(size[0], native[0]), Fraction(size[1], native[1]))
    assert height == 1 or abs(height - zoom * native[0]) <= Fraction(1, 2)
    assert width == 1 or abs(width - zoom * native[1]) <= Fraction(1, 2)
    assert 0 <= (size[0] - height) - 2 * top <= 1 and 0 <= (size[1] - width) - 2 * left <= 1


@given(native=st.tuples(sides, sides), size=st.tuples(sides, sides))
@settings(max_examples=50)
def test_a_new_label_pixel_has_the_id_under_its_centre(native, size):
    _, labels = noise(*native)
    half = Fraction(1, 2)
    rows = [int((row + half) * native[0] / size[0]) for row in range(size[0])]
    columns = [int((column + half) * native[1] / size[1]) for column in range(size[1])]
    assert nearest(labels, *size).tolist() == [[labels[row, column] for column in columns] for row in rows]


@given(native=st.tuples(sides, sides), border=st.tuples(st.integers(0, 40), st.integers(0, 40)))
@settings(max_examples=50)
def test_cutting_the_window_of_an_enlarged_label_gives_the_label_back(native, border):
    _, labels = noise(*native)
    size = (native[0] + border[0], native[1] + border[1])
    for resize in ("squash", "letterbox"):
        top, left, height, width = valid_window(native, size, resize)
        large = resize_label(labels, size, resize)
        assert large.shape == size
        window = large[top : top + height, left : left + width]
        assert np.array_equal(nearest(window, *native), labels)
        assert (large == IGNORE).sum() == size[0] * size[1] - height * width


def test_the_border_of_a_letterbox_is_padding_and_ignored():
    image, labels = noise(20, 40)
    image = resize_image(image, (80, 80), "letterbox")
    labels = resize_label(labels, (80, 80), "letterbox")
    outside = labels == IGNORE
    assert np.array_equal(np.flatnonzero(outside.all(axis=1)), [*range(20), *range(60, 80)])
    assert (image[outside] == PADDING).all()


def test_shrinking_an_image_averages_areas_and_enlarging_is_linear():
    image, _ = noise(16, 18)
    areas = image.reshape(4, 4, 6, 3, 3).mean(axis=(1, 3))
    assert abs(resize_image(image, (4, 6), "squash") - areas).max() <= 0.5
    ramp = np.repeat(np.arange(0, 100, 10, dtype=np.uint8)[None, :, None], 3, axis=2)
    assert resize_image(ramp, (1, 20), "squash")[0, 1:-1, 0] == pytest.approx(np.arange(2.5, 90, 5), abs=0.5)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("grown", [31, 37, 50, 64])
def test_enlarged_images_and_labels_agree_to_the_pixel(axis, grown):
    image, labels = stripes(30, 30, axis)
    image = resize_image(image, (grown, grown), "squash")
    labels = resize_label(labels, (grown, grown), "squash")
    decided = abs(image[..., 0].astype(int) - 100) > 2  # at a tie either id is right
    assert decided.mean() > 0.8
    assert np.array_equal((image[..., 0] > 100)[decided], labels[decided] == 1)


# Random changes


def test_none_changes_nothing():
    image, labels = noise(6, 8)
    same_image, same_labels = augmented(augmentation("none", (6, 8)), image, labels, seed=1, epoch=2, index=3)
    assert np.array_equal(same_image, image) and np.array_equal(same_labels, labels)


def test_a_zoom_of_one_is_the_identity():
    image, labels = noise(6, 8)
    same_image, same_labels = augmented(pipeline((6, 8)), image, labels, seed=1, epoch=2, index=3)
    assert np.array_equal(same_image, image) and np.array_equal(same_labels, labels)


def test_a_flip_turns_image_and_label():
    image, labels = noise(6, 8)
    flipped = augmented(pipeline((6, 8), flip=1.0), image, labels, seed=1, epoch=2, index=3)
    assert np.array_equal(flipped[0], image[:, ::-1]) and np.array_equal(flipped[1], labels[:, ::-1])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"flip": 0.5}, True),
        ({"flip": 1.0, "scale": [1, 1]}, True),
        ({"scale": (1.0, 1.1)}, False),
        ({"scale": (0.9, 1.0)}, False),
        ({"color": 0.1}, False),
        ({"blur": 0.1}, False),
    ],
)
def test_only_flips_says_whether_frames_are_shown_as_they_are_or_mirrored(changes, expected):
    augment = SimpleNamespace(**{**NOTHING, **changes})
    assert only_flips(augment) is expected
    image, labels = noise(16, 18)
    pipeline, found = augmentation(augment, (16, 18)), []
    for index in range(40):
        changed = augmented(pipeline, image, labels, seed=3, epoch=0, index=index)
        sides = image[:, ::-1] if was_flipped(pipeline) else image
        found.append(np.array_equal(changed[0], sides))
    assert all(found) == expected


def test_no_augmentation_only_flips_and_never_does():
    assert only_flips("none") and not was_flipped(augmentation("none", (6, 8)))


@given(scale=st.floats(0.3, 3.0), axis=st.integers(0, 1), index=st.integers(0, 9))
@settings(max_examples=60)
def test_scale_crop_keeps_image_and_label_aligned(scale, axis, index):
    image, labels = stripes(48, 48, axis)
    change = pipeline((48, 48), scale=(scale, scale), flip=0.5)
    image, labels = augmented(change, image, labels, seed=0, epoch=0, index=index)
    assert image.shape == (48, 48, 3) and labels.shape == (48, 48)
    outside = labels == IGNORE
    assert (~outside).sum() == min(48, round(48 * scale)) ** 2
    assert (image[outside] == PADDING).all()
    decided = ~outside & (abs(image[..., 0].astype(int) - 100) > 2)
    assert np.array_equal((image[..., 0] > 100)[decided], labels[decided] == 1)


@pytest.mark.parametrize("scale", [0.5, 1.25, 2.0])
def test_scale_crop_zooms_by_the_scale_and_cuts_anywhere(scale):
    rows, columns = np.mgrid[0:40, 0:60].astype(np.uint8)
    image = np.stack([rows * 4, columns * 4, rows], axis=-1)  # a pixel says where it came from, in quarters
    corners = set()
    for index in range(40):
        labels = np.zeros((40, 60), np.uint8)
        change = pipeline((40, 60), scale=(scale, scale))
        result, labels = augmented(change, image, labels, seed=0, epoch=0, index=index)
        top, left = np.argwhere(labels == 0)[0]
        height, width = min(40, round(40 * scale)), min(60, round(60 * scale))
        inside = result[top : top + height, left : left + width].astype(float) / 4
        row_steps, column_steps = np.diff(inside[1:-1, :, 0], axis=0), np.diff(inside[:, 1:-1, 1], axis=1)
        assert row_steps == pytest.approx(1 / scale, abs=0.26)  # half a level of rounding at either end
        assert row_steps.mean() == pytest.approx(1 / scale, abs=0.02)
        assert column_steps.mean() == pytest.approx(1 / scale, abs=0.02)
        corners.add((int(top), int(left)) if scale < 1 else tuple(inside[0, 0, :2]))
    assert len(corners) > 20


def test_scale_is_drawn_from_its_range():
    _, labels = noise(64, 64)
    image = np.zeros((64, 64, 3), np.uint8)
    filled = []
    change = pipeline((64, 64), scale=(0.25, 0.75))
    for index in range(100):
        _, changed = augmented(change, image, labels, seed=0, epoch=0, index=index)
        filled.append(np.sqrt((changed != IGNORE).sum()) / 64)
    assert 0.25 <= min(filled) < 0.32 and 0.68 < max(filled) <= 0.75
    assert np.mean(filled) == pytest.approx(0.5, abs=0.05)


def luma(image):
    return image.astype(float) @ Color.LUMA


def test_brightness_contrast_saturation_and_hue_each_do_what_they_say():
    image = np.random.default_rng(0).integers(90, 160, (40, 40, 3), dtype=np.uint8)
    color, as_it_is = Color(), {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    assert np.array_equal(color.apply(image, **as_it_is), image)
    assert color.apply(image, **as_it_is | {"brightness": 1.2}) == pytest.approx(image * 1.2, abs=0.51)
    flat = color.apply(image, **as_it_is | {"contrast": 0.5})
    assert flat == pytest.approx(image * 0.5 + luma(image).mean() * 0.5, abs=0.51)
    grey = color.apply(image, **as_it_is | {"saturation": 0.0})
    assert grey == pytest.approx(np.repeat(luma(image)[..., None], 3, axis=2), abs=0.6)
    assert luma(color.apply(image, **as_it_is | {"hue": 15.0})) == pytest.approx(luma(image), abs=0.6)
    before = np.full((1, 1, 3), (200, 80, 80), np.uint8)
    blue, red = Color.YUV[1:] @ before[0, 0]
    new_blue, new_red = Color.YUV[1:] @ color.apply(before, **as_it_is | {"hue": 15.0})[0, 0]
    assert np.hypot(new_blue, new_red) == pytest.approx(np.hypot(blue, red), abs=1)
    turned = np.degrees(np.arctan2(new_red, new_blue) - np.arctan2(red, blue))
    assert turned == pytest.approx(15, abs=1)


def test_color_leaves_labels_and_its_strength_is_bounded():
    image, labels = np.full((8, 8, 3), 100, np.uint8), noise(8, 8)[1]
    levels = []
    for index in range(200):
        changed, same = augmented(pipeline((8, 8), color=1.0), image, labels, seed=0, epoch=0, index=index)
        assert np.array_equal(same, labels) and np.ptp(changed) <= 1  # grey stays grey
        levels.append(changed[0, 0, 0])
    assert 70 <= min(levels) < 75 and 125 < max(levels) <= 130  # contrast keeps the mean, brightness shows


def test_blur_leaves_labels_and_flattens_images():
    image, labels = noise(32, 32)
    changed, same = augmented(pipeline((32, 32), blur=1.0), image, labels, seed=0, epoch=0, index=0)
    assert np.array_equal(same, labels)
    assert changed.std() < image.std() and changed.mean() == pytest.approx(image.mean(), abs=1)


# Seeds


def test_a_sample_depends_on_seed_epoch_and_index_only():
    image, labels = noise(32, 48)
    change = augmentation(SimpleNamespace(scale=(0.5, 2.0), flip=0.5, color=0.5, blur=0.5), (32, 48))

    def sample(change, seed, epoch, index):
        changed = augmented(change, image, labels, seed=seed, epoch=epoch, index=index)
        return b"".join(array.tobytes() for array in changed)

    keys = [(seed, epoch, index) for seed in (0, 304) for epoch in (0, 1, 2) for index in (0, 1, 2)]
    forward = {key: sample(change, *key) for key in keys}
    other = augmentation(SimpleNamespace(scale=(0.5, 2.0), flip=0.5, color=0.5, blur=0.5), (32, 48))
    assert forward == {key: sample(other, *key) for key in reversed(keys)}
    assert len(set(forward.values())) == len(keys)


def test_two_transforms_of_one_pipeline_are_independent():
    image, labels = noise(4, 4)
    flips = albumentations.Compose([albumentations.HorizontalFlip(p=0.5), albumentations.VerticalFlip(p=0.5)])
    outcomes = Counter()
    for index in range(800):
        _, changed = augmented(flips, image, labels, seed=304, epoch=1, index=index)
        views = {"none": labels, "first": labels[:, ::-1], "second": labels[::-1], "both": labels[::-1, ::-1]}
        outcomes.update(name for name, view in views.items() if np.array_equal(changed, view))
    assert sum(outcomes.values()) == 800
    for name in ("none", "first", "second", "both"):
        assert outcomes[name] == pytest.approx(200, abs=50)  # 4 standard deviations of a fair draw


def test_flip_and_color_of_the_training_pipeline_are_independent():
    image, labels = noise(8, 8)
    change = pipeline((8, 8), flip=0.5, color=0.5)
    outcomes = Counter()
    for index in range(400):
        changed, changed_labels = augmented(change, image, labels, seed=304, epoch=0, index=index)
        flipped = not np.array_equal(changed_labels, labels)
        outcomes[flipped, not np.array_equal(changed, image[:, ::-1] if flipped else image)] += 1
    assert len(outcomes) == 4 and min(outcomes.values()) > 65  # 100 each, 4 standard deviations
