"""Image files in folders or archives, decoded once into a memory map."""

import gzip
import hashlib
import json
import math
import os
import shutil
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from dataloaders.cache_parts import fingerprint, npy_header, say
from dataloaders.command import listed, many
from dataloaders.image_set import ImageSplit
from engine.config import UserError
from engine.disk import locked, progress, write_at

VERSION = 2  # raise it when the same files give other bytes
AS_STORED = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION  # whatever EXIF says, as others read them
ENDINGS = (".png", ".jpg", ".jpeg")
CHECKED = (
    50_000  # decoded images whose bytes are compared when they are opened, evenly spread; all of small sets
)
ARCHIVES = (".tar.gz", ".tgz", ".tar")


@dataclass(frozen=True)
class Labelled:
    """An image file: its name inside the source, and its label."""

    name: str
    label: int


class Folder:
    """Files below a folder."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        """Of all image files, sorted."""
        found = []
        for folder, _, files in os.walk(self.path):
            inner = os.path.relpath(folder, self.path)
            found += [
                name if inner == "." else f"{inner}/{name}"
                for name in files
                if name.lower().endswith(ENDINGS)
            ]
        return sorted(found)

    def facts(self, names: Sequence[str]) -> Iterator[tuple]:
        """What changes where a file does."""
        for name in names:
            yield (name, *fingerprint(self.path / name))

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """(name, bytes) in any order."""
        for name in names:
            try:
                content = (self.path / name).read_bytes()
            except OSError as error:
                raise UserError(f"{self.path / name}: can't be read ({error.strerror or error})") from error
            yield name, content


class Archive:
    """Files of a tar archive, whose leading folder of the archive's own name is left out."""

    def __init__(self, path: Path):
        self.path = path
        self.lead = path.name.split(".")[0] + "/"

    def names(self) -> list[str]:
        """Of all image files, sorted. UserError for one that is there twice."""
        with self.opened() as archive:
            found = sorted(
                self.inner(one.name) for one in archive if one.isfile() and one.name.lower().endswith(ENDINGS)
            )
        refuse_doubles(found, self.path)
        return found

    def facts(self, names: Sequence[str]) -> Iterator[tuple]:
        yield fingerprint(self.path)
        yield from ((name,) for name in names)

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        wanted = set(names)
        with self.opened() as archive:
            for one in archive:
                if one.isfile() and self.inner(one.name) in wanted:
                    yield self.inner(one.name), archive.extractfile(one).read()

    def inner(self, name: str) -> str:
        return name.removeprefix("./").removeprefix(self.lead)

    @contextmanager
    def opened(self) -> Iterator[tarfile.TarFile]:
        """UserError for one that is cut off or damaged, wherever the reading comes to it."""
        try:
            with tarfile.open(self.path) as archive:
                yield archive
        except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
            raise UserError(f"{self.path}: can't be read ({error})") from error


def source_of(root: Path, split: str) -> Folder | Archive | None:
    """root/SPLIT/ or an archive of it; None where there is neither."""
    if (root / split).is_dir():
        return Folder(root / split)
    found = [root / f"{split}{ending}" for ending in ARCHIVES if (root / f"{split}{ending}").exists()]
    return Archive(found[0]) if found else None


def classes_of(source: Folder | Archive) -> tuple[str, ...]:
    """Names of the folders that its files are in, in alphabetical order."""
    return tuple(sorted({name.split("/")[0] for name in source.names()}))


def by_class(source: Folder | Archive, classes: Sequence[str], what: str) -> list[Labelled]:
    """Files of CLASS/... by the class's place in `classes`. UserError for a folder that is no class, or none of one."""
    places = {name: place for place, name in enumerate(classes)}
    found = []
    for name in source.names():
        folder = name.split("/")[0]
        if "/" not in name or folder not in places:
            raise UserError(
                f"{what}: {name} is in no folder of a class; allowed: {', '.join(list(places)[:12])}"
            )
        found.append(Labelled(name, places[folder]))
    empty = set(range(len(classes))) - {one.label for one in found}
    if empty:
        raise UserError(f"{what}: no image of class {classes[min(empty)]} ({len(empty)} classes are empty)")
    return found


def of_list(files: Sequence[Labelled], names: Sequence[str], path: Path) -> list[Labelled]:
    """The files that the list `path` tells the labels of. UserError unless it has each of `names`, the image files that
    are there, once and no other."""
    own = [one.name for one in files]
    refuse_doubles(own, path)
    if missing := sorted(set(own) - set(names)):
        raise UserError(
            f"{path}: {many(missing, 'image')} missing, of {len(own)} in this list: {listed(missing)}"
        )
    if others := sorted(set(names) - set(own)):
        raise UserError(
            f"{path}: {many(others, 'image')} not in this list, of {len(names)} that are there: {listed(others)}"
        )
    return list(files)


def refuse_doubles(names: Sequence[str], path: Path) -> None:
    """UserError for names that come more than once in `path`."""
    if doubles := sorted(name for name, count in Counter(names).items() if count > 1):
        raise UserError(
            f"{path}: {many(doubles, 'image')} more than once, expected once each: {listed(doubles)}"
        )


