"""Labels as id masks: one channel whose values are class ids."""

from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from dataloaders.frames import IGNORE, decode, size_text
from engine.config import UserError

NOT_ALLOWED = -1


def id_table(ids: Mapping[int, int]) -> tuple[int, ...]:
    """Table of the 256 mask values: the class id (255: ignored) or -1 for a value that must not occur.

    255 means ignored in any data set that does not use it otherwise."""
    return tuple(ids.get(value, IGNORE if value == IGNORE else NOT_ALLOWED) for value in range(256))


def read_id_mask(path: Path, table: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """Class ids uint8 [H, W] of a mask through `table` (see id_table), and 0: a mask has no unknown pixels.

    Raises UserError for a missing or undecodable file, colours in place of ids, and a value not allowed."""
    mask = read_mask(path)
    ids = np.array(table)
    counts = np.bincount(mask.ravel(), minlength=256)
    if wrong := [value for value in counts.nonzero()[0] if value > 255 or ids[value] == NOT_ALLOWED]:
        named = ", ".join(f"{value} ({counts[value]} pixels)" for value in wrong[:5])
        allowed = ranges([value for value in range(256) if ids[value] != NOT_ALLOWED])
        raise UserError(f"{path}: label value {named}{', ...' if wrong[5:] else ''}; allowed: {allowed}")
    return ids.astype(np.uint8).take(mask), 0


def read_mask(path: Path) -> np.ndarray:
    """The values of a mask as stored, uint8 or uint16 [H, W]; of a picture with a palette the indices."""
    try:
        with Image.open(path) as picture:
            mode, values = picture.mode, np.array(picture)
    except FileNotFoundError:
        raise UserError(f"{path}: cannot be read (No such file or directory)") from None
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        raise UserError(f"{path}: cannot be decoded as an image ({error})") from None
    if mode not in ("L", "P", "I;16"):
        raise UserError(
            f"{path}: a label must hold class ids in one channel of 8 or 16 bits, this picture is {mode}"
        )
    return values


def no_unknown_values(path: Path) -> dict[str, int]:
    """Masks have no unknown values: any other value raises UserError when the mask is read."""
    return {}


def ranges(values: list[int]) -> str:
    """Sorted numbers as people write them: "0..11, 255"."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], value]
        else:
            runs.append([value])
    return ", ".join("..".join(map(str, run)) for run in runs)


def refuse_kitti(data_set: str, root: Path) -> None:
    """Raises UserError where root has KITTI's layout: its labels have another size than its images."""
    for base in (root, root / "training"):
        if (base / "image_2").is_dir() and (base / "semantic").is_dir():
            break
    else:
        return
    sizes = ""
    for label_path in sorted((base / "semantic").glob("*.png"))[:1]:
        image = decode(base / "image_2" / label_path.name, cv2.IMREAD_UNCHANGED)
        label = read_mask(label_path)
        sizes = (
            f": the image {label_path.name} is {size_text(image.shape)}, its label {size_text(label.shape)}"
        )
    raise UserError(
        f"{data_set}: {base} has the layout of KITTI (image_2, semantic), which is not supported: its labels "
        f"have the ids of Cityscapes, but not the size of their images{sizes}"
    )
