"""python -m evaluation.verify SUBMISSION: scores the adversarial images of a ledger again, with the networks it names.

SUBMISSION is the folder of an evaluation under attack that kept its images (evaluate.adversarials: uint8): its
config.yaml, ledger/ and robustness.csv. Whether weights and clean images are the ones the ledger was made with, its
images are inside the ball, suite and attacks are those of the config, the networks say of the images what the records
say, honesty checks and certificates hold, and the tables are what follows from these: none of it is taken on trust. It
takes a forward pass for each recorded image. Attacks are run again where --rerun asks for it; else, how an attack went
(losses, gradients, what it claims) is not checked, nor are transfer and detectors.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attacks.threat import Threat, is_inside
from engine.command import run
from engine.config import Evaluation, UserError, load
from engine.devices import pick_device
from engine.steps import under_attack
from evaluation.adversarials import load_adversarials
from evaluation.beside import CERTIFICATES, DETECTORS, FINDINGS, TRANSFER, read_beside
from evaluation.certificate import certify_targets
from evaluation.deployment import CELLS
from evaluation.findings import Finding
from evaluation.formats import eps_text
from evaluation.ledger import (
    INCUMBENTS,
    brief,
    differences,
    plain,
    read_lines,
    read_manifest,
    read_units,
    shown,
)
from evaluation.plan import Scene, Setup, Unit, manifest_of, units_of
from evaluation.robust import Bench, about_unit, as_begun, images_of, members_of, network_passes
from evaluation.robust_tables import TABLES, write_robust
from evaluation.suites import Member
from evaluation.target_checks import check_first
from evaluation.targets import Target, exact_float32

ROUNDING = 1e-6  # of a distance in float32
ARITHMETIC = 1e-3  # share of an image's pixels that another machine's sums may tip over; of routing, too
# What is the same on every machine: it follows from images, labels and the plan alone.
EXACT = ("valid", "linf", "l2", "status", "target", "source", "settings", "version", "eps", "norm", "seed")
DEPLOYED = 0.02  # share of an image's pixels that another machine's bf16 may tip over
RERUN = (
    0.02  # share of pixels that an attack may leave fewer of when another machine's sums lead it elsewhere
)
UNCHECKED = "honesty checks that run the networks (the submission has evaluate.attack_checks: false), "
BESIDE = (FINDINGS, CERTIFICATES, TRANSFER, DETECTORS)


@dataclass
class Verdict:
    """problems: each in words; none where all was confirmed. units, images: scored again. tipped: of these images
    those where a few pixels differ, as they may on another machine. rerun: names of the units whose attack was run
    again; pixels: of their images (valid, right as recorded, right after the attack here). checked: honesty checks
    that run the networks were made again."""

    problems: list[str] = field(default_factory=list)
    units: int = 0
    images: int = 0
    tipped: int = 0
    rerun: list[str] = field(default_factory=list)
    pixels: tuple[int, int, int] = (0, 0, 0)
    checked: bool = False

    def lines(self) -> list[str]:
        """For a terminal."""
        exact = f"{self.tipped} of them differ in at most {ARITHMETIC:.1%} of their pixels"
        scored = f"{self.units} units of work, {self.images} adversarial images scored again"
        verified = (
            "verified" if self.rerun else "verified, but for the attacks: none was run again (--rerun N)"
        )
        return [
            *(f"wrong: {problem}" for problem in self.problems),
            scored + (f"; {exact}" if self.tipped else "; every pixel count is the recorded one"),
            *self.about_rerun(),
            f"not checked: {'' if self.checked else UNCHECKED}losses and gradients of attacks, transfer, detectors",
            "refused" if self.problems else verified,
        ]

    def about_rerun(self) -> list[str]:
        if not self.rerun:
            return []
        valid, recorded, here = self.pixels
        told = f"{recorded / valid:.2%} of the pixels are right as recorded, {here / valid:.2%} after the attacks here"
        return [f"{len(self.rerun)} units of work run again: {told}"]


def verify(
    folder: str | Path,
    targets: Sequence[Target],
    members: Mapping[str, Sequence[Member]],
    setup: Setup,
    scenes: Iterable[Scene],
    device: torch.device | str = "cpu",
    *,
    checks: bool = False,
    rerun: int = 0,
) -> Verdict:
    """The submission in a folder against the networks, their attacks by name, the setup and the clean images that it
    claims to be about; scenes are gone through more than once. checks: its honesty checks are made again. rerun: so
    many of its units of work, drawn at random, are run again.

    UserError for a folder without a complete ledger, or one that kept no images."""
    folder, device = Path(folder), torch.device(device)
    ledger = folder / "ledger"
    manifest, units = read_manifest(ledger), read_units(ledger)
    if manifest["protocol"]["adversarials"] == "none":
        raise UserError(f"{ledger}: holds no adversarial images; evaluate with evaluate.adversarials: uint8")
    wanted = list(units_of(manifest))
    lacking = [unit for unit in wanted if unit.name not in units]
    if lacking:
        raise UserError(f"{ledger}: {len(lacking)} of {len(wanted)} units of work are missing; let it finish")
    verdict = Verdict(checked=checks)
    damaged = sum(damaged_lines(path) for path in sorted(ledger.glob("segment_*.jsonl")))
    if damaged:
        verdict.problems.append(f"{damaged} lines of the ledger have a wrong checksum")
    known = rows_as_asked(manifest, targets, members, setup, verdict)
    attacked = [unit.name for unit in wanted if unit.eps]
    verdict.rerun = random.SystemRandom().sample(attacked, min(rerun, len(attacked)))
    with as_begun(ledger):
        batches = 0
        for index, scene in enumerate(scenes):
            batches += 1
            if same_images(scene, index, manifest, setup, verdict):
                own = [unit for unit in wanted if unit.batch == index and unit.target in known]
                score_again(known, members, own, units, scene, setup, ledger, device, verdict)
        if batches != len({image["batch"] for image in manifest["images"]}):
            verdict.problems.append(f"the data set gives {batches} batches of images, the ledger has others")
        if (folder / CERTIFICATES).exists() and len(known) == len(manifest["targets"]):
            certified = certify_targets(list(known.values()), scenes, setup, device)
            if read_beside(folder).certificates != certified:
                verdict.problems.append(f"{CERTIFICATES} is not what interval bounds give")
        if checks and not verdict.problems:
            told = {flag_of(finding) for finding in read_beside(folder).findings}
            found = check_first(scenes, list(known.values()), members, setup, device)
            lacking = [one for one in found if one.severity == "flag" and flag_of(one) not in told]
            verdict.problems += [
                f"{FINDINGS} lacks a flag: {one.target}: {one.check}: {one.text}" for one in lacking
            ]
    valid, recorded, here = verdict.pixels
    if recorded - here > RERUN * valid:
        verdict.problems.append(
            f"attacks run again leave {here} of {valid} pixels right, the records say {recorded}: units "
            f"{', '.join(verdict.rerun)}"
        )
    if not verdict.problems:  # of records that are wrong there may be no tables
        verdict.problems += wrong_tables(folder, ledger)
    return verdict


def flag_of(finding: Finding) -> tuple:
    """What makes it the same one on every machine."""
    return finding.check, finding.target, finding.eps, finding.attack, finding.severity


def wrong_tables(folder: Path, ledger: Path) -> list[str]:
    """A problem for each table that differs from what ledger and files beside it give."""
    with tempfile.TemporaryDirectory() as temporary:
        again = Path(temporary)
        for name in (*BESIDE, "results.csv"):
            if (folder / name).exists():
                shutil.copy(folder / name, again)
        write_robust(again, ledger)
        return [
            f"{name} is not what follows from the ledger"
            for name in (*TABLES, "results.csv")
            if read(again / name) != read(folder / name)
        ]


def damaged_lines(path: Path) -> int:
    """Lines of a segment that are no record."""
    with open(path, "rb") as file:
        return sum(1 for _ in file) - sum(1 for _ in read_lines(path))


def rows_as_asked(
    manifest: dict,
    targets: Sequence[Target],
    members: Mapping[str, Sequence[Member]],
    setup: Setup,
    verdict: Verdict,
) -> dict[str, Target]:
    """The targets of the ledger that are the networks they claim to be, attacked as the config asks, by name. What the
    machine that made it brings along (device, threads, torch) may be another."""
    claimed = manifest["protocol"]
    protocol = setup.protocol(torch.device(claimed["device"]), claimed["threads"]) | {
        "torch": claimed["torch"]
    }
    asked = manifest_of(setup, protocol, targets, members, ())
    heads = [{key: one[key] for key in ("protocol", "suite", "subset", "eps")} for one in (manifest, asked)]
    if heads[0] != heads[1]:
        verdict.problems.append(f"the ledger is not what the config asks for: {shown(differences(*heads))}")
    given, rows = {target.name: target for target in targets}, {one["name"]: one for one in asked["targets"]}
    known = {}
    for row in manifest["targets"]:
        name = row["name"]
        if name not in given:
            verdict.problems.append(f"{name}: the config names no such row")
            continue
        own = {**row, "identity": dict(row["identity"])}
        own["identity"].pop("answers", None)  # of one machine; all images are scored again in any case
        different = differences(own["identity"], rows[name]["identity"])
        if different:
            verdict.problems.append(f"{name}: other weights or another network: {shown(different)}")
        elif own != rows[name]:
            told = shown(differences(own, rows[name])) or "in another order"
            verdict.problems.append(f"{name}: other attacks than the config asks for: {told}")
        elif name in known:
            verdict.problems.append(f"{name}: stands in the ledger twice")
        else:
            known[name] = given[name]
    there = [row["name"] for row in manifest["targets"]]
    verdict.problems += [f"{name}: the ledger lacks this row" for name in given if name not in there]
    return known


def same_images(scene: Scene, index: int, manifest: dict, setup: Setup, verdict: Verdict) -> bool:
    """Whether a batch is the one that was attacked."""
    claimed = [image for image in manifest["images"] if image["batch"] == index]
    found = images_of(scene, index, setup)
    if found != claimed:
        names = ", ".join(one["name"] for one in found if one not in claimed) or "their number or order"
        verdict.problems.append(f"batch {index}: other clean images, labels or blocks: {names}")
        return False
    return True


def score_again(
    targets: dict[str, Target],
    members: Mapping[str, Sequence[Member]],
    todo: Sequence[Unit],
    units: dict[str, list[dict]],
    scene: Scene,
    setup: Setup,
    ledger: Path,
    device: torch.device,
    verdict: Verdict,
) -> None:
    """What the networks say of the kept images of a batch, beside what the records say."""
    for name in dict.fromkeys(unit.target for unit in todo):
        own = members_of(targets[name], members)
        with under_attack(targets[name].model), exact_float32(device):
            bench = Bench(targets[name], scene, setup, device)
            for unit in (one for one in todo if one.target == name):
                path = ledger / "adversarials" / f"{unit.name}.npz"
                compare(bench, unit, own[unit.member], units[unit.name], load_adversarials(path), verdict)
                verdict.units += 1
                if unit.name in verdict.rerun:
                    run_again(bench, unit, own[unit.member], units[unit.name], verdict)


def run_again(bench: Bench, unit: Unit, member: Member, records: list[dict], verdict: Verdict) -> None:
    """Attacks the images of a unit, and adds up what is right of them as recorded and now."""
    found, _ = bench.run(member, unit.eps)
    counts = [
        [sum(count for truth, said, count in record["cells"] if truth == said) for record in ones]
        for ones in ([one for one in many if one["incumbent"] == INCUMBENTS[0]] for many in (records, found))
    ]
    valid = sum(record["valid"] for record in found if record["incumbent"] == INCUMBENTS[0])
    verdict.pixels = tuple(
        before + now for before, now in zip(verdict.pixels, (valid, *map(sum, counts)), strict=True)
    )


def compare(
    bench: Bench,
    unit: Unit,
    member: Member,
    records: list[dict],
    points: dict[str, Tensor],
    verdict: Verdict,
) -> None:
    """Records of a unit against its kept images: all that scoring these gives, and what the attack may have cost."""
    where = f"{unit.target}, {unit.member} at eps {eps_text(unit.eps)}"
    expected = [(incumbent, name) for incumbent in INCUMBENTS for name in bench.scene.names]
    if [(record["incumbent"], record["image"]) for record in records] != expected:
        verdict.problems.append(f"{where}: its records are of other images than those of its batch")
        return
    about = plain(about_unit(bench.target, member, unit.eps, bench.setup))
    del about["attack"]  # may be an earlier name; tables have the present one
    for incumbent in INCUMBENTS:
        kept = points.get(incumbent)
        if kept is None or kept.shape != bench.images.shape:
            told = "no images" if kept is None else f"images of shape {tuple(kept.shape)}"
            verdict.problems.append(f"{where}, {incumbent}: {told}")
            continue
        kept = kept.to(bench.images)
        inside = is_inside(kept, bench.images, Threat(unit.eps, bench.setup.norm))
        scored = bench.score(kept)
        own = [record for record in records if record["incumbent"] == incumbent]
        for place, record in enumerate(own):
            verdict.images += 1
            again = about | {key: values[place] for key, values in scored.items()}
            off = pixels_off(record["cells"], again["cells"])
            verdict.tipped += 0 < off <= ARITHMETIC * again["valid"]
            told = [] if inside[place] else ["outside the ball or [0, 1]"]
            told += wrong_keys(record, again, member)
            if told:
                verdict.problems.append(f"{where}, {incumbent}: {record['image']}: {'; '.join(told)}")


def wrong_keys(record: dict, again: dict, member: Member) -> list[str]:
    """What a record says that isn't so: in words. again: what it should say, as far as that can be known."""
    valid, found = again["valid"], []
    off = pixels_off(record["cells"], again["cells"])
    if off > ARITHMETIC * valid:
        found.append(f"{off} of {valid} pixels are not as recorded")
    for key, value in again.items():
        if key == CELLS:
            off = pixels_off(record.get(key, []), value)
            found += [f"{key}: {off} of {valid} pixels are not as recorded"] * (off > DEPLOYED * valid)
            continue
        if key == "cells" or (key == "route" and is_best(record.get(key), again["weights"])):
            continue
        near, pixels = (ROUNDING, 0.0) if key in EXACT else (ARITHMETIC, ARITHMETIC * valid)
        if key not in record or not agree(record[key], value, near, pixels):
            found.append(f"{key} is {brief(record.get(key))}, should be {brief(value)}")
    for key in ("forwards", "backwards"):
        if not 0 <= record[key] <= getattr(member, key):
            found.append(f"{key} is {record[key]}, the attack takes {getattr(member, key)} at most")
    passes = network_passes(member, record["forwards"])
    if record["network_passes"] != passes:
        found.append(f"network_passes is {record['network_passes']}, should be {passes}")
    return found


