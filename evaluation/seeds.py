"""Mean and spread of several runs of one pipeline: python -m evaluation.seeds [--attacked] RUN_FOLDER RUN_FOLDER ...

The mIoU of every row on every subset; with --attacked clean figures and worst cases. Of classifiers both at once:
top-1 of the whole split, whether training had ended, balance of the routes, clean figures and worst cases of the
images that were attacked.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from engine.command import run
from engine.config import UserError
from evaluation.classifier_autoattack import AUTOATTACK, WORST_OF_ALL
from evaluation.classifier_clean import SETTLED
from evaluation.formats import eps_text, markdown_table

MATRIX, RESULTS, CHECKS = "matrix.csv", "results.csv", "checks.csv"
ATTACKED = {
    "clean": "clean",
    "pgd ce": "PGD",
    "worst of common": "common",
    "worst of adaptive": "adaptive",
    AUTOATTACK: "AutoAttack",
    WORST_OF_ALL: "worst of all",
}
FIGURES = {"miou": "mIoU", "aacc": "aAcc", "top1": "top-1"}
OTHER_FIGURES = {
    "top1_attack_on_router": "router attacked",
    "top1_attack_on_experts": "experts attacked",
    "all_paths_empirical": "all paths",
    "route_stability": "route unchanged",
}

WHOLE = {
    "top1": "top-1, whole split",
    "rise": "rise",
    "effective_experts": "effective experts",
}  # of classifiers, without attacks
NUMBERS = (WHOLE["effective_experts"],)  # no shares, so not in percent

Figures = dict[
    str, dict[str, float | None]
]  # by row name and column title, fractions or NUMBERS; None where not defined


def tables_below(folder: str | Path, name: str) -> list[Path]:
    """The files of this name in a folder, or else below it."""
    folder = Path(folder)
    return [folder / name] if (folder / name).is_file() else sorted(folder.rglob(name))


def find_table(folder: str | Path, name: str) -> Path:
    """The one file of this name in or below a folder. Raises UserError where there is none, or several."""
    found = tables_below(folder, name)
    if not found:
        raise UserError(f"{folder}: no {name} here or below; run the pipeline's evaluation first")
    if len(found) > 1:
        places = ", ".join(str(path.parent) for path in found)
        raise UserError(f"{folder}: several evaluations ({places}); name the folder of one")
    return found[0]


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or "model" not in rows[0]:
        raise UserError(f"{path}: not a {path.name} of an evaluation")
    return rows


def read_matrix(path: Path) -> Figures:
    """mIoU columns of a matrix.csv."""
    return {
        row["model"]: {
            _title(column): float(value) if value else None
            for column, value in row.items()
            if column.startswith("miou_")
        }
        for row in read_rows(path)
    }


def read_attacked(path: Path) -> Figures:
    """Clean figures and worst cases of a results.csv. UserError where nothing was attacked, but for classifiers."""
    found: Figures = {}
    rows = read_rows(path)
    classifiers = any(row["metric"] == "top1" for row in rows)
    for row in rows:
        whole = classifiers and not (
            row["suite"] or row["corruption"] or row["kind"] in ("difference", "floor")
        )
        column = WHOLE.get(row["metric"]) if whole else column_of(row)
        if column:
            found.setdefault(row["model"], {})[column] = float(row["value"]) if row["value"] else None
    if not found:
        raise UserError(f"{path}: holds no attacked figures; evaluate with evaluate.suite")
    columns = list(dict.fromkeys(column for own in found.values() for column in own))
    return {model: {column: own.get(column) for column in columns} for model, own in found.items()}


def flagged_in(checks: Path) -> set[str]:
    """Models that a check raised a flag against; none where there is no such file."""
    if not checks.exists():
        return set()
    with open(checks, newline="", encoding="utf-8") as file:
        return {row["model"] for row in csv.DictReader(file) if row["severity"] == "flag"}


def column_of(row: Mapping[str, str]) -> str | None:
    """Title of what a row of results.csv says of an attacked model; None for what stands in no column here."""
    if not row["suite"] or row["kind"] == "difference":
        return None
    if row["suite"] == AUTOATTACK and row["attack"] not in (AUTOATTACK, WORST_OF_ALL):
        return None  # of its fewer images; the suite's figures are of all that were attacked
    eps = f" {eps_text(float(row['eps']))}" if row["eps"] and float(row["eps"]) else ""
    if row["metric"] in OTHER_FIGURES:
        return OTHER_FIGURES[row["metric"]] + eps
    if row["metric"] in FIGURES and row["attack"] in ATTACKED:
        return f"{FIGURES[row['metric']]} {ATTACKED[row['attack']]}{eps}"
    return None


def summary(folders: Sequence[str | Path], attacked: bool = False) -> str:
    """A Markdown table, in percent: mean, sd (n - 1) and smallest .. largest of every figure over the runs. attacked:
    of clean figures and worst cases, in place of the clean matrix, which classifiers have none of.

    Raises UserError for fewer than two runs, a run given twice, matrices of other columns (the classes of mIoU_common
    hang on the subsets), and runs under other attacks, on another number of images, or without a model in common. Rows
    and columns that not every run has are named below the table. ! is behind those with a flag in the checks.csv of a
    run."""
    if any(tables_below(folder, RESULTS) and not tables_below(folder, MATRIX) for folder in folders):
        attacked = True  # classifiers
    name, read = (RESULTS, read_attacked) if attacked else (MATRIX, read_matrix)
    paths = [find_table(folder, name) for folder in folders]
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        raise UserError("name at least two run folders, each once: python -m evaluation.seeds RUN_FOLDER ...")
    for first, second in combinations(paths, 2):
        if first.read_bytes() == second.read_bytes():
            raise UserError(f"{second}: says the same as {first}, byte for byte; name runs of several seeds")
    tables = [read(path) for path in paths]
    titles = [list(next(iter(table.values()))) for table in tables]
    columns = [column for column in titles[0] if all(column in own for own in titles)]
    for path, own in zip(paths[1:], titles[1:], strict=True):
        if not (shared_attacks(titles[0], own) if attacked else own == titles[0]):
            raise UserError(f"{path}: has other columns than {paths[0]}; compare runs of one pipeline")
        if attacked and (told := other_images(paths[0], path)):
            raise UserError(f"{path}: {told} {paths[0]}; compare runs of one pipeline")
    shared = [name for name in tables[0] if all(name in table for table in tables)]
    if not shared:
        raise UserError(
            f"{', '.join(map(str, paths))}: no model is in all of them; compare runs of one pipeline"
        )
    flagged = {one for path in paths for one in flagged_in(path.with_name(CHECKS))} if attacked else set()
    cells = [
        [
            name + " !" * (name in flagged),
            *(
                _spread([table[name][column] for table in tables], 1 if column in NUMBERS else 100)
                for column in columns
            ),
        ]
        for name in shared
    ]
    numbers = "".join(f"; {column}: a number" for column in NUMBERS if column in columns)
    lines = [f"{len(paths)} runs; mean ± sd (smallest .. largest), percent{numbers}.", ""]
    lines += markdown_table(["model", *columns], cells, left=1)
    if flagged & set(shared):
        lines += [
            "",
            f"!: a check raised a flag against figures of it in one of these runs; see their {CHECKS}.",
        ]
    if any(WHOLE["rise"] in own for own in titles):
        lines += [
            "",
            "rise: of the validation images' robust accuracy over the last fifth of training; nothing is ranked of "
            f"rows where it is {100 * SETTLED:g} points or more in a run, or not known.",
        ]
    others = sorted({name for table in tables for name in table} - set(shared))
    others += [column for column in dict.fromkeys(sum(titles, [])) if column not in columns]
    if others:
        lines += ["", f"Not in every run: {', '.join(others)}."]
    return "\n".join(lines)


def shared_attacks(columns: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two runs have a figure under attack in common, where one of them has any."""
    plain = {*WHOLE.values(), *(f"{figure} {ATTACKED['clean']}" for figure in FIGURES.values())}
    own, theirs = (set(one) - plain for one in (columns, others))
    return bool(own & theirs) or not (own or theirs)


