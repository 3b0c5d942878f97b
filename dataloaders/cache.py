"""A lossless cache on disk of frames at the network's size: memory-mapped, shared by runs and subsets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataloaders.cache_parts import Part
from dataloaders.frames import Frame, FrameIndex


class Rows:
    """Rows of several memory-mapped .npy files seen as one sequence of read-only arrays.

    A copy in another process maps the files again: their bytes never travel."""

    def __init__(self, paths: Sequence[Path], places: Sequence[tuple[int, int]]):
        self.paths = paths
        self.places = places  # per row: (file, row in it)
        self.arrays = [np.load(path, mmap_mode="r") for path in paths]

    def __reduce__(self):
        return Rows, (self.paths, self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> np.ndarray:
        file, line = self.places[row]
        return np.asarray(self.arrays[file][line])


@dataclass(frozen=True)
class FrameCache:
    """Frames at the network's size and what was counted in them; row i belongs to `frames[i]`."""

    frames: tuple[Frame, ...]
    images: Rows  # uint8 [H, W, 3] each, RGB
    labels: Rows  # uint8 [H, W] each
    native_sizes: np.ndarray  # int64 [N, 2]: height and width of the source
    unknown_pixels: np.ndarray  # int64 [N]: source pixels whose colour or id is unknown
    class_counts: np.ndarray  # int64 [N, K + 1]: pixels of each class in `labels`, last those ignored
    image_size: tuple[int, int]

    def class_pixels(self) -> np.ndarray:
        """Pixels of each class over all frames at the network's size, int64 [K], without ignored ones."""
        return self.class_counts[:, :-1].sum(axis=0)


def open_cache(
    index: FrameIndex,
    frames: Sequence[Frame],
    image_size: tuple[int, int],
    resize: str,
    cache_dir: str | Path,
) -> FrameCache:
    """The cache of `frames` of `index`; parts that are missing, stale or damaged are made first.

    A part holds one subset and split of the index, so that selections share them. It is found by a hash over
    names, sizes and times of its source files, image size, resize, class map and versions; the bytes that are
    used are checked against their CRC-32.

    Raises UserError for a source that cannot be used and for a folder that cannot be written."""
    root = Path(cache_dir) / "frames"
    wanted = {frame.name for frame in frames}
    members: dict[tuple[str, str], list[Frame]] = {(frame.subset, frame.split): [] for frame in frames}
    for frame in index.frames:
        members.get((frame.subset, frame.split), []).append(frame)

    places: dict[str, tuple[int, int]] = {}  # frame name -> part, row in it
    folders, metas = [], []
    for part_frames in members.values():
        part = Part(index, tuple(part_frames), tuple(image_size), resize)
        rows = [row for row, frame in enumerate(part_frames) if frame.name in wanted]
        metas.append(part.open(root, rows))
        places |= {part_frames[row].name: (len(folders), row) for row in rows}
        folders.append(root / part.key)

    order = [places[frame.name] for frame in frames]
    columns = {
        name: np.array([metas[part][name][row] for part, row in order], dtype=np.int64)
        for name in ("native_sizes", "unknown_pixels", "class_counts")
    }
    images = Rows([folder / "images.npy" for folder in folders], order)
    labels = Rows([folder / "labels.npy" for folder in folders], order)
    return FrameCache(tuple(frames), images, labels, **columns, image_size=tuple(image_size))
