"""Evaluation of classifiers: every model of a config on clean images, under a suite of attacks and under AutoAttack."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from attacks.threat import Threat, seed_of
from dataloaders.image_set import ImageSet, ImageSplit
from engine.config import (
    Classification,
    ClassifierEvaluate,
    ClassifierEvaluation,
    Component,
    UserError,
    dump,
)
from engine.runs import atomic_write
from evaluation.beside import FINDINGS, write_beside
from evaluation.classifier_suites import classifier_members, passes_of
from evaluation.classifier_tables import (
    AUTOATTACK,
    About,
    Clean,
    load_images,
    summary,
    write_classifier_tables,
)
from evaluation.classifiers import answers, save_answers
from evaluation.formats import aligned
from evaluation.image_results import PATH
from evaluation.plan import Scene, Setup, cost_table, manifest_of
from evaluation.robust import attack_all, shard
from evaluation.suites import Member, extra_members, member
from evaluation.target_checks import check_targets
from evaluation.targets import ROUTED, Target, target_of
from pipelines.classifier_costs import cost_of
from pipelines.models import load_classifier, require_classes
from pipelines.segmentation import pick_device

NO_LABEL = -1  # ignored label: no image is without one
CHECKED = 2  # images that the honesty checks of networks look at
FIFTH = 5  # of the epochs: the last one tells whether training had ended


@dataclass(frozen=True)
class Loaded:
    """A classifier in eval mode, weights frozen; role: the name of its network; method: how it was trained."""

    network: nn.Module
    role: str
    about: dict
    method: str = ""
    rise: float | None = None


def evaluate(config: Classification | ClassifierEvaluation, options) -> Clean | None:
    """Evaluates every model that the config names; of several processes (torchrun) the first does the clean pass, all
    do attacks, and who sees the ledgers complete writes the tables."""
    device = pick_device(options.device)
    if isinstance(config, Classification):
        config = as_evaluation(config)
    settings, folder = config.evaluate, folder_of(config)
    begun = any((folder / name).exists() for name in ("ledger", "ledger_autoattack"))
    if (folder / "results.csv").exists() and not begun and not (options.overwrite or options.dry_run):
        raise UserError(f"{folder}: holds an evaluation already; evaluate again with --overwrite")
    images = config.data.build(config.data.cache_dir)
    models = {name: load(source, f"models.{name}", images) for name, source in config.models.items()}
    for name in settings.attack_rows or ():
        if name not in models:
            raise UserError(f"evaluate.attack_rows: there is no model {name!r}; allowed: {', '.join(models)}")
    split = images.split(settings.split)
    chosen = attacked_images(split, settings)
    works = works_of(config, images, models, chosen)
    if options.dry_run:
        print(
            "\n".join(
                [f"{config.name}: {images.describe()}", *(line for one in works for line in one.costs())]
            )
        )
        return None
    for one in models.values():
        one.network.to(device, memory_format=torch.channels_last)
    clean, about = None, {}
    if shard()[0] == 0:
        (folder / "results.csv").unlink(missing_ok=True)
        clean = clean_pass(config, images, split, models, device)
        about = {name: about_of(one, images) for name, one in models.items()}
    complete = {}
    for work in works:
        path = folder / work.folder
        if not attack_all(
            path,
            work.scenes,
            work.targets,
            work.members,
            work.setup,
            device=device,
            replace=options.overwrite,
        ):
            print(f"{work.name}: done here; other processes are still at work on {path}")
            return clean
        complete[work.name] = path
    if clean is None:
        return None
    suite = works[0] if works and works[0].name == "suite" else None
    write_beside(folder / FINDINGS, check_few(suite, device) if suite and settings.attack_checks else [])
    write_classifier_tables(folder, clean, about, images.name, complete)
    results = load_images(complete["suite"]) if suite else None
    print("\n".join(["", *aligned(summary(clean, about, results), left=1), "", f"evaluation: {folder}"]))
    return clean


def as_evaluation(config: Classification) -> ClassifierEvaluation:
    """Of a training's config: its own network alone."""
    return ClassifierEvaluation(
        name=config.name,
        output=config.output,
        data=config.data,
        models={Path(config.name).name: str(Path(config.output) / config.name)},
        evaluate=config.evaluate,
    )


