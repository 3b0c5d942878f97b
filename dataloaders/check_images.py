"""What `python -m dataloaders.check` tells of an image set for classification: every image is read."""

import hashlib
from collections import Counter
from itertools import combinations

import numpy as np

from dataloaders.command import table
from dataloaders.image_set import ImageSet, ImageSplit

CHUNK = 4096  # images that are read together
MOST_CLASSES = 20  # that are listed one by one
OFFICIAL = {  # (name, number of classes) -> images of train (val is a part of it) and of test
    ("mnist", 10): (60_000, 10_000),
    ("cifar10", 10): (50_000, 10_000),
    ("cifar100", 100): (50_000, 10_000),
    ("tiny_imagenet", 200): (100_000, 10_000),
    ("imagenet", 1000): (1_281_167, 50_000),
}


def check_images(images: ImageSet) -> tuple[str, int]:
    """(a report for people, number of problems). Problems: an image that is in test and in train or val as well, a
    class without an image in a split, labels outside of the classes, other numbers of images than the official ones.
    Images twice in a split, of one value only, or with two labels are warnings."""
    found = {name: digests(split) for name, split in images.splits.items()}
    problems, warnings = other_counts(images), []
    for name, split in images.splits.items():
        own = found[name]
        wrong = int(((split.labels < 0) | (split.labels >= images.num_classes)).sum())
        if wrong:
            problems.append(f"{name}: {wrong} labels are outside of 0..{images.num_classes - 1}")
        missing = np.flatnonzero(np.bincount(split.labels.clip(0), minlength=images.num_classes) == 0)
        if len(missing):
            problems.append(f"{name}: no image of {len(missing)} classes ({images.classes[missing[0]]}, ...)")
        if twice := sum(count - 1 for count in Counter(own).values()):
            warnings.append(f"{name}: {twice} images are there twice")
        labels: dict[str, set] = {}
        for digest, label in zip(own, split.labels.tolist(), strict=True):
            labels.setdefault(digest, set()).add(label)
        if torn := sum(len(one) > 1 for one in labels.values()):
            warnings.append(f"{name}: {torn} images have two labels")
        if flat := flat_images(split):
            warnings.append(f"{name}: {flat} images have one value only")
    for one, other in combinations(images.splits, 2):
        if shared := len(set(found[one]) & set(found[other])):
            text = f"{one} and {other} share {shared} images"
            (problems if "test" in (one, other) else warnings).append(text)
    lines = [images.describe(), "", counts(images), ""]
    lines += [f"warning: {text}" for text in warnings] + [f"problem: {text}" for text in problems]
    total = sum(map(len, images.splits.values()))
    return "\n".join([*lines, f"{total} images, {len(problems)} problems"]), len(problems)


def other_counts(images: ImageSet) -> list[str]:
    """A line for each split that has another number of images than the official data set of this name."""
    official = OFFICIAL.get((images.name, images.num_classes))
    if official is None:
        return []
    sizes = {name: len(split) for name, split in images.splits.items()}
    own = {"train": sizes["train"] + sizes.get("val", 0), "test": sizes["test"]}
    return [
        f"{name}: {count} images{' with val' if name == 'train' else ''}, the official {images.name} has {expected}"
        for (name, count), expected in zip(own.items(), official, strict=True)
        if count != expected
    ]


def digests(split: ImageSplit) -> list[str]:
    """A hash of the pixels of each image."""
    return [
        hashlib.sha256(image.tobytes()).hexdigest()
        for start in range(0, len(split), CHUNK)
        for image in np.ascontiguousarray(split.images[np.arange(start, min(start + CHUNK, len(split)))])
    ]


def flat_images(split: ImageSplit) -> int:
    count = 0
    for start in range(0, len(split), CHUNK):
        part = split.images[np.arange(start, min(start + CHUNK, len(split)))].reshape(
            -1, np.prod(split.images.shape[1:])
        )
        count += int((part.min(axis=1) == part.max(axis=1)).sum())
    return count


def counts(images: ImageSet) -> str:
    """Images of each class by split; of many classes the fewest and the most."""
    found = {
        name: np.bincount(split.labels.clip(0), minlength=images.num_classes)
        for name, split in images.splits.items()
    }
    if images.num_classes <= MOST_CLASSES:
        rows = [
            [name, *(int(one[number]) for one in found.values())]
            for number, name in enumerate(images.classes)
        ]
    else:
        rows = [
            [f"{name} of a class", *(int(way(one)) for one in found.values())]
            for name, way in (("fewest", np.min), ("most", np.max))
        ]
    return table(["images", *found], rows)
