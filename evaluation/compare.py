"""Rows of several evaluations under attack side by side: python -m evaluation.compare FOLDER:ROW FOLDER:ROW ...

FOLDER is the run folder of an evaluation, or the one with its ledger; ROW the name of a row in it. For networks that
can't stand in one evaluation, such as gates over other experts: their worst cases, and the differences of all pairs,
paired image by image. Refused where images, attacks or protocol were not the same.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from engine.command import run
from engine.config import UserError
from evaluation.formats import eps_text, in_brackets, markdown_table, percent, points
from evaluation.image_results import ImageResults, load_images
from evaluation.ledger import differences, read_manifest, shown
from evaluation.robust import is_complete
from evaluation.robust_results import COLUMNS, Column, RobustResults, within_floor
from evaluation.robust_tables import PASSES_TOLD, in_words, load_robust, verdict
from evaluation.statistics import FEWEST_UNITS, Estimate

LEDGER = "ledger"
TITLES = {"miou": "mIoU", "aacc": "aAcc", "top1": "top-1"}  # of what rows are compared by
PARITY = (
    0.75  # of the network passes of a row, from which another counts as attacked as hard: restarts are whole
)
UNLESS = ", if both trainings had ended (rise, in classifiers.md)"
MACHINE = ("torch", "threads", "device")  # of a protocol: changes last digits of sums alone


@dataclass(frozen=True, eq=False)
class Side:
    """One row of one evaluation, with all that the ledger of that says."""

    folder: Path
    row: str
    results: RobustResults | ImageResults

    @property
    def name(self) -> str:
        return f"{self.folder}:{self.row}"

    def figures(self, eps: float, column: Column = "adaptive") -> dict[str, Estimate]:
        """Worst case; eps 0: of the clean images."""
        results, row = self.results, self.row
        if isinstance(results, ImageResults):
            right = results.worst(row, eps, column) if eps else results.clean(row)
            return {"top1": results.estimate(right)}
        found = results.worst(row, eps, column).figures if eps else results.clean(row)
        return {name: found[name] for name in TITLES if name in found}

    def floor(self) -> dict[str, float]:
        """Figures of the best constant answer."""
        floor = self.results.floor()
        if not isinstance(floor, dict):
            return {"top1": floor}
        return {name: floor[name] for name in TITLES if name in floor}

    def passes(self, eps: float, column: Column) -> float:
        return self.results.passes(self.row, eps, self.results.members(self.row, column))

    @property
    def network_passes(self) -> int:
        """Of all its attacks at one eps, each pass counted once for every network that it runs."""
        return sum(one["network_passes"] for one in self.results.targets[self.row]["members"])

    @property
    def kind(self) -> tuple:
        """What decides which attacks adapt to the row."""
        identity = self.results.targets[self.row]["identity"]
        return identity["kind"], identity.get("num_experts")

    def asked(self, columns: Sequence[Column]) -> dict:
        """What was asked of the row's attacks of these columns, whatever its weights and the machine."""
        manifest, members = self.results.manifest, self.results.targets[self.row]["members"]
        return {
            "protocol": {key: value for key, value in self.results.protocol.items() if key not in MACHINE},
            "suite": manifest["suite"],
            "eps": manifest["eps"],
            "attacks": {
                one["name"]: {**one["attack"], "version": one["version"]}
                for one in members
                if one["column"] in columns
            },
        }

    def images(self) -> dict[str, tuple]:
        return {one["name"]: (one["sha256"], one["block"]) for one in self.results.manifest["images"]}


def read_side(text: str) -> Side:
    """FOLDER:ROW. UserError where there is no complete ledger, or no such row in it."""
    folder, colon, row = text.rpartition(":")
    if not (colon and folder and row):
        raise UserError(f"{text}: takes FOLDER:ROW, such as runs/demo/attacked:moe_simple")
    ledger = find_ledger(Path(folder))
    if not is_complete(ledger):
        raise UserError(f"{ledger}: is not complete; run its evaluation again, it goes on where it stopped")
    manifest = read_manifest(ledger)
    rows = [target["name"] for target in manifest["targets"]]
    if row not in rows:
        raise UserError(f"{ledger}: there is no row {row!r}; allowed: {', '.join(rows)}")
    of_images = manifest["protocol"].get("task") == "classification"
    return Side(Path(folder), row, load_images(ledger) if of_images else load_robust(ledger))


