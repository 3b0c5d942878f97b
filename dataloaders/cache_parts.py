"""One part of the frame cache: the folder with the frames of one subset and split at one size."""

import hashlib
import io
import json
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np

from dataloaders.frames import Frame, FrameIndex, size_text
from dataloaders.transforms import resize_image, resize_label
from engine.config import UserError
from engine.disk import locked, progress, write_at

VERSION = 1  # raise it when the same sources give other bytes


@dataclass(frozen=True)
class Part:
    """One subset and split of an index at one size: finds, checks and makes its folder in the cache."""

    index: FrameIndex
    frames: tuple[Frame, ...]
    size: tuple[int, int]
    resize: str

    @property
    def title(self) -> str:
        return f"{self.index.name} {self.frames[0].subset} {self.frames[0].split}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"images": (len(self.frames), *self.size, 3), "labels": (len(self.frames), *self.size)}

    @property
    def bytes(self) -> int:
        return sum(file_bytes(shape) for shape in self.shapes.values())

    @cached_property
    def key(self) -> str:
        index = self.index
        facts = (VERSION, cv2.__version__, self.size, self.resize, index.label_map, index.num_classes)
        digest = hashlib.sha256(repr(facts).encode())
        for frame in self.frames:
            for path in (frame.image, frame.label):
                digest.update(repr((os.path.relpath(path, index.root), *fingerprint(path))).encode())
        return digest.hexdigest()[:32]

    def open(self, root: Path, rows: Sequence[int]) -> dict:
        """The part's metadata, its bytes for `rows` known to be right."""
        folder = root / self.key
        try:
            if folder.exists():
                meta, damage = self.check(folder, rows)
                if not damage:
                    return meta
            root.mkdir(parents=True, exist_ok=True)
            waiting = f"waiting for another process that makes the frame cache of {self.title}"
            with locked(root / f"{self.key}.lock", waiting, say):
                if folder.exists():  # damaged, or made by another process while this one waited
                    meta, damage = self.check(folder, rows)
                    if not damage:
                        return meta
                    say(f"warning: frame cache of {self.title}, {folder}: {damage}; making it again")
                    shutil.rmtree(folder)
                return self.make(folder)
        except OSError as error:
            raise UserError(
                f"data.cache_dir: the frame cache of {self.title} cannot be kept in {root}: {error}; "
                f"it needs {self.bytes} bytes ({len(self.frames)} frames of {size_text(self.size)})"
            ) from error

    def check(self, folder: Path, rows: Sequence[int]) -> tuple[dict, str]:
        """The metadata, and what is wrong with the files ("" where nothing is)."""
        path = folder / "meta.json"
        try:
            sealed = json.loads(path.read_text())
            if zlib.crc32(sealed["meta"].encode()) != sealed["crc32"]:
                return {}, "meta.json has another checksum"
            meta = json.loads(sealed["meta"])
            for name, shape in self.shapes.items():
                path = folder / f"{name}.npy"
                with open(path, "rb") as file:
                    if file.read(len(npy_header(shape))) != npy_header(shape):
                        return {}, f"{path.name} has another header"
                array = np.load(path, mmap_mode="r")
                with thread_pool() as threads:
                    sums = threads.map(lambda row, array=array: zlib.crc32(array[row]), rows)
                    found = list(
                        progress(sums, len(rows), f"checking the cached {name} of {self.title}", say)
                    )
                written = meta[f"{name}_crc32"]
                wrong = [row for row, crc32 in zip(rows, found, strict=True) if crc32 != written[row]]
                if wrong:
                    example = self.frames[wrong[0]].name
                    return {}, f"{path.name} has other bytes in {len(wrong)} frames, e.g. {example}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return {}, f"{path.name} cannot be read ({error})"
        return meta, ""

    def make(self, folder: Path) -> dict:
        """Read, resize and write all frames into a temporary folder, then rename it to `folder`."""
        free = shutil.disk_usage(folder.parent).free
        if free < self.bytes:
            raise OSError(f"only {free} bytes are free")
        building = folder.with_suffix(".building")
        shutil.rmtree(building, ignore_errors=True)  # left by a process that was killed
        building.mkdir()
        try:
            start = time.monotonic()
            columns = self.write_frames(building)
            text = json.dumps({"frames": [frame.name for frame in self.frames]} | columns)
            sealed = {"crc32": zlib.crc32(text.encode()), "meta": text}
            (building / "meta.json").write_text(json.dumps(sealed))
            building.rename(folder)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        seconds = time.monotonic() - start
        say(f"cached {self.title}: {len(self.frames)} frames, {self.bytes / 1e6:.1f} MB, {seconds:.1f} s")
        return columns

    def write_frames(self, folder: Path) -> dict[str, list]:
        """Write images.npy and labels.npy; a list of values per frame for each column of the metadata.

        By threads, which are as fast as processes here: decoding, look-up and resizing release the GIL."""
        files = {}
        with ExitStack() as stack:
            for name, shape in self.shapes.items():
                files[name] = stack.enter_context(open(folder / f"{name}.npy", "wb", buffering=0))
                files[name].write(npy_header(shape))
            threads = stack.enter_context(thread_pool())
            made = threads.map(lambda row: self.write_frame(files, row), range(len(self.frames)))
            records = list(progress(made, len(self.frames), f"caching {self.title}", say))
        return {name: [record[name] for record in records] for name in records[0]}

    def write_frame(self, files: dict[str, io.FileIO], row: int) -> dict:
        frame = self.frames[row]
        image, labels, unknown = self.index.read(frame)
        arrays = {
            "images": np.ascontiguousarray(resize_image(image, self.size, self.resize)),
            "labels": np.ascontiguousarray(resize_label(labels, self.size, self.resize)),
        }
        counts = np.bincount(arrays["labels"].ravel(), minlength=256)
        ids = [*range(self.index.num_classes), self.index.ignore_index]
        if counts[ids].sum() < counts.sum():
            counts[ids] = 0
            raise UserError(
                f"{frame.label}: label value {counts.argmax()}, allowed: 0..{self.index.num_classes - 1} and "
                f"{self.index.ignore_index}"
            )
        for name, array in arrays.items():
            write_at(files[name].fileno(), array, len(npy_header(self.shapes[name])) + row * array.nbytes)
        return {
            "images_crc32": zlib.crc32(arrays["images"]),
            "labels_crc32": zlib.crc32(arrays["labels"]),
            "native_sizes": labels.shape,
            "unknown_pixels": int(unknown),
            "class_counts": counts[ids].tolist(),
        }


def fingerprint(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns; a missing file raises UserError."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    return status.st_size, status.st_mtime_ns


def npy_header(shape: tuple[int, ...]) -> bytes:
    """What a .npy file of uint8 and this shape begins with."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def file_bytes(shape: tuple[int, ...]) -> int:
    """Size of a .npy file of uint8."""
    return len(npy_header(shape)) + math.prod(shape)


@contextmanager
def thread_pool() -> Iterator[ThreadPoolExecutor]:
    """One thread per core; what has not begun is dropped when the block ends early."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = ThreadPoolExecutor(cores)
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
