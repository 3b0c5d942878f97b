"""Runs attacks on fixed batches and writes what they did into the ledger; the tables are made from there.

Every process takes the batches whose index is its RANK modulo WORLD_SIZE (torchrun sets both); they meet in the
ledger's folder only. Scores are of the unmodified model in float32, run again on the images that an attack gave; in
bf16 as well where the setup says that it is deployed so.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from attacks.evade import experts_alone
from attacks.quantise import quantised
from attacks.routed import look_inside, preferences
from attacks.search import Found, scores
from attacks.threat import Threat, check_inside, count_labelled, refuse_bad_images, seed_of, sizes
from engine.arithmetic import autocast_of
from engine.config import UserError
from engine.steps import under_attack
from evaluation.adversarials import save_adversarials
from evaluation.deployment import CELLS
from evaluation.floor import gate_free_floor
from evaluation.formats import number
from evaluation.ledger import INCUMBENTS, Ledger, Record, canonical, read_manifest, read_units
from evaluation.plan import Scene, Setup, Unit, cost_table, manifest_of, units_of
from evaluation.suites import CLEAN, Member
from evaluation.targets import PATH, ROUTED, Target, exact_float32, threat_on, with_answers
from metrics.confusion import confusion

TRACE = 8  # values of an attack's loss that are recorded, from the first to the last
SAID_EVERY = 60.0  # seconds after which a line tells how far the attacks are, besides that of each batch
LAST = 10  # values at the end that tell whether it had settled (Pintor et al. 2022, arXiv 2106.09947)

Log = Callable[[str], None]


def shard() -> tuple[int, int]:
    """(RANK, WORLD_SIZE) of this process as torchrun sets them; (0, 1) elsewhere."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world:
        raise UserError(f"RANK {rank} of WORLD_SIZE {world}: there is no such process")
    return rank, world


def attack_all(
    folder: str | Path,
    scenes: Iterable[Scene],
    targets: Sequence[Target],
    members: Mapping[str, Sequence[Member]],
    setup: Setup,
    *,
    device: torch.device | str = "cpu",
    replace: bool = False,
    log: Log = print,
) -> bool:
    """Does every unit of work of this process that the ledger in `folder` lacks; whether it is complete then, other
    processes' work included: who sees that writes the tables, of a ledger that was complete before the first process.

    scenes: the same fixed batches each time they are gone through, which happens twice. members: those of each
    target, by its name. replace: see Ledger.
    """
    device, (rank, world) = torch.device(device), shard()
    with as_begun(folder):
        manifest = manifest_for(folder, scenes, targets, members, setup, device)
        # An attack of two names is one unit of work.
        units = list({unit.name: unit for unit in units_of(manifest)}.values())
        with Ledger(folder, manifest, rank=rank, replace=replace) as ledger:
            todo = [unit for unit in units if unit.name not in ledger and unit.batch % world == rank]
            for line in cost_table(manifest) if rank == 0 else ():
                log(line)
            lacking = any(unit.name not in ledger for unit in units)
            log(f"ledger {folder}: {len(units)} units of work, {len(todo)} to do here")
            work(ledger, scenes, targets, members, setup, todo, device, log)
            ledger.refresh()
            complete = all(unit.name in ledger for unit in units)
            if complete:
                records = ledger.records(unit.name for unit in units)
                log(f"ledger {folder}: complete, {number(passes_of(records))} network passes")
            return complete and (lacking or rank == 0)


def begin(
    folder: str | Path,
    scenes: Iterable[Scene],
    targets: Sequence[Target],
    members: Mapping[str, Sequence[Member]],
    setup: Setup,
    *,
    device: torch.device | str = "cpu",
    replace: bool = False,
) -> None:
    """Begins the ledger that `attack_all` would work on, and does nothing else: one of another evaluation is refused
    here, before any work."""
    with as_begun(folder):
        manifest = manifest_for(folder, scenes, targets, members, setup, torch.device(device))
    Ledger(folder, manifest, rank=shard()[0], replace=replace).close()


def is_complete(folder: str | Path) -> bool:
    """Whether the ledger in the folder holds everything that its manifest asks for, whoever did it."""
    units = read_units(folder)
    return all(unit.name in units for unit in units_of(read_manifest(folder)))


