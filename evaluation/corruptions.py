"""Corruptions: every row of the matrix under each corruption and severity, one pass after the other, and its tables."""

import csv
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from engine.checkpoints import atomic_write
from engine.config import UserError
from evaluation.formats import csv_text, in_brackets, markdown_table, percent
from evaluation.intervals import COMPARED, interval_columns
from evaluation.ledger import differences, plain, shown
from evaluation.results import Results
from evaluation.statistics import (
    FEWEST_UNITS,
    ClassCounts,
    Estimate,
    Resamples,
    aacc,
    estimates,
    fwiou,
    macc,
    mean_iou,
)
from evaluation.tables import RESULT_COLUMNS

MEAN = "mean"  # in the columns corruption and severity: over all that were evaluated
MODELS = ("baseline", "expert", "ensemble", "gate", "control", "floor")
NOTES = (
    "Corruptions of Hendrycks and Dietterich 2019 in this project's own implementation, on the 8-bit image at the "
    "network's input size, its letterbox included; the labels stay. frost is drawn, not photographed; "
    "elastic_transform and zoom_blur move what the labels don't follow.",
    "mIoU in percent over the classes with ground truth, the same for all rows and corruptions. drop: what part of "
    "the clean mIoU is lost at the mean.",
)


@dataclass(frozen=True)
class Corrupted:
    """Batches whose images are replaced by change(image uint8 [H, W, 3], name of the frame); labels stay."""

    batches: Collection
    change: Callable[[np.ndarray, str], np.ndarray]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator:
        for batch in self.batches:
            images = batch.images.permute(0, 2, 3, 1).numpy()
            names = [frame.name for frame in batch.frames]
            changed = [self.change(*pair) for pair in zip(images, names, strict=True)]
            batch = copy(batch)
            batch.images = torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2)
            yield batch


def rounds(
    folder: str | Path,
    grid: Iterable[tuple[str, int]],
    about: Mapping,
    evaluate: Callable[[str, int], Results],
) -> Iterator[tuple[str, int, Results]]:
    """(corruption, severity, results) for each pair of the grid, in order.

    A pass is written as soon as it is done and read where it is there already, so that what was killed goes on where
    it stopped. about: everything that the results depend on. UserError where the folder is of something else."""
    folder, about = Path(folder), plain(about)
    file = folder / "about.json"
    if file.exists():
        different = differences(json.loads(file.read_text(encoding="utf-8")), about)
        if different:
            raise UserError(
                f"{folder}: holds passes of another evaluation, different in {shown(different)}; --overwrite "
                "(in a pipeline: --force) discards them"
            )
    else:
        atomic_write(file, json.dumps(about, indent=1) + "\n")
    for corruption, severity in grid:
        path = folder / f"{corruption}_{severity}.npz"
        if not path.exists():
            replace(evaluate(corruption, severity), cases={}, scores={}).save(path)
        yield corruption, severity, Results.load(path)


