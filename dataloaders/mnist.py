"""MNIST in its IDX files (LeCun et al. 1998), gzipped or not."""

import math
from pathlib import Path

import numpy as np

from dataloaders.image_files import read_gzip
from dataloaders.image_set import ImageSet, ImageSplit, with_val
from engine.config import PositiveInt, Probability, UserError

FILES = {"train": "train", "test": "t10k"}
CLASSES = tuple("0123456789")


def mnist(
    cache_dir: str,
    *,
    root: str,
    val_images: PositiveInt = 1000,
    val_seed: int = 0,
    test_share: Probability = 0.3,
) -> ImageSet:
    """MNIST, 28x28 in grey.

    root: holds train-images-idx3-ubyte and train-labels-idx1-ubyte, and t10k-..., each as .gz or unpacked.
    val_images: taken out of train, as many of each class (rounded down).
    val_seed: of the choice of these.
    test_share: where root has no train files: this share of t10k, its last images, stays test; the others are train.

    Images are [1, 28, 28]. UserError for missing or damaged files, and for labels of other classes."""
    base = Path(root)
    found = {
        split: read_split(base, name)
        for split, name in FILES.items()
        if path_of(base, f"{name}-images-idx3-ubyte")
    }
    if "test" not in found:
        raise UserError(f"mnist: no t10k-images-idx3-ubyte(.gz) in {base} (data.root)")
    name = "mnist" if "train" in found else "mnist_t10k"  # other images, other figures
    if "train" not in found:
        whole = found["test"]
        cut = len(whole) - round(test_share * len(whole))
        if cut in (0, len(whole)):
            raise UserError(
                f"data.test_share: {test_share} leaves no image for {'test' if cut else 'train'}; expected more than 0 "
                "and less than 1"
            )
        found = {"train": whole.take(np.arange(cut)), "test": whole.take(np.arange(cut, len(whole)))}
    splits = {split: found[split] for split in FILES}
    return with_val(ImageSet(name, CLASSES, splits), val_images, val_seed)


def path_of(base: Path, name: str) -> Path | None:
    return next((base / one for one in (name, f"{name}.gz") if (base / one).exists()), None)


def read_split(base: Path, name: str) -> ImageSplit:
    """UserError for labels that are none of the ten classes, and for more images than labels or less."""
    images = read_idx(base, f"{name}-images-idx3-ubyte", 3)
    labels = read_idx(base, f"{name}-labels-idx1-ubyte", 1)
    if len(images) != len(labels) or not len(labels):
        raise UserError(f"mnist: {len(images)} images and {len(labels)} labels of {name} in {base}")
    if labels.max() >= len(CLASSES):
        path = path_of(base, f"{name}-labels-idx1-ubyte")
        raise UserError(f"{path}: label {labels.max()}, allowed: 0 to {len(CLASSES) - 1}; is this EMNIST?")
    names = [f"{name}_{place:05d}" for place in range(len(images))]
    return ImageSplit(images[:, None], labels.astype(np.int64), names)


def read_idx(base: Path, name: str, rank: int) -> np.ndarray:
    """uint8 array of `rank` dimensions: two zero bytes, type 8, rank, sizes as big-endian int32, then the values."""
    path = path_of(base, name)
    if path is None:
        raise UserError(f"mnist: no {name}(.gz) in {base} (data.root)")
    content = read_gzip(path)
    head = 4 + 4 * rank
    if content[:4] != bytes([0, 0, 8, rank]):
        raise UserError(f"{path}: is no IDX file of bytes in {rank} dimensions")
    if len(content) < head:
        raise UserError(f"{path}: {len(content)} bytes, its header alone has {head}; download it again")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", rank, 4))
    values = np.frombuffer(content, np.uint8, offset=head)
    if len(values) != math.prod(shape):
        raise UserError(f"{path}: {len(values)} values, its header says {shape}; download it again")
    return values.reshape(shape)
