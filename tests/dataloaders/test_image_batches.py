"""Batches of images: every image once an epoch, moves from seed and epoch alone, crops as a loop would do them."""

import numpy as np
import pytest
import torch

from dataloaders.image_batches import EvalBatches, TrainBatches, images_of, moved
from dataloaders.image_set import ImageSplit

CPU = torch.device("cpu")


def split(count=23, channels=3):
    images = np.random.default_rng(0).integers(0, 256, (count, channels, 6, 6), dtype=np.uint8)
    return ImageSplit(images, np.arange(count) % 4, [f"i{n}" for n in range(count)])


def seen(batches, epoch, start=0):
    found = {}
    for batch in batches.epoch(epoch, start):
        images = images_of(batch, CPU, torch.preserve_format)
        found |= {frame.name: image for frame, image in zip(batch.frames, images, strict=True)}
    return found


def test_every_image_is_seen_once_an_epoch_in_another_order():
    batches = TrainBatches(split(), batch_size=4, seed=1)
    names = [[frame.name for batch in batches.epoch(epoch) for frame in batch.frames] for epoch in (0, 1)]
    assert len(batches) == 6 and [sorted(one) for one in names] == [sorted(f"i{n}" for n in range(23))] * 2
    assert names[0] != names[1] and names[0] == [f.name for b in batches.epoch(0) for f in b.frames]
    for batch in batches.epoch(0):
        assert batch.labels.tolist() == [int(frame.name[1:]) % 4 for frame in batch.frames]


def test_a_last_batch_of_one_is_left_out():
    assert len(TrainBatches(split(9), 4, 0)) == 2 and len(TrainBatches(split(10), 4, 0)) == 3
    assert [len(batch.labels) for batch in TrainBatches(split(9), 4, 0).epoch(0)] == [4, 4]


def test_what_an_image_looks_like_depends_on_seed_and_epoch_alone():
    whole = seen(TrainBatches(split(), 4, seed=1), 2)
    for other in (
        seen(TrainBatches(split(), 7, seed=1), 2),
        seen(TrainBatches(split(), 4, seed=1), 2, start=3),
    ):
        assert all(torch.equal(image, whole[name]) for name, image in other.items())
    differing = seen(TrainBatches(split(), 4, seed=2), 2)
    assert sum(not torch.equal(differing[name], image) for name, image in whole.items()) > 15


@pytest.mark.parametrize("channels", [1, 3])
def test_moves_are_those_of_a_loop(channels):
    images = torch.from_numpy(split(12, channels).images)
    moves = torch.stack([torch.arange(12) % 5, (torch.arange(12) * 2) % 5, torch.arange(12) % 2], dim=1)
    found = moved(images, moves, 2)
    for image, (top, left, flip), one in zip(images, moves.tolist(), found, strict=True):
        padded = torch.zeros(channels, 10, 10, dtype=torch.uint8)
        padded[:, 2:8, 2:8] = image
        crop = padded[:, top : top + 6, left : left + 6]
        assert torch.equal(one, crop.flip(2) if flip else crop)


def test_without_pad_and_flip_images_stay_as_they_are():
    for name, image in seen(TrainBatches(split(), 4, 0, pad=0, flip=False), 0).items():
        assert torch.equal((image * 255).round().byte(), torch.from_numpy(split().images[int(name[1:])]))


def test_evaluation_takes_all_in_their_order():
    batches = EvalBatches(split(), 5)
    names = [frame.name for batch in batches for frame in batch.frames]
    assert names == [f"i{n}" for n in range(23)] and len(batches) == 5
    images = torch.cat([images_of(batch, CPU, torch.preserve_format) for batch in batches])
    assert torch.equal((images * 255).round().byte(), torch.from_numpy(split().images))
    assert images.max() <= 1 and images.dtype == torch.float32
