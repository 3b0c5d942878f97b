"""A2D2 (Geyer et al. 2020), front centre camera, in its official layout; splits come from text lists."""

import hashlib
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from dataloaders.a2d2_classes import class_map
from dataloaders.a2d2_lists import Entry, find_lists, read_list
from dataloaders.frames import IGNORE, Frame, FrameIndex, decode
from engine.config import Size, UserError

# Frame numbers count the camera's 30 images a second, of which a part is labelled: 1000 numbers are 33
# seconds and some 10 to 50 labelled frames, enough road for two blocks to look different.
BLOCK_LENGTH = 1000

ROWS_AT_ONCE = 128  # so that what lies between colours and ids stays in the processor's cache
KNOWN_IGNORED = 254  # look-up value of a known colour that the class map ignores; an unknown colour is 255

LIST_HELP = (
    "python -m dataloaders.make_splits ROOT writes scene-disjoint lists, "
    "python -m dataloaders.import_splits FOLDER --root ROOT imports the public ones"
)


def a2d2(
    *,
    root: str,
    num_classes: Literal[11, 38, 55] = 38,
    splits: str = "splits",
    frame_size: Size = (1208, 1920),
) -> FrameIndex:
    """The frames that the lists `splits`/SUBSET_SPLIT_gt.txt name. No image or label file is touched here.

    root: the folder that holds the scenes, or its parent with a folder camera_lidar_semantic.
    num_classes: 55 entries of the class list, 38 categories, or 11 groups (without Blurred area, Rain dirt).
    splits: folder of the lists, below root or absolute. Lists all_* count only where there are no others:
        "all" always means every subset that has train frames.
    frame_size: height and width that images and labels must have.

    Frame.scene is the scene's folder, Frame.block a run of 1000 frame numbers (33 s) of it. Raises UserError
    for a missing root, missing or malformed lists and a malformed class_list.json."""
    base = Path(root)
    if not base.is_dir():
        raise UserError(f"a2d2: there is no folder {base} (data.root); the README says how to obtain A2D2")
    nested = base / "camera_lidar_semantic"
    scenes = nested if nested.is_dir() else base
    class_list = next((p for p in (scenes / "class_list.json", base / "class_list.json") if p.exists()), None)
    classes = class_map(num_classes, class_list)
    return FrameIndex(
        name="a2d2",
        root=base,
        classes=classes.classes,
        palette=classes.palette,
        frames=read_frames(base / splits, scenes),
        read_label=partial(read_colour_label, ids=classes.ids),
        unknown_values=partial(unknown_colours, ids=classes.ids),
        label_map=f"a2d2 {num_classes} {hashlib.sha256(repr(classes.ids).encode()).hexdigest()[:16]}",
        frame_size=tuple(frame_size),
    )


def read_frames(folder: Path, scenes: Path) -> tuple[Frame, ...]:
    """The frames of all lists: subsets with train frames first; within one train, gate, val, test."""
    lists = find_lists(folder)
    if not lists:
        raise UserError(f"a2d2: there are no split lists (SUBSET_SPLIT_gt.txt) in {folder}; {LIST_HELP}")
    if set(lists) != {"all"}:
        lists.pop("all", None)
    frames = []
    for subset in sorted(lists, key=lambda subset: ("train" not in lists[subset], subset)):
        for split, path in lists[subset].items():
            entries, first_camera = read_list(path)
            if first_camera is not None:
                raise UserError(f"{path}:{first_camera}: names a camera image; allowed: label paths")
            frames += [make_frame(entry, scenes, subset, split) for entry in entries]
    return tuple(frames)


def make_frame(entry: Entry, scenes: Path, subset: str, split: str) -> Frame:
    return Frame(
        name=entry.name,
        image=scenes / entry.path("camera"),
        label=scenes / entry.path("label"),
        subset=subset,
        split=split,
        scene=entry.scene,
        block=f"{entry.scene}/{int(entry.number) // BLOCK_LENGTH}",
    )


def read_colour_label(path: Path, ids: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, int]:
    """Class ids uint8 [H, W] of a colour-coded label and its number of pixels of unknown colour (id 255)."""
    return colours_to_ids(decode(path, cv2.IMREAD_COLOR_BGR), ids)


def colours_to_ids(label: np.ndarray, ids: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, int]:
    """As read_colour_label, for a decoded label: uint8 [H, W, 3] in cv2's order (B, G, R)."""
    table = lookup_table(ids)
    mapped = np.empty(label.shape[:2], np.uint8)
    for row in range(0, len(label), ROWS_AT_ONCE):
        rows = slice(row, row + ROWS_AT_ONCE)
        mapped[rows] = table.take(packed_colours(label[rows]))
    unknown = np.count_nonzero(mapped == IGNORE)
    if any(class_id == IGNORE for _, class_id in ids):
        mapped[mapped == KNOWN_IGNORED] = IGNORE
    return mapped, unknown


def packed_colours(label: np.ndarray) -> np.ndarray:
    """Colours as int32 [H, W], 0xRRGGBB - 2^24: negative, so they index a table of 2^24 entries from its end.

    One pass of cv2 makes B, G, R, 255 of each pixel, and those four bytes are the little-endian integer."""
    return cv2.cvtColor(label, cv2.COLOR_BGR2BGRA).view("<i4")[..., 0]


@lru_cache(maxsize=4)
def lookup_table(ids: tuple[tuple[int, int], ...]) -> np.ndarray:
    """uint8 [2^24]: class id by colour r << 16 | g << 8 | b; 254: ignored colour, 255: unknown colour."""
    table = np.full(1 << 24, IGNORE, dtype=np.uint8)
    for colour, class_id in ids:
        table[colour] = KNOWN_IGNORED if class_id == IGNORE else class_id
    return table


def unknown_colours(path: Path, ids: tuple[tuple[int, int], ...]) -> dict[str, int]:
    """Pixels of each colour that the class list does not know: "#rrggbb" -> count."""
    packed = packed_colours(decode(path, cv2.IMREAD_COLOR_BGR))
    colours, counts = np.unique(packed[lookup_table(ids).take(packed) == IGNORE], return_counts=True)
    return {f"#{colour + (1 << 24):06x}": int(count) for colour, count in zip(colours, counts, strict=True)}
