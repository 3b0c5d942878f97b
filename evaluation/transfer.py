"""Transfer: adversarial images made for one target, shown to every other."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attacks.quantise import quantised
from attacks.threat import Threat
from engine.config import Component, UserError
from engine.steps import under_attack
from evaluation.beside import Keep, keep_nothing
from evaluation.findings import Finding
from evaluation.formats import markdown_table, percent
from evaluation.record_checks import ALARM
from evaluation.statistics import ClassCounts, Resamples, aacc, estimates, mean_iou
from evaluation.targets import Target, exact_float32, threat_on
from metrics.confusion import confusion

CLEAN = "clean"
METRICS = ("aacc", "miou")
TRANSFER_COLUMNS = (
    "source", "target", "eps", "attack", "metric", "value", "ci_low", "ci_high", "units", "n_images",
    "against_own", "against_own_low", "against_own_high",
)  # fmt: skip


@dataclass(frozen=True)
class Transfer:
    """What each target says of the images that an attack made for each source.

    sources: "clean" (the images themselves), then the names of the targets. counts: int64 [S, T, N, K, K], rows
    truth, columns prediction. A target's result on its own images is its white-box one, taken again from the images.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    counts: np.ndarray

    def rows(self, blocks: Sequence[str]) -> list[dict]:
        """One row per figure, in [0, 1]: aacc (pooled over the images), or miou over the classes with ground truth in
        them, with its interval over the blocks that the images are of; against_own: how much less or more it is than
        under images made for the target itself, paired."""
        resamples = Resamples(blocks)
        figures = {"aacc": aacc, "miou": mean_iou(np.flatnonzero(self.counts[0, 0].sum(axis=(0, 2))))}
        found = {
            (source, target): estimates(resamples, ClassCounts.of(counts), figures)
            for source, line in zip(self.sources, self.counts, strict=True)
            for target, counts in zip(self.targets, line, strict=True)
        }
        rows = []
        for metric in METRICS:
            for (source, target), figure in found.items():
                low, high = figure[metric].bounds()
                more = figure[metric] - found[target, target][metric]
                row = {"source": source, "target": target, "metric": metric, "value": figure[metric].value}
                row |= {"ci_low": low, "ci_high": high, "units": resamples.units, "against_own": more.value}
                rows.append(
                    row | dict(zip(("against_own_low", "against_own_high"), more.bounds(), strict=True))
                )
        return rows


def transfer_table(rows: Iterable[Mapping], metric: str = "miou") -> list[str]:
    """Lines of a Markdown table in percent of the rows of a Transfer: made for (rows), shown to (columns)."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["metric"] == metric:
            lines.setdefault(row["source"], {})[row["target"]] = percent(row["value"])
    targets = next(iter(lines.values()))
    cells = [[source, *(found[target] for target in targets)] for source, found in lines.items()]
    return markdown_table([f"made for \\ shown to, {metric}", *targets], cells, 1)


def stronger_than_white_box(rows: Iterable[Mapping]) -> list[Mapping]:
    """The rows of accuracy where images made for another target, or the clean ones, leave fewer pixels right than
    those made for the target itself, by more than chance where there is an interval: its gradients are masked, or the
    attack is too weak."""
    found = []
    for row in rows:
        surely = row["against_own"] if row["against_own_high"] is None else row["against_own_high"]
        if row["metric"] == "aacc" and surely < 0:
            found.append(row)
    return found


def below_worst_case(rows: Iterable[Mapping], worst: Callable[[str, float], float]) -> list[Finding]:
    """A flag for each row of accuracy that is below the worst case that the suite found, worst(target, eps): what it
    calls the worst is none. Rows of the clean images can't be."""
    found = []
    for row in rows:
        found_by_suite = worst(row["target"], row["eps"])
        if row["metric"] == "aacc" and found_by_suite - row["value"] > ALARM:
            text = (
                f"images of {row['attack']} made for {row['source']} leave {percent(row['value'])} % of accuracy, the "
                f"worst case of the suite is {percent(found_by_suite)} %: its attacks are too weak"
            )
            found.append(Finding("weaker attacks", row["target"], row["eps"], "transfer", "flag", text))
    return found


def transfer(
    targets: Sequence[Target],
    attack: Component,
    batches: Iterable[tuple[Tensor, Tensor, Threat]],
    num_classes: int,
    as_bytes: bool = False,
    keep: Keep = keep_nothing,
) -> Transfer:
    """All pairs: the attack on each target, the images with the fewest right pixels that it found shown to all.

    batches: images float32 [B, 3, H, W] in [0, 1], labels [B, H, W], and the threat with a seed per image. as_bytes:
    the images are rounded to multiples of 1/255 before they are shown (see `quantised`). keep: of each batch (see
    evaluation.beside).
    """
    names = tuple(target.name for target in targets)
    if len({CLEAN, *names}) <= len(names):
        raise UserError(
            f"transfer: targets need their own names, none of them {CLEAN}; found {', '.join(names)}"
        )
    counts = []
    with ExitStack() as stack:
        for target in targets:
            stack.enter_context(under_attack(target.model))
        for index, (images, labels, threat) in enumerate(batches):

            def work(images=images, labels=labels, threat=threat) -> list[list[int]]:
                with exact_float32(images.device):
                    made = {CLEAN: images}
                    for target in targets:
                        own = threat_on(target, threat, images.device)
                        points = attack.build(target.model, images, labels, own).images
                        made[target.name] = quantised(points, images, own) if as_bytes else points
                    found = cross_counts(targets, made, labels, num_classes, threat.ignore_index)
                places = np.flatnonzero(found)  # few of the cells have any pixels
                return [places.tolist(), found.flat[places].tolist()]

            places, pixels = keep(f"batch {index}", work)
            found = np.zeros((len(names) + 1, len(names), len(images), num_classes, num_classes), np.int64)
            found.flat[places] = pixels
            counts.append(found)
    if not counts:
        raise UserError("transfer: no images")
    return Transfer((CLEAN, *names), names, np.concatenate(counts, axis=2))


def cross_counts(
    targets: Sequence[Target],
    made: Mapping[str, Tensor],
    labels: Tensor,
    num_classes: int,
    ignore_index: int | None,
) -> np.ndarray:
    """Confusion counts int64 [S, T, B, K, K] of each source's images [B, 3, H, W] shown to each target."""
    ignored = -1 if ignore_index is None else ignore_index
    with torch.no_grad():
        found = [
            [
                confusion(target.model(points).argmax(dim=1), labels, num_classes, ignored)
                for target in targets
            ]
            for points in made.values()
        ]
    return np.stack([np.stack([counts.cpu().numpy() for counts in line]) for line in found])