def folder_of(config: Classification | ClassifierEvaluation) -> Path:
    """runs/<name>/evaluation/<split>/"""
    return Path(config.output) / config.name / "evaluation" / config.evaluate.split


# Models


def load(source: str | Component, key: str, images: ImageSet) -> Loaded:
    """A trained classifier of a run folder or checkpoint, or one that brings its own weights. UserError where nothing
    is trained there, or it is for other classes."""
    if isinstance(source, Component):
        network = source.build(images.num_classes).eval().requires_grad_(False)
        about = {"network": source.plain(), "file_sha256": network.file_sha256}
        return Loaded(network, source.name, about)
    trained = load_classifier(source, key)
    require_classes(trained, images.classes, key, f"of {images.name}")
    about = {"network": trained.metadata["network"], "sha256": trained.sha256}
    method = trained.metadata.get("config", {}).get("train", {}).get("method", "")
    rise = rise_of(trained.file.parent.parent / "metrics.csv")
    return Loaded(trained.network, about["network"]["name"], about, method, rise)


def rise_of(metrics: Path) -> float | None:
    """How much the validation's robust accuracy rose over the last fifth of the epochs, from the best before it to the
    best in it; None for a run that left no figures, or fewer than five epochs."""
    if not metrics.exists():
        return None
    with open(metrics, newline="", encoding="utf-8") as file:
        values = [float(row["robust_top1"]) for row in csv.DictReader(file) if row.get("robust_top1")]
    last = len(values) // FIFTH
    if not last:
        return None
    return max(0.0, max(values[-last:]) - max(values[:-last]))


def about_of(one: Loaded, images: ImageSet) -> About:
    cost = cost_of(one.network, images.size)
    return About(
        one.role, cost.parameters, cost.active, cost.executed, cost.pathway, cost.router, one.method, one.rise
    )


# Clean images


def clean_pass(
    config: ClassifierEvaluation,
    images: ImageSet,
    split: ImageSplit,
    models: Mapping[str, Loaded],
    device: torch.device,
) -> Clean:
    """Every model on all images of the split, kept in per_image.npz."""
    settings, folder = config.evaluate, folder_of(config)
    found = {}
    for name, one in models.items():
        found[name] = answers(
            one.network, batches_of(split, settings.batch_size), device, settings.images_seed
        )
    atomic_write(folder / "config.yaml", dump(config.resolved()))
    save_answers(folder / "per_image.npz", np.asarray(split.names), split.labels, found)
    return Clean(np.asarray(split.names), split.labels, images.classes, found, settings.split)


def batches_of(split: ImageSplit, size: int) -> Iterator[tuple[Tensor, int]]:
    """(images float [B, C, H, W] in [0, 1], place of the first)."""
    for start in range(0, len(split), size):
        rows = np.arange(start, min(start + size, len(split)))
        yield torch.from_numpy(np.ascontiguousarray(split.images[rows])).float() / 255, start


# Attacks


@dataclass(frozen=True)
class Work:
    """What one ledger holds."""

    name: str
    folder: str
    scenes: "Scenes"
    targets: Sequence[Target]
    members: Mapping[str, Sequence[Member]]
    setup: Setup

    def costs(self) -> list[str]:
        """What --dry-run tells."""
        named = [{"name": name, "batch": 0} for name in self.scenes.split.names]
        return [f"{self.name}:", *cost_table(manifest_of(self.setup, {}, self.targets, self.members, named))]


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


def attacked_images(split: ImageSplit, settings: ClassifierEvaluate) -> ImageSplit:
    """evaluate.attack_images of the split, in an order that follows from evaluate.images_seed. UserError for more than
    there are."""
    wanted = len(split) if settings.attack_images == "all" else settings.attack_images
    for key, count in (("attack_images", wanted), ("autoattack", settings.autoattack)):
        if count > len(split):
            raise UserError(f"evaluate.{key}: {count} of {len(split)} {settings.split} images")
    order = np.random.default_rng(settings.images_seed).permutation(len(split))
    return split.take(order[: max(wanted, settings.autoattack)])


