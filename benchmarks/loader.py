"""Training batches at 480x640 from the cache against decoding PNG files and one mask per colour.

MOE_DATA=... python -m benchmarks.loader [--repeats N] [--out FILE]"""

import tempfile
from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.label_colours import CLASSES, masks_of_channels, masks_of_pixels, sample_frames
from benchmarks.timing import arguments, medians, report, side_by_side
from dataloaders.a2d2 import read_colour_label
from dataloaders.frames import FrameIndex
from dataloaders.loader import train_loader
from dataloaders.transforms import augmentation, augmented, resize_image, resize_label
from engine.config import Augment

SIZE = (480, 640)
BATCH_SIZE = 4
WORKERS = 2
SEED = 304
OUR_IMAGES, PLAIN_IMAGES = 400, 8  # a round takes 0.5 s with ours and 5 s or more with files


class PlainFrames(Dataset):
    """Reads, converts and resizes a frame each time it is asked for."""

    def __init__(self, frames, to_ids: Callable[[np.ndarray], np.ndarray]):
        self.frames = frames
        self.to_ids = to_ids
        self.pipeline = augmentation(Augment(), SIZE)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        frame = self.frames[index]
        image = cv2.cvtColor(cv2.imread(str(frame.image)), cv2.COLOR_BGR2RGB)
        ids = self.to_ids(cv2.imread(str(frame.label)))
        image, labels = resize_image(image, SIZE, "squash"), resize_label(ids, SIZE, "squash")
        image, labels = augmented(self.pipeline, image, labels, seed=SEED, epoch=0, index=index)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(labels)


def plain_loader(frames, to_ids) -> DataLoader:
    return DataLoader(PlainFrames(frames, to_ids), BATCH_SIZE, num_workers=WORKERS, persistent_workers=True)


def our_loader(frames, cache_dir: str):
    index = FrameIndex(
        name="a2d2",
        root=frames[0].label.parents[3],
        classes=CLASSES.classes,
        palette=CLASSES.palette,
        frames=frames,
        read_label=lambda path: read_colour_label(path, CLASSES.ids),
        unknown_values=lambda path: {},
        label_map="38",
    )
    return train_loader(
        index,
        frames * (OUR_IMAGES // len(frames)),
        image_size=SIZE,
        resize="squash",
        augment=Augment(),
        cache_dir=cache_dir,
        batch_size=BATCH_SIZE,
        seed=SEED,
        workers=WORKERS,
    )


def check_that_they_agree(ours, plain) -> None:
    """The same samples of the same epoch have the same bytes."""
    images, labels = (torch.cat(parts) for parts in zip(*plain, strict=True))
    found = 0
    for samples, batch in zip(ours.order, ours.epoch(0), strict=True):
        for place, (_, row) in enumerate(samples):
            if row < PLAIN_IMAGES:
                found += 1
                assert torch.equal(batch.images[place], images[row]), "the ways disagree on an image"
                assert torch.equal(batch.labels[place], labels[row]), "the ways disagree on a label"
    assert found == PLAIN_IMAGES


def main() -> None:
    args = arguments(__doc__.splitlines()[0], repeats=3)
    frames = sample_frames()
    plain_frames = (frames * PLAIN_IMAGES)[:PLAIN_IMAGES]
    with tempfile.TemporaryDirectory() as cache_dir:
        ours = our_loader(frames, cache_dir)
        by_channels = plain_loader(plain_frames, masks_of_channels)
        by_pixels = plain_loader(plain_frames, masks_of_pixels)
        check_that_they_agree(ours, by_pixels)
        check_that_they_agree(ours, by_channels)
        ways = {
            "cache (train_loader)": (OUR_IMAGES, lambda: [None for _ in ours.epoch(0)]),
            "PNG files, masks by channels": (PLAIN_IMAGES, lambda: [None for _ in by_channels]),
            "PNG files, masks by pixels": (PLAIN_IMAGES, lambda: [None for _ in by_pixels]),
        }
        seconds = medians(side_by_side({name: way for name, (_, way) in ways.items()}, args.repeats))
    rates = {name: ways[name][0] / value for name, value in seconds.items()}
    ours_rate = next(iter(rates.values()))
    report(
        f"Training batches at {SIZE[0]}x{SIZE[1]} ({len(frames)} A2D2 frames, {WORKERS} workers)",
        ("loader", "images/s", "our gain"),
        [(name, f"{rate:.1f}", f"{ours_rate / rate:.1f}") for name, rate in rates.items()],
        f"Median of {args.repeats} interleaved rounds ({OUR_IMAGES} images from the cache, {PLAIN_IMAGES} "
        "from files, all in the page cache); the same augmentation, identical batches.",
        args.out,
    )


if __name__ == "__main__":
    main()