def manifest_for(
    folder: str | Path,
    scenes: Iterable[Scene],
    targets: Sequence[Target],
    members: Mapping[str, Sequence[Member]],
    setup: Setup,
    device: torch.device,
) -> dict:
    """The manifest that the ledger in the folder has to have; its threads are those that it was begun with."""
    protocol = setup.protocol(device, threads_of(folder) or torch.get_num_threads())
    images, labelled = [], 0
    for index, scene in enumerate(scenes):
        if not index:
            targets = [with_answers(target, scene.images.to(device)) for target in targets]
        images += images_of(scene, index, setup)
        labelled += count_labelled(scene.labels, setup.ignore_index)
    if not labelled:
        told = f"all labels of the {len(images)} images to attack"
        raise UserError(f"{told} are {setup.ignore_index}, which counts nowhere: there is nothing to measure")
    return manifest_of(setup, protocol, targets, members, images)


def work(
    ledger: Ledger,
    scenes: Iterable[Scene],
    targets: Sequence[Target],
    members: Mapping[str, Sequence[Member]],
    setup: Setup,
    todo: Sequence[Unit],
    device: torch.device,
    log: Log,
) -> None:
    """Does the units in `todo`, in order, each written to the ledger before the next begins."""
    by_batch: dict[int, dict[str, list[Unit]]] = {}
    for unit in todo:
        by_batch.setdefault(unit.batch, {}).setdefault(unit.target, []).append(unit)
    attacks = {target.name: members_of(target, members) for target in targets}
    weight = {
        unit.name: attacks[unit.target][unit.member].network_passes * len(unit.images)
        for target in targets
        for unit in todo
        if unit.target == target.name
    }
    total = rest = sum(weight.values())
    started = said = time.monotonic()

    def say(where: str) -> None:
        nonlocal said
        said, spent = time.monotonic(), total - rest
        line = f"{where}: {number(spent)} network passes in {duration(said - started)}"
        log(line + (f", about {duration((said - started) / spent * rest)} to go" if rest else ""))

    for index, scene in enumerate(scenes):
        for target in targets:
            own = by_batch.get(index, {}).get(target.name, ())
            if not own:
                continue
            with under_attack(target.model), exact_float32(device):
                bench = Bench(target, scene, setup, device)
                for unit in own:
                    begun = time.monotonic()
                    records, points = bench.run(attacks[target.name][unit.member], unit.eps)
                    if setup.adversarials != "none":
                        path = ledger.folder / "adversarials" / f"{unit.name}.npz"
                        save_adversarials(path, points, setup.adversarials)
                    ledger.add(unit.name, records, round(time.monotonic() - begun, 3))
                    rest -= weight[unit.name]
                    if time.monotonic() - said > SAID_EVERY:
                        say(f"batch {index}, {target.name}")
        if index in by_batch:
            say(f"batch {index}")


