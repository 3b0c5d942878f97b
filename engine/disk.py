"""What every cache on disk needs: writes that a full disk can't turn into a kill, a lock, and progress."""

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

LINE_SECONDS = 10

Log = Callable[[str], None]


def write_at(descriptor: int, array: np.ndarray, offset: int) -> None:
    """A plain write, since a full disk is an OSError here but kills a process that writes to a memory map."""
    data = memoryview(array).cast("B")
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


@contextmanager
def locked(path: Path, waiting: str, log: Log) -> Iterator[None]:
    """Holds the lock file, so that of several processes one makes what it guards; the others log `waiting`."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def progress(items: Iterable, total: int, title: str, log: Log, unit: str = "frame") -> Iterator:
    """The items; a bar on a terminal, a line every 10 seconds elsewhere, nothing for what takes a moment."""
    if sys.stderr.isatty():
        yield from tqdm(items, title, total, unit=unit, delay=1, leave=False)
        return
    last = time.monotonic()
    for done, item in enumerate(items, 1):
        if time.monotonic() - last > LINE_SECONDS:
            last = time.monotonic()
            log(f"{title}: {done} of {total} {unit}s")
        yield item