def other_images(first: Path, second: Path) -> str:
    """In which numbers of attacked images two results.csv differ; "" where they don't."""
    counts = [
        {(row["suite"], row["subset"]): row["n_images"] for row in read_rows(path) if column_of(row)}
        for path in (first, second)
    ]
    differing = [key for key in counts[0] if counts[0][key] != counts[1].get(key, counts[0][key])]
    if not differing:
        return ""
    one, other = (count[differing[0]] for count in counts)
    return f"{other} images under suite {differing[0][0]}, but {one} in"


def _title(column: str) -> str:
    common = column.startswith("miou_common_")
    return f"mIoU_common {column[12:]}" if common else f"mIoU {column[5:]}"


def _spread(values: Sequence[float | None], scale: float) -> str:
    if None in values:
        return "-"
    scaled = [scale * value for value in values]
    mean, deviation = statistics.mean(scaled), statistics.stdev(scaled)
    return f"{mean:.2f} ± {deviation:.2f} ({min(scaled):.2f} .. {max(scaled):.2f})"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folders", metavar="RUN_FOLDER", nargs="+", help="of one pipeline, or of one evaluation in it"
    )
    parser.add_argument("--attacked", action="store_true", help="clean figures and worst cases under attack")
    given = parser.parse_args(arguments)
    print(summary(given.folders, given.attacked))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