def agree(recorded, again, near: float, pixels: float) -> bool:
    """Whether plain values are the same: whole numbers within `pixels`, others within `near` (relative above 1)."""
    if isinstance(recorded, list) and isinstance(again, list):
        pairs = zip(recorded, again, strict=False)
        return len(recorded) == len(again) and all(agree(*pair, near, pixels) for pair in pairs)
    if isinstance(recorded, int | float) and isinstance(again, int):
        return abs(recorded - again) <= pixels
    if isinstance(recorded, int | float) and isinstance(again, float):
        return abs(recorded - again) <= near * max(1.0, abs(again))
    return recorded == again


def is_best(route: object, weights: list) -> bool:
    """Whether experts [S, K] are those with the largest weights [S, E, K], but for arithmetic."""
    weights = np.array(weights, dtype=float)
    if np.shape(route) != weights[:, 0].shape:
        return False
    chosen = np.arange(weights.shape[1])[:, None] == np.array(route)[:, None]
    near = weights >= weights.max(axis=1, keepdims=True) - ARITHMETIC
    return bool((chosen & near).any(axis=1).all())


def pixels_off(recorded: list[list[int]], found: list[list[int]]) -> int:
    """Pixels that stand in other cells of the confusion counts; twice a moved pixel, halved."""
    before, after = ({(truth, said): count for truth, said, count in cells} for cells in (recorded, found))
    return -(-sum(abs(before.get(cell, 0) - after.get(cell, 0)) for cell in {**before, **after}) // 2)


def read(path: Path) -> bytes | None:
    """None where there is no such file; UserError where it can't be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("submission", metavar="SUBMISSION", help="folder of an evaluation under attack")
    parser.add_argument(
        "overrides",
        metavar="a.b=c",
        nargs="*",
        default=[],
        help="of its config: where data and runs are, data.root=...",
    )
    parser.add_argument(
        "--rerun", type=int, default=0, metavar="N", help="run N units of work again, drawn at random"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda; that of the ledger is exact")
    arguments = parser.parse_intermixed_args(argv)
    from pipelines.robustness import submitted

    config = load(Path(arguments.submission) / "config.yaml", arguments.overrides)
    if not isinstance(config, Evaluation):
        raise UserError(
            f"{arguments.submission}/config.yaml: is not the config of an evaluation of segmentation, whose attacked "
            "images alone can be kept and scored again"
        )
    device = pick_device(arguments.device)
    if arguments.rerun < 0:
        raise UserError(f"--rerun: {arguments.rerun} is wrong; expected 0 or more units of work")
    asked = {"checks": config.evaluate.attack_checks, "rerun": arguments.rerun}
    verdict = verify(arguments.submission, *submitted(config, device), device, **asked)
    print("\n".join(verdict.lines()))
    return 2 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(run(main))
