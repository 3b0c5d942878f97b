"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): the official binary files, or folders (or archives) of image files."""

import json
from pathlib import Path
from typing import Literal

import numpy as np

from dataloaders.image_files import by_class, classes_of, decoded, source_of
from dataloaders.image_set import ImageSet, ImageSplit, with_val
from engine.config import PositiveInt, UserError

EDGE, CHANNELS = 32, 3
CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
BINARY = {  # classes -> (folder, images in the files of train, of test, label bytes before an image, file of the names)
    10: (
        "cifar-10-batches-bin", {f"data_batch_{place}.bin": 10_000 for place in range(1, 6)},
        {"test_batch.bin": 10_000}, 1, "batches.meta.txt",
    ),
    100: ("cifar-100-binary", {"train.bin": 50_000}, {"test.bin": 10_000}, 2, "fine_label_names.txt"),
}  # fmt: skip


def cifar(
    cache_dir: str,
    *,
    root: str,
    classes: Literal[10, 100] = 10,
    val_images: PositiveInt = 5000,
    val_seed: int = 0,
) -> ImageSet:
    """CIFAR-10 or CIFAR-100, 32x32; image files are decoded once, below cache_dir.

    root: holds cifar-10-batches-bin/ (cifar-100-binary/) as unpacked from the official archive, or is that folder;
        or train/CLASS/*.png|jpg and test/CLASS/*, also packed as train.tar.gz and test.tar.gz.
    classes: 10, or 100 (the fine labels).
    val_images: taken out of train, as many of each class (rounded down), by a hash of val_seed and the image's name.
    val_seed: of the choice of these.

    UserError for missing, short or damaged files. A small set in the binary layout, with no file of official length
    and equal train batches, is read; python -m dataloaders.check tells that it is not the official one."""
    base = Path(root)
    if not base.is_dir():
        raise UserError(
            f"cifar: there is no folder {base} (data.root); the README, Data, says how to obtain CIFAR"
        )
    folder, train, test, label_bytes, names = BINARY[classes]
    for place in (base / folder, base):
        if any((place / name).exists() for name in (*train, *test)):
            parts = {name: read_rows(place / name, label_bytes, classes) for name in (*train, *test)}
            refuse_short(place, {name: len(part) for name, part in parts.items()}, train, test)
            splits = {
                split: binary_split({name: parts[name] for name in files}, label_bytes)
                for split, files in (("train", train), ("test", test))
            }
            found = ImageSet(f"cifar{classes}", class_names(place / names, classes), splits)
            return with_val(found, val_images, val_seed)
    sources = {split: source_of(base, split) for split in ("train", "test")}
    if None in sources.values():
        raise UserError(
            f"cifar: {base} holds neither {folder}/ (the binary version) nor train/ and test/ (or .tar.gz of them)"
        )
    labels = folder_classes(base, sources["train"], classes)
    splits = {
        split: decoded(
            source, by_class(source, labels, f"cifar {split}"), EDGE, cache_dir, f"cifar{classes} {split}"
        )
        for split, source in sources.items()
    }
    exact = all(name.lower().endswith(".png") for source in sources.values() for name in source.names())
    name = (
        f"cifar{classes}" if exact else f"cifar{classes}_jpeg"
    )  # figures of others don't hold for the latter
    return with_val(ImageSet(name, labels, splits), val_images, val_seed)


def read_rows(path: Path, label_bytes: int, classes: int) -> np.ndarray:
    """uint8 [N, label bytes + 3072]: the labels (the last one counts), then an image, planes R, G, B."""
    row = label_bytes + CHANNELS * EDGE**2
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error
    if not len(content) or len(content) % row:
        raise UserError(
            f"{path}: {len(content)} bytes are no whole number of rows of {row}; download it again"
        )
    rows = content.reshape(-1, row)
    highest = rows[:, label_bytes - 1].max()
    if highest >= classes:
        raise UserError(f"{path}: label {highest}, allowed: 0 to {classes - 1}; is this another CIFAR?")
    return rows


def refuse_short(place: Path, rows: dict[str, int], train: dict[str, int], test: dict[str, int]) -> None:
    """UserError for a file without its official number of rows where another has its own, and for unequal train batches
    where none has."""
    expected = {**train, **test}
    if not any(rows[name] == count for name, count in expected.items()):
        expected = {name: max(rows[one] for one in train) for name in train}
    for name, count in expected.items():
        if rows[name] != count:
            raise UserError(f"{place / name}: {rows[name]} images, expected {count}; download it again")


def binary_split(parts: dict[str, np.ndarray], label_bytes: int) -> ImageSplit:
    """Rows of files by the files' names, one after the other."""
    rows = np.concatenate(list(parts.values()))
    images = rows[:, label_bytes:].reshape(-1, CHANNELS, EDGE, EDGE)
    names = [f"{Path(name).stem}/{place:05d}" for name, part in parts.items() for place in range(len(part))]
    return ImageSplit(images, rows[:, label_bytes - 1].astype(np.int64), names)


def class_names(path: Path, classes: int) -> tuple[str, ...]:
    """A line each; without the file they are those of CIFAR-10, or numbers."""
    if path.exists():
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if len(lines) != classes:
            raise UserError(f"{path}: {len(lines)} names, expected {classes}")
        return tuple(lines)
    return CIFAR10 if classes == 10 else tuple(f"class {place:02d}" for place in range(classes))


def folder_classes(base: Path, source, classes: int) -> tuple[str, ...]:
    """classes.json (a list, in the order of the labels), or the folders of train in alphabetical order."""
    path = base / "classes.json"
    if path.exists():
        try:
            names = tuple(map(str, json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: can't be read ({error})") from error
    else:
        names = classes_of(source)
    if len(names) != classes:
        raise UserError(f"cifar: {base} has {len(names)} classes, data.classes says {classes}")
    return names
