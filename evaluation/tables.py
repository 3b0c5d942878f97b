"""Writes every table of an evaluation, from matrix.csv to results.csv, and builds most of them. Runs nothing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from types import MappingProxyType

import numpy as np

from engine.checkpoints import atomic_write
from evaluation.disagreement import (
    DISAGREEMENT_COLUMNS,
    disagreement_rows,
    error_detection,
    per_image_columns,
    per_image_rows,
)
from evaluation.formats import csv_text, in_brackets, latex_escape, markdown_table, number, percent, points
from evaluation.gate_table import GATE_COLUMNS, gate_rows
from evaluation.intervals import (
    DIFFERENCE_COLUMNS,
    DIFFERENCES,
    Intervals,
    clean_estimates,
    difference_rows,
    interval_columns,
)
from evaluation.results import Results
from evaluation.statistics import FEWEST_UNITS, LEVEL, REPLICATES, units_named
from metrics.confusion import iou_per_class

RESULT_COLUMNS = (
    "model", "kind", "subset", "corruption", "severity", "suite", "attack", "eps", "metric", "class", "value",
    "ci_low", "ci_high", "units", "n_images", "passes_per_image",
)  # fmt: skip
IN_PERCENT = (
    "Figures are in percent, behind them in parentheses the number of classes counted; matrix.csv and "
    "results.csv hold fractions in [0, 1] with all digits."
)
METRIC_TITLES = {
    "miou_gt_only": "mIoU", "miou_common": "mIoU_common", "aacc": "aAcc", "aacc_image_mean": "aAcc, mean of images",
    "macc": "mAcc", "fwiou": "fwIoU",
}  # fmt: skip
FEW_IMAGES = 10  # a class in fewer images than this is marked: its IoU says little


@dataclass(frozen=True)
class Cost:
    """What a row costs, and a remark; None or "" where it does not apply.

    `images_seen` and `steps`: training images drawn and optimiser steps, those of its experts included.
    """

    parameters: int | None = None
    trained_parameters: int | None = None
    gmacs: float | None = None
    images_seen: int | None = None
    steps: int | None = None
    note: str = ""


COSTS = tuple(field.name for field in fields(Cost))
UNKNOWN = Cost()
NOTHING: Mapping = MappingProxyType({})


def write_tables(
    folder: str | Path,
    results: Results,
    costs: Mapping[str, Cost] = NOTHING,
    subsets: Sequence[str] = (),
) -> None:
    """Writes all tables into a folder, results.csv last: where it is, the others are. `costs` by row;
    `subsets`: columns in this order (none given: all there are)."""
    subsets = list(subsets) or results.subset_names
    matrix, intervals = matrix_rows(results, subsets, costs), clean_estimates(results, subsets)
    differences = difference_rows(results, subsets, intervals)
    files = {
        "matrix.csv": csv_text(list(matrix[0]), matrix),
        "matrix.md": matrix_markdown(results, subsets, matrix, intervals),
        "matrix.tex": matrix_latex(results, subsets, matrix),
        "differences.csv": csv_text(DIFFERENCE_COLUMNS, differences),
        "differences.md": differences_markdown(results, subsets, differences),
        "classes.md": classes_markdown(results, subsets),
        "gate.csv": csv_text(GATE_COLUMNS, gate_rows(results, subsets)),
        "disagreement.csv": csv_text(DISAGREEMENT_COLUMNS, disagreement_rows(results, subsets)),
        "disagreement_per_image.csv": csv_text(per_image_columns(results), per_image_rows(results)),
        "results.csv": csv_text(RESULT_COLUMNS, result_rows(results, subsets, intervals)),
    }
    for name, text in files.items():
        atomic_write(Path(folder) / name, text.encode())


def result_rows(results: Results, subsets: Sequence[str], intervals: Intervals = NOTHING) -> list[dict]:
    """One row per figure, values as fractions in [0, 1] (counts as they are), with its interval where there is one.
    Rows of model "labels" tell in how many images of the subset a class has ground truth."""
    rows = []
    for subset in subsets:
        mask = results.mask(subset)
        units = len({block for block, wanted in zip(results.blocks, mask, strict=True) if wanted})
        base = {"subset": subset, "units": units, "n_images": int(mask.sum())}
        for class_name, count in zip(results.protocol.classes, results.present(subset).tolist(), strict=True):
            images = {"model": "labels", "kind": "labels", "metric": "images", "class": class_name}
            rows.append({**base, **images, "value": count})
        for name in results.names():
            total = results.total(name, subset)
            values = {
                "miou": results.miou(name, subset),
                "miou_common": results.miou_common(name, subset, subsets),
                **results.figures(name, subset),
                "classes_counted": results.counted(name, subset) if total.any() else math.nan,
            }
            if name in results.cases:
                values |= error_detection(results, name, subset)
            model = {**base, "model": name, "kind": results.row(name).kind}
            for metric, value in values.items():
                interval = interval_columns(intervals.get((name, subset, metric)))
                rows.append({**model, "metric": metric, "value": value, **interval})
            for class_name, iou in zip(results.protocol.classes, iou_per_class(total).tolist(), strict=True):
                rows.append({**model, "metric": "iou", "class": class_name, "value": iou})
    return rows


def matrix_rows(results: Results, subsets: Sequence[str], costs: Mapping[str, Cost]) -> list[dict]:
    """One dict per row: model, kind, miou_<subset>, miou_common_<subset>, then the fields of Cost.

    Figures are fractions, NaN where a row is not defined."""
    rows = []
    for name in results.names():
        row = {"model": name, "kind": results.row(name).kind}
        row |= {f"miou_{subset}": results.miou(name, subset) for subset in subsets}
        row |= {f"miou_common_{subset}": results.miou_common(name, subset, subsets) for subset in subsets}
        row |= dict(zip(COSTS, astuple(costs.get(name, UNKNOWN)), strict=True))
        if name == results.chosen:
            row["note"] = "; ".join(filter(None, ["chosen on val", row["note"]]))
        rows.append(row)
    return rows


def header_lines(results: Results, subsets: Sequence[str]) -> list[str]:
    """What has to be told beside the figures, one sentence a line."""
    protocol = results.protocol
    height, width = protocol.image_size
    counts = ", ".join(f"{subset} {int(results.mask(subset).sum())}" for subset in subsets)
    present = ", ".join(f"{subset} {int((results.present(subset) > 0).sum())}" for subset in subsets)
    common = len(results.common_classes(subsets))
    where = "at the label's own size" if protocol.resolution == "native" else "at the network's input size"
    rule = {
        "nan": "a class in neither truth nor prediction is left out, one that is only predicted counts 0",
        "gt_only": "classes without ground truth are left out",
        "zero": "a class in neither truth nor prediction counts 0",
        "one": "a class in neither truth nor prediction counts 1",
    }[protocol.absent]
    together = " + ".join(protocol.training_subsets)
    return [
        f"Data {protocol.dataset}, split {protocol.split}; images: {counts}"
        + (f" (all = {together})." if "all" in subsets else "."),
        f"Network input {height} x {width} (height x width, {protocol.resize}), {protocol.precision}, "
        f"attack: {protocol.attack}; counted {where} (resolution: {protocol.resolution}).",
        f"Classes: {len(protocol.classes)}; with ground truth: {present}. absent: {protocol.absent} "
        f"({rule}).",
        "mIoU_common is over the classes with ground truth in every one of these subsets "
        f"({common} of {len(protocol.classes)}), so that its columns can be compared.",
        _intervals_line(results, subsets),
    ]


def _intervals_line(results: Results, subsets: Sequence[str]) -> str:
    """What an interval is, and of how many units; that there is none, where no subset has enough."""
    blocks = {subset: len(set(np.array(results.blocks)[results.mask(subset)])) for subset in subsets}
    units = ", ".join(f"{subset} {count}" for subset, count in blocks.items())
    what = units_named(results.blocks)
    few = f"none for fewer than {FEWEST_UNITS}"
    if max(blocks.values()) < FEWEST_UNITS:
        return f"Units ({what}): {units}; intervals: {few}."
    return (
        f"[low, high]: {100 * LEVEL:.0f} % percentile intervals over {REPLICATES} resamples of units ({what}): "
        f"{units}; {few}. The classes of a mean are the same in all resamples."
    )


def matrix_markdown(
    results: Results, subsets: Sequence[str], rows: Sequence[Mapping], intervals: Intervals = NOTHING
) -> str:
    """The matrix in percent, with its header lines."""
    titles, cells = _matrix_cells(results, subsets, rows, " ({})", intervals)
    lines = [*(f"- {line}" for line in [*header_lines(results, subsets), IN_PERCENT]), ""]
    return "\n".join(lines + markdown_table(titles, cells, left=2)) + "\n"


def matrix_latex(results: Results, subsets: Sequence[str], rows: Sequence[Mapping]) -> str:
    """The matrix in percent as a LaTeX tabular (package booktabs) without intervals, its header lines as comments."""
    titles, cells = _matrix_cells(results, subsets, rows, r" \,({})", NOTHING)
    lines = [f"% {line}" for line in [*header_lines(results, subsets), IN_PERCENT]]
    lines += [r"\begin{tabular}{ll" + "r" * (len(titles) - 3) + "l}", r"\toprule"]
    lines += [" & ".join(latex_escape(title) for title in titles) + r" \\", r"\midrule"]
    kind = cells[0][1]
    for line in cells:
        if line[1] != kind:
            lines.append(r"\midrule")
            kind = line[1]
        texts = [
            latex_escape(cell) if column in (0, 1, len(line) - 1) else cell
            for column, cell in enumerate(line)
        ]
        lines.append(" & ".join(texts) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def differences_markdown(results: Results, subsets: Sequence[str], rows: Sequence[Mapping]) -> str:
    """The lines of `difference_rows` in points, a line per rival and subset."""
    lines = [f"- {line}" for line in (*header_lines(results, subsets)[:2], _intervals_line(results, subsets))]
    if not rows:
        return "\n".join([*lines, "", "There is no gate to compare."]) + "\n"
    lines += [
        f"- Points by which {rows[0]['row']} is above the row, the interval of the difference on the same resamples "
        "of both. mIoU is over the classes with ground truth in the subset, the same for both.",
        "- The row is the best of its kind by mIoU on these very images, which favours it. About these networks: a "
        "claim about the method takes several training seeds.",
        "",
    ]
    table: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        text = points(row["difference"]) + in_brackets(row["ci_low"], row["ci_high"])
        line = table.setdefault(
            (row["subset"], row["kind"]), {"against": row["against"], "units": str(row["units"])}
        )
        line[row["metric"]] = text
    cells = [
        [subset, f"best {kind}", line["against"], line["units"], *(line.get(key, "-") for key in DIFFERENCES)]
        for (subset, kind), line in table.items()
    ]
    titles = ["subset", "against", "row", "units", *(METRIC_TITLES[key] for key in DIFFERENCES)]
    return "\n".join(lines + markdown_table(titles, cells, left=3)) + "\n"


def classes_markdown(results: Results, subsets: Sequence[str]) -> str:
    """IoU of each class in percent, a table per subset; classes in few images are marked."""
    models = results.names("baseline", "expert", "ensemble", "gate")
    lines = [f"- {line}" for line in header_lines(results, subsets)[:2]]
    lines += [f"- IoU in percent. `*`: the class has ground truth in fewer than {FEW_IMAGES} images."]
    for subset in subsets:
        present = results.present(subset).tolist()
        columns = [iou_per_class(results.total(model, subset)).tolist() for model in models]
        cells = []
        for index, class_name in enumerate(results.protocol.classes):
            mark = " *" if present[index] < FEW_IMAGES else ""
            cells.append(
                [class_name + mark, str(present[index]), *(percent(column[index]) for column in columns)]
            )
        lines += ["", f"## {subset}", "", *markdown_table(["class", "images", *models], cells, left=1)]
    return "\n".join(lines) + "\n"


def _matrix_cells(
    results: Results, subsets: Sequence[str], rows: Sequence[Mapping], counted_in: str, intervals: Intervals
) -> tuple[list[str], list[list[str]]]:
    """Titles and texts of the matrix; a figure is followed by its interval, mIoU by the number of classes counted."""

    def interval(*key: str) -> str:
        return in_brackets(*intervals[key].interval()) if key in intervals else ""

    titles = ["model", "kind", *(f"mIoU {subset}" for subset in subsets)]
    titles += [f"mIoU_common {subset}" for subset in subsets]
    titles += ["parameters", "trained parameters", "GMACs", "images seen", "optimiser steps", "note"]
    cells = []
    for row in rows:
        line = [row["model"], row["kind"]]
        for subset in subsets:
            value = row[f"miou_{subset}"]
            counted = counted_in.format(results.counted(row["model"], subset))
            behind = "" if math.isnan(value) else interval(row["model"], subset, "miou") + counted
            line.append(percent(value) + behind)
        line += [
            percent(row[f"miou_common_{subset}"]) + interval(row["model"], subset, "miou_common")
            for subset in subsets
        ]
        line += [number(row[cost]) for cost in COSTS[:-1]]
        cells.append([*line, row["note"]])
    return titles, cells