class CorruptionTables:
    """Figures of every row on every subset, clean and corrupted, all on the same resamples of blocks."""

    def __init__(
        self,
        clean: Results,
        subsets: Sequence[str],
        corruptions: Sequence[str],
        severities: Sequence[int],
        seed: int,
    ):
        """`add` must be given the results of each corruption and severity before a table is asked for."""
        self.clean, self.subsets, self.seed = clean, list(subsets), seed
        self.corruptions, self.severities = list(corruptions), list(severities)
        self.models = clean.names(*MODELS)
        self.resamples = {subset: Resamples(np.array(clean.blocks)[clean.mask(subset)]) for subset in subsets}
        self.figures: dict[tuple[str, str, str, int], dict[str, Estimate]] = {}
        self.add("", 0, clean)

    def add(self, corruption: str, severity: int, results: Results) -> None:
        """The pass of one corruption and severity. ValueError where it is of other images than the clean one."""
        if (results.images, results.subsets) != (self.clean.images, self.clean.subsets):
            raise ValueError(f"{corruption} {severity}: other images than the clean evaluation")
        for subset in self.subsets:
            truth = np.flatnonzero(self.clean.present(subset))
            figures = {COMPARED: mean_iou(truth), "aacc": aacc, "macc": macc, "fwiou": fwiou}
            for model in self.models:
                if results.total(model, subset).any():
                    counts = ClassCounts.of(results.confusions(model, subset))
                    found = estimates(self.resamples[subset], counts, figures)
                    self.figures[model, subset, corruption, severity] = found

    def mean(self, model: str, subset: str, corruption: str = MEAN, severity: str | int = MEAN) -> Estimate:
        """mIoU, the mean over what is not fixed; its resamples are those of all others on the subset."""
        parts = [
            self.figures[model, subset, one, level][COMPARED]
            for one in (self.corruptions if corruption == MEAN else [corruption])
            for level in (self.severities if severity == MEAN else [severity])
        ]
        first = parts[0]  # what is added to it is exactly 0 where all are equal
        value = first.value + float(np.mean([part.value - first.value for part in parts]))
        moved = np.mean([part.replicates - first.replicates for part in parts], axis=0)
        return Estimate(value, first.replicates + moved, self.resamples[subset])

    def drop(self, model: str, subset: str) -> Estimate:
        """The part of the clean mIoU that is lost at the mean over all."""
        clean, left = self.clean_miou(model, subset), self.mean(model, subset)
        lost = [
            1 - after / before if before else float("nan") for before, after in [(clean.value, left.value)]
        ]
        with np.errstate(divide="ignore", invalid="ignore"):
            return Estimate(lost[0], 1 - left.replicates / clean.replicates, self.resamples[subset])

    def clean_miou(self, model: str, subset: str) -> Estimate:
        return self.figures[model, subset, "", 0][COMPARED]

    @cached_property
    def defined(self) -> list[tuple[str, str]]:
        """(model, subset) that have figures."""
        pairs = [(model, subset) for subset in self.subsets for model in self.models]
        return [pair for pair in pairs if (*pair, "", 0) in self.figures]

    def rows(self) -> list[dict]:
        """One row per figure in the columns of results.csv; `mean` in corruption or severity is over all of them."""
        rows = []
        for model, subset in self.defined:
            base = {
                "model": model,
                "kind": self.clean.row(model).kind,
                "subset": subset,
                "n_images": self.resamples[subset].images,
            }
            for corruption in [*self.corruptions, MEAN]:
                for severity in [*self.severities, MEAN]:
                    if MEAN in (corruption, severity):
                        found = {COMPARED: self.mean(model, subset, corruption, severity)}
                    else:
                        found = self.figures[model, subset, corruption, severity]
                    if corruption == severity == MEAN:
                        found["relative_drop"] = self.drop(model, subset)
                    where = {"corruption": corruption, "severity": severity}
                    rows += [
                        {
                            **base,
                            **where,
                            "metric": metric,
                            "value": estimate.value,
                            **interval_columns(estimate),
                        }
                        for metric, estimate in found.items()
                    ]
        return rows

    def csv(self) -> str:
        """A line per model and subset, fractions: clean, each corruption's mean, the mean over all, what part of the
        clean figure is lost, and the means by severity."""
        columns = ["model", "kind", "subset", "clean", *self.corruptions, MEAN, "relative_drop"]
        columns += [f"severity_{severity}" for severity in self.severities]
        lines = []
        for model, subset in self.defined:
            line = {"model": model, "kind": self.clean.row(model).kind, "subset": subset}
            line |= {"clean": self.clean_miou(model, subset).value, MEAN: self.mean(model, subset).value}
            line |= {one: self.mean(model, subset, one).value for one in self.corruptions}
            line |= {f"severity_{s}": self.mean(model, subset, MEAN, s).value for s in self.severities}
            lines.append(line | {"relative_drop": self.drop(model, subset).value})
        return csv_text(columns, lines)

    def markdown(self) -> str:
        """The same in percent, for each subset a table by corruption and one by severity."""
        protocol = self.clean.protocol
        height, width = protocol.image_size
        levels = ", ".join(map(str, self.severities))
        lines = [
            f"Data {protocol.dataset}, split {protocol.split}; network input {height} x {width} (height x width, "
            f"{protocol.resize}), {protocol.precision}; resolution: {protocol.resolution}.",
            f"{len(self.corruptions)} corruptions, severities {levels}, corruption seed {self.seed}.",
            *NOTES,
            f"[low, high]: 95 % intervals over resamples of blocks of frames; none for fewer than {FEWEST_UNITS}.",
        ]
        text = [f"- {line}" for line in lines]
        for subset in self.subsets:
            models = [model for model, there in self.defined if there == subset]
            resamples, classes = self.resamples[subset], int((self.clean.present(subset) > 0).sum())
            text += ["", f"## {subset}", ""]
            text += [f"{resamples.images} images, {resamples.units} blocks, {classes} classes.", ""]
            text += markdown_table(
                ["model", "kind", "clean", *self.corruptions, MEAN, "drop %"],
                [self._by_corruption(model, subset) for model in models],
                left=2,
            )
            text += ["", "Mean over the corruptions, by severity:", ""]
            text += markdown_table(
                ["model", "kind", "clean", *map(str, self.severities)],
                [
                    [
                        model,
                        self.clean.row(model).kind,
                        percent(self.clean_miou(model, subset).value),
                        *(percent(self.mean(model, subset, MEAN, level).value) for level in self.severities),
                    ]
                    for model in models
                ],
                left=2,
            )
        return "\n".join(text) + "\n"

    def _by_corruption(self, model: str, subset: str) -> list[str]:
        def told(estimate: Estimate) -> str:
            return percent(estimate.value) + in_brackets(*estimate.interval())

        return [
            model,
            self.clean.row(model).kind,
            told(self.clean_miou(model, subset)),
            *(percent(self.mean(model, subset, one).value) for one in self.corruptions),
            told(self.mean(model, subset)),
            told(self.drop(model, subset)),
        ]


def write_corruptions(folder: str | Path, tables: CorruptionTables) -> None:
    """Writes corruptions.md, puts the rows into results.csv in place of earlier ones, then writes corruptions.csv:
    where it is, all is there."""
    folder = Path(folder)
    atomic_write(folder / "corruptions.md", tables.markdown())
    with open(folder / "results.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if not row["corruption"]]
    atomic_write(folder / "results.csv", csv_text(RESULT_COLUMNS, [*rows, *tables.rows()]))
    atomic_write(folder / "corruptions.csv", tables.csv())
