"""The two files that describe anybody's data: a CSV with one row a frame, and classes.json."""

import csv
import json
from difflib import get_close_matches
from pathlib import Path

from dataloaders.frames import IGNORE
from engine.config import UserError


class Manifest:
    """A CSV file with a header, read by columns. Raises UserError where it is missing, empty or ragged."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                self.rows = [(reader.line_num, row) for row in reader]
                self.header = reader.fieldnames or []
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
        if not self.rows:
            raise UserError(f"{path}: holds no frames; expected a header and one row a frame")
        for line, row in self.rows:
            if None in row or None in row.values():
                raise UserError(
                    f"{path}:{line}: this row has not the {len(self.header)} fields of the header"
                )

    def column(self, name: str, empty: bool = False) -> list[str]:
        """The values of a column. Raises UserError for an unknown column and, unless `empty`, for an empty
        field."""
        if name not in self.header:
            near = get_close_matches(name, self.header, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(
                f"{self.path}: there is no column {name!r}; there are {', '.join(self.header)}{meant}"
            )
        for line, row in self.rows:
            if not (row[name].strip() or empty):
                raise UserError(f"{self.path}:{line}: the column {name!r} is empty")
        return [row[name].strip() for _, row in self.rows]

    def line(self, position: int) -> str:
        """Where a row stands, for messages: "FILE:LINE"."""
        return f"{self.path}:{self.rows[position][0]}"


def read_classes(path: Path) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...], dict[int, int]]:
    """classes.json as (names, palette, mask value -> class id or 255); ignored classes have no class id.

    The file is a list of {"id": 0..254, "name": text, "color": [r, g, b], "ignore": bool (false)}. Raises
    UserError naming file and entry where it is not."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as JSON ({getattr(error, 'strerror', None) or error})"
        ) from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: expected a list of classes")
    for entry in entries:
        if not (isinstance(entry, dict) and _is_class(entry)):
            raise UserError(
                f'{path}: {json.dumps(entry)} is no class; expected {{"id": 0..254, "name": text, '
                '"color": [0..255, 0..255, 0..255], "ignore": true | false}'
            )
    for key in ("id", "name"):
        values = [entry[key] for entry in entries]
        if twice := {value for value in values if values.count(value) > 1}:
            raise UserError(f"{path}: the {key} {min(twice)!r} is used twice")
    entries = sorted(entries, key=lambda entry: entry["id"])
    counted = [entry for entry in entries if not entry.get("ignore", False)]
    if not counted:
        raise UserError(f"{path}: every class is ignored")
    ids = {entry["id"]: IGNORE for entry in entries}
    ids |= {entry["id"]: number for number, entry in enumerate(counted)}
    return tuple(entry["name"] for entry in counted), tuple(tuple(entry["color"]) for entry in counted), ids


def _is_class(entry: dict) -> bool:
    color = entry.get("color")
    return (
        _is_byte(entry.get("id"))
        and entry["id"] != IGNORE
        and isinstance(entry.get("name"), str)
        and isinstance(color, list)
        and len(color) == 3
        and all(map(_is_byte, color))
        and isinstance(entry.get("ignore", False), bool)
    )


def _is_byte(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255
