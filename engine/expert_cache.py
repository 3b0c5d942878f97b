"""Stores of named tensors by row on disk: made once, checked, shared by processes. Knows no network."""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from engine.disk import Log, locked, progress, write_at
from engine.row_files import Layout, RowFile

VERSION = 1  # raise it when the same experts and frames give other bytes


def store_key(facts: Mapping) -> str:
    """The name of the store of all that follows from the facts, which are plain values."""
    text = json.dumps([VERSION, torch.__version__, facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def bytes_on_disk(folder: Path) -> int:
    """Bytes of the store in a folder, or of as much of it as an interrupted process has left."""
    kept = folder if folder.exists() else _unfinished(folder)
    return sum(file.stat().st_size for file in kept.glob("*.bin"))


class Damage(Exception):
    """What is wrong with the files of a store."""


class Store:
    """A finished store: `notes` are what was kept with the rows, `nbytes` the bytes of all rows."""

    def __init__(self, folder: Path):
        """Opens the files. Raises Damage where they can't be those that were written."""
        path = folder / "meta.json"
        try:
            sealed = json.loads(path.read_text())
            if zlib.crc32(sealed["meta"].encode()) != sealed["crc32"]:
                raise ValueError("another checksum")
            meta = json.loads(sealed["meta"])
            self.notes, self.sums = meta["notes"], meta["crc32"]
            self.files = {}
            for name, values in meta["layouts"].items():
                path = folder / f"{name}.bin"
                self.files[name] = RowFile(path, Layout.from_plain(values), len(self.sums[name]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Damage(f"{path.name} cannot be used ({error})") from error
        self.nbytes = sum(file.rows.nbytes for file in self.files.values())

    def check(self, title: str, log: Log) -> None:
        """Reads every byte. Raises Damage where one isn't what was written."""
        for name, sums in self.sums.items():
            row = self.files[name].intact(sums, f"checking {name} of the cached {title}", log)
            if row < len(sums):
                raise Damage(f"{name}.bin has other bytes in row {row}")

    def read(self, rows: Sequence[int], pin: bool = False) -> dict[str, Tensor]:
        """name -> tensor [len(rows), ...] on the CPU, in pinned memory if asked."""
        for file in self.files.values():
            file.ask_for(rows)
        return {name: file.gather(rows, pin) for name, file in self.files.items()}


def open_store(
    folder: Path,
    title: str,
    *,
    batches: Sequence[Sequence[int]],
    compute: Callable[[Sequence[int]], Mapping[str, Tensor]],
    notes: Callable[[], Mapping],
    log: Log,
) -> Store:
    """The store in a folder, which is made first where it is missing, and again where it is damaged.

    batches: the rows 0, 1, 2, ... in groups. compute(rows): tensors [len(rows), ...] by name, of the same
    names, types and shapes for every group. notes(): plain values to keep with the rows.
    Of several processes one makes it and the others wait. What an interrupted one has made is gone on with.
    Raises OSError where it can't be kept; then nothing of it is left."""
    store, _ = _finished(folder, title, log)
    if store:
        return store
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock"), f"waiting for another process that caches {title}", log):
        store, damage = _finished(folder, title, log)  # another process may have made it meanwhile
        if store:
            return store
        if damage:
            log(f"warning: cached {title}, {folder}: {damage}; making it again")
            shutil.rmtree(folder)
        try:
            _make(folder, title, batches, compute, notes, log)
        except OSError:
            shutil.rmtree(_unfinished(folder), ignore_errors=True)
            raise
    return Store(folder)


def _finished(folder: Path, title: str, log: Log) -> tuple[Store | None, Damage | None]:
    """The store if it is there and right, or what is wrong with it."""
    if not folder.exists():
        return None, None
    try:
        store = Store(folder)
        store.check(title, log)
        return store, None
    except Damage as damage:
        return None, damage


def _unfinished(folder: Path) -> Path:
    return folder.with_suffix(".building")


def _make(folder: Path, title: str, batches, compute, notes, log: Log) -> None:
    """Writes all rows into a folder beside it and renames that. Its journal has a line for every group:
    layouts, first row, checksums."""
    building = _unfinished(folder)
    building.mkdir(exist_ok=True)
    layouts, sums = _left_behind(building, title, log)
    done = min(map(len, sums.values()), default=0)
    if done:
        log(f"cached {title}: going on after {done} frames of an interrupted run")
    missing = [rows for rows in batches if rows[-1] >= done]
    with ExitStack() as stack:
        journal = stack.enter_context(open(building / "journal", "w"))
        files: dict[str, int] = {}

        def note(first: int, added: Mapping[str, list[int]]) -> None:
            entry = {"layouts": _plain(layouts), "first": first, "crc32": added}
            print(json.dumps(entry), file=journal, flush=True)

        note(0, sums)
        for rows in progress(missing, len(missing), f"caching {title}", log, "batch"):
            tensors = compute(rows)
            layouts = layouts or {name: Layout.of(tensor) for name, tensor in tensors.items()}
            added = {}
            for name, layout in layouts.items():
                if name not in files:
                    files[name] = os.open(building / f"{name}.bin", os.O_WRONLY | os.O_CREAT, 0o644)
                    stack.callback(os.close, files[name])
                data = layout.to_bytes(tensors[name])
                write_at(files[name], data, rows[0] * layout.nbytes)
                added[name] = [zlib.crc32(row) for row in data]
                sums[name] = sums.get(name, [])[: rows[0]] + added[name]
            note(rows[0], added)
    text = json.dumps({"layouts": _plain(layouts), "crc32": sums, "notes": dict(notes())})
    (building / "meta.json").write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "meta": text}))
    (building / "journal").unlink()
    building.rename(folder)


def _plain(layouts: Mapping[str, Layout]) -> dict:
    return {name: layout.plain() for name, layout in layouts.items()}


def _left_behind(building: Path, title: str, log: Log) -> tuple[dict[str, Layout], dict[str, list[int]]]:
    """Layouts and checksums of the first rows of an unfinished store, as far as all files hold them."""
    layouts: dict[str, Layout] = {}
    sums: dict[str, list[int]] = {}
    try:
        for line in (building / "journal").read_text().splitlines():
            entry = json.loads(line)
            layouts = {name: Layout.from_plain(values) for name, values in entry["layouts"].items()}
            for name, added in entry["crc32"].items():
                sums[name] = sums.get(name, [])[: entry["first"]] + added
    except (OSError, ValueError):
        pass  # no journal, or its last line was cut off: what it said before holds
    try:
        good = min(
            (
                RowFile(building / f"{name}.bin", layouts[name], len(found)).intact(found, title, log)
                for name, found in sums.items()
            ),
            default=0,
        )
    except (OSError, ValueError):
        good = 0
    return (layouts, {name: found[:good] for name, found in sums.items()}) if good else ({}, {})
