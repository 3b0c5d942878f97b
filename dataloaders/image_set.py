"""Labelled images for classification: uint8 arrays or memory maps, and a validation split taken out of train."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.config import UserError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """images uint8 [N, C, H, W], C = 1 or 3, in memory or mapped; labels int64 [N]; a name for each image."""

    images: np.ndarray
    labels: np.ndarray
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "ImageSplit":
        """Some of them, in the order of `rows`; of mapped images a view that reads when asked."""
        if isinstance(self.images, Picked):
            images = self.images.take(rows)
        else:  # a memory map isn't indexed here: that would read it
            images = Picked(self.images, rows) if isinstance(self.images, np.memmap) else self.images[rows]
        return ImageSplit(images, self.labels[rows], [self.names[row] for row in rows])


class Picked:
    """Rows of a memory map, read when they are asked for."""

    def __init__(self, array: np.ndarray, rows: np.ndarray):
        self.array, self.rows = array, np.asarray(rows)
        self.shape, self.dtype = (len(self.rows), *array.shape[1:]), array.dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key) -> np.ndarray:
        return self.array[self.rows[key]]

    def take(self, rows: np.ndarray) -> "Picked":
        return Picked(self.array, self.rows[rows])


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A data set with the splits that it has: train, test, and val where it brings one of its own."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, ImageSplit]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return tuple(next(iter(self.splits.values())).images.shape[1:])

    def split(self, name: str) -> ImageSplit:
        """UserError for one that the data set hasn't got."""
        if name not in self.splits:
            raise UserError(f"{self.name}: there is no split {name!r}; allowed: {', '.join(self.splits)}")
        return self.splits[name]

    def manifest(self, split: str) -> str:
        """SHA-256 over names and labels of a split."""
        own, digest = self.split(split), hashlib.sha256()
        for name, label in zip(own.names, own.labels.tolist(), strict=True):
            digest.update(f"{name}\0{label}\n".encode())
        return digest.hexdigest()

    def describe(self) -> str:
        counts = ", ".join(f"{len(split)} {name}" for name, split in self.splits.items())
        return f"{self.name}: {counts}, {self.num_classes} classes, {' x '.join(map(str, self.size))}"


def with_val(found: ImageSet, count: int, seed: int) -> ImageSet:
    """`count` images of train become val, the same share of every class, chosen by a hash of (seed, name): test is not
    looked at before the end. UserError for a count that train can't give, or for a train that has less than two
    images of a class."""
    train = found.split("train")
    per_class = count // found.num_classes
    sizes = np.bincount(train.labels, minlength=found.num_classes)
    if sizes.min() < 2:
        raise UserError(
            f"{found.name}: train has {sizes.min()} of class {found.classes[sizes.argmin()]}, expected 2 images or "
            "more: val (data.val_images) takes some of each class"
        )
    if per_class < 1 or per_class >= sizes.min():
        raise UserError(
            f"data.val_images: {count} is wrong for {found.name}; expected {found.num_classes} (one per class) to "
            f"{found.num_classes * (int(sizes.min()) - 1)}"
        )
    keys = [hashlib.sha256(f"{seed}/{name}".encode()).digest() for name in train.names]
    held_out = np.zeros(len(train), dtype=bool)
    for label in range(found.num_classes):
        rows = np.flatnonzero(train.labels == label)
        held_out[sorted(rows.tolist(), key=lambda row: keys[row])[:per_class]] = True
    splits = {"train": train.take(np.flatnonzero(~held_out)), "val": train.take(np.flatnonzero(held_out))}
    return replace(found, splits={**splits, **{k: v for k, v in found.splits.items() if k not in splits}})
