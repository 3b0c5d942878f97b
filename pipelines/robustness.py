"""Rows of an evaluation under attack: from networks of a zoo to targets, a ledger, and tables beside the clean ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from attacks.threat import Threat, seed_of
from dataloaders.cache import open_cache
from dataloaders.frames import Frame, FrameIndex
from engine.config import Component, Evaluate, Evaluation, UserError
from engine.schema import ROBUST_EPS
from evaluation.beside import CERTIFICATES, DETECTORS, FINDINGS, TRANSFER, Keep, once, write_beside
from evaluation.certificate import certify_targets
from evaluation.detectors import DETECTION_COLUMNS, cost, detection_rows
from evaluation.formats import eps_text, number
from evaluation.ledger import read_manifest
from evaluation.plan import Scene, Setup, cost_table, manifest_of
from evaluation.robust import as_begun, attack_all, shard
from evaluation.robust_tables import TABLES, robust_summary, write_robust
from evaluation.suites import (
    Member,
    attacks_for,
    by_number,
    extra_members,
    made_for,
    members,
    needs_class_weights,
    refuse_for_label_maps,
)
from evaluation.target_checks import check_first
from evaluation.targets import Target, target_of
from evaluation.transfer import TRANSFER_COLUMNS, transfer
from networks.ensemble import Ensemble
from pipelines.matrix import Zoo, is_whole, load_zoo, subsets_of
from pipelines.models import Trained
from pipelines.segmentation import evaluation_batches

ENSEMBLE = "ensemble "  # before the name of its rule: the name of its row


def is_asked(settings: Evaluate) -> bool:
    """Whether an evaluation attacks anything."""
    return settings.suite != "none" or any(attack.name != "clean" for attack in settings.attacks)


def with_ladder(config: Evaluation, zoo: Zoo) -> Evaluation:
    """A config that names no eps attacks more strongly where all networks were trained on attacked images (gates over
    such experts may be clean)."""
    settings = config.evaluate
    gates = {name: trained for name, (trained, _) in zoo.gates.items()}
    robust = [name for name, one in {**zoo.networks, **gates}.items() if is_robust(one)]
    if not (robust and is_asked(settings) and settings.norm == "linf") or "eps" in settings.model_fields_set:
        return config
    stronger = ", ".join(map(eps_text, ROBUST_EPS))
    if not all(map(is_robust, zoo.networks.values())):
        print(
            f"note: {', '.join(robust)} were trained on attacked images, other networks here were not: evaluate.eps is "
            f"{', '.join(map(eps_text, settings.eps))}; name [{stronger}] to tell more of the former"
        )
        return config
    print(f"evaluate.eps: {stronger}, as all networks were trained on attacked images")
    return config.model_copy(update={"evaluate": settings.model_copy(update={"eps": list(ROBUST_EPS)})})


def is_robust(trained: Trained) -> bool:
    """Whether a network was trained on attacked images."""
    train = trained.metadata.get("config", {}).get("train") or {}
    return train.get("adversarial", "none") != "none"


def begin(folder: Path) -> None:
    """Tables of an earlier evaluation go, as they may be of other models; the ledger stays, and goes on."""
    for name in TABLES:
        (folder / name).unlink(missing_ok=True)


def parts_of(
    config: Evaluation, index: FrameIndex, zoo: Zoo, subsets: Sequence[str]
) -> tuple["Scenes", list[Target], dict[str, list[Member]], Setup]:
    """Images, rows, the attacks of each and the setup that a config stands for, as `attack_all` takes them. UserError
    as of `attacked_rows`."""
    targets, own = attacked_rows(config, index, zoo)
    return scenes_of(config, index, subsets), targets, own, setup_of(config, index, subsets)


def attack_rows(
    config: Evaluation,
    index: FrameIndex,
    parts: tuple["Scenes", list[Target], dict[str, list[Member]], Setup],
    device: torch.device,
    folder: Path,
    overwrite: bool,
) -> bool:
    """Attacks what the config asks for (see `parts_of`) and, where the ledger is complete then, writes the tables into
    the folder of the evaluation; whether it was."""
    settings, (scenes, targets, own, setup) = config.evaluate, parts
    for target in targets:  # of one layout in all processes, whether they did the clean pass or not
        target.model.to(device, memory_format=torch.channels_last)
    ledger = folder / "ledger"
    if not attack_all(ledger, scenes, targets, own, setup, device=device, replace=overwrite):
        print(f"robustness: done here; other processes are still at work on {ledger}")
        return False
    with as_begun(ledger):
        found = check_first(scenes, targets, own, setup, device) if settings.attack_checks else []
        write_beside(folder / FINDINGS, found)
        write_beside(folder / CERTIFICATES, certify_targets(targets, scenes, setup, device))
        manifest = read_manifest(ledger)
        attack = transfer_of(config, index)
        source = {"ledger": manifest, "transfer": attack and attack.plain()}
        source["columns"] = TRANSFER_COLUMNS
        bytes_too = {"quantised": True} if setup.adversarials == "uint8" else {}  # earlier ones were not
        once(
            folder / TRANSFER,
            source | bytes_too,
            partial(transfer_rows, attack, targets, scenes, setup, device),
            shard()[0],
        )
        source = {"ledger": manifest, "detectors": settings.detectors, "columns": DETECTION_COLUMNS}
        once(
            folder / DETECTORS,
            source | bytes_too,
            partial(detector_rows, settings.detectors, targets, scenes, setup, device),
            shard()[0],
        )
    results, flags = write_robust(folder, ledger)
    print("\n".join(["", *robust_summary(results, flags), "", f"robustness: {folder / 'robustness.md'}"]))
    return True


def submitted(
    config: Evaluation, device: torch.device
) -> tuple[list[Target], dict[str, list[Member]], Setup, "Scenes"]:
    """The rows, the attacks of each, the setup and the clean images that the config of an evaluation stands for, as
    `attack_rows` had them."""
    index = config.data.build()
    scenes, targets, own, setup = parts_of(config, index, load_zoo(config, index), subsets_of(config))
    for target in targets:
        target.model.to(device, memory_format=torch.channels_last)
    return targets, own, setup, scenes


def scenes_of(config: Evaluation, index: FrameIndex, subsets: Sequence[str]) -> "Scenes":
    """The fixed batches of frames that are attacked."""
    frames, size = attacked_frames(config, index, subsets), config.evaluate.attack_batch_size
    return Scenes(evaluation_batches(config.data, index, frames, size, "network"))


def transfer_rows(
    attack: Component | None,
    targets: Sequence[Target],
    scenes: "Scenes",
    setup: Setup,
    device: torch.device,
    keep: Keep,
) -> list[dict]:
    """What every target says of the images that the attack makes for each at the largest eps; none without one."""
    if attack is None:
        return []
    eps = max(setup.eps)
    blocks = [block for scene in scenes for block in scene.blocks]
    print(f"transfer: {attack.name} at eps {eps_text(eps)} for each of {len(targets)} rows, shown to all")

    def batches() -> Iterator[tuple[Tensor, Tensor, Threat]]:
        for scene in scenes:
            seeds = tuple(seed_of(setup.seed, name, "transfer") for name in scene.names)
            threat = Threat(eps, setup.norm, setup.ignore_index, seeds)
            yield scene.images.to(device), scene.labels.to(device), threat

    found = transfer(targets, attack, batches(), len(setup.classes), setup.adversarials == "uint8", keep)
    about = {"eps": eps, "attack": attack.name, "n_images": len(blocks)}
    return [row | about for row in found.rows(blocks)]


def detector_rows(
    wanted: bool, targets: Sequence[Target], scenes: "Scenes", setup: Setup, device: torch.device, keep: Keep
) -> list[dict]:
    """Scores of every target as detectors of attacks at the largest eps; none where they are not wanted."""
    rows, eps = [], max(setup.eps)
    for target in targets if wanted else ():
        passes = cost(target)
        print(f"detectors of {target.name}: {passes} passes per image at eps {eps_text(eps)}")
        rows += detection_rows(target, scenes, setup, eps, device=device, keep=keep)
    return rows


def describe_attacks(config: Evaluation, index: FrameIndex, zoo: Zoo, subsets: Sequence[str]) -> str:
    """What --dry-run tells of the attacks: their cost, and that of what stands beside them."""
    targets, own = attacked_rows(config, index, zoo)
    frames = attacked_frames(config, index, subsets)
    images = [{"name": frame.name, "batch": 0} for frame in frames]
    lines = cost_table(manifest_of(setup_of(config, index, subsets), {}, targets, own, images))
    return "\n".join([*lines, *costs_beside(config, index, targets)])


def costs_beside(config: Evaluation, index: FrameIndex, targets: Sequence[Target]) -> list[str]:
    """Passes per image of transfer and detectors, which are made at the largest eps. Checks and certificates take few,
    on few images."""
    lines, attack = [], transfer_of(config, index)
    if attack is not None:
        size, classes, norm = tuple(config.data.image_size), len(index.classes), config.evaluate.norm
        made = [own for one in targets for own in transferred(attack, one, size, classes, norm)]
        passes = sum(own.forwards for own in made) + len(targets) * (1 + len(targets))
        lines.append(
            f"transfer, at the largest eps: {attack.name} on each row, its images shown to every row: "
            f"{number(passes)} passes per image"
        )
    if config.evaluate.detectors:
        told = ", ".join(f"{one.name} {number(cost(one))}" for one in targets)
        lines.append(f"detectors, at the largest eps, passes per image: {told}")
    return lines


def setup_of(config: Evaluation, index: FrameIndex, subsets: Sequence[str]) -> Setup:
    settings, data = config.evaluate, config.data
    return Setup(
        classes=tuple(index.classes),
        eps=tuple(settings.eps),
        suite=settings.suite,
        norm=settings.norm,
        seed=settings.attack_seed,
        ignore_index=index.ignore_index,
        subset=" + ".join(attacked_subsets(subsets)),
        adversarials=settings.adversarials,
        deployment_precision=settings.deployment_precision,
        about={
            "dataset": index.name,
            "split": settings.split,
            "image_size": list(data.image_size),
            "resize": data.resize,
            "resolution": "network",
        },
    )


def attacked_subsets(subsets: Sequence[str]) -> list[str]:
    """All training subsets together where the evaluation has them; else what it has."""
    return ["all"] if "all" in subsets else list(subsets)


def attacked_frames(config: Evaluation, index: FrameIndex, subsets: Sequence[str]) -> list[Frame]:
    """The frames of evaluate.attack_images, in the order of the index."""
    settings = config.evaluate
    frames = list(index.select(settings.split, attacked_subsets(subsets)))
    wanted = settings.attack_images
    if wanted == "all":
        return frames
    blocks: dict[str, list[Frame]] = {}
    for frame in frames:
        blocks.setdefault(frame.block, []).append(frame)
    middle = [block[len(block) // 2] for block in blocks.values()]
    if wanted == "blocks":
        return middle
    if wanted > len(frames):
        raise UserError(f"evaluate.attack_images: {wanted} of {len(frames)} {settings.split} frames")
    pool = middle if wanted <= len(middle) else frames
    return [pool[(2 * place + 1) * len(pool) // (2 * wanted)] for place in range(wanted)]


def refuse_unlabelled(config: Evaluation, index: FrameIndex, subsets: Sequence[str]) -> None:
    """UserError where no frame to attack has a labelled pixel; reads no further than to the first that has one."""
    frames = attacked_frames(config, index, subsets)
    if not any((index.read_label(frame.label)[0] != index.ignore_index).any() for frame in frames):
        raise UserError(
            f"data: none of the {len(frames)} {config.evaluate.split} frames to attack has a labelled pixel (all are "
            f"{index.ignore_index}): there is nothing to measure"
        )


def attacked_rows(
    config: Evaluation, index: FrameIndex, zoo: Zoo
) -> tuple[list[Target], dict[str, list[Member]]]:
    """(targets, the attacks of each by its name). UserError for attacks that they can't be made for."""
    settings, size, classes = config.evaluate, tuple(config.data.image_size), len(index.classes)
    names = [row.name for row in zoo.rows(controls=False)]
    known = [*names, *(name for name in zoo.gates if name not in names)]
    for name in settings.attack_rows or ():
        if name not in known:
            raise UserError(f"evaluate.attack_rows: there is no row {name!r}; allowed: {', '.join(known)}")
    refuse_for_label_maps(settings.attacks, "evaluate.attacks")
    refuse_for_label_maps(filter(None, [settings.transfer]), "evaluate.transfer")
    if settings.transfer and len(settings.attack_rows or names) < 2:
        raise UserError(
            "evaluate.transfer: there is one row; images made for it are shown to others, so name more"
        )
    targets = [target_of_row(zoo, name) for name in settings.attack_rows or names]
    parity = max(target.num_experts for target in targets)
    attacks, transferring = (
        by_number(settings.attacks, index.classes, "evaluate.attacks"),
        transfer_of(config, index),
    )
    further = attacks_for(attacks, {target.name: target.kind for target in targets})
    own, lacking = {}, []
    for target in targets:
        suite = members(settings.suite, target.kind, target.num_experts, parity)
        more = extra_members(
            further[target.name], target.kind, target.num_experts, size, classes, suite, norm=settings.norm
        )
        own[target.name] = [*suite, *more]
        made = [*own[target.name], *transferred(transferring, target, size, classes, settings.norm)]
        if target.class_pixels is None and any(map(needs_class_weights, made)):
            lacking.append(target.name)
    if lacking:
        pixels = training_pixels(config, index)
        print(
            f"class weights of {', '.join(lacking)}: from the training split of {index.name}, as their files don't "
            "hold those that they were trained on"
        )
        targets = [
            replace(target, class_pixels=tuple(pixels)) if target.name in lacking else target
            for target in targets
        ]
    return targets, own


