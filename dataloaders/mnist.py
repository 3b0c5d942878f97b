"""MNIST in its IDX files (LeCun et al. 1998), gzipped or not."""

from pathlib import Path

import numpy as np

from dataloaders.image_files import read_gzip
from dataloaders.image_set import ImageSet, ImageSplit, with_val
from engine.config import PositiveInt, Probability, UserError

FILES = {"train": "train", "test": "t10k"}


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
    val_images: taken out of train, the same number of each class.
    val_seed: of the choice of these.
    test_share: where root has no train files: this share of t10k, its last images, stays test; the others are train.

    Images are [1, 28, 28]. UserError for missing or damaged files."""
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
        found = {"train": whole.take(np.arange(cut)), "test": whole.take(np.arange(cut, len(whole)))}
    splits = {split: found[split] for split in FILES}
    return with_val(ImageSet(name, tuple("0123456789"), splits), val_images, val_seed)


def path_of(base: Path, name: str) -> Path | None:
    return next((base / one for one in (name, f"{name}.gz") if (base / one).exists()), None)


def read_split(base: Path, name: str) -> ImageSplit:
    images, labels = (read_idx(base, f"{name}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    if len(images) != len(labels):
        raise UserError(f"mnist: {len(images)} images and {len(labels)} labels of {name} in {base}")
    names = [f"{name}_{place:05d}" for place in range(len(images))]
    return ImageSplit(images[:, None], labels.astype(np.int64), names)


def read_idx(base: Path, name: str) -> np.ndarray:
    """uint8 array: two zero bytes, type 8, number of dimensions, their sizes as big-endian int32, then the values."""
    path = path_of(base, name)
    if path is None:
        raise UserError(f"mnist: no {name}(.gz) in {base} (data.root)")
    content = read_gzip(path)
    if len(content) < 8 or content[:3] != b"\0\0\x08":
        raise UserError(f"{path}: is no IDX file of bytes")
    rank = content[3]
    shape = tuple(int(size) for size in np.frombuffer(content, ">i4", rank, 4))
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if len(values) != np.prod(shape):
        raise UserError(f"{path}: {len(values)} values, its header says {shape}; download it again")
    return values.reshape(shape)