class Bench:
    """A target and a batch of images: attacks it and says what came of it."""

    def __init__(self, target: Target, scene: Scene, setup: Setup, device: torch.device):
        self.target, self.scene, self.setup = target, scene, setup
        self.images, self.labels = scene.images.to(device), scene.labels.to(device)
        self.threat = threat_on(target, Threat(0.0, setup.norm, setup.ignore_index), device)
        self._clean_route: Tensor | None = None

    def run(self, member: Member, eps: float) -> tuple[list[Record], dict[str, Tensor]]:
        """(a record per incumbent and image, the images by incumbent) of one attack. What all records of the ledger
        share, and what the unit's name stands for, is in the manifest."""
        attack = canonical(member.attack.plain())
        seeds = tuple(seed_of(self.setup.seed, name, attack) for name in self.scene.names)
        threat = replace(self.threat, eps=eps, seeds=seeds)
        found = member.attack.build(self.target.model, self.images, self.labels, threat)
        points = {"pixels": found.images, "balanced": found.balanced}
        if self.setup.adversarials == "uint8":
            points = {name: quantised(one, self.images, threat) for name, one in points.items()}
        shared = self._of_attack(member, found)
        unit = about_unit(self.target, member, eps, self.setup)
        records = []
        for incumbent in INCUMBENTS:
            check_inside(points[incumbent], self.images, threat)
            own = self.score(points[incumbent])
            for place, name in enumerate(self.scene.names):
                about = {**unit, "image": name, "incumbent": incumbent}
                about |= {key: values[place] for key, values in shared.items()}
                records.append(about | {key: values[place] for key, values in own.items()})
        return records, points

    def _of_attack(self, member: Member, found: Found) -> dict[str, list]:
        """What holds for both incumbents: values per image."""
        count = len(self.scene.names)
        kept = trace_places(len(found.losses))
        return {
            "forwards": [found.forwards] * count,
            "backwards": [found.backwards] * count,
            "network_passes": [network_passes(member, found.forwards)] * count,
            "zero_gradients": found.zero_gradients.tolist(),
            "bad_gradients": found.bad_gradients.tolist(),
            "claimed_correct": found.correct.tolist(),
            "losses": [
                [finite(value) for value in trace]
                for trace in found.losses[kept].T.reshape(count, len(kept)).tolist()
            ],
            "unsettled": unsettled(found.losses),
        }

    def score(self, points: Tensor) -> dict[str, list]:
        """What the unmodified model says of the points, values per image: counts, change, routing."""
        with torch.no_grad():
            logits = self.target.model(points)
            routing = self._routing(points) if self.target.kind in ROUTED else {}
        if logits.dtype != torch.float32:
            raise UserError(
                f"target {self.target.name}: its logits are {logits.dtype}; robustness needs float32"
            )
        linf, l2 = sizes(points, self.images)
        sound = torch.isfinite(logits.flatten(1)).all(dim=1)
        counts = self._counts(logits)
        return {
            "cells": [sparse(one) for one in counts],
            "valid": counts.sum(dim=(1, 2)).tolist(),
            "linf": linf.tolist(),
            "l2": l2.tolist(),
            "status": ["ok" if one else "logits not finite" for one in sound.tolist()],
            **routing,
            **self._deployed(points),
        }

    def _counts(self, logits: Tensor) -> Tensor:
        """Confusion counts [B, K, K]."""
        return confusion(logits.argmax(dim=1), self.labels, logits.shape[1], self.setup.ignore_index).cpu()

    def _deployed(self, points: Tensor) -> dict[str, list]:
        """Of a model that is deployed in bf16 what it says of the points then."""
        precision = self.setup.deployment_precision
        if precision == "fp32":
            return {}
        with torch.no_grad(), autocast_of(precision, points.device):
            logits = self.target.model(points)
        return {CELLS: [sparse(one) for one in self._counts(logits)]}

    def _routing(self, points: Tensor) -> dict[str, list]:
        """Of a routed model, per image: "weights" [S, E, K], means over the grid, "route" [S, K], the expert with
        the largest one, "shares" [S, E, K], the weights of a soft gate, of a hard one softmax(gate logits), "flips",
        the share of routing places with another best expert (of the k best: another set) than on the clean image,
        "margin" and "least_margin", the mean and the least lead of the best gate logit over the second, "entropy", the
        mean of that of the shares, in nats, "expert_right" [E], the right pixels with all weight on one expert, and
        "gate_free", those that all weights of the gate's kind leave right (see evaluation.floor), or in words why that
        is not known."""
        seen = look_inside(self.target.model, points)
        gate_logits = seen.gate_logits  # [S, B, E, K, h, w]
        if self._clean_route is None:
            self._clean_route = self._taken(self.target.model.gate_logits(self.images))
        logs = preferences(self.target.model, seen).log_softmax(dim=2)
        weights, shares = (
            one.mean(dim=(-2, -1)).transpose(0, 1) for one in (seen.weights, logs.exp())
        )  # [B, S, E, K]
        alone = [
            scores(one, self.labels, self.setup.ignore_index)[0] for one in experts_alone(seen).unbind(1)
        ]
        flips = (self._taken(gate_logits) != self._clean_route).any(dim=2)
        flips = flips.double().transpose(0, 1).flatten(1).mean(dim=1)
        floor = gate_free_floor(self.target.model, points, self.labels, self.setup.ignore_index, seen)
        gap = torch.zeros_like(gate_logits[:, :, 0])
        if gate_logits.shape[2] > 1:
            best, second = gate_logits.topk(2, dim=2).values.unbind(2)
            gap = best - second
        gap = gap.transpose(0, 1).flatten(1)
        entropy = -(logs.masked_fill(logs.isneginf(), 0.0) * logs.exp()).sum(
            dim=2
        )  # a masked expert's share is 0
        return {
            "weights": rounded(weights.tolist()),
            "shares": rounded(shares.tolist()),
            "expert_right": torch.stack(alone, dim=1).tolist(),
            "gate_free": [floor.reason] * len(points)
            if floor.right is None
            else floor.right.view(len(points), -1).sum(dim=1).tolist(),
            "route": weights.argmax(dim=2).tolist(),
            "flips": rounded(flips.tolist()),
            "margin": rounded(gap.mean(dim=1).tolist()),
            "least_margin": rounded(gap.amin(dim=1).tolist()),
            "entropy": rounded(entropy.transpose(0, 1).flatten(1).mean(dim=1).tolist()),
        }

    def _taken(self, gate_logits: Tensor) -> Tensor:
        """The experts, bool like gate logits [S, B, E, K, h, w], that are best: one, or k that a pass runs of more."""
        active = self.target.active
        best = gate_logits.topk(active if 0 < active < gate_logits.shape[2] else 1, dim=2).indices
        return torch.zeros_like(gate_logits, dtype=torch.bool).scatter(2, best, True)


