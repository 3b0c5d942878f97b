"""Batches for training and evaluation. Seed, epoch and step decide what a batch holds, never the workers."""

import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import albumentations
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataloaders.cache import FrameCache, open_cache
from dataloaders.cache_parts import say
from dataloaders.frames import Frame, FrameIndex
from dataloaders.image_batches import steps_of
from dataloaders.transforms import ORDER, augmentation, augmented, was_flipped
from engine.config import UserError

SHARED_MEMORY = Path("/dev/shm")  # through which workers hand over their batches
PREFETCH = 2  # batches that each worker prepares ahead


@dataclass
class Batch:
    """`images` uint8 [B, 3, H, W], RGB, stored channels last; `labels` uint8 [B, H, W] at the network's size.

    `native_labels` are the uint8 [h, w] labels of the source where the evaluation needs them, None where the
    labels at the network's size are those of the source or where they were not asked for. `rows` are the
    places of the frames in the loader's cache; `flipped` tells which of them the augmentation mirrored."""

    images: torch.Tensor
    labels: torch.Tensor
    frames: list[Frame]
    rows: list[int]
    flipped: list[bool]
    native_labels: list[torch.Tensor] | None = None

    def pin_memory(self) -> "Batch":
        """What DataLoader calls to speed up copies to a GPU."""
        native = self.native_labels and [labels.pin_memory() for labels in self.native_labels]
        return replace(
            self, images=self.images.pin_memory(), labels=self.labels.pin_memory(), native_labels=native
        )


@dataclass
class Batches(Dataset):
    """Makes the batch of a list of (epoch, row) of the cache; runs in the workers.

    The message of a UserError is returned: raised here, it would reach the user with a traceback in it."""

    cache: FrameCache
    pipeline: albumentations.Compose
    seed: int = 0
    read_native: Callable[[Path], tuple[np.ndarray, int]] | None = None

    def __getitem__(self, samples: Sequence[tuple[int, int]]) -> Batch | str:
        try:
            return self.batch(samples)
        except UserError as error:
            return str(error)

    def batch(self, samples: Sequence[tuple[int, int]]) -> Batch:
        size = self.cache.image_size
        images = np.empty((len(samples), *size, 3), np.uint8)
        labels = np.empty((len(samples), *size), np.uint8)
        flipped = []
        for place, (epoch, row) in enumerate(samples):
            images[place], labels[place] = augmented(
                self.pipeline,
                self.cache.images[row],
                self.cache.labels[row],
                seed=self.seed,
                epoch=epoch,
                index=row,
            )
            flipped.append(was_flipped(self.pipeline))
        rows = [row for _, row in samples]
        frames = [self.cache.frames[row] for row in rows]
        native = [self.cache.native_sizes[row] for row in rows]
        native_labels = None
        if self.read_native is not None and not all(np.array_equal(shape, size) for shape in native):
            native_labels = [torch.from_numpy(self.read_native(frame.label)[0]) for frame in frames]
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        return Batch(pixels, torch.from_numpy(labels), frames, rows, flipped, native_labels)


class TrainOrder:
    """The (epoch, row) pairs of each batch of `epoch`, from batch `start` on; nothing else is remembered."""

    def __init__(self, length: int, batch_size: int, seed: int):
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return steps_of(self.length, self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        order = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(ORDER, epoch)))
        rows = order.permutation(self.length).tolist()
        for step in range(self.start, len(self)):
            yield [(epoch, row) for row in rows[step * self.batch_size : (step + 1) * self.batch_size]]


