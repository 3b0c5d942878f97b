"""Mean and spread of several runs of one pipeline: python -m evaluation.seeds RUN_FOLDER RUN_FOLDER ..."""

import csv
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.command import run
from engine.config import UserError
from evaluation.formats import markdown_table

MATRIX = "matrix.csv"


def find_matrix(folder: str | Path) -> Path:
    """The one matrix.csv in or below a folder. Raises UserError where there is none, or several."""
    folder = Path(folder)
    found = [folder / MATRIX] if (folder / MATRIX).is_file() else sorted(folder.rglob(MATRIX))
    if not found:
        raise UserError(f"{folder}: no {MATRIX} here or below; run the pipeline's evaluation first")
    if len(found) > 1:
        places = ", ".join(str(path.parent) for path in found)
        raise UserError(f"{folder}: several evaluations ({places}); name the folder of one")
    return found[0]


def read_matrix(path: Path) -> dict[str, dict[str, float | None]]:
    """mIoU columns of a matrix.csv by row name, fractions; None where a row is not defined."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or "model" not in rows[0]:
        raise UserError(f"{path}: not a {MATRIX} of an evaluation")
    return {
        row["model"]: {
            column: float(value) if value else None
            for column, value in row.items()
            if column.startswith("miou_")
        }
        for row in rows
    }


def summary(folders: Sequence[str | Path]) -> str:
    """A Markdown table, in percent: mean, sd (n - 1) and smallest .. largest of every figure over the runs.

    Raises UserError for fewer than two runs, a run given twice, and runs with other columns. Rows that not
    every run has are named below the table."""
    paths = [find_matrix(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        raise UserError("name at least two run folders, each once: python -m evaluation.seeds RUN_FOLDER ...")
    matrices = [read_matrix(path) for path in paths]
    columns = list(next(iter(matrices[0].values())))
    for path, matrix in zip(paths, matrices, strict=True):
        if list(next(iter(matrix.values()))) != columns:
            raise UserError(f"{path}: has other columns than {paths[0]}; compare runs of one pipeline")
    shared = [name for name in matrices[0] if all(name in matrix for matrix in matrices)]
    cells = [
        [name, *(_spread([matrix[name][column] for matrix in matrices]) for column in columns)]
        for name in shared
    ]
    titles = ["model", *(_title(column) for column in columns)]
    lines = [f"{len(paths)} runs; mean ± sd (smallest .. largest), percent.", ""]
    lines += markdown_table(titles, cells, left=1)
    others = sorted({name for matrix in matrices for name in matrix} - set(shared))
    if others:
        lines += ["", f"Not in every run: {', '.join(others)}."]
    return "\n".join(lines)


def _title(column: str) -> str:
    common = column.startswith("miou_common_")
    return f"mIoU_common {column[12:]}" if common else f"mIoU {column[5:]}"


def _spread(values: Sequence[float | None]) -> str:
    if None in values:
        return "-"
    percent = [100 * value for value in values]
    mean, deviation = statistics.mean(percent), statistics.stdev(percent)
    return f"{mean:.2f} ± {deviation:.2f} ({min(percent):.2f} .. {max(percent):.2f})"


def main(arguments: Sequence[str]) -> int:
    print(summary(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