def about_unit(target: Target, member: Member, eps: float, setup: Setup) -> Record:
    """What all records of an attack on a target say of it."""
    return {
        "target": target.name,
        "source": source_of(target, member),
        "attack": member.name,
        "settings": member.about["attack"],
        "version": member.version,
        "eps": eps,
        "norm": setup.norm,
        "seed": setup.seed,
    }


def network_passes(member: Member, forwards: int) -> int:
    """Networks that ran in so many passes of an attack, per image."""
    return round(forwards * member.network_passes / member.forwards)


def members_of(target: Target, members: Mapping[str, Sequence[Member]]) -> dict[str, Member]:
    """All that is run on a target by name: nothing (the clean images), then its attacks."""
    every = (replace(CLEAN, network_passes=target.networks), *members[target.name])
    return {member.name: member for member in every}


def source_of(target: Target, member: Member) -> str:
    """What an attack was made for: the target, or one of its pathways by itself."""
    pathway = member.attack.args.get("pathway")
    return target.name if pathway is None else f"{target.name}{PATH}{pathway}"


def images_of(scene: Scene, batch: int, setup: Setup) -> list[dict]:
    """What the manifest says of each image. UserError for images that no attack takes."""
    refuse_bad_images(scene.images)
    found = []
    for name, block, image, label in zip(scene.names, scene.blocks, scene.images, scene.labels, strict=True):
        content = hashlib.sha256(image.cpu().contiguous().numpy())
        content.update(label.cpu().contiguous().numpy())
        counted = label[label != setup.ignore_index]
        if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < len(setup.classes):
            raise UserError(
                f"image {name}: labels from {int(counted.min())} to {int(counted.max())}, allowed: "
                f"0..{len(setup.classes) - 1} and {setup.ignore_index}"
            )
        found.append({"name": name, "sha256": content.hexdigest(), "block": block, "batch": batch})
    return found


def passes_of(records: Iterable[Record]) -> int:
    """Network passes that were made for these records; those of an attack's two incumbents are the same ones."""
    return sum(record["network_passes"] for record in records if record["incumbent"] == INCUMBENTS[0])


@contextmanager
def as_begun(folder: str | Path) -> Iterator[None]:
    """With the threads that the ledger in the folder was begun with, as the last bits of logits depend on them: for the
    attacks, and for whatever stands beside the ledger."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads_of(folder) or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_of(folder: str | Path) -> int | None:
    """Threads that the ledger in the folder was begun with."""
    if not (Path(folder) / "manifest.json").exists():
        return None
    return read_manifest(folder)["protocol"]["threads"]


def sparse(counts: Tensor) -> list[list[int]]:
    """The cells of confusion counts [K, K] that are not 0: [truth, prediction, pixels] each."""
    places = counts.nonzero()
    return torch.cat([places, counts[counts != 0][:, None]], dim=1).tolist()


def trace_places(steps: int) -> list[int]:
    """Up to TRACE of `steps` places, the first and the last among them."""
    if steps <= TRACE:
        return list(range(steps))
    return [round(place * (steps - 1) / (TRACE - 1)) for place in range(TRACE)]


def unsettled(losses: Tensor) -> list[float | None]:
    """Per image the range of the LAST of an attack's losses [T, B] in units of the range of all; None where there are
    no more than LAST, or one isn't finite; 0 where all are the same."""
    if len(losses) <= LAST:
        return [None] * losses.shape[1]
    last, whole = (one.amax(dim=0) - one.amin(dim=0) for one in (losses[-LAST:], losses))
    return rounded((last / whole.clamp_min(1e-30)).tolist())


def finite(value: float) -> float | None:
    """The value to 6 digits, None for one that JSON has no number for."""
    return float(f"{value:.6g}") if abs(value) < float("inf") else None


def rounded(values):
    """Nested lists of floats, each as `finite` gives it."""
    return [rounded(value) for value in values] if isinstance(values, list) else finite(values)


def duration(seconds: float) -> str:
    """In words, for people."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
