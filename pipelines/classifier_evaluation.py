"""Evaluation of classifiers: every model of a config on clean images, under a suite of attacks and under AutoAttack."""

import csv
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dataloaders.image_set import ImageSet, ImageSplit
from engine.checkpoints import atomic_write
from engine.config import (
    Classification,
    ClassifierEvaluate,
    ClassifierEvaluation,
    Component,
    UserError,
    dump,
)
from engine.devices import own_gpu, pick_device
from engine.errors import collected
from engine.pathways import NO_LABEL
from evaluation.beside import FINDINGS, write_beside
from evaluation.classifier_autoattack import AUTOATTACK
from evaluation.classifier_clean import About, Clean, read_clean
from evaluation.classifier_suites import classifier_members, passes_of
from evaluation.classifier_tables import SUITE, write_classifier_tables
from evaluation.classifiers import ANSWERS, Answers, answers, save_answers, source_of_answers
from evaluation.console import note_idle
from evaluation.ledger import digest
from evaluation.plan import Scene, Setup, cost_table, manifest_of
from evaluation.robust import as_begun, attack_all, begin, is_complete, shard
from evaluation.suites import (
    Member,
    attacks_for,
    extra_members,
    member,
    needs_class_weights,
    refuse_for_classifiers,
)
from evaluation.target_checks import check_first
from evaluation.targets import PATH, ROUTED, Target, exact_float32, target_of, with_answers
from pipelines.classifier_costs import cost_of
from pipelines.models import (
    Trained,
    built_external,
    contents_of,
    load_classifier,
    require_classes,
    require_network,
)
from pipelines.seen_images import refuse_seen

# Keys that AutoAttack doesn't read: it has its own, or none.
OF_SUITE = ("attack_images", "attack_batch_size", "attack_checks", "restarts")
LAST_FIFTH = 0.8  # of the epochs; what comes after it tells whether training had ended


@dataclass(frozen=True)
class Loaded:
    """A classifier in eval mode, weights frozen; role: the name of its network; method: how it was trained; trained:
    the checkpoint that it is from, None for one that brings its own weights."""

    network: nn.Module
    role: str
    about: dict
    method: str = ""
    rise: float | None = None
    trained: Trained | None = None


def evaluate(config: Classification | ClassifierEvaluation, options) -> Clean | None:
    """Evaluates every model that the config names. Of several processes (torchrun) the first does the clean pass, all
    do attacks, and who sees the ledgers complete writes the tables; None for the others."""
    device = own_gpu(pick_device(options.device))
    training, asked = config if isinstance(config, Classification) else None, config.evaluate
    if training:
        config = as_evaluation(config)
    settings, folder = config.evaluate, folder_of(config)
    if (folder / "results.csv").exists() and not (options.overwrite or options.dry_run):
        raise UserError(f"{folder}: holds an evaluation already; evaluate again with --overwrite")
    images = config.data.build(config.data.cache_dir)
    models = collected(
        {name: partial(load, source, f"models.{name}", images) for name, source in config.models.items()}
    )
    for name, one in models.items():
        if one.trained and training:
            require_network(one.trained, training.network, "network")
        if one.trained:
            file, metadata = one.trained.file, one.trained.metadata
            refuse_seen(file, metadata, f"models.{name}", config.data, images, settings.split)
    for name in settings.attack_rows or ():
        if name not in models:
            raise UserError(f"evaluate.attack_rows: there is no model {name!r}; allowed: {', '.join(models)}")
    for one in models.values():
        one.network.to(device, memory_format=torch.channels_last)
    about = {name: about_of(one, images) for name, one in models.items()}
    note_what_is_idle(asked)
    split = images.split(settings.split)
    works = works_of(config, images, models, attacked_images(split, settings))
    if options.dry_run:
        costs = [line for one in works for line in one.costs()]
        print("\n".join([f"{config.name}: {images.describe()}", *costs]))
        return None
    for one in works:
        begin(folder / one.folder, *one.parts, device=device, replace=options.overwrite)
    if shard()[0] == 0:
        (folder / "results.csv").unlink(missing_ok=True)
        clean_pass(config, split, models, device)
    for one in works:
        attack_all(folder / one.folder, *one.parts, device=device, replace=options.overwrite)
    ledgers = {one.name: folder / one.folder for one in works}
    waiting = [path for path in ledgers.values() if not is_complete(path)]
    if waiting:
        print(f"done here; other processes are still at work on {', '.join(map(str, waiting))}")
        return None
    if not (folder / ANSWERS).exists():
        print(f"the first process is still at work on the clean images of {folder}")
        return None
    clean = read_clean(folder, images.classes, settings.split)
    suite = next((one for one in works if one.name == SUITE), None)
    checked = suite is not None and settings.attack_checks
    found = []
    if checked:
        with as_begun(ledgers[SUITE]):
            found = check_first(suite.scenes, *suite.parts[1:], device)
    write_beside(folder / FINDINGS, found)
    summary = write_classifier_tables(folder, clean, about, images.name, ledgers)
    print("\n".join(["", *summary, "", f"evaluation: {folder}"]))
    return clean


