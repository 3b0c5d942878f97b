"""The ledger: what every attack did to every image, append-only, so that a killed evaluation goes on.

A folder of manifest.json (what is evaluated, and how), segment_*.jsonl (records; one file per process) and
timing_*.jsonl (seconds, the one thing that two runs don't share). Every table is a function of manifest and
records. The unit of work is a fixed batch of images under one attack at one eps: its records are written
together, and count together or not at all.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine import flat
from engine.checkpoints import atomic_write
from engine.config import UserError

FORMAT = 2  # raised when records change their meaning
INCUMBENTS = ("pixels", "balanced")  # fewest correct pixels, lowest class-balanced accuracy
SHOWN = 12  # differences in a message

Record = dict[str, Any]


class Ledger:
    """The records of a folder, and the segment that this process writes.

    The records of a unit share its name under "unit", and say under "place" and "of" which of how many they are.
    Lines that are torn or damaged don't count, nor does the rest of their unit, which is to be done again.
    """

    def __init__(self, folder: str | Path, manifest: Mapping, *, rank: int = 0, replace: bool = False):
        """Opens or begins the ledger of a manifest of plain values.

        replace: a ledger of another manifest gets this one, the other is kept beside it; records that fit the new
        one are used, others stay unused.
        Raises UserError for one of another manifest that has records, naming what differs, and where another process
        writes this segment."""
        self.folder, self.manifest = Path(folder), plain({"format": FORMAT, **manifest})
        self.rank, self.segment = rank, self.folder / f"segment_{rank:03d}.jsonl"
        self._admit(replace)
        self._files = {
            path: open_to_append(path) for path in (self.segment, self.folder / f"timing_{rank:03d}.jsonl")
        }
        self.units: dict[str, list[Record]] = {}
        self.refresh()

    def __contains__(self, unit: str) -> bool:
        return unit in self.units

    def refresh(self) -> None:
        """Takes in what other processes have written since."""
        self.units = read_units(self.folder)

    def add(self, unit: str, records: Sequence[Record], seconds: float) -> None:
        """Writes the records of a unit, on disk when this returns."""
        whole = [
            {"unit": unit, "place": place, "of": len(records), **plain(record)}
            for place, record in enumerate(records)
        ]
        segment, timing = self._files.values()
        append(segment, whole)
        append(timing, [{"unit": unit, "seconds": seconds}])
        self.units[unit] = whole

    def records(self, units: Iterable[str]) -> list[Record]:
        """Records of these units in their order. KeyError for one that isn't there."""
        return [record for unit in units for record in self.units[unit]]

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _admit(self, replace: bool) -> None:
        path = self.folder / "manifest.json"
        if path.exists():
            before = read_manifest(self.folder)
            different = differences(before, self.manifest)
            if different and not replace and read_units(self.folder):
                raise UserError(
                    f"{self.folder}: this ledger is of another evaluation: {shown(different)}. Go on with what it "
                    "was begun with, take another name, or replace it (--overwrite: records that fit are used)"
                )
            if not different:
                return
            atomic_write(self.folder / f"manifest_{digest(before)}.json", path.read_bytes())
        atomic_write(path, json.dumps(self.manifest, indent=1) + "\n")


def plain(value: Any) -> Any:
    """The value as JSON gives it back."""
    return json.loads(json.dumps(value, allow_nan=False))


def canonical(value: Any) -> str:
    """One text for equal plain values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """16 hex digits of the SHA-256 of a plain value."""
    return hashlib.sha256(canonical(plain(value)).encode()).hexdigest()[:16]


def read_manifest(folder: str | Path) -> dict:
    """UserError where there is none, or none that this code reads."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no ledger here") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({error})") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise UserError(f"{path}: a ledger of format {found}, this code reads {FORMAT}; take another name")
    return manifest


def read_units(folder: str | Path) -> dict[str, list[Record]]:
    """The complete units of all segments: name -> its records in the order in which they were written.

    A unit that was begun, lost lines and was done again is taken from where it is complete."""
    found: dict[str, dict[str, Record]] = {}
    for path in sorted(Path(folder).glob("segment_*.jsonl")):
        for record in read_lines(path):
            found.setdefault(record["unit"], {})[record["place"]] = record
    return {
        unit: [records[place] for place in sorted(records)]
        for unit, records in found.items()
        if len(records) == next(iter(records.values()))["of"]
    }


def read_seconds(folder: str | Path) -> dict[str, float]:
    """Seconds that each unit took."""
    return {
        line["unit"]: line["seconds"]
        for path in sorted(Path(folder).glob("timing_*.jsonl"))
        for line in read_lines(path)
    }


def read_lines(path: Path) -> Iterator[Record]:
    """The lines of a segment that are whole: their checksum is right."""
    with open(path, "rb") as file:
        for line in file:
            try:
                value = json.loads(line)
                checksum = value.pop("sha")
            except (ValueError, KeyError, AttributeError):
                continue
            if checksum == digest(value):
                yield value


def append(file, lines: Sequence[Record]) -> None:
    """One write, then flushed to disk. UserError where the disk is full."""
    text = "".join(canonical({**line, "sha": digest(line)}) + "\n" for line in lines)
    try:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{file.name}: can't be written: {error.strerror}; start again to go on") from error


def open_to_append(path: Path):
    """The file for this process alone; what follows a torn last line begins a line of its own."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115, it stays open and locked
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{path}: another process is at work on it; let it end, or stop it") from None
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


def differences(before: Mapping, now: Mapping) -> list[tuple[str, Any, Any]]:
    """(dotted key, value before, value now) of everything that differs between plain mappings."""
    return flat.differences(*(flat.flatten(one, into_lists=True) for one in (before, now)))


def shown(different: Sequence[tuple[str, Any, Any]]) -> str:
    """The differences for a message."""
    texts = [f"{key} (was {brief(before)}, is {brief(now)})" for key, before, now in different[:SHOWN]]
    more = len(different) - SHOWN
    return "; ".join(texts) + (f"; and {more} more" if more > 0 else "")


def brief(value: Any) -> str:
    text = "missing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
