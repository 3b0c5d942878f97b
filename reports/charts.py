"""Charts of an evaluation and of the runs behind it: progress, gate weights, the matrix as a heat map."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from evaluation.results import Results
from evaluation.robust_results import COLUMNS, RobustResults
from evaluation.robust_tables import ordered
from reports.figures import INK, MUTED, expert_color, to_png

GRID = "#dde3e9"
OTHER_COLORS = ("#52606d", "#7b3294", "#b2182b", "#1b7837", "#2166ac", "#bf812d")  # of what is no expert
BLUES = LinearSegmentedColormap.from_list("blues", ["#f7fafc", "#9fc5e8", "#1c5d99"])
PRINT_DPI = 150
STYLES = {"ensemble": "--", "gate": "-", "expert": ":", "baseline": "-."}  # of curves by kind of row

# Groups of trainings: the column of metrics.csv that is shown, and what it is.
WATCHED = {
    "networks": ("miou", "validation mIoU (%)"),
    "gates": ("miou", "validation mIoU (%)"),
    "classifiers": ("robust_top1", "validation top-1 under attack (%)"),
    "plain classifiers": ("top1", "validation top-1 (%)"),
}


@dataclass(frozen=True)
class Run:
    """A training as the report shows it: rows of its metrics.csv, and its group, one of WATCHED."""

    name: str
    group: str
    rows: tuple[Mapping[str, str], ...]


def progress(runs: Sequence[Run], experts: Sequence[str]) -> bytes:
    """Training loss and what validation measures over optimiser steps, a row of panels for each group of runs. PNG.

    `experts` have their colours of the overlays. Every run must have a row, and there must be a run."""
    groups = [
        (title, members) for title in WATCHED if (members := [run for run in runs if run.group == title])
    ]
    figure = Figure(figsize=(10, 2.9 * len(groups)), layout="constrained")
    for (title, members), (left, right) in zip(
        groups, figure.subplots(len(groups), 2, squeeze=False), strict=True
    ):
        for index, run in enumerate(members):
            color = _color(run.name, index, experts)
            style = ("-", "--", ":")[index // len(OTHER_COLORS) % 3]  # of colours that come again
            loss = next(column for column in run.rows[0] if column.endswith("loss"))
            _line(left, run, loss, 1, color, style)
            _line(right, run, WATCHED[title][0], 100, color, style)
        left.set_title(f"{title}: training loss", fontsize=10, loc="left", color=INK)
        right.set_title(f"{title}: {WATCHED[title][1]}", fontsize=10, loc="left", color=INK)
        right.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
        for panel in (left, right):
            _plain(panel)
            panel.set_xlabel("optimiser step", fontsize=8, color=MUTED)
    return to_png(figure, PRINT_DPI)


def gate_histograms(results: Results, subsets: Sequence[str]) -> bytes:
    """How the images of each subset are spread over the weight of an expert: a row per gate, a column per
    expert (with two experts the first tells all). Weights per class are averaged over the classes. PNG."""
    gates = results.names("gate")
    columns = max(max(1, len(results.row(gate).experts) - 1) for gate in gates)
    figure = Figure(figsize=(max(6.5, 4.2 * columns), 1.7 * len(gates)), layout="constrained")
    edges = np.linspace(0, 1, 21)
    for gate, panels in zip(gates, figure.subplots(len(gates), columns, squeeze=False), strict=True):
        weights = results.weights[gate].mean(axis=2)  # [N, E]
        for expert, panel in enumerate(panels):
            if expert >= max(1, weights.shape[1] - 1):
                panel.axis("off")
                continue
            for index, subset in enumerate(subsets):
                values = weights[results.mask(subset), expert].clip(0, 1)
                shares = np.histogram(values, edges)[0] / len(values)
                color = _color(subset, index, results.names("expert"))
                panel.stairs(shares, edges, fill=True, alpha=0.45, color=color, label=subset)
                panel.stairs(shares, edges, color=color, linewidth=1.2)
            title = f"{gate}: weight of {results.row(gate).experts[expert]}"
            panel.set_title(title, fontsize=9, loc="left", color=INK)
            panel.set(xlim=(0, 1), yticks=[])
            _plain(panel)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=9
    )
    return to_png(figure, PRINT_DPI)


def gate_by_class(results: Results, gate: str, subsets: Sequence[str]) -> bytes:
    """Mean weight of every expert but the last, per subset and class, of a class-wise gate. PNG."""
    weights, experts = results.weights[gate], results.row(gate).experts[:-1]
    classes = results.protocol.classes
    figure = Figure(
        figsize=(0.42 * len(classes) + 2.2, len(experts) * (0.34 * len(subsets) + 1.5)), layout="constrained"
    )
    for index, panel in enumerate(figure.subplots(len(experts), 1, squeeze=False)[:, 0]):
        values = np.stack([weights[results.mask(subset), index].mean(axis=0) for subset in subsets])
        ends = LinearSegmentedColormap.from_list(
            "ends", [expert_color(index + 1), "#ffffff", expert_color(index)]
        )
        panel.imshow(values, cmap=ends, vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            panel.text(
                column,
                row,
                f"{value:.2f}"[1:] if value < 0.995 else "1",
                ha="center",
                va="center",
                fontsize=7,
            )
        panel.set_xticks(range(len(classes)), classes, rotation=45, ha="right", fontsize=8)
        panel.set_yticks(range(len(subsets)), subsets, fontsize=9)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        panel.set_title(f"mean weight of {experts[index]}", fontsize=9, loc="left", color=INK)
    return to_png(figure, PRINT_DPI)


def matrix_heatmap(results: Results, subsets: Sequence[str]) -> bytes:
    """mIoU_common of every row on every subset, in percent, darker for more. PNG."""
    names = results.names()
    values = np.array(
        [[100 * results.miou_common(name, subset, subsets) for subset in subsets] for name in names]
    )
    figure = Figure(figsize=(1.1 * len(subsets) + 3, 0.27 * len(names) + 0.8), layout="constrained")
    panel = figure.subplots()
    panel.imshow(np.nan_to_num(values), cmap=BLUES, vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = "-" if np.isnan(value) else f"{value:.1f}"
        panel.text(
            column, row, text, ha="center", va="center", fontsize=8, color="white" if value > 65 else INK
        )
    kinds = [results.row(name).kind for name in names]
    for row in range(1, len(names)):
        if kinds[row] != kinds[row - 1]:
            panel.axhline(row - 0.5, color="white", linewidth=4)
    panel.set_xticks(range(len(subsets)), subsets, fontsize=9)
    panel.xaxis.tick_top()
    panel.set_yticks(range(len(names)), names, fontsize=8.5, color=INK)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    return to_png(figure, PRINT_DPI)


def labels_by_expert(tables: Mapping[str, np.ndarray], classes: Sequence[str]) -> bytes:
    """Of each mixture the share of the images of each label [K] that takes each expert [E], from counts [K, E]. PNG."""
    few = len(classes) <= 20
    figure = Figure(
        figsize=(1 + 2.2 * len(tables), 0.27 * len(classes) + 1 if few else 5), layout="constrained"
    )
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for panel, (name, counts) in zip(panels, tables.items(), strict=True):
        shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        panel.imshow(shares, cmap=BLUES, vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(shares) if few else ():
            color = "white" if value > 65 else INK
            panel.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
        panel.set_title(name, fontsize=10, loc="left", color=INK)
        panel.set_xticks(
            range(counts.shape[1]), [f"expert {one}" for one in range(counts.shape[1])], fontsize=9
        )
        panel.xaxis.tick_top()
        panel.set_yticks(range(len(classes)) if few else [], classes if few else [], fontsize=8.5, color=INK)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    return to_png(figure, PRINT_DPI)


def robust_curves(results: RobustResults) -> bytes:
    """mIoU of the worst case over eps: common attacks on the left, gate-aware and ensemble-aware ones as well on the
    right, with 95 % intervals as bands, and the floor. PNG."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    steps, names = [0, *(eps * 255 for eps in results.ladder)], list(ordered(results))
    experts = results.of_role("expert")
    panels = figure.subplots(1, len(COLUMNS), sharey=True)
    for panel, column in zip(panels, COLUMNS, strict=True):
        for index, name in enumerate(names):
            found = [
                results.clean(name),
                *(results.worst(name, eps, column).figures for eps in results.ladder),
            ]
            values = np.array([(one["miou"].value, *one["miou"].interval()) for one in found]) * 100
            color, style = _color(name, index, experts), STYLES.get(results.targets[name]["role"], "-")
            panel.plot(steps, values[:, 0], style, marker=".", linewidth=1.5, color=color, label=name)
            panel.fill_between(steps, values[:, 1], values[:, 2], color=color, alpha=0.12, linewidth=0)
        floor = 100 * results.floor()["miou"]
        panel.axhline(floor, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), label="best constant class")
        panel.set_title(f"{column} attacks: mIoU (%)", fontsize=10, loc="left", color=INK)
        panel.set_xlabel(
            "eps, in 1/255" if results.protocol["norm"] == "linf" else "eps (L2), in 1/255", fontsize=8
        )
        panel.set_ylim(bottom=0)
        _plain(panel)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return to_png(figure, PRINT_DPI)


def _color(name: str, index: int, experts: Sequence[str]) -> str:
    return expert_color(experts.index(name)) if name in experts else OTHER_COLORS[index % len(OTHER_COLORS)]


def _line(panel: Axes, run: Run, column: str, factor: float, color: str, style: str) -> None:
    known = [(int(row["step"]), factor * float(row[column])) for row in run.rows if row.get(column)]
    marker = "." if len(known) < 30 else None
    panel.plot(
        *(zip(*known, strict=True) if known else ((), ())),
        style,
        marker=marker,
        linewidth=1.5,
        color=color,
        label=run.name,
    )


def _plain(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(GRID)
    panel.grid(color=GRID, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8, colors=MUTED, length=0)
