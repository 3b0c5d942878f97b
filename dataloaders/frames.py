"""What every data set is made of: frames (an image and a label file each) and the index that holds them."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np

from engine.config import IGNORE, UserError

SPLITS = ("train", "gate", "val", "test")


@dataclass(frozen=True)
class Frame:
    """One image with its label.

    `name` is unique in the data set. `scene` is what train and test must not share: the recording, or a run
    of its frames where a guard gap keeps runs apart. `block` is the run of neighbouring frames that the
    bootstrap draws as one unit."""

    name: str
    image: Path
    label: Path
    subset: str
    split: str
    scene: str
    block: str


@dataclass(frozen=True)
class FrameIndex:
    """All frames of a data set, in a fixed order, with its classes and the way to read a label.

    `read_label(path)` gives class ids (uint8 [H, W], 0..K-1 or `ignore_index`) and the number of pixels whose
    colour or id the data set does not know (they are ignored). `unknown_values(path)` counts those pixels by
    colour or id. `label_map` is a text that changes whenever the same label file would give other ids.
    `frame_size` is the (height, width) that every frame must have, None where frames may differ. `notes` are
    lines for people: what was left out and why."""

    name: str
    root: Path
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    frames: tuple[Frame, ...]
    read_label: Callable[[Path], tuple[np.ndarray, int]]
    unknown_values: Callable[[Path], dict[str, int]]
    label_map: str
    ignore_index: int = IGNORE
    frame_size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def subsets(self) -> tuple[str, ...]:
        """Names of the subsets in the order of their first frame."""
        return tuple(dict.fromkeys(frame.subset for frame in self.frames))

    @cached_property
    def counts(self) -> Counter:
        """Number of frames by (subset, split)."""
        return Counter((frame.subset, frame.split) for frame in self.frames)

    @cached_property
    def repeated(self) -> dict[str, list[str]]:
        """Frames that are listed more than once: name -> the "subset/split" places where it stands."""
        places: dict[str, list[str]] = {}
        for frame in self.frames:
            places.setdefault(frame.name, []).append(f"{frame.subset}/{frame.split}")
        return {name: where for name, where in places.items() if len(where) > 1}

    def select(self, split: str, subsets: Sequence[str]) -> tuple[Frame, ...]:
        """Frames of one split in index order; "all" stands for every subset that has train frames.

        Raises UserError for a subset that is not there, a subset without frames in this split, and for an
        index in which a frame is listed twice (it could be in train and in test)."""
        if split not in SPLITS:
            raise UserError(f"{self.name}: there is no split {split!r}; allowed: {', '.join(SPLITS)}")
        if self.repeated:
            name, where = next(iter(self.repeated.items()))
            raise UserError(
                f"{self.name} at {self.root}: {len(self.repeated)} frames are listed more than once, e.g. "
                f"{name} in {' and '.join(where)}; python -m dataloaders.check CONFIG lists them"
            )
        wanted: set[str] = set()
        for subset in subsets:
            members = self.trained_subsets if subset == "all" else {subset} & set(self.subsets)
            if not any(self.counts[member, split] for member in members):
                raise UserError(
                    f"{self.name} at {self.root}: subset {subset!r} has no {split} frames; {self.describe()}"
                )
            wanted |= members
        return tuple(frame for frame in self.frames if frame.split == split and frame.subset in wanted)

    @cached_property
    def trained_subsets(self) -> set[str]:
        return {subset for subset in self.subsets if self.counts[subset, "train"]}

    def describe(self) -> str:
        """What there is, in one line: "there is highway: 10 train, 2 test; urban: 8 train"."""
        parts = []
        for subset in self.subsets:
            counts = [
                f"{self.counts[subset, split]} {split}" for split in SPLITS if self.counts[subset, split]
            ]
            parts.append(f"{subset}: {', '.join(counts)}")
        return f"there is {'; '.join(parts)}" if parts else "there are no frames"

    def read(self, frame: Frame) -> tuple[np.ndarray, np.ndarray, int]:
        """Image uint8 [H, W, 3], class ids uint8 [H, W] and the number of unknown pixels.

        Raises UserError for a missing or undecodable file, for a label value out of range, for an image and a
        label of different size and for a size other than `frame_size`."""
        image = read_image(frame.image)
        labels, unknown = self.read_label(frame.label)
        expected = self.frame_size or image.shape[:2]
        if image.shape[:2] != expected or labels.shape != expected:
            allowed = size_text(self.frame_size) if self.frame_size else "the same size for both"
            raise UserError(
                f"{frame.image} is {size_text(image.shape)} and its label {frame.label} is "
                f"{size_text(labels.shape)}; allowed: {allowed}"
            )
        return image, labels, unknown

    def manifest(self, frames: Iterable[Frame]) -> str:
        """SHA-256 (hex) over the names, subsets, splits and file sizes of the frames, in their order.

        Raises UserError for a missing file."""
        digest = hashlib.sha256()
        for frame in frames:
            sizes = [file_size(frame.image), file_size(frame.label)]
            digest.update(repr((frame.name, frame.subset, frame.split, *sizes)).encode())
        return digest.hexdigest()


def read_image(path: Path) -> np.ndarray:
    """RGB image, uint8 [H, W, 3]; a rotation noted in the file is not applied, since labels carry none.

    Raises UserError for a missing or undecodable file."""
    return decode(path, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def decode(path: Path, flags: int) -> np.ndarray:
    """A picture file through cv2.imdecode; a missing, empty, cut off or foreign file raises UserError."""
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    picture = cv2.imdecode(data, flags) if data.size else None
    if picture is None:
        raise UserError(f"{path}: cannot be decoded as an image ({data.size} bytes)")
    return picture


def size_text(shape: Sequence[int]) -> str:
    """A size as people write it: "1920x1208" for (1208, 1920) or (1208, 1920, 3)."""
    return f"{shape[1]}x{shape[0]}"


def file_size(path: Path) -> int:
    """Size in bytes; a missing file raises UserError."""
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