def transfer_of(config: Evaluation, index: FrameIndex) -> Component | None:
    """The attack of evaluate.transfer, with the number of a class that it names; None without one."""
    asked = filter(None, [config.evaluate.transfer])
    return next(iter(by_number(asked, index.classes, "evaluate.transfer")), None)


def transferred(
    attack: Component | None, target: Target, size: tuple[int, int], num_classes: int, norm: str
) -> list[Member]:
    """The attack of evaluate.transfer as a member, none without one. UserError for a row that it can't be made for."""
    if attack is None:
        return []
    words, kinds = made_for(attack)
    if target.kind not in kinds:
        raise UserError(
            f"evaluate.transfer: {attack.name} is for {words}, and row {target.name} is none; name an attack that all "
            "rows take, such as pgd, or the rows that take it in evaluate.attack_rows"
        )
    return extra_members([attack], target.kind, target.num_experts, size, num_classes, norm=norm)


def target_of_row(zoo: Zoo, name: str) -> Target:
    """The network behind a row of the matrix, and what identifies it."""
    if name in zoo.networks:
        trained = zoo.networks[name]
        role = "baseline" if name in zoo.baselines else "expert"
        about = {"network": trained.metadata["network"], "sha256": trained.sha256}
        pixels = trained.metadata.get("class_pixels")
        return target_of(name, trained.network, role=role, class_pixels=pixels, **about)
    if name in zoo.gates:
        trained, experts = zoo.gates[name]
        about = {"gate": trained.metadata["gate"], "sha256": trained.sha256}
        if not is_whole(trained):
            about["experts"] = {expert: zoo.networks[expert].sha256 for expert in experts}
        role = "gate" if name in zoo.learned_gates else "control"
        pixels = trained.metadata.get("class_pixels")
        return target_of(name, trained.network, role=role, class_pixels=pixels, **about)
    rule = name.removeprefix(ENSEMBLE)
    parts = {expert: zoo.networks[expert] for expert in zoo.experts}
    network = Ensemble({expert: part.network for expert, part in parts.items()}, zoo.ensembles[rule])
    counts = [part.metadata.get("class_pixels") for part in parts.values()]
    pixels = None if None in counts else [sum(column) for column in zip(*counts, strict=True)]
    about = {"combine": rule, "experts": {expert: part.sha256 for expert, part in parts.items()}}
    return target_of(name, network.eval(), role="ensemble", class_pixels=pixels, **about)


def training_pixels(config: Evaluation, index: FrameIndex) -> list[int]:
    """Labelled pixels of each class in the training split of what is evaluated."""
    data = config.data
    frames = index.select("train", data.subsets)
    return open_cache(index, frames, data.image_size, data.resize, data.cache_dir).class_pixels().tolist()


@dataclass(frozen=True)
class Scenes:
    """Batches of frames as attacks take them."""

    batches: object

    def __iter__(self) -> Iterator[Scene]:
        for batch in self.batches:
            yield Scene(
                (batch.images.float() / 255).contiguous(),
                batch.labels.long(),
                tuple(frame.name for frame in batch.frames),
                tuple(frame.block for frame in batch.frames),
            )
