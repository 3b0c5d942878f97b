"""Experts' outputs on the frames of a loader: computed by the experts, kept on disk, and read again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy
import torch
from torch import Tensor

from dataloaders.cache import FrameCache
from dataloaders.loader import Batch
from engine.arithmetic import autocast_of, layout_of
from engine.config import Train
from engine.expert_cache import Store, open_store, store_key
from engine.expert_contents import APPROXIMATE, difference, pack, unpack
from engine.loop import images_of
from networks.moe import ExpertOutputs, MixtureOfExperts
from pipelines.gates import reduced
from pipelines.models import Trained

MEASURED = 4  # frames on which the effect of an approximation is measured


class Experts:
    """The experts that some mixtures share, run as the training settings say. A `prepare` of engine.loop.fit."""

    def __init__(self, mixtures: Sequence[MixtureOfExperts], settings: Train, device: torch.device):
        self.mixture, self.settings, self.device = mixtures[0], settings, device
        self.read_images = any(mixture.input == "image" for mixture in mixtures)
        self.layout = layout_of(settings)
        self.mixture.to(device=device, memory_format=self.layout)
        compiled = settings.compile and device.type == "cuda"
        self.run = torch.compile(self.mixture.run_experts) if compiled else self.mixture.run_experts

    def __call__(self, batch: Batch, *_) -> ExpertOutputs:
        """Outputs on the device, without a graph."""
        return self.outputs(images_of(batch, self.device, self.layout))

    def filled(self, batch: Batch, *_) -> ExpertOutputs:
        """The same, a smaller batch than train.batch_size filled up on its way through the experts: the last bits of a
        network's outputs may depend on the batch's size, and what is kept is computed in batches of its own."""
        images = images_of(batch, self.device, self.layout)
        count, missing = len(images), self.settings.batch_size - len(images)
        if missing <= 0:
            return self.outputs(images)
        found = self.outputs(torch.cat([images, images[:1].expand(missing, -1, -1, -1)]))
        features = [feature[:count] for feature in found.features]
        read = None if found.images is None else found.images[:count]
        return replace(found, logits=found.logits[:count], features=features, images=read)

    def outputs(self, images: Tensor) -> ExpertOutputs:
        with torch.no_grad(), autocast_of(self.settings.precision, self.device):
            return self.without_images(self.run(images))

    def without_images(self, outputs: ExpertOutputs) -> ExpertOutputs:
        """The outputs; images only where a gate reads them."""
        return outputs if self.read_images else replace(outputs, images=None)

    def reduced_labels(self, batch: Batch, size: Sequence[int]) -> Tensor:
        """The batch's labels on the device, on the grid [h, w] of the logits as the loss takes them there."""
        labels = batch.labels.to(self.device, non_blocking=True)
        return reduced(labels, self.mixture.grid(batch.images.shape[-2:]), size)


