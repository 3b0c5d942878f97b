"""What networks that are deployed in bf16 answer to the images of a ledger, beside what they answer in float32.

Attacks are made in float32 all the same: bf16 rounds most of a small perturbation away while it is made, which fakes
robustness. Every image that they gave is scored in both, and worst cases are taken over either score by itself.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from evaluation.formats import eps_text, in_brackets, markdown_table, percent, points
from evaluation.ledger import Record
from evaluation.statistics import Estimate

PRECISION = "bf16"
CELLS = f"cells_{PRECISION}"  # of a record: its confusion counts in this precision
ROUTING = ("gate_free", "flips")  # of a record: known in float32 alone
FLOAT32_ONLY = (
    "route_stability",
    "top1_of_pathway",
)  # metrics that need them, or what an attack claims itself
TOLD = (
    f"The images that were made in float32, scored under autocast to {PRECISION} as well: what networks answer to them "
    f"that are deployed so. Worst cases are over these images, and say nothing of attacks made for {PRECISION}. In "
    "parentheses bf16 minus float32 in points, paired, with its 95 % interval."
)


def is_scored(units: Mapping[str, Sequence[Record]]) -> bool:
    """Whether the records of a ledger have answers in bf16, too."""
    return any(CELLS in record for records in units.values() for record in records[:1])


def as_deployed(units: Mapping[str, Sequence[Record]]) -> dict[str, list[Record]]:
    """The records of such a ledger with the answers in bf16 in place of those in float32."""
    return {name: [in_bf16(record) for record in records] for name, records in units.items()}


def in_bf16(record: Record) -> Record:
    kept = {key: value for key, value in record.items() if key not in (CELLS, *ROUTING)}
    return {**kept, "cells": record[CELLS]}


def deployed_rows(rows: Iterable[Mapping]) -> list[dict]:
    """Rows of results.csv that were made from such records, by the names of their metrics: miou_bf16."""
    return [
        {**row, "metric": f"{row['metric']}_{PRECISION}"}
        for row in rows
        if row["kind"] != "floor" and row["metric"] not in FLOAT32_ONLY
    ]


def deployment_lines(
    results: Any, models: Iterable[str], figures: Callable[[Any, str, float], dict[str, Estimate]]
) -> list[str]:
    """A table for each figure: every model in float32 and in bf16, on the clean images and in the adaptive worst case
    at each eps. figures: (results or results.deployed, model, eps or 0) -> title -> figure."""
    models, ladder, lines = list(models), (0.0, *results.ladder), [TOLD]
    for title in figures(results, models[0], 0.0):
        heads = [f"eps {eps_text(eps)}, adaptive" if eps else "clean" for eps in ladder]
        cells = []
        for model in models:
            line = [model]
            for eps in ladder:
                exact, rounded = (figures(one, model, eps)[title] for one in (results, results.deployed))
                gap = rounded - exact
                told = f"{percent(rounded.value)} ({points(gap.value)}{in_brackets(*gap.interval())})"
                line += [percent(exact.value), told]
            cells.append(line)
        titles = [f"{title} in %", *(part for head in heads for part in (head, f"in {PRECISION}"))]
        lines += ["", *markdown_table(titles, cells, left=1)]
    return lines
