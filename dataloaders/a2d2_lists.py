"""Split lists of A2D2: SUBSET_SPLIT_gt.txt, one label path a line, of which only the base name counts."""

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dataloaders.frames import SPLITS
from engine.config import UserError

_LIST = re.compile(rf"(?P<subset>.+)_(?P<split>{'|'.join(SPLITS)})_gt\.txt")
_LINE = re.compile(r"(?P<day>\d{8})(?P<time>\d{6})_(?P<kind>label|camera)_frontcenter_(?P<number>\d+)\.png")


class Entry(NamedTuple):
    """A frame: its scene (the folder, "20181204_135952") and its number as written ("000094929")."""

    scene: str
    number: str

    @property
    def name(self) -> str:
        """Name of the frame, the same for its camera and its label file."""
        return f"{self.scene.replace('_', '')}_frontcenter_{self.number}"

    def path(self, kind: str) -> str:
        """Path below the scenes' folder; kind: "camera" or "label"."""
        file = self.name.replace("_frontcenter_", f"_{kind}_frontcenter_")
        return f"{self.scene}/{kind}/cam_front_center/{file}.png"


def parse(path: str) -> tuple[Entry, str] | None:
    """(entry, "label" or "camera") of a path whose base name is that of a front centre file, else None."""
    match = _LINE.fullmatch(path.replace("\\", "/").rsplit("/", 1)[-1])
    return match and (Entry(f"{match['day']}_{match['time']}", match["number"]), match["kind"])


def read_list(path: Path) -> tuple[list[Entry], int | None]:
    """The frames of a list in order, and the first line number that names a camera image (None: there is
    none).

    Raises UserError with file:line for a line that names no frame of the front centre camera."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    entries, first_camera = [], None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        parsed = parse(line.strip())
        if parsed is None:
            raise UserError(
                f"{path}:{number}: {line.strip()!r} names no label; allowed: a path that ends in "
                "<14 digits>_label_frontcenter_<digits>.png"
            )
        entry, kind = parsed
        entries.append(entry)
        if kind == "camera" and first_camera is None:
            first_camera = number
    return entries, first_camera


def find_lists(folder: Path) -> dict[str, dict[str, Path]]:
    """The lists of a folder: subset -> split -> file, both in order. Other files are passed over.

    Raises UserError for a list (..._gt.txt) whose name ends in no known split."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.glob("*_gt.txt")):
        match = _LIST.fullmatch(path.name)
        if match is None:
            raise UserError(
                f"{path}: the name tells no split; allowed: SUBSET_SPLIT_gt.txt with {' | '.join(SPLITS)}"
            )
        found.setdefault(match["subset"], {})[match["split"]] = path
    return {
        subset: {split: lists[split] for split in SPLITS if split in lists} for subset, lists in found.items()
    }


def write_lists(folder: Path, lists: Mapping[str, str], overwrite: bool) -> None:
    """Makes the lists (file name -> text) the only ones of the folder: all are written aside first, then
    renamed.

    Lists of different origin must not be mixed (a test frame of one may be a train frame of the other), so a
    folder that holds other lists is refused unless `overwrite` is given. Raises UserError where nothing can
    be written."""
    present = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*_gt.txt")}
    if present == dict(lists):
        return
    if present and not overwrite:
        raise UserError(f"{folder} already holds {len(present)} other lists; --overwrite replaces them")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".incoming-", dir=folder) as aside:
            for name, text in lists.items():
                Path(aside, name).write_text(text, encoding="utf-8")
            for name in lists:
                os.replace(Path(aside, name), folder / name)
        for name in present.keys() - lists.keys():
            (folder / name).unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
