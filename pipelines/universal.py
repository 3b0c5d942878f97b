"""Trains a universal perturbation on a row of an evaluation: python -m pipelines.universal CONFIG ROW FILE.

It sees the training images of the config, is chosen on its val images, and never reads a test image. The file is
applied, to any row of any evaluation at that image size, by evaluate.attacks=[{name: universal, file: FILE}].
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attacks.pixel_losses import LOSSES
from attacks.threat import Threat
from attacks.universal import Universal, shuffled, train_universal
from dataloaders.cache import FrameCache, open_cache
from dataloaders.frames import FrameIndex
from dataloaders.image_set import ImageSplit
from engine.checkpoints import atomic_write
from engine.command import run
from engine.config import Classification, ClassifierEvaluation, Data, Evaluation, Run, UserError, load
from engine.devices import pick_device
from engine.pathways import NO_LABEL
from engine.schema import boundless
from engine.steps import under_attack
from evaluation.formats import percent
from evaluation.targets import Target, class_weights, exact_float32, target_of
from pipelines import classifier_evaluation
from pipelines.matrix import as_evaluation, load_zoo
from pipelines.robustness import target_of_row


@dataclass(frozen=True)
class Samples(Sequence):
    """`size` images one by one, as attacks take them: image float32 [C, H, W] in [0, 1], label int64 [H, W] or [].
    read: row -> uint8 [C, H, W] and its label or labels."""

    read: Callable[[int], tuple[np.ndarray, np.ndarray]]
    size: int
    device: torch.device

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        if row >= len(self):
            raise IndexError(row)
        image, label = (torch.from_numpy(np.array(one)).to(self.device) for one in self.read(row))
        return (image.float() / 255).contiguous(), label.long()


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
    config: Evaluation | ClassifierEvaluation,
    row: str,
    threat: Threat,
    *,
    device: torch.device,
    frames: int | None = None,
    **how,
) -> Universal:
    """A perturbation of the network behind a row, with what identifies network and images in its metadata.

    frames: of the training split, evenly spread; None: all. how: what train_universal takes.
    UserError for a row that isn't there."""
    prepare = of_classifier if isinstance(config, ClassifierEvaluation) else of_segmentation
    target, train, val, threat, data = prepare(config, row, threat, device, frames)
    target.model.to(device)
    size = config.evaluate.batch_size
    with under_attack(target.model), exact_float32(device):
        return train_universal(
            target.model,
            shuffled(train, size, how.get("seed", 0)),
            InOrder(val, size),
            threat,
            source={"row": row, **target.identity},
            data={**data, "train": len(train), "val": len(val), "batch_size": size},
            on_epoch=tell,
            **how,
        )


# Target, samples of train and of val, threat, what is told of the data.
Prepared = tuple[Target, Samples, Samples, Threat, dict]


def of_segmentation(
    config: Evaluation, row: str, threat: Threat, device: torch.device, count: int | None
) -> Prepared:
    index = config.data.build()
    zoo = load_zoo(config, index)
    refuse_unknown(row, [one.name for one in zoo.rows(controls=False)])
    target = target_of_row(zoo, row)
    train, val = (
        cache_of(config.data, index, split, most) for split, most in (("train", count), ("val", None))
    )
    weights = class_weights(target.class_pixels or train.class_pixels().tolist()).to(device)
    threat = Threat(threat.eps, threat.norm, index.ignore_index, class_weights=weights)
    about = {"dataset": index.name, "subsets": list(config.data.subsets), "resize": config.data.resize}
    return target, of_frames(train, device), of_frames(val, device), threat, about


def of_classifier(
    config: ClassifierEvaluation, row: str, threat: Threat, device: torch.device, count: int | None
) -> Prepared:
    """Without class weights: those are for label maps."""
    images = config.data.build(config.data.cache_dir)
    refuse_unknown(row, list(config.models))
    loaded = classifier_evaluation.load(config.models[row], f"models.{row}", images)
    target = target_of(row, loaded.network, role=loaded.role, **loaded.about)
    train, val = images.split("train"), images.split("val")
    chosen = train.take(np.array(spread_evenly(len(train), count)))
    samples = of_images(chosen, device), of_images(val, device)
    return target, *samples, Threat(threat.eps, threat.norm, NO_LABEL), {"dataset": images.name}


def refuse_unknown(row: str, known: Sequence[str]) -> None:
    if row not in known:
        raise UserError(f"row {row!r}: there is none of that name; allowed: {', '.join(known)}")


def tell(epoch: int, right: float) -> None:
    print(f"epoch {epoch}: {percent(right)} % of val right", flush=True)


def cache_of(data: Data, index: FrameIndex, split: str, count: int | None = None) -> FrameCache:
    """The frames of a split, or `count` of them, evenly spread."""
    frames = index.select(split, data.subsets)
    frames = [frames[place] for place in spread_evenly(len(frames), count)]
    return open_cache(index, frames, data.image_size, data.resize, data.cache_dir)


def of_frames(cache: FrameCache, device: torch.device) -> Samples:
    return Samples(
        lambda row: (cache.images[row].transpose(2, 0, 1), cache.labels[row]), len(cache.frames), device
    )


def of_images(split: ImageSplit, device: torch.device) -> Samples:
    return Samples(lambda row: (split.images[row], split.labels[row]), len(split), device)


def spread_evenly(whole: int, count: int | None) -> list[int]:
    """`count` of so many places, or all."""
    count = whole if count is None or count > whole else count
    return [(2 * place + 1) * whole // (2 * count) for place in range(count)]


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
    if isinstance(config, Run | Classification):
        config = (as_evaluation if isinstance(config, Run) else classifier_evaluation.as_evaluation)(config)
    if isinstance(config, ClassifierEvaluation) and given.loss.startswith("balanced"):
        raise UserError(f"--loss {given.loss}: weighs classes by their pixels; it is for label maps")
    if not isinstance(config, Evaluation | ClassifierEvaluation):
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
        f"{given.file}: of epoch {about['chosen_epoch']}, {percent(min(about['accuracy']))} % of val right, "
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
    parser.add_argument(
        "config", metavar="CONFIG", help="YAML file of an evaluation or of a run; classifiers too"
    )
    parser.add_argument("row", metavar="ROW", help="the row to train it on, such as baseline")
    parser.add_argument("file", metavar="FILE", help="the .safetensors file to write")
    parser.add_argument(
        "overrides", metavar="a.b=c", nargs="*", default=[], help="values of the config to change"
    )
    parser.add_argument("--eps", type=number, required=True, help="size of the perturbation, such as 8/255")
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf")
    parser.add_argument("--loss", choices=tuple(LOSSES), default="ce", help="what is raised")
    parser.add_argument("--epochs", type=count, default=30, help="passes over the training images")
    parser.add_argument("--inner-steps", type=count, default=1, help="steps on a batch before the next")
    parser.add_argument("--step-size", type=number, help="default: eps / 10")
    parser.add_argument(
        "--tile", type=count, nargs=2, metavar=("HEIGHT", "WIDTH"), help="repeat a small one; fits any size"
    )
    parser.add_argument(
        "--random-start", action="store_true", help="begin at a random point of the ball, not at zero"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a FILE that is there")
    parser.add_argument("--frames", type=count, help="training images to use, evenly spread; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