def works_of(
    config: ClassifierEvaluation, images: ImageSet, models: Mapping[str, Loaded], chosen: ImageSplit
) -> list[Work]:
    """The ledgers that the config asks for."""
    settings, found = config.evaluate, []
    rows = {name: one for name, one in models.items() if name in (settings.attack_rows or models)}
    about = {
        "task": "classification", "dataset": images.name, "split": settings.split, "image_size": list(images.size[1:]),
        "images_seed": settings.images_seed,
    }  # fmt: skip

    def setup(suite: str, eps: Sequence[float], seed: int, **more) -> Setup:
        return Setup(
            images.classes,
            tuple(eps),
            suite,
            settings.norm,
            seed,
            NO_LABEL,
            settings.split,
            "none",
            {**about, **more},
        )

    if settings.suite != "none" or any(one.name != "clean" for one in settings.attacks):
        count = len(chosen) if settings.attack_images == "all" else settings.attack_images
        targets = targets_of(rows, settings.pathways)
        own = members_of(settings, targets, images.size[1:])
        scenes = Scenes(chosen.take(np.arange(count)), settings.attack_batch_size)
        found.append(
            Work(
                "suite",
                "ledger",
                scenes,
                targets,
                own,
                setup(settings.suite, settings.eps, settings.attack_seed),
            )
        )
    if settings.autoattack:
        targets = targets_of(rows, False)
        own = {one.name: autoattack_members(one) for one in targets}
        size = settings.autoattack_batch_size
        scenes = Scenes(chosen.take(np.arange(settings.autoattack)), size)
        asked = setup(AUTOATTACK, [max(settings.eps)], settings.attack_seed, batch=size)
        found.append(Work(AUTOATTACK, "ledger_autoattack", scenes, targets, own, asked))
    return found


def targets_of(models: Mapping[str, Loaded], pathways: bool) -> list[Target]:
    """The models and, where asked for and a route is one choice, the pathways of each mixture by themselves."""
    found = []
    for name, one in models.items():
        found.append(target_of(name, one.network, role=one.role, **one.about))
        if pathways and found[-1].kind in ROUTED and getattr(one.network, "granularity", None) == "model":
            for expert in range(one.network.num_experts):
                plain = one.network.pathway(expert).requires_grad_(False).eval()
                found.append(
                    target_of(f"{name}{PATH}{expert}", plain, role="pathway", **one.about, pathway=expert)
                )
    return found


def members_of(
    settings: ClassifierEvaluate, targets: Sequence[Target], size: tuple[int, int]
) -> dict[str, list[Member]]:
    """The attacks on each target: a plain network beside mixtures gets restarts for as many network passes as they
    take; a pathway begins once."""
    own = {
        one.name: classifier_members(settings.suite, one.kind, one.num_experts, one.conditional)
        for one in targets
    }
    beside = max((passes_of(own[one.name]) for one in targets if one.kind in ROUTED), default=0)
    for one in targets:
        if one.kind == "single" and one.role != "pathway":
            own[one.name] = classifier_members(settings.suite, one.kind, beside=beside)
        own[one.name] += extra_members(
            settings.attacks, one.kind, one.num_experts, size, own[one.name], one.conditional
        )
    return own


def autoattack_members(target: Target) -> list[Member]:
    """AutoAttack on the whole model, and on every pathway of a mixture."""
    found = [
        member(
            AUTOATTACK,
            {"name": "autoattack"},
            "common",
            target.kind,
            target.num_experts,
            conditional=target.conditional,
        )
    ]
    for expert in range(target.num_experts if target.kind in ROUTED else 0):
        attack = {"name": "autoattack", "pathway": expert}
        name = f"{AUTOATTACK}{PATH}{expert}"
        found.append(
            member(name, attack, "adaptive", target.kind, target.num_experts, conditional=target.conditional)
        )
    return found


def check_few(work: Work, device: torch.device) -> list:
    """The honesty checks that run the networks, on the first CHECKED images and at the largest eps."""
    setup, scene = work.setup, next(iter(work.scenes))
    images, labels = (part[:CHECKED].to(device) for part in (scene.images, scene.labels))
    seeds = tuple(seed_of(setup.seed, name, "checks") for name in scene.names[:CHECKED])
    threat = Threat(max(setup.eps), setup.norm, setup.ignore_index, seeds)
    return check_targets(work.targets, images, labels, threat, work.members)
