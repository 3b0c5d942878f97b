"""Colours of a real A2D2 label to class ids: the look-up table against one mask per colour.

MOE_DATA=... python -m benchmarks.label_colours [--repeats N] [--out FILE]"""

import os
import sys
from pathlib import Path

import cv2
import numpy as np

from benchmarks.timing import arguments, medians, report, side_by_side
from dataloaders.a2d2 import colours_to_ids
from dataloaders.a2d2_classes import class_map
from dataloaders.frames import IGNORE, Frame

CLASSES = class_map(38)


def masks_of_pixels(label: np.ndarray) -> np.ndarray:
    """One mask per colour, as it is usually written. `label` is uint8 [H, W, 3] in cv2's order B, G, R."""
    ids = np.full(label.shape[:2], IGNORE, np.uint8)
    for colour, class_id in CLASSES.ids:
        blue_green_red = [colour & 255, colour >> 8 & 255, colour >> 16]
        ids[(label == np.uint8(blue_green_red)).all(axis=-1)] = class_id
    return ids


def masks_of_channels(label: np.ndarray) -> np.ndarray:
    """One mask per colour, channel by channel: masks at their quickest."""
    ids = np.full(label.shape[:2], IGNORE, np.uint8)
    blue, green, red = (np.ascontiguousarray(label[..., channel]) for channel in range(3))
    for colour, class_id in CLASSES.ids:
        ids[(red == colour >> 16) & (green == (colour >> 8 & 255)) & (blue == (colour & 255))] = class_id
    return ids


def sample_frames() -> tuple[Frame, ...]:
    """The A2D2 sample of MOE_DATA; ends the program where it is not there."""
    root = Path(os.environ.get("MOE_DATA", "")) / "a2d2_sample" / "camera_lidar_semantic"
    labels = sorted(root.glob("*/label/*/*.png"))
    if not labels:
        sys.exit(f"no A2D2 frames in {root}: set MOE_DATA to the folder that holds a2d2_sample")
    frames = []
    for label in labels:
        image = Path(str(label).replace("/label/", "/camera/").replace("_label_", "_camera_"))
        frames.append(Frame(label.stem, image, label, "sample", "train", label.parts[-4], label.parts[-4]))
    return tuple(frames)


def main() -> None:
    args = arguments(__doc__.splitlines()[0], repeats=9)
    label = cv2.imread(str(sample_frames()[0].label))
    ways = {
        "look-up table (colours_to_ids)": lambda: colours_to_ids(label, CLASSES.ids)[0],
        "one mask per colour, by channels": lambda: masks_of_channels(label),
        "one mask per colour, by pixels": lambda: masks_of_pixels(label),
    }
    expected = masks_of_pixels(label)
    assert all(np.array_equal(way(), expected) for way in ways.values()), "the ways disagree"
    seconds = medians(side_by_side(ways, args.repeats))
    ours = next(iter(seconds.values()))
    rows = [(name, f"{value * 1e3:.1f}", f"{value / ours:.1f}") for name, value in seconds.items()]
    size = f"{label.shape[1]}x{label.shape[0]}"
    report(
        f"Colours of an A2D2 label to class ids ({size}, {len(CLASSES.ids)} colours)",
        ("way", "ms", "x our time"),
        rows,
        f"Median of {args.repeats} interleaved rounds, one thread, decoding not included; identical results.",
        args.out,
    )


if __name__ == "__main__":
    main()
