"""scikit-learn's bundled digits: 1,797 real images of 8x8 with 17 grey levels, nothing to download."""

import numpy as np

from dataloaders.image_set import ImageSet, ImageSplit, with_val
from engine.config import PositiveInt, UserError

LEVELS = 16


def digits(
    cache_dir: str, *, test_images: PositiveInt = 360, val_images: PositiveInt = 200, val_seed: int = 0
) -> ImageSet:
    """scikit-learn's digits, 8x8 in grey.

    test_images: the last ones of the file, written by other people than the first.
    val_images: out of the others, as many of each class (rounded down).
    val_seed: of the choice of these.

    Images are [1, 8, 8] with values of 0 to 255 (level / 16); an eps is in units of these pixels. UserError for more
    test or val images than leave some of each class to train."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images / LEVELS * 255).astype(np.uint8)[:, None]
    labels, names = bunch.target.astype(np.int64), [f"digit_{place:04d}" for place in range(len(images))]
    # train needs the first two of each class, one of them for val
    most = len(images) - 1 - max(np.flatnonzero(labels == label)[1] for label in range(10))
    if test_images > most:
        raise UserError(f"data.test_images: {test_images} is wrong for digits; expected 1 to {most}")
    whole, cut = ImageSplit(images, labels, names), len(images) - test_images
    splits = {"train": whole.take(np.arange(cut)), "test": whole.take(np.arange(cut, len(images)))}
    return with_val(ImageSet("digits", tuple("0123456789"), splits), val_images, val_seed)
