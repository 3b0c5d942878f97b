"""What is wrong with an image set is told: leaks, doubles, missing classes."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from dataloaders.check_images import OFFICIAL, check_images
from dataloaders.digits import digits
from dataloaders.image_set import ImageSet, ImageSplit

ROOT = Path(__file__).resolve().parents[2]


def split(values, labels):
    images = np.random.default_rng(0).integers(0, 255, (9, 3, 4, 4), dtype=np.uint8)[list(values)]
    return ImageSplit(images, np.array(labels), [f"i{place}" for place in range(len(labels))])


def told(train, test, classes=("a", "b")):
    return check_images(ImageSet("toy", classes, {"train": train, "test": test}))


def test_good_images_have_no_problem():
    text, problems = told(split([0, 1], [0, 1]), split([2, 3], [0, 1]))
    assert problems == 0 and "4 images, 0 problems" in text and "warning" not in text
    assert check_images(digits(""))[1] == 0


def test_a_test_image_in_train_is_a_problem_and_a_double_a_warning():
    text, problems = told(split([0, 1, 1, 1], [0, 1, 1, 0]), split([1, 3], [0, 1]))
    assert problems == 1 and "problem: train and test share 1 images" in text
    assert "warning: train: 2 images are there twice" in text
    assert "warning: train: 1 images have two labels" in text


def test_missing_classes_wrong_labels_and_flat_images_are_told():
    flat = split([0, 1], [0, 0])
    flat.images[0] = 7
    text, problems = told(flat, split([2, 3], [1, 5]), ("a", "b"))
    assert problems == 3
    assert "problem: train: no image of 1 classes (b, ...)" in text
    assert "problem: test: 1 labels are outside of 0..1" in text
    assert "warning: train: 1 images have one value only" in text


def test_other_numbers_of_images_than_the_official_ones_are_a_problem(monkeypatch):
    train, val, test = split([0, 1], [0, 1]), split([2, 3], [0, 1]), split([4, 5, 6], [0, 1, 1])
    whole = ImageSet("toy", ("a", "b"), {"train": train, "val": val, "test": test})
    assert check_images(whole)[1] == 0
    monkeypatch.setitem(OFFICIAL, ("toy", 2), (4, 3))
    assert check_images(whole)[1] == 0
    monkeypatch.setitem(OFFICIAL, ("toy", 2), (5, 30))
    text, problems = check_images(whole)
    assert problems == 2 and "problem: train: 4 images with val, the official toy has 5\n" in text
    assert "problem: test: 3 images, the official toy has 30\n" in text
    monkeypatch.setitem(OFFICIAL, ("toy", 3), OFFICIAL.pop(("toy", 2)))  # of some of the classes
    assert check_images(whole)[1] == 0


def test_many_classes_are_summed_up():
    classes = tuple(map(str, range(21)))
    train = split([place % 9 for place in range(22)], [*range(21), 0])
    text, _ = told(train, split([0], [0]), classes)
    assert "fewest of a class" in text and "most of a class" in text


def test_the_command_takes_a_classifier_and_a_pipeline_of_them():
    for config in ("resnet18_digits", "pipeline_digits", "evaluation_digits"):
        command = [sys.executable, "-m", "dataloaders.check", f"configs/cnn_moe/{config}.yaml"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        assert found.stdout.count("1797 images, 0 problems") == 1
