"""Robustness of anybody's network from Python: evaluate(model, loader, suite)."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.config import IGNORE, Component, UserError
from evaluation.beside import CERTIFICATES, FINDINGS, write_beside
from evaluation.certificate import certify_targets
from evaluation.plan import Scene, Setup
from evaluation.robust import Log, as_begun, attack_all
from evaluation.robust_results import RobustResults
from evaluation.robust_tables import robust_rows, write_robust
from evaluation.suites import extra_members, members, needs_class_weights
from evaluation.target_checks import check_first
from evaluation.targets import has_tensors, target_of


@dataclass(frozen=True)
class Report:
    """results: every figure on request. rows: one per figure, the columns of results.csv. markdown: the tables."""

    results: RobustResults
    rows: list[dict]
    markdown: str


def evaluate(
    model: Callable[[Tensor], Tensor],
    loader: Iterable[tuple[Tensor, Tensor]],
    suite: str = "quick",
    *,
    eps: Sequence[float] = (0.5 / 255, 1 / 255, 2 / 255),
    norm: str = "linf",
    attacks: Sequence[Component] = (),
    classes: Sequence[str] = (),
    ignore_index: int = IGNORE,
    class_pixels: Sequence[int] | None = None,
    blocks: Sequence[str] | None = None,
    name: str = "model",
    folder: str | Path | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    checks: bool = True,
    log: Log = print,
) -> Report:
    """Attacks a network on all images of a loader and says what is left of it.

    model: images [B, 3, H, W] in [0, 1] -> logits [B, K, H, W]; what else it offers (see evaluation.stand_ins)
    decides which attacks it gets. loader: the same batches (images float32 in [0, 1], labels [B, H, W]) in the same
    order whenever it is gone through. attacks: further ones, as engine.config.component makes them. class_pixels:
    labelled pixels of each class in the training data (None: in the loader), for attacks that weigh classes.
    blocks: for each image the name of its block of similar ones (None: each image for itself). folder: where ledger
    and tables are kept, so that a second call goes on where the first was stopped (None: nowhere); a model
    without tensors of its own, such as a function, can't be told from another one and needs a new folder each time.
    checks: whether the network itself is looked at on two images as well, some hundred passes: float32 throughout,
    gradients, batches, an implanted weakness that attacks have to find.

    UserError for images outside [0, 1], labels that the network has no class for, and a folder that is of another
    model, or may be."""
    if folder is not None and not has_tensors(model) and (Path(folder) / "ledger" / "manifest.json").exists():
        raise UserError(
            f"{folder}: holds an evaluation already, and a {type(model).__name__} without weights of its own can't be "
            "told from the model of that one; take a new folder, or give the nn.Module itself"
        )
    batches = loader if iter(loader) is not loader else list(loader)
    first = next(iter(batches))[0]
    if isinstance(model, nn.Module):
        model.to(device)
    target = target_of(name, model)
    own = members(suite, target.kind, target.num_experts)
    classes = list(classes) or [f"class {index}" for index in range(classes_of(model, first[:1].to(device)))]
    own += extra_members(attacks, target.kind, target.num_experts, tuple(first.shape[-2:]), len(classes), own)
    if class_pixels is None and any(map(needs_class_weights, own)):
        class_pixels = pixels_of((labels for _, labels in batches), len(classes), ignore_index)
        log(
            "class weights: from the labels of these images, as no class_pixels of the training data are given"
        )
    if class_pixels is not None:
        target = replace(target, class_pixels=tuple(class_pixels))
    scenes = Scenes(batches, blocks)
    about = {"image_size": list(first.shape[-2:])}
    setup = Setup(tuple(classes), tuple(eps), suite, norm, seed, ignore_index, about=about)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(folder or temporary)
        attack_all(place / "ledger", scenes, [target], {name: own}, setup, device=device, log=log)
        device = torch.device(device)
        with as_begun(place / "ledger"):
            found = check_first(next(iter(scenes)), [target], {name: own}, setup, device) if checks else []
            certified = certify_targets([target], scenes, setup, device)
        write_beside(place / FINDINGS, found)
        write_beside(place / CERTIFICATES, certified)
        results, _ = write_robust(place, place / "ledger")
        markdown = (place / "robustness.md").read_text(encoding="utf-8")
    return Report(results, robust_rows(results, certified), markdown)


@dataclass(frozen=True)
class Scenes:
    """The batches of a loader with a name and a block for each image."""

    batches: Iterable[tuple[Tensor, Tensor]]
    blocks: Sequence[str] | None

    def __iter__(self) -> Iterator[Scene]:
        seen = 0
        for images, labels in self.batches:
            places = range(seen, seen + len(images))
            names = tuple(f"image {place:05d}" for place in places)
            blocks = names if self.blocks is None else tuple(self.blocks[place] for place in places)
            seen += len(images)
            yield Scene(images, labels.long(), names, blocks)


def classes_of(model: Callable[[Tensor], Tensor], images: Tensor) -> int:
    """Channels of its logits."""
    with torch.no_grad():
        return model(images).shape[1]


def pixels_of(labels: Iterable[Tensor], num_classes: int, ignore_index: int) -> list[int]:
    """Labelled pixels of each class."""
    total = torch.zeros(num_classes, dtype=torch.int64)
    for one in labels:
        total += torch.bincount(one[one != ignore_index].flatten().long(), minlength=num_classes)
    return total.tolist()