@dataclass(frozen=True, eq=False)
class Part:
    """Frames whose outputs are kept: row r is frame r, row N + r its mirror image where there are two copies."""

    title: str
    content: str
    folder: Path  # of all stores
    run: Experts
    experts: Mapping[str, Trained]
    cache: FrameCache
    copies: int
    filled: bool  # whether small batches are filled up, as in training

    @property
    def count(self) -> int:
        return len(self.cache.frames)

    @cached_property
    def store(self) -> Path:
        """Its own folder, named by the hash of all that its rows depend on."""
        facts = {
            "experts": [expert.sha256 for expert in self.experts.values()],
            "networks": [
                {key: value for key, value in expert.metadata["network"].items() if key != "pretrained"}
                for expert in self.experts.values()
            ],
            "frames": [
                (self.cache.images.paths[part].parent.name, row) for part, row in self.cache.images.places
            ],
            "image_size": self.cache.image_size,
            "content": self.content,
            "precision": self.run.settings.precision,
            "copies": self.copies,
            "device": self.run.device.type,
        }
        return self.folder / store_key(facts)

    def open(self, log: Callable[[str], None]) -> "Cached":
        """What reads its rows; they are made first where they are missing. Raises OSError as open_store."""
        groups = list(self.groups())
        notes = self.measured if self.content in APPROXIMATE else dict
        store = open_store(self.store, self.title, batches=groups, compute=self.compute, notes=notes, log=log)
        log(
            f"cache: experts' outputs on {self.title}: {self.content}, {effect(store.notes, self.experts)}, "
            f"{size_text(store.nbytes)} in {self.store}"
        )
        return Cached(self, store)

    def groups(self) -> Iterator[range]:
        """The rows batch by batch; none holds both frames and mirror images."""
        size = self.run.settings.batch_size
        for first in range(0, self.copies * self.count, self.count):
            for start in range(first, first + self.count, size):
                yield range(start, min(start + size, first + self.count))

    def batch(self, rows: Sequence[int]) -> Batch:
        """The frames of rows of one copy, as a loader gives them."""
        places = [row % self.count for row in rows]
        images = numpy.stack([self.cache.images[place] for place in places])
        labels = numpy.stack([self.cache.labels[place] for place in places])
        mirrored = rows[0] >= self.count
        if mirrored:
            images, labels = images[:, :, ::-1].copy(), labels[:, :, ::-1].copy()
        frames = [self.cache.frames[place] for place in places]
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        return Batch(pixels, torch.from_numpy(labels), frames, places, [mirrored] * len(places))

    def compute(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The tensors to store."""
        return self.pack(rows)[1]

    def pack(self, rows: Sequence[int]) -> tuple[ExpertOutputs, dict[str, Tensor]]:
        """What the experts say about rows of one copy, and what of it is stored."""
        batch = self.batch(rows)
        outputs = self.run.filled(batch) if self.filled else self.run(batch)
        labels = None
        if self.content == "label_probs":
            labels = self.run.reduced_labels(batch, outputs.logits.shape[-2:])
        return outputs, pack(self.content, outputs.logits, outputs.features, labels)

    def measured(self) -> dict:
        """The effect of an approximation on a few frames, and the type that features had."""
        rows = sorted({self.count * place // MEASURED for place in range(MEASURED)})
        outputs, packed = self.pack(rows)
        found, _ = unpack(self.content, packed, None, outputs.logits.shape[2])
        feature_type = str(outputs.features[0].dtype).removeprefix("torch.")
        return {"frames": len(rows), "feature_type": feature_type, **difference(outputs.logits, found)}


class Cached:
    """A `prepare` of engine.loop.fit that reads what is kept of a part."""

    def __init__(self, part: Part, store: Store):
        self.part, self.store = part, store
        self.num_classes = part.run.mixture.num_classes
        kind = store.notes.get("feature_type")
        self.feature_type = kind and getattr(torch, kind)

    def __call__(self, batch: Batch, *_) -> ExpertOutputs:
        """Outputs on the device."""
        run, part = self.part.run, self.part
        rows = [row + part.count * mirrored for row, mirrored in zip(batch.rows, batch.flipped, strict=True)]
        read = self.store.read(rows, pin=run.device.type == "cuda")
        stored = {name: tensor.to(run.device, non_blocking=True) for name, tensor in read.items()}
        labels = None
        if part.content == "label_probs":
            labels = run.reduced_labels(batch, stored["label_log_probs"].shape[-2:])
        logits, features = unpack(part.content, stored, labels, self.num_classes, self.feature_type)
        images = images_of(batch, run.device, run.layout) if run.read_images else None
        return ExpertOutputs(logits, features, images, tuple(batch.images.shape[-2:]))


def effect(notes: Mapping, names: Sequence[str]) -> str:
    """The measured effect of an approximation in words."""
    if not notes:
        return "exact"
    changed = ", ".join(f"{name} {share:.2%}" for name, share in zip(names, notes["changed"], strict=True))
    return (
        f"an approximation (on {notes['frames']} frames: largest error of a logit {notes['largest']:.2g}, mean "
        f"{notes['mean']:.2g}, pixels with another class: {changed})"
    )


def size_text(count: int) -> str:
    """A number of bytes in words."""
    power = min(3, max(1, len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.2f} {('bytes', 'kB', 'MB', 'GB')[power]}"
