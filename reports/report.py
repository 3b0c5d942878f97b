"""report.html: one self-contained page about finished evaluations and the runs behind them."""

import base64
import glob
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from engine.checkpoints import atomic_write
from engine.config import UserError
from evaluation.disagreement import case_totals, error_detection, parts_of
from evaluation.formats import in_brackets, number, percent, points
from evaluation.intervals import DIFFERENCES
from evaluation.results import KINDS, Results, main_subset
from evaluation.robust_tables import load_robust
from evaluation.tables import COSTS, FEW_IMAGES, METRIC_TITLES, header_lines
from metrics.confusion import iou_per_class
from metrics.disagreement import CASES
from reports import charts
from reports.findings import findings
from reports.folders import Folder, commands, environments, is_classifier, open_folder, run_row
from reports.markdown import to_html

TEMPLATES = Path(__file__).parent / "templates"
CLASSIFIERS = "classifiers.md"  # an evaluation folder with it is one of classifiers
GENERATED = ("roadscenes",)  # data sets that a program drew
REGRETS = ("regret_miou", "regret_aacc")  # columns of gate.csv
COMPARED = ("baseline", "expert", "ensemble", "gate")  # kinds that the best of a column is picked from


def write_report(
    evaluations: Sequence[str | Path], runs: Sequence[str | Path], out: str | Path, title: str = ""
) -> None:
    """Writes the page. `evaluations`: folders with per_image.npz, tables and overlays; `runs`: run folders of
    the trainings (progress, configs); `title`: by default the name of the folder that `out` lies in.

    Raises UserError for an evaluation folder that is missing, incomplete or damaged."""
    out = Path(out)
    folders = [open_folder(Path(run)) for run in runs]
    opened = [open_folder(Path(evaluation)) for evaluation in evaluations]
    parts = [_evaluation_part(folder) for folder in opened if not (folder.path / CLASSIFIERS).exists()]
    classified = [_classifier_part(folder) for folder in opened if (folder.path / CLASSIFIERS).exists()]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    experts = [name for part in parts for name in part["results"].names("expert")]
    page = environment.get_template("report.html").render(
        title=title or out.resolve().parent.name,
        parts=parts,
        classified=classified,
        datasets=sorted({part["results"].protocol.dataset for part in parts}),
        generated=any(part["results"].protocol.dataset in GENERATED for part in parts),
        progress=_progress(folders, experts),
        runs=[run_row(folder) for folder in folders],
        commands=commands(folders),
        configs=[folder for folder in [*folders, *opened] if folder.config_text],
        environments=environments(folders),
        few_images=FEW_IMAGES,
    )
    atomic_write(out, page.encode())


def _evaluation_part(folder: Folder) -> dict:
    """Everything that the template says about one evaluation."""
    results = Results.load(folder.path / "per_image.npz")
    matrix = folder.table("matrix.csv")
    if not matrix:
        raise UserError(f"{folder.path / 'matrix.csv'}: missing; evaluate again with --overwrite")
    subsets = [column[len("miou_common_") :] for column in matrix[0] if column.startswith("miou_common_")]
    members = [subset for subset in subsets if subset != "all"] or subsets
    gate = results.lead_gate
    classwise = [name for name in results.names("gate") if results.weights[name].shape[2] > 1]
    by_class = gate if gate in classwise else next(iter(classwise), "")
    return {
        "folder": folder,
        "results": results,
        "subsets": subsets,
        "main": main_subset(subsets),
        "header": header_lines(results, subsets),
        "counted": {subset: _same_count(results, subset) for subset in subsets},
        "tiles": _tiles(results, subsets),
        "findings": findings(results, subsets),
        "groups": _groups(results, subsets, matrix, _intervals(folder)),
        "difference_titles": [METRIC_TITLES[metric] for metric in DIFFERENCES],
        "differences": _difference_rows(folder.table("differences.csv")),
        "ceilings": results.names("ceiling"),
        "classes": _class_rows(results, main_subset(subsets)),
        "class_models": results.names(*COMPARED),
        "gates": _gate_rows(folder.table("gate.csv")),
        "gate_experts": list(dict.fromkeys(row["expert"] for row in folder.table("gate.csv"))),
        "disagreement": _disagreement_rows(results, main_subset(subsets)),
        "followed": list(dict.fromkeys(name for row in results.cases for name in results.row(row).experts)),
        "heatmap": _embed(charts.matrix_heatmap(results, subsets)),
        "histograms": _embed(charts.gate_histograms(results, members)) if gate else "",
        "by_class": by_class,
        "by_class_chart": _embed(charts.gate_by_class(results, by_class, members)) if by_class else "",
        "overlays": _overlays(folder.path / "overlays", results.subset_names),
        "robust_curves": _robust_curves(folder.path / "ledger", folder.path / "robustness.csv"),
        "robustness": _markdown(folder.path / "robustness.md"),
        "corruptions": _markdown(folder.path / "corruptions.md"),
    }


