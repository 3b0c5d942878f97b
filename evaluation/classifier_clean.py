"""Tables of classifiers on clean images: accuracy, costs, and where a mixture sends them."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.classifiers import (
    ANSWERS,
    Answers,
    Right,
    accuracies,
    balance,
    labels_by_expert,
    load_answers,
    loads,
    loads_by_site,
)
from evaluation.findings import Finding
from evaluation.formats import in_brackets, markdown_table, percent, points
from evaluation.results import FLOOR
from evaluation.statistics import clopper_pearson
from metrics.gate import COLLAPSE, is_collapsed

MOST_LABELS = 20  # of which each has a line in a table
SEVERAL = (
    " An image that takes several experts, at one site or another, is that of the one which most of its sites take, of "
    "equals the first."
)
ROUTE_COLUMNS = ("model", "label", "expert", "images")
SETTLED = 0.005  # of validation's robust accuracy: a training that still rose by as much had not ended


@dataclass(frozen=True)
class About:
    """What stands beside a model's accuracy. kind: its network; design: the same for people. gmacs: of a
    pass; pathway, router: of these alone; rise: how much the validation's robust accuracy rose over the last fifth of
    training (None: not known)."""

    kind: str
    parameters: int
    active: int
    gmacs: float
    pathway: float
    router: float
    method: str = ""
    rise: float | None = None
    design: str = ""

    @property
    def unfinished(self) -> bool:
        """Whether training had not ended, or nobody knows."""
        return self.rise is None or self.rise >= SETTLED


@dataclass(frozen=True, eq=False)
class Clean:
    """Answers of every model to all images of a split."""

    names: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    answers: dict[str, Answers]
    split: str


def read_clean(folder: str | Path, classes: Sequence[str], split: str) -> Clean:
    """What the clean pass left in the folder."""
    names, labels, found = load_answers(Path(folder) / ANSWERS)
    return Clean(names, labels, tuple(classes), found, split)


def share(counted: np.ndarray, right: np.ndarray) -> tuple[float, float, float, int]:
    """(accuracy, exact interval, images) of the images that count; NaN without any."""
    images, hits = int(counted.sum()), int((right & counted).sum())
    if not images:
        return math.nan, math.nan, math.nan, 0
    return (hits / images, *clopper_pearson(hits, images), images)


def told(counted: np.ndarray, right: np.ndarray) -> str:
    """In percent with its interval."""
    value, low, high, images = share(counted, right)
    return percent(value) + in_brackets(low, high) if images else "-"


def all_told(right: np.ndarray | None) -> str:
    """Where all images count; a dash where it is not known."""
    return "-" if right is None else told(np.ones_like(right), right)


def clean_rows(clean: Clean, about: Mapping[str, About]) -> list[dict]:
    """One row per figure in the columns of results.csv."""
    rows = []
    for model, own in clean.answers.items():
        base = {"model": model, "kind": about[model].kind, "subset": clean.split}
        for metric, (counted, right) in accuracies(own, clean.labels, len(clean.classes)).items():
            value, low, high, images = share(counted, right)
            figure = {"metric": metric, "value": value, "ci_low": low, "ci_high": high}
            rows.append({**base, **figure, "units": images, "n_images": images})
        if about[model].rise is not None:
            rows.append({**base, "metric": "rise", "value": about[model].rise})
        if own.routed:
            many = {"units": len(clean.labels), "n_images": len(clean.labels)}
            for expert, load in enumerate(loads(own)):
                rows.append({**base, **many, "metric": f"load_{expert}", "value": float(load)})
            rows.append({**base, **many, "metric": "effective_experts", "value": balance(own)})
    floor = {"model": FLOOR, "kind": "floor", "subset": clean.split, "metric": "top1"}
    return [*rows, {**floor, "value": floor_of(clean), "n_images": len(clean.labels)}]


def floor_of(clean: Clean) -> float:
    """Accuracy of the best constant answer."""
    return float(np.bincount(clean.labels).max() / len(clean.labels))


def clean_markdown(clean: Clean, about: Mapping[str, About], dataset: str) -> str:
    """Everything that a reader needs of the clean images, in percent."""
    count = len(clean.labels)
    lines = [
        "# Classifiers",
        "",
        f"- {dataset}, {count} {clean.split} images, {len(clean.classes)} classes; top-1 in percent with its exact "
        "95 % interval (Clopper-Pearson).",
        "- GMACs per image: what runs for it; of a mixture (its pathway + the router). Parameters: all, and those "
        "that an image meets.",
        "- rise: how much the robust accuracy of the validation images rose over the last fifth of training; where it "
        "is 0.5 points or more, training had not ended, and nothing is ranked; nor where it is not known, as of a "
        "training that was stopped early.",
        "",
    ]
    titles = ["model", "network", "method", "top-1", "top-5", "GMACs", "parameters", "active", "rise"]
    cells = []
    for model, own in clean.answers.items():
        figures, one = accuracies(own, clean.labels, len(clean.classes)), about[model]
        cells.append([
            model, one.design or one.kind, one.method or "-", told(*figures["top1"]),
            told(*figures["top5"]) if "top5" in figures else "-", gmacs_of(one), f"{one.parameters:,}",
            f"{one.active:,}", "-" if one.rise is None else points(one.rise),
        ])  # fmt: skip
    cells.append([FLOOR, "-", "-", percent(floor_of(clean)), *["-"] * 5])
    lines += markdown_table(titles, cells, left=3)
    mixtures = {model: own for model, own in clean.answers.items() if own.routed}
    routed = {model: own for model, own in mixtures.items() if own.alone is not None}
    if mixtures:
        lines += ["", "## Routing", "", *routing_lines(clean, mixtures)]
    if routed and len(clean.classes) > MOST_LABELS:
        return "\n".join([*lines, "", "Images of each label that take each expert: routes.csv."]) + "\n"
    for model, own in routed.items():
        sites = "" if own.routes.shape[1] == 1 else " at most sites"
        lines += ["", f"## {model}: images of each label that take each expert{sites}", ""]
        table = labels_by_expert(own, clean.labels, len(clean.classes))
        shown = [
            [name, *map(str, row)]
            for name, row in zip(clean.classes, table.tolist(), strict=True)
            if sum(row)
        ]
        lines += markdown_table(["label", *(f"expert {one}" for one in range(table.shape[1]))], shown, left=1)
    return "\n".join(lines) + "\n"


def gmacs_of(one: About) -> str:
    """Of a pass, with its parts where it has two."""
    parts = f" ({one.pathway:.3g} + {one.router:.3g})" if one.router else ""
    return f"{one.gmacs:.3g}{parts}"


def routing_lines(clean: Clean, routed: Mapping[str, Answers]) -> list[str]:
    """Loads, accuracy by route, and what other routers would have."""
    most = max(own.experts for own in routed.values())
    mixed = any(own.alone is None for own in routed.values())
    titles = ["model", "effective experts"]
    for expert in range(most):
        titles += [f"{expert}: load", "top-1 of its images", "of all on it"]
    titles += ["random route", "worst route", "own", "oracle route"]
    cells = []
    for model, own in routed.items():
        figures = accuracies(own, clean.labels, len(clean.classes))
        line = [model + " !" * is_collapsed(loads_by_site(own)), f"{balance(own):.2f}"]
        for expert in range(most):
            line.append(percent(float(loads(own)[expert])) if expert < own.experts else "-")
            line += [top1_of(figures, f"{name}_{expert}") for name in ("route", "constant")]
        line += [top1_of(figures, name) for name in ("random_route", "worst_route", "top1", "oracle_route")]
        cells.append(line)
    return [
        "load: share of images and sites. effective experts: exp of the entropy of the loads, mean over the sites. "
        f"!: at every site one expert has over {100 * COLLAPSE:g} % of them: hardly any route hangs on the image. "
        "Oracle and worst route: images that some, or that all, of the constant "
        "routes have right; no router that sends an image one way can be outside of these."
        + SEVERAL
        * any(own.routes is not None and own.routes.shape[1] > 1 for own in routed.values())
        + " A mixture that weighs several experts for an image takes none of these routes; load is the share of the "
        "weight there." * mixed,
        "",
        *markdown_table(titles, cells, left=1),
    ]


def top1_of(figures: Mapping[str, Right], name: str) -> str:
    """In percent; a dash where there is no such figure."""
    return percent(share(*figures[name])[0]) if name in figures else "-"


def route_rows(clean: Clean) -> list[dict]:
    """Rows of routes.csv: images of each label that take each expert of a mixture at most of its sites."""
    return [
        {"model": model, "label": label, "expert": expert, "images": images}
        for model, own in clean.answers.items()
        if own.alone is not None
        for label, row in zip(
            clean.classes, labels_by_expert(own, clean.labels, len(clean.classes)).tolist(), strict=True
        )
        for expert, images in enumerate(row)
    ]


def collapse_findings(clean: Clean, checked: Collection[str]) -> list[Finding]:
    """Flags of mixtures whose routes hardly hang on the image, but for those whose ledger is checked for it."""
    text = f"one expert has over {100 * COLLAPSE:g} % of the {len(clean.labels)} clean images at every site"
    return [
        Finding("gate collapse", model, None, "", "flag", text)
        for model, own in clean.answers.items()
        if own.routed and model not in checked and is_collapsed(loads_by_site(own))
    ]
