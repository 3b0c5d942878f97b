"""Colours of a real A2D2 label to class ids: our look-up table against one mask per colour.

    MOE_DATA=... python -m benchmarks.label_colours [--repeats N] [--out FILE]"""

import os
import sys
from pathlib import Path

import cv2
import numpy as np

from benchmarks.timing import arguments, medians, report, side_by_side
from dataloaders.a2d2 import colours_to_ids
from dataloaders.a2d2_classes import class_map
from dataloaders.frames import IGNORE

# (class id, r, g, b) of each of the 55 colours
IDS = tuple(class_map(38, None).ids)


def masks_of_pixels(label: np.ndarray) -> np.ndarray:
    """One mask per colour, comparing pixels: how it is usually written."""
    ids = np.full(label.shape[:2], IGNORE, np.uint8)
    for colour, class_id in IDS:
        ids[(label == [colour & 255, colour >> 8 & 255, colour >> 16]).all(axis=-1)] = class_id
    return ids


def masks_of_channels(label: np.ndarray) -> np.ndarray:
    """One mask per colour, comparing channel by channel: the quickest that masks get."""
    ids = np.full(label.shape[:2], IGNORE, np.uint8)
    blue, green, red = (np.ascontiguousarray(label[..., channel]) for channel in range(3))
    for colour, class_id in IDS:
        ids[(red == colour >> 16) & (green == (colour >> 8 & 255)) & (blue == (colour & 255))] = class_id
    return ids
