"""Small data sets on disk in the layouts that the loaders read."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from dataloaders.a2d2_lists import Entry


def save(path: Path, pixels: np.ndarray) -> Path:
    """Writes a picture losslessly: uint8 [H, W] ids or [H, W, 3] RGB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def solid(size: tuple[int, int], colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((*size, 3), colour, dtype=np.uint8)


def a2d2_tree(scenes: Path, entries: Iterable[Entry], size=(6, 10), colour=(255, 0, 255)) -> None:
    """Image and label of every entry, labels of one colour (by default a road)."""
    for entry in entries:
        save(scenes / entry.path("camera"), solid(size, (90, 100, 110)))
        save(scenes / entry.path("label"), solid(size, colour))


def write_lists(folder: Path, **lists: Iterable[str]) -> None:
    """Split lists, such as highway_train=[...]."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in lists.items():
        (folder / f"{name}_gt.txt").write_text("\n".join(lines))


def folder_tree(root: Path, rows: Iterable[dict[str, str]], size=(4, 6), classes: int = 3) -> Path:
    """images, labels (all of id 1), classes.json and manifest.csv with the given rows."""
    rows = list(rows)
    for row in rows:
        save(root / "images" / f"{row['name']}.png", solid(size, (10, 20, 30)))
        save(root / "labels" / f"{row['name']}.png", np.ones(size, dtype=np.uint8))
    listed = [{"id": i, "name": f"class {i}", "color": [i, i, i], "ignore": False} for i in range(classes)]
    (root / "classes.json").write_text(json.dumps(listed))
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (root / "manifest.csv").write_text("\n".join(lines) + "\n")
    return root