def decoded(
    source: Folder | Archive, files: Sequence[Labelled], size: int, cache_dir: str | Path, title: str
) -> ImageSplit:
    """The files as RGB images of size x size, decoded once into a memory map below cache_dir/images: the shorter edge
    is resized to `size` where it differs, then the middle is taken. Found again by a hash of names, sizes and times.

    UserError for a file that is missing or no image, naming it, and for a folder that can't be written."""
    names = [one.name for one in files]
    digest = hashlib.sha256(repr((VERSION, cv2.__version__, size)).encode())
    for fact in source.facts(names):
        digest.update(repr(fact).encode())
    root = Path(cache_dir) / "images"
    folder, shape = root / digest.hexdigest()[:32], (len(files), 3, size, size)
    try:
        root.mkdir(parents=True, exist_ok=True)
        waiting = f"waiting for another process that decodes {title}"
        with locked(root / f"{folder.name}.lock", waiting, say):
            damage = damage_of(folder, shape)
            if damage:
                if damage != "missing":
                    say(f"warning: decoded images of {title}, {folder}: {damage}; decoding again")
                decode_all(source, names, size, folder, title)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: decoded images of {title} can't be kept in {root}: {error}; they need "
            f"{math.prod(shape)} bytes"
        ) from error
    images = np.load(folder / "images.npy", mmap_mode="r")
    return ImageSplit(images, np.array([one.label for one in files], dtype=np.int64), names)


def damage_of(folder: Path, shape: tuple[int, ...]) -> str:
    """What is wrong with decoded images, "" where nothing is."""
    if not folder.exists():
        return "missing"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        array = np.load(folder / "images.npy", mmap_mode="r")
        if array.shape != shape or array.dtype != np.uint8:
            return f"images.npy is {array.dtype} {array.shape}"
        if len(meta["crc32"]) != len(array):
            return f"meta.json is of {len(meta['crc32'])} images"
        rows = np.unique(np.linspace(0, len(array) - 1, min(len(array), CHECKED)).astype(int)).tolist()
        wrong = sum(zlib.crc32(array[row]) != meta["crc32"][row] for row in rows)
        return f"{wrong} of {len(rows)} images have other bytes" if wrong else ""
    except (OSError, ValueError, KeyError) as error:
        return f"can't be read ({error})"


def decode_all(source: Folder | Archive, names: Sequence[str], size: int, folder: Path, title: str) -> None:
    """Into a temporary folder that is renamed at the end, when each image is in it. It stays where the process is
    stopped, and the next one goes on in it."""
    building = folder.with_suffix(".building")
    shutil.rmtree(folder, ignore_errors=True)
    building.mkdir(exist_ok=True)
    began, shape = time.monotonic(), (len(names), 3, size, size)
    rows, sums = {name: row for row, name in enumerate(names)}, decoded_before(building, shape)
    left = [name for name, crc32 in zip(names, sums, strict=True) if crc32 is None]
    if len(left) < len(names):
        say(f"decoding {title}: going on after {len(names) - len(left)} of {len(names)} images")
    try:
        images, done = building / "images.npy", building / "done"
        with (
            open(images, "r+b" if images.exists() else "wb", buffering=0) as file,
            open(done, "a") as journal,
        ):
            write_at(file.fileno(), np.frombuffer(npy_header(shape), np.uint8), 0)
            for name, content in progress(source.read(left), len(left), f"decoding {title}", say, "image"):
                image, row = np.ascontiguousarray(decode(content, size, f"{source.path}: {name}")), rows[name]
                write_at(file.fileno(), image, len(npy_header(shape)) + row * image.nbytes)
                sums[row] = zlib.crc32(image)
                journal.write(f"{row} {sums[row]}\n")
                journal.flush()
        if missing := [name for name, crc32 in zip(names, sums, strict=True) if crc32 is None]:
            raise UserError(f"{title}: {many(missing, 'image')} missing, of {len(names)}: {listed(missing)}")
        (building / "meta.json").write_text(json.dumps({"crc32": sums}))
        done.unlink()
        building.rename(folder)
    except Exception:  # not where it is stopped from outside
        shutil.rmtree(building, ignore_errors=True)
        raise
    say(
        f"decoded {title}: {len(names)} images, {math.prod(shape) / 1e6:.1f} MB, {time.monotonic() - began:.1f} s"
    )


def decoded_before(building: Path, shape: tuple[int, ...]) -> list[int | None]:
    """CRC-32 of each image that a process which was stopped has left there whole, None of the others."""
    sums: list[int | None] = [None] * shape[0]
    if not (building / "done").exists() or not (building / "images.npy").exists():
        return sums
    size, start = math.prod(shape[1:]), len(npy_header(shape))
    with open(building / "images.npy", "rb", buffering=0) as file:
        for line in (building / "done").read_text().splitlines():
            row, _, crc32 = line.partition(" ")
            if not (row.isdigit() and crc32.isdigit() and int(row) < len(sums)):
                continue  # torn
            if zlib.crc32(os.pread(file.fileno(), size, start + int(row) * size)) == int(crc32):
                sums[int(row)] = int(crc32)
    return sums


def decode(content: bytes, size: int, what: str) -> np.ndarray:
    """RGB uint8 [3, size, size]; grey images get three equal channels."""
    image = cv2.imdecode(np.frombuffer(content, np.uint8), AS_STORED) if content else None
    if image is None:
        raise UserError(f"{what}: is no image that can be read")
    height, width = image.shape[:2]
    if min(height, width) != size:
        scale = size / min(height, width)
        shrinks = scale < 1
        new = max(size, round(width * scale)), max(size, round(height * scale))
        image = cv2.resize(image, new, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        height, width = image.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size, ::-1].transpose(2, 0, 1)


def read_gzip(path: Path) -> bytes:
    """Of a file that may be gzipped. UserError where it can't be read."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: can't be read ({error})") from error