def as_evaluation(config: Classification) -> ClassifierEvaluation:
    """Of a training's config: its own network alone, at the eps of its validation where no other is named."""
    eps = config.evaluate.eps or [one for one in (config.train.val_eps or config.train.eps,) if one]
    return ClassifierEvaluation(
        name=config.name,
        output=config.output,
        data=config.data,
        models={Path(config.name).name: str(Path(config.output) / config.name)},
        evaluate=config.evaluate.model_copy(update={"eps": eps or None}),
    )


def folder_of(config: Classification | ClassifierEvaluation) -> Path:
    """runs/<name>/evaluation/<split>/"""
    return Path(config.output) / config.name / "evaluation" / config.evaluate.split


# Models


def load(source: str | Component, key: str, images: ImageSet) -> Loaded:
    """A trained classifier of a run folder or checkpoint, or one that brings its own weights. UserError where nothing
    is trained there, or it is for other classes."""
    if isinstance(source, Component):
        network = built_external(source, images.num_classes, key).requires_grad_(False)
        about = {"network": contents_of(source)}
        return Loaded(network, source.name, about)
    trained = load_classifier(source, key)
    require_classes(trained, images.classes, key, f"of {images.name}")
    size = trained.metadata.get("image_size")
    if size and tuple(size) != tuple(images.size):
        told, here = (" x ".join(map(str, one)) for one in (size, images.size))
        raise UserError(f"{key}: {source} was trained on images of {told}, {images.name} has {here}")
    refuse_broken(trained, key)
    about = {"network": trained.metadata["network"], "sha256": trained.sha256}
    method = trained.metadata.get("config", {}).get("train", {}).get("method", "")
    epochs = trained.metadata.get("config", {}).get("train", {}).get("epochs")
    rise = rise_of(trained.file.parent.parent / "metrics.csv", epochs)
    return Loaded(trained.network, about["network"]["name"], about, method, rise, trained)


def refuse_broken(trained: Trained, key: str) -> None:
    """UserError for NaN or inf in the weights or BatchNorm's statistics."""
    state = trained.network.state_dict()
    bad = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(
            f"{key}: {trained.file} has NaN or inf in {len(bad)} tensors ({', '.join(bad[:3])}): its training broke; "
            "train it again, or name another checkpoint"
        )