def find_ledger(folder: Path) -> Path:
    """The one ledger of an evaluation's suite in or below a folder."""
    found = sorted(path.parent for path in folder.rglob(f"{LEDGER}/manifest.json"))
    if not found:
        raise UserError(f"{folder}: no ledger here or below; evaluate with evaluate.suite")
    if len(found) > 1:
        raise UserError(f"{folder}: several ledgers ({', '.join(map(str, found))}); name the folder of one")
    return found[0]


def refuse_unlike(sides: Sequence[Side]) -> None:
    """UserError where the rows were not attacked on the same images in the same way: the attacks that adapt to what a
    row is are the same for rows of a kind."""
    first = sides[0]
    for other in sides[1:]:
        where = f"{first.name} and {other.name} can't be compared"
        own, theirs = first.images(), other.images()
        if list(own.items()) != list(theirs.items()):
            alike = sum(theirs.get(name) == one for name, one in own.items())
            raise UserError(
                f"{where}: of {len(own)} and {len(theirs)} images {alike} are the same; attack the same frames in the "
                "same order and size"
            )
        columns = COLUMNS if first.kind == other.kind else COLUMNS[:1]
        different = differences(first.asked(columns), other.asked(columns))
        if different:
            raise UserError(f"{where}: {shown(different)}")


def comparison(sides: Sequence[Side]) -> str:
    """Markdown: worst cases of all rows, and paired differences of every two. UserError as of `refuse_unlike`."""
    refuse_unlike(sides)
    results, manifest = sides[0].results, sides[0].results.manifest
    units = results.resamples.units
    if isinstance(results, ImageResults):
        brackets = f"95 % interval: Clopper-Pearson, of differences a bootstrap over the {units} images"
    elif units < FEWEST_UNITS:
        brackets = f"no intervals: {units} blocks of images, {FEWEST_UNITS} are needed"
    else:
        brackets = f"95 % bootstrap over {units} blocks of images"
    lines = [
        f"Suite {manifest['suite']} on {len(results.images)} images of {manifest['subset']}; "
        f"{in_words(results.protocol)}. In percent, [{brackets}].",
        PASSES_TOLD,
    ]
    for eps in results.ladder:
        lines += ["", f"## eps {eps_text(eps)}", "", *worst_table(sides, eps), "", *pair_lines(sides, eps)]
    return "\n".join(lines)


def worst_table(sides: Sequence[Side], eps: float) -> list[str]:
    names = list(sides[0].figures(0.0))
    titles = ["row", "passes", *(f"{TITLES[name]} {of}" for name in names for of in ("clean", *COLUMNS))]
    cells = []
    for side in sides:
        clean, worst = side.figures(0.0), [side.figures(eps, column) for column in COLUMNS]
        line = [side.name, " / ".join(f"{side.passes(eps, column):g}" for column in COLUMNS)]
        for name in names:
            line.append(percent(clean[name].value))
            line += [percent(one[name].value) + in_brackets(*one[name].interval()) for one in worst]
        cells.append(line)
    return markdown_table(titles, cells, left=1)


def pair_lines(sides: Sequence[Side], eps: float) -> Iterator[str]:
    """Adaptive worst case of each row minus that of each later one, and what that says."""
    floor = sides[0].floor()
    for name, least in floor.items():
        for first, second in combinations(sides, 2):
            worst = [side.figures(eps)[name] for side in (first, second)]
            gap = worst[0] - worst[1]
            at_floor = all(within_floor(one, least) for one in worst)
            said = verdict(*gap.interval(), at_floor, "the first")
            shown = f"{first.name} - {second.name} = {points(gap.value)}{in_brackets(*gap.interval())}"
            said += UNLESS * (name == "top1" and said.startswith("the first is"))
            fewer, more = sorted(side.network_passes for side in (first, second))
            if fewer < PARITY * more and "single" in (first.kind[0], second.kind[0]):
                said += (
                    f"; not attacked as hard, by {first.network_passes} and {second.network_passes} network passes (a "
                    "single network gets its restarts where it stands beside mixtures or ensembles in one evaluation)"
                )
            yield f"- {TITLES[name]}, adaptive: {shown}: {said}."


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.compare",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", metavar="FOLDER:ROW", nargs="+", help="at least two")
    given = parser.parse_args(arguments)
    if len(set(given.rows)) < max(2, len(given.rows)):
        raise UserError(
            "name at least two rows, each once: python -m evaluation.compare FOLDER:ROW FOLDER:ROW"
        )
    print(comparison([read_side(text) for text in given.rows]))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
