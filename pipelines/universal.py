"""Trains a universal perturbation on a row of an evaluation: python -m pipelines.universal CONFIG ROW FILE.

It sees the training frames of the config, is chosen on its val frames, and never reads a test frame. The file is
applied, to any row of any evaluation at that image size, by evaluate.attacks=[{name: universal, file: FILE}].
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attacks.pixel_losses import LOSSES
from attacks.threat import Threat
from attacks.universal import Universal, shuffled, train_universal
from dataloaders.cache import FrameCache, open_cache
from dataloaders.frames import FrameIndex
from engine.checkpoints import atomic_write
from engine.command import run
from engine.config import Data, Evaluation, Run, UserError, load
from engine.devices import pick_device
from engine.schema import boundless
from engine.steps import under_attack
from evaluation.formats import percent
from evaluation.targets import class_weights, exact_float32
from pipelines.matrix import as_evaluation, load_zoo
from pipelines.robustness import target_of_row


@dataclass(frozen=True)
class Samples(Sequence):
    """Frames one by one, as attacks take them: image float32 [3, H, W] in [0, 1], label int64 [H, W]."""

    cache: FrameCache
    device: torch.device

    def __len__(self) -> int:
        return len(self.cache.frames)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        if row >= len(self):
            raise IndexError(row)
        image, label = (torch.from_numpy(kind[row].copy()) for kind in (self.cache.images, self.cache.labels))
        image, label = image.to(self.device), label.to(self.device)
        return (image.permute(2, 0, 1).float() / 255).contiguous(), label.long()


@dataclass(frozen=True)
class InOrder:
    """Batches of samples in their order, however often they are gone through."""

    samples: Samples
    batch_size: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.samples), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(self.samples)))
            images, labels = zip(*(self.samples[row] for row in rows), strict=True)
            yield torch.stack(images), torch.stack(labels)


def train_on_row(
    config: Evaluation, row: str, threat: Threat, *, device: torch.device, frames: int | None = None, **how
) -> Universal:
    """A perturbation of the network behind a row, with what identifies network and frames in its metadata.

    frames: of the training split, evenly spread; None: all. how: what train_universal takes.
    UserError for a row that isn't there."""
    index = config.data.build()
    zoo = load_zoo(config, index)
    known = [one.name for one in zoo.rows(controls=False)]
    if row not in known:
        raise UserError(f"row {row!r}: there is none of that name; allowed: {', '.join(known)}")
    target = target_of_row(zoo, row)
    target.model.to(device)
    train = samples_of(config.data, index, "train", device, frames)
    val = samples_of(config.data, index, "val", device)
    weights = class_weights(target.class_pixels or train.cache.class_pixels().tolist()).to(device)
    threat = Threat(threat.eps, threat.norm, index.ignore_index, class_weights=weights)
    size = config.evaluate.batch_size
    with under_attack(target.model), exact_float32(device):
        return train_universal(
            target.model,
            shuffled(train, size, how.get("seed", 0)),
            InOrder(val, size),
            threat,
            source={"row": row, **target.identity},
            data={
                "dataset": index.name,
                "train": len(train),
                "val": len(val),
                "subsets": list(config.data.subsets),
                "resize": config.data.resize,
                "batch_size": size,
            },
            on_epoch=tell,
            **how,
        )


def tell(epoch: int, right: float) -> None:
    print(f"epoch {epoch}: {percent(right)} % of val's pixels right", flush=True)


def samples_of(
    data: Data, index: FrameIndex, split: str, device: torch.device, count: int | None = None
) -> Samples:
    """The frames of a split, or `count` of them, evenly spread."""
    frames = index.select(split, data.subsets)
    if count is not None and count < len(frames):
        frames = [frames[(2 * place + 1) * len(frames) // (2 * count)] for place in range(count)]
    return Samples(open_cache(index, frames, data.image_size, data.resize, data.cache_dir), device)


def check_file(path: Path, overwrite: bool) -> None:
    """UserError where the perturbation can't be written once it is trained, or would replace what is there."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; FILE is the .safetensors file to write")
    if path.exists() and not overwrite:
        raise UserError(f"{path}: is there already; replace it (--overwrite), or name another file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        what = "nothing can be written there" if folder.is_dir() else "is a file, not a folder"
        raise UserError(f"{path}: can't be written: {folder}: {what}")


def main(argv: Sequence[str]) -> int:
    given = _parser().parse_intermixed_args(argv)
    for mistake in boundless({"eps": given.eps, "norm": given.norm}):
        raise UserError(f"--{mistake}")
    check_file(Path(given.file), given.overwrite)
    config = load(given.config, given.overrides)
    if isinstance(config, Run):
        config = as_evaluation(config)
    if not isinstance(config, Evaluation):
        raise UserError(f"{given.config}: names no row of an evaluation")
    found = train_on_row(
        config,
        given.row,
        Threat(given.eps, given.norm),
        device=pick_device(given.device),
        frames=given.frames,
        loss=given.loss,
        epochs=given.epochs,
        inner_steps=given.inner_steps,
        step_size=given.step_size,
        tile=given.tile and tuple(given.tile),
        random_start=given.random_start,
        seed=given.seed,
    )
    atomic_write(Path(given.file), found.to_bytes())
    about = found.metadata
    print(
        f"{given.file}: of epoch {about['chosen_epoch']}, {percent(min(about['accuracy']))} % of val's pixels right, "
        f"{percent(about['accuracy'][0])} % without it; {about['steps']} steps"
    )
    return 0


def number(text: str) -> float:
    """Above 0, from "0.05" or "8/255"."""
    top, _, bottom = text.partition("/")
    value = float(top) / float(bottom or 1) if float(bottom or 1) else 0.0
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def count(text: str) -> int:
    """A whole number above 0."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.universal", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of an evaluation, or of a run")
    parser.add_argument("row", metavar="ROW", help="the row to train it on, such as baseline")
    parser.add_argument("file", metavar="FILE", help="the .safetensors file to write")
    parser.add_argument(
        "overrides", metavar="a.b=c", nargs="*", default=[], help="values of the config to change"
    )
    parser.add_argument("--eps", type=number, required=True, help="size of the perturbation, such as 8/255")
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf")
    parser.add_argument("--loss", choices=tuple(LOSSES), default="ce", help="what is raised")
    parser.add_argument("--epochs", type=count, default=30, help="passes over the training frames")
    parser.add_argument("--inner-steps", type=count, default=1, help="steps on a batch before the next")
    parser.add_argument("--step-size", type=number, help="default: eps / 10")
    parser.add_argument(
        "--tile", type=count, nargs=2, metavar=("HEIGHT", "WIDTH"), help="repeat a small one; fits any size"
    )
    parser.add_argument(
        "--random-start", action="store_true", help="begin at a random point of the ball, not at zero"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a FILE that is there")
    parser.add_argument("--frames", type=count, help="training frames to use, evenly spread; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
