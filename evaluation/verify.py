"""python -m evaluation.verify SUBMISSION: scores the adversarial images of a ledger again, with the networks it names.

SUBMISSION is the folder of an evaluation under attack that kept its images (evaluate.adversarials: uint8): its
config.yaml, ledger/ and robustness.csv. Whether weights and clean images are the ones the ledger was made with, its
images are inside the ball, the networks say of them what the records say, and the table is what follows from these:
none of it is taken on trust. Attacks are not run again, so that it takes a forward pass for each recorded image.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from engine.config import Evaluation, UserError, load
from evaluation.adversarials import load_adversarials
from evaluation.ledger import differences, plain, read_lines, read_manifest, read_units, shown
from evaluation.plan import Scene, Setup, Unit, units_of
from evaluation.robust import Bench, images_of
from evaluation.robust_tables import write_robust
from evaluation.targets import Target, exact_float32, under_attack

ROUNDING = 1e-6  # of a distance in float32
ARITHMETIC = 1e-3  # share of an image's pixels that another machine's sums may tip over


@dataclass
class Verdict:
    """problems: each in words; none where all was confirmed. units, images: scored again. tipped: of these images
    those where a few pixels differ, as they may on another machine."""

    problems: list[str] = field(default_factory=list)
    units: int = 0
    images: int = 0
    tipped: int = 0

    def lines(self) -> list[str]:
        """For a terminal."""
        exact = f"{self.tipped} of them differ in at most {ARITHMETIC:.1%} of their pixels"
        scored = f"{self.units} units of work, {self.images} adversarial images scored again"
        return [
            *(f"wrong: {problem}" for problem in self.problems),
            scored + (f"; {exact}" if self.tipped else "; every pixel count is the recorded one"),
            "refused" if self.problems else "verified",
        ]


def verify(
    folder: str | Path, targets: Sequence[Target], scenes: Iterable[Scene], device: torch.device | str = "cpu"
) -> Verdict:
    """The submission in a folder against the networks and clean images that it claims to be about.

    UserError for a folder without a complete ledger, or one that kept no images."""
    folder = Path(folder)
    ledger = folder / "ledger"
    manifest, units = read_manifest(ledger), read_units(ledger)
    setup = setup_in(manifest)
    if setup.adversarials == "none":
        raise UserError(f"{ledger}: holds no adversarial images; evaluate with evaluate.adversarials: uint8")
    wanted = list(units_of(manifest))
    lacking = [unit for unit in wanted if unit.name not in units]
    if lacking:
        raise UserError(f"{ledger}: {len(lacking)} of {len(wanted)} units of work are missing; let it finish")
    verdict = Verdict()
    damaged = sum(damaged_lines(path) for path in sorted(ledger.glob("segment_*.jsonl")))
    if damaged:
        verdict.problems.append(f"{damaged} lines of the ledger have a wrong checksum")
    known = networks_named(manifest, targets, verdict)
    before = torch.get_num_threads()
    torch.set_num_threads(manifest["protocol"]["threads"])
    try:
        batches = 0
        for index, scene in enumerate(scenes):
            batches += 1
            if same_images(scene, index, manifest, setup, verdict):
                own = [unit for unit in wanted if unit.batch == index and unit.target in known]
                score_again(known, own, units, scene, setup, ledger, torch.device(device), verdict)
        if batches != len({image["batch"] for image in manifest["images"]}):
            verdict.problems.append(f"the data set gives {batches} batches of images, the ledger has others")
    finally:
        torch.set_num_threads(before)
    with tempfile.TemporaryDirectory() as again:
        write_robust(again, ledger)
        for name in ("winners.csv", "telemetry.csv", "components.csv"):
            if (Path(again) / name).read_bytes() != read(folder / name):
                verdict.problems.append(f"{name} is not what follows from the ledger")
        if attacked(Path(again) / "robustness.csv") != attacked(folder / "robustness.csv"):
            verdict.problems.append("robustness.csv is not what follows from the ledger")
    return verdict


def setup_in(manifest: dict) -> Setup:
    """How the targets of a ledger were attacked."""
    protocol = manifest["protocol"]
    return Setup(
        classes=tuple(protocol["classes"]),
        eps=tuple(manifest["eps"]),
        norm=protocol["norm"],
        seed=protocol["seed"],
        ignore_index=protocol["ignore_index"],
        adversarials=protocol["adversarials"],
    )


def damaged_lines(path: Path) -> int:
    """Lines of a segment that are no record."""
    with open(path, "rb") as file:
        return sum(1 for _ in file) - sum(1 for _ in read_lines(path))


def networks_named(manifest: dict, targets: Sequence[Target], verdict: Verdict) -> dict[str, Target]:
    """The targets of the ledger that are the networks they claim to be, by name."""
    given, known = {target.name: target for target in targets}, {}
    for claimed in manifest["targets"]:
        name = claimed["name"]
        if name not in given:
            verdict.problems.append(f"{name}: the config names no such row")
            continue
        different = differences(claimed["identity"], plain(given[name].identity))
        if different:
            verdict.problems.append(f"{name}: other weights or another network: {shown(different)}")
        else:
            known[name] = given[name]
    return known


def same_images(scene: Scene, index: int, manifest: dict, setup: Setup, verdict: Verdict) -> bool:
    """Whether a batch is the one that was attacked."""
    claimed = [image for image in manifest["images"] if image["batch"] == index]
    found = images_of(scene, index, setup)
    different = [one["name"] for one in found if one not in claimed]
    if different or len(found) != len(claimed):
        names = ", ".join(different) or "their number"
        verdict.problems.append(f"batch {index}: other clean images, labels or blocks: {names}")
        return False
    return True


def score_again(
    targets: dict[str, Target],
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
        with under_attack(targets[name].model), exact_float32(device):
            bench = Bench(targets[name], scene, setup, device)
            for unit in todo:
                if unit.target == name:
                    compare(bench, unit, units[unit.name], ledger, verdict)
                    verdict.units += 1


def compare(bench: Bench, unit: Unit, records: list[dict], ledger: Path, verdict: Verdict) -> None:
    points = load_adversarials(ledger / "adversarials" / f"{unit.name}.npz")
    for incumbent, kept in points.items():
        where = f"{unit.target}, {unit.member} at eps {unit.eps * 255:.4g}/255, {incumbent}"
        kept = kept.to(bench.images.device)
        if kept.shape != bench.images.shape:
            verdict.problems.append(f"{where}: images of shape {tuple(kept.shape)}")
            continue
        own = [record for record in records if record["incumbent"] == incumbent]
        outside = sizes(kept - bench.images, bench.setup.norm) > unit.eps + ROUNDING
        outside |= (kept < 0).flatten(1).any(dim=1) | (kept > 1).flatten(1).any(dim=1)
        again = bench.score(kept)
        for place, record in enumerate(own):
            verdict.images += 1
            image = f"{where}: {record['image']}"
            if outside[place]:
                verdict.problems.append(f"{image}: outside the ball or [0, 1]")
            off = pixels_off(record["cells"], again["cells"][place])
            verdict.tipped += 0 < off <= ARITHMETIC * record["valid"]
            if off > ARITHMETIC * record["valid"]:
                verdict.problems.append(f"{image}: {off} of {record['valid']} pixels are not as recorded")
        if len(own) != len(kept):
            verdict.problems.append(f"{where}: {len(own)} records of {len(kept)} images")


def sizes(change: Tensor, norm: str) -> Tensor:
    """Of changes [B, 3, H, W], [B]."""
    flat = change.double().flatten(1)
    return flat.abs().amax(dim=1) if norm == "linf" else torch.linalg.vector_norm(flat, dim=1)


def pixels_off(recorded: list[list[int]], found: list[list[int]]) -> int:
    """Pixels that stand in other cells of the confusion counts; twice a moved pixel, halved."""
    before, after = ({(truth, said): count for truth, said, count in cells} for cells in (recorded, found))
    return -(-sum(abs(before.get(cell, 0) - after.get(cell, 0)) for cell in {**before, **after}) // 2)


def attacked(path: Path) -> list[bytes]:
    """Rows of a robustness.csv but certificates, which do not follow from the ledger."""
    return [line for line in read(path).splitlines() if b",interval bounds," not in line]


def read(path: Path) -> bytes:
    """UserError where it can't be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("submission", metavar="SUBMISSION", help="folder of an evaluation under attack")
    parser.add_argument(
        "overrides", metavar="a.b=c", nargs="*", help="of its config: where data and runs are, data.root=..."
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda; that of the ledger is exact")
    arguments = parser.parse_intermixed_args(argv)
    try:
        from pipelines.robustness import submitted

        config = load(Path(arguments.submission) / "config.yaml", arguments.overrides)
        if not isinstance(config, Evaluation):
            raise UserError(f"{arguments.submission}/config.yaml: is not the config of an evaluation")
        device = torch.device(arguments.device)
        verdict = verify(arguments.submission, *submitted(config, device), device)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(verdict.lines()))
    return 2 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
