"""What stands beside a ledger: results that need the networks but are no attack of the suite, kept as JSON.

The tables of a robust evaluation are made from the ledger and these files, without the networks.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from engine.checkpoints import atomic_write
from engine.config import UserError
from evaluation.certificate import Certified
from evaluation.findings import Finding
from evaluation.ledger import Ledger, digest, plain

FINDINGS, CERTIFICATES = "findings.json", "certificates.json"
TRANSFER, DETECTORS = "transfer.json", "detectors.json"

Keep = Callable[[str, Callable[[], Any]], Any]


def keep_nothing(key: str, work: Callable[[], Any]) -> Any:
    """A Keep that has no file."""
    return work()


@dataclass(frozen=True)
class Beside:
    """findings: of honesty checks that ran the networks. transfer: rows of a `transfer.Transfer`, with eps and
    attack. detectors: rows of `detectors.detection_rows`. Each is empty where it was not asked for."""

    findings: Sequence[Finding] = ()
    certificates: Sequence[Certified] = ()
    transfer: Sequence[Mapping] = ()
    detectors: Sequence[Mapping] = ()


def read_beside(folder: str | Path) -> Beside:
    """What stands in the folder. UserError for a damaged file."""
    folder = Path(folder)
    return Beside(
        findings=[_made(Finding, row, folder / FINDINGS) for row in _rows(folder / FINDINGS)],
        certificates=[_made(Certified, row, folder / CERTIFICATES) for row in _rows(folder / CERTIFICATES)],
        transfer=_rows(folder / TRANSFER),
        detectors=_rows(folder / DETECTORS),
    )


def write_beside(path: str | Path, rows: Iterable, of: str = "") -> None:
    """Findings, certificates, or rows of plain values, atomically. of: what they follow from."""
    values = [plain(row if isinstance(row, Mapping) else asdict(row)) for row in rows]
    atomic_write(path, json.dumps({"of": of, "rows": values}, indent=1) + "\n")


def once(path: str | Path, source: Mapping, make: Callable[[Keep], Iterable[Mapping]], rank: int = 0) -> None:
    """Writes what `make` gives, unless the file holds what followed from the same source already.

    make(keep) has long work done by keep(key, work): a plain value, on disk as soon as it is there, so that what a
    killed process had of it is not done again. rank: of this process."""
    path, of = Path(path), digest(source)
    if path.exists() and _read(path).get("of") == of:
        return
    parts = path.with_suffix(".parts")
    with ExitStack() as stack:

        @cache
        def ledger() -> Ledger:
            return stack.enter_context(Ledger(parts, source, rank=rank, replace=True))

        def keep(key: str, work: Callable[[], Any]) -> Any:
            unit, started = digest([of, key]), time.monotonic()
            if unit not in ledger():
                ledger().add(unit, [{"value": work()}], round(time.monotonic() - started, 3))
            return ledger().units[unit][0]["value"]

        write_beside(path, make(keep), of)
    shutil.rmtree(parts, ignore_errors=True)


def _rows(path: Path) -> list:
    return _read(path)["rows"] if path.exists() else []


def _read(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict) and isinstance(value.get("rows"), list):
            return value
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it and evaluate again") from None
    raise UserError(f"{path}: damaged (no rows in it); delete it and evaluate again")


def _made(kind: type, row: dict, path: Path):
    try:
        return kind(**row)
    except TypeError as error:
        raise UserError(f"{path}: damaged ({error}); delete it and evaluate again") from None
