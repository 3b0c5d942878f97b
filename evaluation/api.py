"""Robustness of anybody's network from Python: evaluate(model, loader, suite)."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from attacks.threat import count_labelled, refuse_bad_images
from engine.components import Named
from engine.config import IGNORE, Component, UserError
from engine.devices import pick_device
from engine.errors import ConfigError, Mistakes
from engine.steps import under_attack
from engine.values import number_or_none
from evaluation.beside import CERTIFICATES, FINDINGS, write_beside
from evaluation.certificate import certify_targets
from evaluation.plan import Scene, Setup
from evaluation.robust import Log, as_begun, attack_all
from evaluation.robust_results import RobustResults
from evaluation.robust_tables import robust_rows, write_robust
from evaluation.suites import (
    TABLE,
    by_number,
    extra_members,
    members,
    needs_class_weights,
    refuse_for_label_maps,
)
from evaluation.target_checks import check_first
from evaluation.targets import target_of

LINF_EPS = (0.5 / 255, 1 / 255, 2 / 255)


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
    eps: Sequence[float] | None = None,
    norm: str = "linf",
    attacks: Sequence[Component | Mapping] = (),
    classes: Sequence[str] = (),
    ignore_index: int = IGNORE,
    class_pixels: Sequence[int] | None = None,
    blocks: Sequence[str] | None = None,
    name: str = "model",
    folder: str | Path | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    deployment_precision: str = "fp32",
    checks: bool = True,
    log: Log = print,
) -> Report:
    """Attacks a network on all images of a loader and says what is left of it.

    model: images [B, 3, H, W] in [0, 1] -> logits [B, K, H, W]; what else it offers (see evaluation.stand_ins)
    decides which attacks it gets. loader: the same batches (images float32 in [0, 1], labels [B, H, W]) in the same
    order whenever it is gone through. eps: largest changes (None: 0.5, 1 and 2 /255 of linf). attacks: further ones,
    as in YAML ({"name": "pgd", "steps": 40}) or as engine.config.component makes them. class_pixels: labelled pixels of
    each class in the training data (None: in the loader), for attacks that weigh classes. blocks: for each image the
    name of its block of similar ones (None: each image for itself). folder: where ledger and tables are kept, so that a
    second call goes on where the first was stopped (None: nowhere); a model without tensors of its own, such as a
    function, is told from others by what it says of the first image.
    deployment_precision: bf16 scores the attacked images, which are made in float32, in bf16 as well.
    checks: whether the network itself is looked at on two images as well, some hundred passes: float32 throughout,
    gradients, batches, an implanted weakness that attacks have to find.

    UserError, before any attack, for images outside [0, 1], labels of another shape or that the network has no class
    for, no labelled pixel at all, and a folder that is of another model."""
    if isinstance(classes, str):
        raise UserError(f"classes: {classes!r} is wrong; expected the name of each class")
    if torch.is_inference_mode_enabled():
        raise UserError("evaluate: attacks need gradients; call it outside of torch.inference_mode()")
    if eps is None and norm == "l2":
        raise UserError("eps: missing; norm l2 has no radii of its own, such as [0.5, 1, 2]")
    eps = LINF_EPS if eps is None else eps
    if isinstance(eps, str) or not isinstance(eps, Iterable):
        raise UserError(f"eps: {eps!r} is wrong; expected several numbers, such as [{eps}]")
    eps = list(eps)
    radii = [number_or_none(one) if isinstance(one, str) else plain_values(one) for one in eps]
    if None in radii:
        raise UserError(f"eps: {eps} is wrong; expected numbers, such as [2/255]")
    try:
        device = pick_device(str(device))
    except UserError as error:
        raise UserError(str(error).removeprefix("--")) from None
    refuse_other_weights(model)
    batches = loader if iter(loader) is not loader else list(loader)
    blocks = None if blocks is None else [str(one) for one in plain_values(blocks)]
    first, sizes = checked(batches, ignore_index, blocks)
    if isinstance(model, nn.Module):
        model.to(device)
    target = target_of(name, model)
    own = members(suite, target.kind, target.num_experts)
    with under_attack(model):
        known = classes_of(model, first[:1].to(device))
    classes = list(classes) or [f"class {index}" for index in range(known)]
    class_pixels = None if class_pixels is None else [int(count) for count in class_pixels]
    if class_pixels is not None and min(class_pixels, default=0) < 0:
        raise UserError(f"class_pixels: {min(class_pixels)} is wrong; expected 0 or more of each class")
    for key, given in (("classes", classes), ("class_pixels", class_pixels)):
        if given is not None and len(given) != known:
            raise UserError(f"{key}: {len(given)} of them, and the model has logits of {known} classes")
    about = {"image_size": list(sizes[0] if len(sizes) == 1 else sizes)}
    setup = Setup(
        tuple(classes), tuple(radii), suite, norm, int(seed), ignore_index, about=about,
        deployment_precision=deployment_precision,
    )  # fmt: skip
    attacks = [as_component(attack, place) for place, attack in enumerate(attacks)]
    refuse_for_label_maps(attacks, "attacks")
    attacks = by_number(attacks, classes, "attacks")
    own += extra_members(
        attacks, target.kind, target.num_experts, tuple(first.shape[-2:]), len(classes), own, norm=norm
    )
    if class_pixels is None and any(map(needs_class_weights, own)):
        class_pixels = pixels_of((labels for _, labels in batches), len(classes), ignore_index)
        log(
            "class weights: from the labels of these images, as no class_pixels of the training data are given"
        )
    if class_pixels is not None:
        target = replace(target, class_pixels=tuple(class_pixels))
    scenes = Scenes(batches, blocks)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(folder or temporary)
        attack_all(place / "ledger", scenes, [target], {name: own}, setup, device=device, log=log)
        with as_begun(place / "ledger"):
            found = check_first(scenes, [target], {name: own}, setup, device) if checks else []
            certified = certify_targets([target], scenes, setup, device)
        write_beside(place / FINDINGS, found)
        write_beside(place / CERTIFICATES, certified)
        results, _ = write_robust(place, place / "ledger")
        markdown = (place / "robustness.md").read_text(encoding="utf-8")
    return Report(results, robust_rows(results, certified), markdown)


def refuse_other_weights(model: Callable[[Tensor], Tensor]) -> None:
    """UserError for a model with weights of less than float32: attacks need it, and so do their figures."""
    kinds = {one.dtype for one in model.parameters()} if isinstance(model, nn.Module) else set()
    for kind in kinds:
        if not kind.is_floating_point or torch.finfo(kind).bits >= 32:
            continue
        name = str(kind).removeprefix("torch.")
        told = "robustness needs float32: model.float(), and deployment_precision for what it is used in"
        raise UserError(f"model: has weights in {name}; {told}")


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


def plain_values(values: Sequence) -> Sequence:
    """Of an array or tensor its values as Python has them."""
    return values.tolist() if hasattr(values, "tolist") else values


def checked(
    batches: Iterable[tuple[Tensor, Tensor]], ignore_index: int, blocks: Sequence[str] | None
) -> tuple[Tensor, list[list[int]]]:
    """The images of the first batch, and every size [H, W] that there is. UserError for batches that can't be
    attacked, and blocks of other images."""
    first, seen, labelled, sizes = None, 0, 0, []
    for index, batch in enumerate(batches):
        where = f"loader: batch {index}"
        pair = isinstance(batch, tuple | list) and len(batch) == 2 and all(map(torch.is_tensor, batch))
        if not pair:
            raise UserError(f"{where}: is no pair (images, labels) of tensors")
        images, labels = batch
        if images.ndim != 4 or not len(images):
            raise UserError(f"{where}: images {list(images.shape)}, expected [B, 3, H, W]")
        refuse_bad_images(images)
        if labels.shape == images.shape[:1]:
            raise UserError(
                f"{where}: labels {list(labels.shape)} are of whole images, this is for label maps [B, H, W]; "
                "classifiers: evaluate_cnn_moe.py, with {name: external, file: FILE} for a network of your own"
            )
        expected = [len(images), *images.shape[2:]]
        if list(labels.shape) != expected or labels.is_floating_point():
            kind = f" of {labels.dtype}" if labels.is_floating_point() else ""
            told = f"expected whole numbers {expected}, a class for each pixel of the images"
            raise UserError(f"{where}: labels {list(labels.shape)}{kind}, {told}")
        first, seen = images if first is None else first, seen + len(images)
        sizes += [size for size in [list(images.shape[2:])] if size not in sizes]
        labelled += count_labelled(labels, ignore_index)
    if first is None:
        raise UserError("loader: gives no batch")
    if not labelled:
        raise UserError(f"loader: no pixel of its {seen} images has a label other than {ignore_index}")
    if blocks is not None and len(blocks) != seen:
        raise UserError(f"blocks: {len(blocks)} names for {seen} images; give the block of each image")
    return first, sizes


def as_component(attack: Component | Mapping, place: int) -> Component:
    """An attack as it is, or made of what YAML has. UserError for anything else."""
    if isinstance(attack, Component):
        return attack
    try:
        return Named(TABLE).validate(dict(attack) if isinstance(attack, Mapping) else attack)
    except Mistakes as error:
        raise ConfigError([str(mistake.under(("attacks", place))) for mistake in error.mistakes]) from None


def classes_of(model: Callable[[Tensor], Tensor], images: Tensor) -> int:
    """Channels of its logits. UserError where these are none of each pixel."""
    with torch.no_grad():
        logits = model(images)
    if not torch.is_tensor(logits):
        raise UserError(f"model: gives a {type(logits).__name__}, expected a tensor of logits [B, K, H, W]")
    size = list(images.shape[2:])
    if logits.ndim != 4 or list(logits.shape[2:]) != size:
        raise UserError(
            f"model: logits {list(logits.shape)} of images {list(images.shape)}, expected [B, K, {size[0]}, {size[1]}]"
        )
    return logits.shape[1]


def pixels_of(labels: Iterable[Tensor], num_classes: int, ignore_index: int) -> list[int]:
    """Labelled pixels of each class. UserError for a label that is none."""
    total = torch.zeros(num_classes, dtype=torch.int64)
    for index, one in enumerate(labels):
        counted = one[one != ignore_index].long()
        if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < num_classes:
            found = f"from {int(counted.min())} to {int(counted.max())}"
            raise UserError(
                f"loader: batch {index}: labels {found}, allowed: 0..{num_classes - 1} and {ignore_index}"
            )
        total += torch.bincount(counted, minlength=num_classes)
    return total.tolist()