class TrainBatches:
    """Shuffled, augmented batches. `len` is the steps of an epoch; a last batch of one frame is dropped."""

    def __init__(self, source: Batches, batch_size: int, workers: int):
        self.cache = source.cache
        self.order = TrainOrder(len(self.cache.frames), batch_size, source.seed)
        self.source = source
        self.workers = affordable(workers, batch_size * input_bytes(self.cache))

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch; with `start` = k exactly those after the first k. One epoch at a time: the
        next one may begin before this one has ended, but then this one is over."""
        self.order.epoch, self.order.start = epoch, start
        yield from batches_of(self)

    @cached_property
    def loader(self) -> DataLoader:
        return data_loader(self.source, self.order, self.workers)


class EvalBatches:
    """Batches in the order of the frames, without augmentation; the last one may be smaller."""

    def __init__(self, source: Batches, batch_size: int, workers: int):
        self.cache = source.cache
        samples = [(0, row) for row in range(len(self.cache.frames))]
        self.order = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
        self.source = source
        native = int(self.cache.native_sizes.prod(axis=1).max()) if source.read_native else 0
        self.workers = affordable(workers, batch_size * (input_bytes(self.cache) + native))

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        return batches_of(self)

    @cached_property
    def loader(self) -> DataLoader:
        return data_loader(self.source, self.order, self.workers)


def refuse_large_batch(frames: int, batch_size: int) -> None:
    """UserError for fewer frames than one batch."""
    if frames < batch_size:
        raise UserError(
            f"train.batch_size: {batch_size} is more than the {frames} frames that data.subsets gives; "
            f"allowed: 1..{frames}, or name more subsets"
        )


def train_loader(
    index: FrameIndex,
    frames: Sequence[Frame],
    *,
    image_size: tuple[int, int],
    resize: str,
    augment,
    cache_dir: str | Path,
    batch_size: int,
    seed: int,
    workers: int,
) -> TrainBatches:
    """Batches for training from the cache of `frames`, which is made first where needed.

    `augment` is what `transforms.augmentation` takes. The order of an epoch depends on (seed, epoch), the
    changes of a sample on (seed, epoch, its place in `frames`). Raises UserError for fewer frames than one
    batch and for sources or a cache that cannot be used."""
    refuse_large_batch(len(frames), batch_size)
    cache = open_cache(index, frames, image_size, resize, cache_dir)
    return TrainBatches(Batches(cache, augmentation(augment, image_size), seed), batch_size, workers)


def eval_loader(
    index: FrameIndex,
    frames: Sequence[Frame],
    *,
    image_size: tuple[int, int],
    resize: str,
    cache_dir: str | Path,
    batch_size: int,
    workers: int,
    resolution: str,
) -> EvalBatches:
    """Batches for evaluation in the order of `frames`, always the same; native labels where `resolution` is
    "native" and the sources have another size than the network's input.

    Raises UserError for sources or a cache that cannot be used."""
    cache = open_cache(index, frames, image_size, resize, cache_dir)
    read_native = index.read_label if resolution == "native" else None
    source = Batches(cache, augmentation("none", image_size), read_native=read_native)
    return EvalBatches(source, batch_size, workers)


def data_loader(source: Batches, order, workers: int) -> DataLoader:
    """A loader whose workers live as long as it does; made at the first batch, when CUDA is in use or not.

    Workers are forked on Linux, which takes milliseconds. That is safe since they use neither CUDA nor a pool
    of threads (OpenCV's is off, and DataLoader sets torch to one thread)."""
    parallel = {}
    if workers:
        parallel = {
            "persistent_workers": True,
            "prefetch_factor": PREFETCH,
            "multiprocessing_context": "fork" if sys.platform == "linux" else "spawn",
        }
    return DataLoader(
        source,
        sampler=order,
        batch_size=None,
        collate_fn=as_it_is,
        num_workers=workers,
        pin_memory=torch.cuda.is_initialized(),
        # Else each pass would draw a seed for the workers from torch's global generator, and a resumed run,
        # which begins its epoch once more, would go on with other numbers than an uninterrupted one.
        generator=torch.Generator(),
        **parallel,
    )


def batches_of(batches: "TrainBatches | EvalBatches") -> Iterator[Batch]:
    """One pass; ends the workers before it raises the UserError that one of them met."""
    with without_interrupts():
        passing = iter(batches.loader)
    for batch in passing:
        if isinstance(batch, str):
            break
        yield batch
    else:
        return
    del batches.loader  # left to the garbage collector, they would be waited for in vain, 5 seconds each
    raise UserError(batch)


def as_it_is(batch: Batch | str) -> Batch | str:
    return batch


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Processes and threads that begin inside the block never get Ctrl-C, not even before their first line: it
    reaches the whole process group, but only the main process knows how to end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def input_bytes(cache: FrameCache) -> int:
    """Bytes of one image and its labels at the network's size."""
    return 4 * cache.image_size[0] * cache.image_size[1]


def affordable(workers: int, batch_bytes: int) -> int:
    """As many workers as the free shared memory carries: containers often have 64 MB."""
    if not SHARED_MEMORY.is_dir():
        return workers
    free = shutil.disk_usage(SHARED_MEMORY).free
    fitting = free // 2 // (PREFETCH * batch_bytes)  # half: another loader may be at work
    if fitting < workers:
        say(
            f"warning: data.workers: {fitting} instead of {workers}: {SHARED_MEMORY} has {free / 1e6:.0f} MB "
            f"free and a batch takes {batch_bytes / 1e6:.0f} MB (for a container: docker run --shm-size=2g)"
        )
    return min(workers, fitting)
