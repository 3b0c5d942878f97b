"""Intervals of a clean evaluation's figures, and the chosen gate against what it has to beat, on the same resamples."""

from collections.abc import Mapping, Sequence

import numpy as np

from evaluation.results import Results
from evaluation.statistics import (
    ClassCounts,
    Estimate,
    Resamples,
    aacc,
    estimate_image_mean,
    estimates,
    fwiou,
    macc,
    mean_iou,
)
from metrics.confusion import aacc as aacc_of
from metrics.confusion import counted_classes

DIFFERENCE_COLUMNS = (
    "row", "against", "kind", "subset", "metric", "difference", "ci_low", "ci_high", "units", "n_images",
)  # fmt: skip
COMPARED = (
    "miou_gt_only"  # mIoU that differences are of: over the classes with ground truth, whatever the policy
)
DIFFERENCES = (COMPARED, "miou_common", "aacc", "aacc_image_mean", "macc", "fwiou")
RIVALS = ("baseline", "expert", "ensemble")

Intervals = Mapping[tuple[str, str, str], Estimate]  # by (row, subset, metric)


def clean_estimates(results: Results, subsets: Sequence[str]) -> dict[tuple[str, str, str], Estimate]:
    """Figures of the rows that are defined on a subset. The metrics are those of results.csv that have an interval,
    and COMPARED; a row's `miou` is over the classes that its figure counts, in every resample."""
    found, common = {}, results.common_classes(subsets)
    for subset in subsets:
        resamples = Resamples(np.array(results.blocks)[results.mask(subset)])
        truth = np.flatnonzero(results.present(subset))
        for name in results.names():
            matrices, total = results.confusions(name, subset), results.total(name, subset)
            if not total.any():
                continue
            counted = np.flatnonzero(counted_classes(total, results.protocol.absent))
            figures = {"miou": mean_iou(counted, empty=float(results.protocol.absent == "one"))}
            figures |= {"miou_common": mean_iou(common)} if len(common) else {}
            figures |= {COMPARED: mean_iou(truth), "aacc": aacc, "macc": macc, "fwiou": fwiou}
            for metric, estimate in estimates(resamples, ClassCounts.of(matrices), figures).items():
                found[name, subset, metric] = estimate
            found[name, subset, "aacc_image_mean"] = estimate_image_mean(resamples, aacc_of(matrices))
    return found


def difference_rows(results: Results, subsets: Sequence[str], intervals: Intervals) -> list[dict]:
    """Lines of differences.csv: the chosen gate (none chosen: the first) minus the best baseline, expert and ensemble
    of the subset by COMPARED, fractions; none without a gate."""
    gate = results.lead_gate
    rows = []
    for subset in subsets:
        for kind in RIVALS:
            rivals = [name for name in results.names(kind) if (name, subset, COMPARED) in intervals]
            if (gate, subset, COMPARED) not in intervals or not rivals:
                continue
            best = max(rivals, key=lambda name: intervals[name, subset, COMPARED].value)
            about = {"row": gate, "against": best, "kind": kind, "subset": subset}
            for metric in (metric for metric in DIFFERENCES if (gate, subset, metric) in intervals):
                difference = intervals[gate, subset, metric] - intervals[best, subset, metric]
                rows.append(about | interval_columns(difference) | {
                    "metric": metric,
                    "difference": difference.value,
                    "n_images": difference.resamples.images,
                })  # fmt: skip
    return rows


def interval_columns(estimate: Estimate | None) -> dict:
    """ci_low, ci_high and units of a table; nothing where there is no estimate."""
    if estimate is None:
        return {}
    low, high = estimate.interval()
    return {"ci_low": low, "ci_high": high, "units": estimate.units}
