"""Image files in an LMDB: one file instead of a million, each image as the bytes of its own file."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from dataloaders.cache_parts import fingerprint, say
from dataloaders.image_files import Labelled
from engine.config import UserError
from engine.disk import progress

ABOUT = b"about"  # the key of [classes, [(name, label), ...]]; the others are names
MAP_BYTES = 2**41  # most that a file may grow to; it is as large as what is in it
AT_ONCE = 5000  # images of a transaction


class Packed:
    """A source of image files, as dataloaders.image_files has others."""

    def __init__(self, path: Path):
        self.path = path
        with self.opened() as environment, environment.begin() as transaction:
            about = transaction.get(ABOUT)
        if about is None:
            raise UserError(f"{path}: was not packed by python -m dataloaders.imagenet")
        classes, labelled = json.loads(about)
        self.classes = tuple(classes)
        self.files = [Labelled(name, label) for name, label in labelled]

    def opened(self):
        """UserError for one that is cut off: what is read beyond its end would kill the process. (One that `pack` wrote
        has all of its pages.)"""
        try:
            environment = lmdb().open(str(self.path), subdir=False, readonly=True, lock=False)
        except lmdb().Error as error:
            raise UserError(f"{self.path}: can't be read ({error})") from error
        whole = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if self.path.stat().st_size < whole:
            environment.close()
            raise UserError(f"{self.path}: is cut off; it has {self.path.stat().st_size} bytes of {whole}")
        return environment

    def holds(self, files: Sequence[Labelled], classes: Sequence[str]) -> bool:
        """Whether it is of these files, by their names and labels."""
        return self.classes == tuple(classes) and self.files == list(files)

    def names(self) -> list[str]:
        return sorted(one.name for one in self.files)

    def facts(self, names: Sequence[str]) -> Iterator[tuple]:
        yield fingerprint(self.path)
        yield from ((name,) for name in names)

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        with self.opened() as environment, environment.begin() as transaction:
            for name in names:
                yield name, bytes(transaction.get(name.encode()) or b"")


def pack(source, files: Sequence[Labelled], classes: Sequence[str], path: Path) -> None:
    """Writes the files of a source into an LMDB, under a temporary name until it is whole. UserError for one that is
    there already."""
    if path.exists():
        raise UserError(f"{path}: exists; delete it first")
    building = path.with_name(f"{path.name}.building")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        building.unlink(missing_ok=True)
        with lmdb().open(str(building), subdir=False, map_size=MAP_BYTES, lock=False) as environment:
            content = progress(
                source.read([one.name for one in files]), len(files), f"packing {path}", say, "image"
            )
            done = False
            while not done:
                with environment.begin(write=True) as transaction:
                    for _ in range(AT_ONCE):
                        name, image = next(content, (None, None))
                        if name is None:
                            done = True
                            break
                        transaction.put(name.encode(), image)
            about = json.dumps([list(classes), [(one.name, one.label) for one in files]])
            with environment.begin(write=True) as transaction:
                transaction.put(ABOUT, about.encode())
        os.replace(building, path)
    except (OSError, lmdb().Error) as error:
        raise UserError(f"{path}: can't be written ({getattr(error, 'strerror', None) or error})") from error
    finally:
        if path.parent.is_dir():
            building.unlink(missing_ok=True)
    say(f"packed {len(files)} images into {path}, {shutil.disk_usage(path.parent).free / 1e9:.0f} GB left")


def lmdb():
    """The package, which only this needs."""
    try:
        import lmdb as package
    except ImportError as error:
        raise UserError("imagenet: an LMDB needs the package lmdb: pip install lmdb") from error
    return package