def _classifier_part(folder: Folder) -> dict:
    """Everything that the template says about one evaluation of classifiers."""
    rows = folder.table("routes.csv")
    labels = list(dict.fromkeys(row["label"] for row in rows))
    images: dict[str, list[int]] = {}
    for row in rows:
        images.setdefault(row["model"], []).append(int(row["images"]))
    tables = {model: np.array(own).reshape(len(labels), -1) for model, own in images.items()}
    return {
        "folder": folder,
        "routes": _embed(charts.labels_by_expert(tables, labels)) if tables else "",
        "clean": _markdown(folder.path / CLASSIFIERS),
        "robustness": _markdown(folder.path / "robustness.md"),
    }


def _group(folder: Folder) -> str:
    """Of the training's chart."""
    if is_classifier(folder):
        return "classifiers" if folder.config["train"]["monitor"] == "robust_top1" else "plain classifiers"
    return "gates" if folder.config.get("gate") else "networks"


def _markdown(path: Path) -> Markup:
    """A page of ours in HTML without its title; "" where it isn't there."""
    if not path.exists():
        return Markup("")
    text = path.read_text(encoding="utf-8")
    return to_html(text.partition("\n")[2] if text.startswith("# ") else text)


def _robust_curves(ledger: Path, tables: Path) -> str:
    """The chart of a ledger whose tables are there, else ""."""
    return _embed(charts.robust_curves(load_robust(ledger))) if tables.exists() and ledger.exists() else ""


def _tiles(results: Results, subsets: Sequence[str]) -> list[tuple[str, str, str]]:
    """(figure, what it is, whose it is) of the most important rows on the main subset."""
    subset, tiles = main_subset(subsets), []
    for kind, label in (
        ("gate", "MoE"),
        ("expert", "best expert"),
        ("baseline", "best baseline"),
        ("ensemble", "best ensemble"),
    ):
        names = results.names(kind)
        if names:
            name = (
                results.lead_gate if kind == "gate" else max(names, key=lambda row: results.miou(row, subset))
            )
            tiles.append((percent(results.miou(name, subset)), label, name))
    return tiles


def _intervals(folder: Folder) -> dict[tuple[str, str], str]:
    """Texts of the intervals of the clean figures of results.csv by (row, metric_subset)."""
    return {
        (row["model"], f"{row['metric']}_{row['subset']}"): in_brackets(
            float(row["ci_low"]), float(row["ci_high"])
        )
        for row in folder.table("results.csv")
        if row["ci_low"] and not (row["corruption"] or row["suite"])
    }


def _groups(
    results: Results,
    subsets: Sequence[str],
    matrix: list[dict[str, str]],
    intervals: Mapping[tuple[str, str], str],
) -> list[tuple[str, list[dict]]]:
    """Rows of the matrix by kind; each cell with its text and interval, its marks and the number of classes counted."""
    known = {row["model"]: row for row in matrix}
    value = {
        (name, column): float(row[column]) if row[column] else math.nan
        for name, row in known.items()
        for column in row
        if column.startswith("miou_")
    }
    groups = []
    for kind in KINDS:
        rows = []
        for name in results.names(kind):
            cells = []
            for prefix in ("miou_", "miou_common_"):
                for subset in subsets:
                    column = prefix + subset
                    rivals = [value[other, column] for other in results.names(*COMPARED)]
                    best = kind in COMPARED and value[name, column] == max(rivals)
                    told = prefix == "miou_common_" or _same_count(results, subset) is not None
                    counted = None if told else results.counted(name, subset)
                    cells.append({
                        "text": percent(value[name, column]),
                        "interval": intervals.get((name, column), ""),
                        "counted": None if math.isnan(value[name, column]) else counted,
                        "marks": " ".join(filter(None, ["best" * best, _place(results, name, subset)])),
                    })  # fmt: skip
            costs = [known[name][cost] for cost in COSTS[:-1]]
            rows.append(
                {
                    "name": name,
                    "cells": cells,
                    "costs": [_cost(cost) for cost in costs],
                    "note": known[name]["note"],
                }
            )
        if rows:
            groups.append((kind, rows))
    return groups


def _difference_rows(table: list[dict[str, str]]) -> list[dict]:
    """One line per subset and rival of the chosen gate, from the lines of differences.csv."""
    lines: dict[tuple[str, str], dict] = {}
    for row in table:
        line = lines.setdefault(
            (row["subset"], row["kind"]), {**row, "cells": dict.fromkeys(DIFFERENCES, ("-", ""))}
        )
        interval = in_brackets(float(row["ci_low"]), float(row["ci_high"])) if row["ci_low"] else ""
        line["cells"][row["metric"]] = points(float(row["difference"])), interval
    return list(lines.values())


