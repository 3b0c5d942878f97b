"""Batches of an image split: an order that a seed and an epoch decide, crops and flips that are done on the device."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataloaders.image_set import ImageSplit


class Named(NamedTuple):
    """An image of a batch."""

    name: str


@dataclass(frozen=True)
class ImageBatch:
    """images uint8 [B, C, H, W] as stored; labels int64 [B]; rows int64 [B] in the split; moves int64 [B, 3]: top and
    left edge of the crop out of the padded image, and whether it is flipped; None for images as they are."""

    images: Tensor
    labels: Tensor
    frames: tuple[Named, ...]
    rows: np.ndarray
    moves: Tensor | None = None
    pad: int = 0


def steps_of(images: int, batch_size: int) -> int:
    """Batches of an epoch of training. A last batch of one image is left out: BatchNorm can't take it."""
    whole, rest = divmod(images, batch_size)
    return whole + (rest > 1)


@dataclass(frozen=True)
class TrainBatches:
    """All images once an epoch, in an order and with crops and flips that follow from (seed, epoch, image): batch size
    and interruptions change none of them."""

    split: ImageSplit
    batch_size: int
    seed: int
    pad: int = 4
    flip: bool = True

    def __len__(self) -> int:
        return steps_of(len(self.split), self.batch_size)

    def epoch(self, number: int, start: int = 0) -> Iterator[ImageBatch]:
        """Batches of epoch `number` from batch `start` on."""
        dice = np.random.default_rng([self.seed, number])
        order = dice.permutation(len(self.split))
        moves = np.stack(
            [
                dice.integers(0, 2 * self.pad + 1, len(order)),
                dice.integers(0, 2 * self.pad + 1, len(order)),
                dice.integers(0, 2, len(order)) * self.flip,
            ],
            axis=1,
        )
        for place in range(start, len(self)):
            rows = order[place * self.batch_size : (place + 1) * self.batch_size]
            yield take(self.split, rows, torch.from_numpy(moves[rows]), self.pad)


@dataclass(frozen=True)
class EvalBatches:
    """All images in their order, as they are."""

    split: ImageSplit
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[ImageBatch]:
        for start in range(0, len(self.split), self.batch_size):
            yield take(self.split, np.arange(start, min(start + self.batch_size, len(self.split))))


def take(split: ImageSplit, rows: np.ndarray, moves: Tensor | None = None, pad: int = 0) -> ImageBatch:
    """A batch of some rows."""
    images = torch.from_numpy(np.ascontiguousarray(split.images[rows]))
    names = tuple(Named(split.names[row]) for row in rows.tolist())
    return ImageBatch(images, torch.from_numpy(split.labels[rows]), names, rows, moves, pad)


def images_of(batch: ImageBatch, device: torch.device, layout: torch.memory_format) -> Tensor:
    """The batch's images on the device, cropped and flipped there, float [B, C, H, W] in [0, 1]."""
    images = batch.images.to(device, non_blocking=True)
    if batch.moves is not None:
        images = moved(images, batch.moves.to(device, non_blocking=True), batch.pad)
    return images.to(memory_format=layout).float() / 255


def moved(images: Tensor, moves: Tensor, pad: int) -> Tensor:
    """Each image [C, H, W] padded by `pad` black pixels, cropped from (top, left), and flipped where moves[:, 2]."""
    count, _, height, width = images.shape
    top, left, flip = moves.unbind(dim=1)
    rows = top[:, None] + torch.arange(height, device=images.device)  # [B, H]
    columns = left[:, None] + torch.arange(width, device=images.device)
    columns = torch.where(flip[:, None].bool(), columns.flip(1), columns)
    padded = F.pad(images, (pad, pad, pad, pad))
    batch = torch.arange(count, device=images.device)[:, None, None]
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
