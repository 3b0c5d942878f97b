"""A small data set on disk for tests: noisy images and id masks of K = 5 classes, some pixels unknown."""

from pathlib import Path

import cv2
import numpy as np

from dataloaders.frames import IGNORE, Frame, FrameIndex

PARTS = {("east", "train"): 6, ("west", "train"): 5, ("east", "test"): 3}


def write_index(root: Path, parts: dict[tuple[str, str], int] = PARTS, size=(24, 40)) -> FrameIndex:
    """Writes images and masks of `size` (height, width) to `root`: the same for the same arguments."""
    random = np.random.default_rng(7)
    root.mkdir(parents=True, exist_ok=True)
    frames = []
    for (subset, split), count in parts.items():
        for number in range(count):
            name = f"{subset}_{split}_{number}"
            frame = Frame(name, root / f"{name}.png", root / f"{name}_ids.png", subset, split, subset, subset)
            coarse = random.integers(0, 256, (size[0] // 4, size[1] // 4, 3), dtype=np.uint8)
            cv2.imwrite(str(frame.image), cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_LINEAR))
            ids = random.integers(0, 6, (size[0] // 4, size[1] // 4), dtype=np.uint8)
            ids[ids == 5] = IGNORE
            cv2.imwrite(str(frame.label), cv2.resize(ids, size[::-1], interpolation=cv2.INTER_NEAREST))
            frames.append(frame)
    return FrameIndex(
        name="tiny",
        root=root,
        classes=tuple("abcde"),
        palette=((0, 0, 0),) * 5,
        frames=tuple(frames),
        read_label=read_ids,
        unknown_values=lambda path: {},
        label_map="tiny 1",
    )


def read_ids(path: Path) -> tuple[np.ndarray, int]:
    ids = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_GRAYSCALE)
    return ids, int((ids == IGNORE).sum())