def _same_count(results: Results, subset: str) -> int | None:
    """Number of classes in the mean, where it is the same for every row; else each cell tells its own."""
    counts = {results.counted(name, subset) for name in results.names() if results.defined(name, subset)}
    return counts.pop() if len(counts) == 1 else None


def _place(results: Results, name: str, subset: str) -> str:
    """Whether an expert is at home on a subset, or on another expert's home."""
    row = results.row(name)
    if row.kind != "expert" or subset not in results.protocol.training_subsets:
        return ""
    return "home" if subset in row.home else "abroad"


def _class_rows(results: Results, subset: str) -> list[dict]:
    """IoU of each class on a subset, the best of a line marked; classes without ground truth are left out."""
    images = results.present(subset).tolist()
    columns = [iou_per_class(results.total(name, subset)) for name in results.names(*COMPARED)]
    rows = []
    for index, name in enumerate(results.protocol.classes):
        if images[index]:
            values = [float(column[index]) for column in columns]
            cells = [(percent(value), value == max(values) > 0) for value in values]
            rows.append(
                {"name": name, "images": images[index], "few": images[index] < FEW_IMAGES, "cells": cells}
            )
    return rows


def _gate_rows(table: list[dict[str, str]]) -> list[dict]:
    """One line per gate and subset with the weights of its experts, from the lines of gate.csv for images."""
    lines: dict[tuple[str, str], dict] = {}
    for row in table:
        if not row["class"]:
            line = lines.setdefault((row["model"], row["subset"]), {**row, "weights": {}})
            text = f"{float(row['mean']):.2f} ± {float(row['std']):.2f}"
            light = f"{float(row['spearman_luma']):.2f}" if row["spearman_luma"] else "-"
            line["weights"][row["expert"]] = text, light
            line["regret"] = [percent(float(row[key])) if row[key] else "-" for key in REGRETS]
    return list(lines.values())


def _disagreement_rows(results: Results, subset: str) -> list[dict]:
    """A line per gate and ensemble: (share of the pixels, how much of it is right) of every case on a subset, and
    how well disagreement detects its errors."""
    rows = []
    for name in (*results.names("gate"), *results.names("ensemble")):
        if name in results.cases:
            counts = case_totals(results, name, subset).sum(axis=0)
            pixels = counts[: len(CASES), 0].sum()
            cells = {
                part.followed or part.slug: _share_and_right(counts[part.place], pixels)
                for part in parts_of(results, name)
            }
            detection = [f"{value:.2f}" for value in error_detection(results, name, subset).values()]
            rows.append({"name": name, "cells": cells, "detection": detection})
    return rows


def _share_and_right(counts: np.ndarray, pixels: int) -> tuple[str, str]:
    """Percentages of pixels of a case, and of those in it that the row has right."""
    share = f"{100 * counts[0] / pixels:.2f}" if pixels else "-"
    return share, f"{100 * counts[1] / counts[0]:.0f}" if counts[0] else "-"


def _overlays(folder: Path, subsets: Sequence[str]) -> list[tuple[str, str, str]]:
    """(subset, frame, picture) of the files <subset>_<frame>.png, in the order of the subsets."""
    found = []
    for subset in subsets:
        others = [other for other in subsets if len(other) > len(subset) and other.startswith(f"{subset}_")]
        for path in sorted(folder.glob(f"{glob.escape(subset)}_*.png")):
            if not any(path.name.startswith(f"{other}_") for other in others):
                found.append((subset, path.stem[len(subset) + 1 :], _embed(path.read_bytes())))
    return found


def _cost(text: str) -> str:
    """A count or GMACs as people read them: 8.91 M, 2.45, 16 000."""
    if not text:
        return "-"
    value = float(text)
    return f"{value / 1e6:.2f} M" if value >= 1e6 else number(int(value) if "." not in text else value)


def _progress(folders: Sequence[Folder], experts: Sequence[str]) -> str:
    """The chart of all trainings that have left rows, "" where there is none. Several of one name, such as a gate that
    two stages train, have that of their folder in front."""
    names = Counter(folder.name for folder in folders)
    runs = [
        charts.Run(
            folder.name if names[folder.name] == 1 else f"{folder.path.parent.name}/{folder.name}",
            _group(folder),
            tuple(rows),
        )
        for folder in folders
        if (rows := folder.table("metrics.csv"))
    ]
    return _embed(charts.progress(runs, experts)) if runs else ""


def _embed(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