def rise_of(metrics: Path, epochs: int | None) -> float | None:
    """How much the validation's robust accuracy rose over the last fifth of the epochs, from the best before it to the
    best in it; None for a run that left no such figures on one of the two sides, or has not all of its epochs behind
    it: interrupted, stopped early, or still going on."""
    if not metrics.exists():
        return None
    with open(metrics, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or int(rows[-1]["epoch"]) != epochs:
        return None
    begun, before, last = LAST_FIFTH * epochs, [], []
    for row in rows:
        if row.get("robust_top1"):
            (last if int(row["epoch"]) > begun else before).append(float(row["robust_top1"]))
    return max(0.0, max(last) - max(before)) if before and last else None


def about_of(one: Loaded, images: ImageSet) -> About:
    cost = cost_of(one.network, images.size)
    return About(
        one.role, cost.parameters, cost.active, cost.executed, cost.pathway, cost.router, one.method, one.rise,
        design_of(one.about["network"]),
    )  # fmt: skip


def design_of(network: Mapping) -> str:
    """A network section in few words: "2 x resnet18 / 0.125" is a mixture of 2 pathways of that share of the width,
    ", by stage, top 2" one that picks for each stage, its 2 best."""
    if "arch" not in network:
        return network["name"]
    experts = f"{network['num_experts']} x " if "num_experts" in network else ""
    sparse = "sparse " * (network["name"] == "sparse_cnn")
    granularity, top_k = network.get("granularity", "model"), network.get("top_k", 1)
    routes = f", by {granularity}" * (granularity != "model") + f", top {top_k}" * (top_k > 1)
    return f"{experts}{sparse}{network['arch']} / {network['ratio']:g}{routes}"


# Clean images


def clean_pass(
    config: ClassifierEvaluation, split: ImageSplit, models: Mapping[str, Loaded], device: torch.device
) -> None:
    """Every model on all images of the split, in float32 as under attack; kept in per_image.npz, unless that is of the
    very same already."""
    settings, folder = config.evaluate, folder_of(config)
    atomic_write(folder / "config.yaml", dump(config.resolved()))
    of = clean_source(settings, split, models, device)
    if (folder / ANSWERS).exists() and source_of_answers(folder / ANSWERS) == of:
        print(f"clean images: done before, {folder / ANSWERS}")
        return
    (folder / ANSWERS).unlink(missing_ok=True)
    with exact_float32(device):
        found = {
            name: answers(
                one.network,
                batches_of(split, settings.batch_size),
                device,
                settings.images_seed,
                f"models.{name}",
            )
            for name, one in models.items()
        }
    save_answers(folder / ANSWERS, np.asarray(split.names), split.labels, found, of)


def clean_source(
    settings: ClassifierEvaluate, split: ImageSplit, models: Mapping[str, Loaded], device: torch.device
) -> str:
    """A digest of all that the answers to clean images depend on, to the bit."""
    first = torch.from_numpy(np.ascontiguousarray(split.images[:1])).float().to(device) / 255
    named = {name: target_of(name, one.network, **one.about) for name, one in models.items()}
    content = 0
    for start in range(0, len(split), settings.batch_size):
        content = zlib.crc32(np.ascontiguousarray(split.images[start : start + settings.batch_size]), content)
    return digest(
        {
            "models": {name: with_answers(one, first).identity for name, one in named.items()},
            "images": [list(split.names), split.labels.tolist(), content],
            "settings": [settings.batch_size, settings.images_seed],
            "kept": [field.name for field in fields(Answers)],
            "machine": [device.type, torch.get_num_threads(), torch.__version__],
        }
    )


def batches_of(split: ImageSplit, size: int) -> Iterator[tuple[Tensor, int]]:
    """(images float [B, C, H, W] in [0, 1], place of the first)."""
    for start in range(0, len(split), size):
        rows = np.arange(start, min(start + size, len(split)))
        yield torch.from_numpy(np.ascontiguousarray(split.images[rows])).float() / 255, start


# Attacks


@dataclass(frozen=True)
class Scenes:
    """Images in their fixed batches, as attacks take them; each is its own unit of the bootstrap."""

    split: ImageSplit
    batch_size: int

    def __iter__(self) -> Iterator[Scene]:
        for images, start in batches_of(self.split, self.batch_size):
            rows = slice(start, start + len(images))
            names = tuple(self.split.names[rows])
            yield Scene(images, torch.from_numpy(self.split.labels[rows]).long(), names, names)


@dataclass(frozen=True)
class Work:
    """What one ledger holds."""

    name: str
    folder: str
    scenes: Scenes
    targets: Sequence[Target]
    members: Mapping[str, Sequence[Member]]
    setup: Setup

    @property
    def parts(self) -> tuple:
        """As `attack_all` takes them."""
        return self.scenes, self.targets, self.members, self.setup

    def costs(self) -> list[str]:
        """What --dry-run tells."""
        named = [{"name": name, "batch": 0} for name in self.scenes.split.names]
        return [f"{self.name}:", *cost_table(manifest_of(self.setup, {}, self.targets, self.members, named))]


def suite_asked(settings: ClassifierEvaluate) -> bool:
    """Whether anything but AutoAttack is to attack."""
    return settings.suite != "none" or any(one.name != "clean" for one in settings.attacks)


def note_what_is_idle(settings: ClassifierEvaluate) -> None:
    """Keys of attacks that are not made, on the terminal."""
    if suite_asked(settings):
        if settings.suite == "none":
            note_idle(settings, ("restarts",), "evaluate.attacks alone")
    elif settings.autoattack:
        note_idle(settings, OF_SUITE, "AutoAttack alone")
    else:
        note_idle(settings)


def attacked_images(split: ImageSplit, settings: ClassifierEvaluate) -> ImageSplit:
    """evaluate.attack_images of the split, in an order that follows from evaluate.images_seed; without a suite those
    for AutoAttack. UserError for more than there are."""
    counts = {}
    if suite_asked(settings):
        counts["attack_images"] = len(split) if settings.attack_images == "all" else settings.attack_images
    counts["autoattack"] = settings.autoattack
    for key, count in counts.items():
        if count > len(split):
            hint = "; all takes them all" * (key == "attack_images")
            raise UserError(
                f"evaluate.{key}: {count} is more than the {len(split)} {settings.split} images{hint}"
            )
    most = max(counts.values())
    if suite_asked(settings) and most > counts["attack_images"]:
        raise UserError(
            f"evaluate.autoattack: {most} of evaluate.attack_images, {counts['attack_images']}; it takes the first of "
            "these"
        )
    return split.take(np.random.default_rng(settings.images_seed).permutation(len(split))[:most])


def works_of(
    config: ClassifierEvaluation, images: ImageSet, models: Mapping[str, Loaded], chosen: ImageSplit
) -> list[Work]:
    """The ledgers that the config asks for, on the chosen images."""
    settings, found = config.evaluate, []
    rows = {name: one for name, one in models.items() if name in (settings.attack_rows or models)}
    about = {
        "task": "classification", "dataset": images.name, "split": settings.split, "image_size": list(images.size[1:]),
        "images_seed": settings.images_seed,
    }  # fmt: skip
    shared = {
        "classes": images.classes, "norm": settings.norm, "seed": settings.attack_seed, "ignore_index": NO_LABEL,
        "subset": settings.split,
    }  # fmt: skip
    if suite_asked(settings):
        targets = targets_of(rows, settings.pathways)
        own = members_of(settings, targets, images.size, images.num_classes)
        scenes = Scenes(chosen, settings.attack_batch_size)
        deployed = settings.deployment_precision
        setup = Setup(
            eps=tuple(settings.eps),
            suite=settings.suite,
            about=about,
            deployment_precision=deployed,
            **shared,
        )
        found.append(Work(SUITE, "ledger", scenes, targets, own, setup))
    if settings.autoattack:
        targets = targets_of(rows, False)
        own = {one.name: autoattack_members(one, settings) for one in targets}
        size = settings.autoattack_batch_size
        scenes = Scenes(chosen.take(np.arange(settings.autoattack)), size)
        about = {**about, "batch": size}
        eps = settings.autoattack_eps or max(settings.eps)
        if eps not in settings.eps:
            told = ", ".join(f"{one * 255:g}/255" for one in settings.eps)
            raise UserError(
                f"evaluate.autoattack_eps: {eps * 255:g}/255 is none of evaluate.eps; allowed: {told}"
            )
        setup = Setup(eps=(eps,), suite=AUTOATTACK, about=about, **shared)
        found.append(Work(AUTOATTACK, "ledger_autoattack", scenes, targets, own, setup))
    return found


def targets_of(models: Mapping[str, Loaded], pathways: bool) -> list[Target]:
    """The models and, where asked for and a route is one choice of one expert, the pathways of each mixture by
    themselves."""
    found = []
    for name, one in models.items():
        found.append(target_of(name, one.network, role=one.role, **one.about))
        if pathways and found[-1].kind == "hard" and getattr(one.network, "granularity", None) == "model":
            for expert in range(one.network.num_experts):
                plain = one.network.pathway(expert).requires_grad_(False).eval()
                found.append(
                    target_of(f"{name}{PATH}{expert}", plain, role="pathway", **one.about, pathway=expert)
                )
    return found


def members_of(
    settings: ClassifierEvaluate, targets: Sequence[Target], size: tuple[int, int, int], num_classes: int
) -> dict[str, list[Member]]:
    """The attacks on each target: a plain network beside mixtures gets restarts for as many network passes as they
    take; a pathway has those of the settings alone."""
    own = {
        one.name: classifier_members(
            settings.suite, one.kind, one.num_experts, one.active, restarts=settings.restarts
        )
        for one in targets
    }
    beside = max((passes_of(own[one.name]) for one in targets if one.kind in ROUTED), default=0)
    refuse_for_classifiers(settings.attacks, "evaluate.attacks")
    further = attacks_for(settings.attacks, {one.name: one.kind for one in targets})
    for one in targets:
        if one.kind == "single" and one.role != "pathway":
            own[one.name] = classifier_members(
                settings.suite, one.kind, beside=beside, restarts=settings.restarts
            )
        own[one.name] += extra_members(
            further[one.name],
            one.kind,
            one.num_experts,
            size,
            num_classes,
            own[one.name],
            one.active,
            settings.norm,
        )
        for attack in filter(needs_class_weights, own[one.name]):
            raise UserError(
                f"evaluate.attacks: {attack.name}: loss balanced_masked_ce weighs classes by their pixels; it is for "
                "label maps"
            )
    return own


def autoattack_members(target: Target, settings: ClassifierEvaluate) -> list[Member]:
    """AutoAttack on the whole model and, where asked for, on every pathway of a mixture that takes one at a time."""

    def one(name: str, column: str, **more) -> Member:
        attack = {"name": "autoattack", "seed": settings.attack_seed, **more}
        return member(name, attack, column, target.kind, target.num_experts, active=target.active)

    paths = range(target.num_experts if settings.pathways and target.kind == "hard" else 0)
    return [
        one(AUTOATTACK, "common"),
        *(one(f"{AUTOATTACK}{PATH}{expert}", "adaptive", pathway=expert) for expert in paths),
    ]
