"""The results table as an evaluation prints it: mIoU by row and subset, the paper's rows first."""

import math
from collections.abc import Iterable, Sequence

from evaluation.formats import percent
from evaluation.results import KINDS, Results

HEADINGS = {
    "baseline": "further baselines",
    "expert": "further experts",
    "ensemble": "further ensembles",
    "gate": "further gates",
    "control": "controls: what a gate has to beat",
    "ceiling": "ceilings: may look at the label",
    "floor": "floor",
}


def results_table(results: Results, subsets: Sequence[str], first: Sequence[str]) -> str:
    """Lines of rows x subsets, mIoU in percent with the number of classes counted in parentheses: the rows named
    in `first` in that order, then all others by kind. A dash where a row is not defined."""
    protocol = results.protocol
    others = [name for name in results.names() if name not in first]
    groups = [("", list(first))]
    groups += [
        (HEADINGS[kind], [name for name in others if results.row(name).kind == kind]) for kind in KINDS
    ]
    lines = [["", *subsets]]
    for heading, names in groups:
        if names:
            lines += [[heading]] if heading else []
            lines += [
                [name + " *" * (name == results.chosen), *_cells(results, name, subsets)] for name in names
            ]
    where = "the label's own size" if protocol.resolution == "native" else "the network's input size"
    text = [
        f"mIoU in % (classes counted) on {protocol.dataset}, split {protocol.split}, "
        f"{len(results.images)} images, at {where}",
        "",
        *_aligned(lines),
    ]
    return "\n".join([*text, "", "* gate chosen on val"] if results.chosen else text)


def _cells(results: Results, name: str, subsets: Sequence[str]) -> Iterable[str]:
    for subset in subsets:
        value = results.miou(name, subset)
        yield "-" if math.isnan(value) else f"{percent(value)} ({results.counted(name, subset)})"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """First column to the left, the others to the right; a line of one cell is a heading."""
    table = [line for line in lines if len(line) > 1]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    texts = []
    for line in lines:
        if len(line) == 1:
            texts += ["", line[0]]
            continue
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        texts.append("  ".join([line[0].ljust(widths[0]), *cells]).rstrip())
    return texts
