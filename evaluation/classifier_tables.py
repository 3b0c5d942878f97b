"""Tables of classifiers: clean accuracy and routing, what attacks leave, AutoAttack beside our own suite."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from engine.checkpoints import atomic_write
from evaluation.beside import read_beside
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
from evaluation.deployment import deployed_rows, deployment_lines
from evaluation.findings import FINDING_COLUMNS, Finding, Flags, finding_lines, finding_rows, told_of
from evaluation.formats import aligned, csv_text, eps_text, in_brackets, markdown_table, percent, points
from evaluation.image_results import ON_EXPERTS, ImageResults
from evaluation.ledger import read_manifest, read_seconds, read_units
from evaluation.plan import records_of
from evaluation.record_checks import GAP, ON_GATE, check_manifest, plausibility
from evaluation.results import FLOOR
from evaluation.robust_results import COLUMNS
from evaluation.robust_tables import PASSES_TOLD, in_words
from evaluation.statistics import Estimate, Share, clopper_pearson
from evaluation.suites import CLEAN
from evaluation.tables import RESULT_COLUMNS
from evaluation.telemetry import TELEMETRY_COLUMNS, telemetry_rows
from metrics.gate import COLLAPSE, is_collapsed

SUITE = "suite"
AUTOATTACK = "autoattack"  # the member; on one pathway: autoattack path 0
WORST_OF_ALL = "worst of all"  # of our suite, AutoAttack, and AutoAttack on pathways
BESIDE = "AutoAttack beside our suite"
MOST_LABELS = 20  # of which each has a line in a table
SEVERAL = (
    " An image that takes several experts, at one site or another, is that of the one which most of its sites take, of "
    "equals the first."
)
ROUTE_COLUMNS = ("model", "label", "expert", "images")
OF_ATTACKS = ("robustness.md", "checks.csv", "timing.csv", "telemetry.csv")  # tables that only attacks have
SETTLED = 0.005  # of validation's robust accuracy: a training that still rose by as much had not ended
TIMING_COLUMNS = ("ledger", "model", "eps", "attack", "seconds", "passes")


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


# Clean


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
    parts = f" ({one.pathway:.4f} + {one.router:.4f})" if one.router else ""
    return f"{one.gmacs:.4f}{parts}"


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


# Under attack


def load_images(ledger: str | Path) -> ImageResults:
    """What a complete ledger says. UserError where there is none."""
    return ImageResults(read_manifest(ledger), read_units(ledger))


@dataclass(frozen=True, eq=False)
class Figure:
    """A share of images. attack: those that it is the worst case of. right: bool [N]. passes: of these attacks, per
    image."""

    metric: str
    attack: str
    right: np.ndarray
    passes: float


def figures_of(results: ImageResults, model: str, eps: float) -> dict[str, Figure]:
    """Every figure of a model at an eps beside those of single attacks, by the title of its column."""

    def worst_of(members: Sequence[str], metric: str, attack: str) -> Figure:
        return Figure(metric, attack, results.under(model, eps, members), results.passes(model, eps, members))

    found = {one: worst_of(results.members(model, one), "top1", f"worst of {one}") for one in COLUMNS}
    if model not in results.mixtures:
        return found
    every, paths = found["adaptive"], results.pathways(model)
    if paths:
        passes = every.passes + sum(results.passes(path, eps, results.members(path)) for path in paths)
        found["all paths"] = Figure(
            "all_paths_empirical", every.attack, results.all_paths(model, eps), passes
        )
    for part, attacks in (("router", ON_GATE), ("experts", ON_EXPERTS)):
        own = results.of(model, attacks)
        if own:
            found[f"on the {part}"] = worst_of(own, f"top1_attack_on_{part}", " + ".join(own))
    if results.of(model, ON_GATE):  # others have no reason to change a route
        found["stable"] = Figure("route_stability", every.attack, results.stable(model, eps), every.passes)
    return found


def robust_rows(results: ImageResults) -> list[dict]:
    """One row per figure in the columns of results.csv: clean, each attack, worst cases, what aims at router or
    experts, all paths, and paired differences between models; and the same in bf16, where they are deployed so."""
    base = {
        "subset": results.manifest["subset"], "suite": results.manifest["suite"], "n_images": len(results.images),
        "units": len(results.images),
    }  # fmt: skip
    rows = []
    every = np.ones(len(results.images), dtype=bool)

    def add(model: str, eps: float, figure: Figure) -> None:
        value, low, high, _ = share(every, figure.right)
        own = {"model": model, "kind": results.targets[model]["role"], "attack": figure.attack, "eps": eps}
        own |= {"metric": figure.metric, "value": value, "ci_low": low, "ci_high": high}
        rows.append({**base, **own, "passes_per_image": figure.passes})

    for model in results.targets:
        add(model, 0.0, Figure("top1", CLEAN.name, results.clean(model), 1.0))
        for eps in results.ladder:
            for member in results.members(model):
                passes = results.passes(model, eps, [member])
                add(model, eps, Figure("top1", member, results.under(model, eps, [member]), passes))
                if results.attack(model, member).get("pathway") is not None:
                    own = results.claimed(model, eps, member)
                    add(model, eps, Figure("top1_of_pathway", member, own, passes))
            for figure in figures_of(results, model, eps).values():
                add(model, eps, figure)
    rows.append({**base, "model": FLOOR, "kind": "floor", "metric": "top1", "value": results.floor()})
    for eps in results.ladder:
        for (first, second), found in differences(results, eps).items():
            low, high = found.interval()
            own = {
                "model": f"{first} - {second}",
                "kind": "difference",
                "attack": "worst of adaptive",
                "eps": eps,
            }
            rows.append(
                {**base, **own, "metric": "top1", "value": found.value, "ci_low": low, "ci_high": high}
            )
    if results.deployed is not None:
        rows += deployed_rows(robust_rows(results.deployed))
    return rows


def differences(results: ImageResults, eps: float) -> dict[tuple[str, str], Estimate]:
    """(first, second) of all pairs of models -> adaptive worst case of the first minus that of the second, paired."""
    worst = {model: results.estimate(results.worst(model, eps, "adaptive")) for model in results.whole}
    return {(first, second): worst[first] - worst[second] for first, second in combinations(worst, 2)}


def robust_markdown(
    results: ImageResults | None, auto: ImageResults | None, findings: Sequence, about: Mapping[str, About]
) -> str:
    """Everything that a reader needs of the attacked images, in percent. Flags among the findings are marked."""
    flags, lines = Flags(findings), ["# Robustness", ""]
    if results is not None:
        lines += [f"- {line}" for line in header_lines(results)]
        for eps in results.ladder:
            lines += ["", f"## eps {eps_text(eps)}: worst case, top-1", "", *worst_table(results, eps, flags)]
            pairs = differences(results, eps)
            if pairs:
                lines += [
                    "",
                    "Paired differences of adaptive worst cases, in points, 95 % bootstrap over images; (no ranking) "
                    "where the training of one had not ended, or is not known to have, or both are at the floor:",
                    "",
                ]
                lowest = {
                    one for one in results.whole if at_floor(results.worst(one, eps, "adaptive"), results)
                }
                lines += [
                    f"- {first} - {second}: {points(found.value)}{in_brackets(*found.interval())}"
                    + " (no ranking)"
                    * (about[first].unfinished or about[second].unfinished or lowest >= {first, second})
                    for (first, second), found in pairs.items()
                ]
        for eps in results.ladder:
            lines += [
                "",
                f"## eps {eps_text(eps)}: single attacks, top-1",
                "",
                *single_table(results, eps, flags),
            ]
    if results is not None and results.deployed is not None:
        lines += ["", "## Scored in bf16", "", *deployment_lines(results, results.targets, adaptive_figures)]
    if auto is not None:
        lines += ["", "## AutoAttack", "", *auto_lines(results, auto, flags)]
    if findings:
        lines += ["", "## Checks", "", *(f"- {line}" for line in finding_lines(findings))]
    return "\n".join(lines) + "\n"


def adaptive_figures(results: ImageResults, model: str, eps: float) -> dict[str, Estimate]:
    """Top-1 in the adaptive worst case; eps 0: of the clean images."""
    right = results.worst(model, eps, "adaptive") if eps else results.clean(model)
    return {"top-1": results.estimate(right)}


def header_lines(results: ImageResults) -> list[str]:
    """What has to be told beside the figures."""
    manifest, about = results.manifest, in_words(results.protocol)
    return [
        f"Suite {manifest['suite']} on {len(results.images)} images of {manifest['subset']}; {about}.",
        "Figures are shares of these images in percent with their exact 95 % interval (Clopper-Pearson).",
        "common: worst case over attacks that are the same for every model. adaptive: over those and attacks that know "
        "the router, or (plain networks) as many restarts. Both hold for the attacks that were run, and for no others.",
        PASSES_TOLD,
        "all paths: images that every pathway by itself withstands attacks on, and that no attack of this suite on the "
        "mixture broke; empirical, no proof. on the router, on "
        "the experts: the whole model under attacks that aim at the router alone, or at the pathway of the clean image "
        "alone. stable: images of which no attack changed a route.",
        f"A figure marked * is within its interval of the floor ({FLOOR}, {percent(results.floor())}): there nothing "
        "can be compared. A model marked !1 has a flag raised against its figures: see Checks.",
    ]


def at_floor(right: np.ndarray, results: ImageResults) -> bool:
    """Whether the interval of a share of images, right [N], reaches down to the best constant class."""
    return share(np.ones_like(right), right)[1] <= results.floor()


def with_floor(right: np.ndarray, results: ImageResults) -> str:
    """As `all_told`, * where it is at the floor."""
    return all_told(right).replace(" [", "* [", 1) if at_floor(right, results) else all_told(right)


def worst_table(results: ImageResults, eps: float, flags: Flags) -> list[str]:
    titles = ["model", "network", "passes", "clean", "common", "adaptive", "all paths", "on the router",
              "on the experts", "stable"]  # fmt: skip
    cells = []
    for model in results.targets:
        found = figures_of(results, model, eps)
        line = [
            model + flags.mark(model, eps),
            results.targets[model]["role"],
            " / ".join(f"{found[column].passes:.0f}" for column in COLUMNS),
            percent(float(results.clean(model).mean())),
        ]
        for title in titles[4:]:
            right = found[title].right if title in found else None
            line.append(with_floor(right, results) if title in COLUMNS else all_told(right))
        cells.append(line)
    floor = percent(results.floor())
    cells.append([FLOOR, "floor", "-", floor, floor, floor, *["-"] * (len(titles) - 6)])
    return markdown_table(titles, cells, left=2)


def single_table(results: ImageResults, eps: float, flags: Flags) -> list[str]:
    columns = list(dict.fromkeys(member for model in results.targets for member in results.members(model)))
    cells = []
    for model in results.targets:
        own = results.members(model)
        shares = [
            percent(float(results.under(model, eps, [member]).mean())) if member in own else "-"
            for member in columns
        ]
        cells.append([model + flags.mark(model, eps), *shares])
    return markdown_table(["model", *columns], cells, left=1)


def auto_lines(results: ImageResults | None, auto: ImageResults, flags: Flags) -> list[str]:
    """AutoAttack's own figures, and its gap to our suite on the same images."""
    eps, count = auto.ladder[-1], len(auto.images)
    seed = auto.attack(next(iter(auto.targets)), AUTOATTACK)["seed"]
    lines = [
        f"AutoAttack standard (pyautoattack) at eps {eps_text(eps)} on the first {count} of the attacked images, seed "
        f"{seed}, in batches of {auto.protocol['batch']}. path: on one pathway of a mixture by "
        "itself: what that pathway has right then, and the whole model on the same images; only the latter is part of "
        f"the worst case. *: within its interval of the floor of these images, {percent(auto.floor())}.",
        "",
    ]
    paths = list(dict.fromkeys(m for one in auto.targets for m in auto.members(one) if m != AUTOATTACK))
    titles = ["model", "clean", "adaptive", "AutoAttack"]
    titles += [f"{path.removeprefix(AUTOATTACK).strip()}: its own, the model's" for path in paths]
    titles += [WORST_OF_ALL, "adaptive - AutoAttack"]
    cells = []
    for model in auto.targets:
        attacked, suite = auto.under(model, eps, [AUTOATTACK]), suite_beside(results, auto, model)
        line = [
            model + flags.mark(model, eps),
            percent(float(auto.clean(model).mean())),
            "-" if suite is None else with_floor(suite, auto),
            with_floor(attacked, auto),
        ]
        for path in paths:
            there = path in auto.members(model)
            both = (auto.claimed(model, eps, path), auto.under(model, eps, [path])) if there else ()
            line.append(", ".join(percent(float(one.mean())) for one in both) or "-")
        gap = gap_to_auto(results, auto, model)
        line.append(with_floor(worst_of_all(results, auto, model), auto))
        line.append("-" if gap is None else points(gap.value) + in_brackets(*gap.interval()))
        cells.append(line)
    floor = percent(auto.floor())
    cells.append([FLOOR, floor, floor, floor, *["-"] * len(paths), floor, "-"])
    return [*lines, *markdown_table(titles, cells, left=1)]


def suite_beside(results: ImageResults | None, auto: ImageResults, model: str) -> np.ndarray | None:
    """Who of AutoAttack's images is right in the adaptive worst case of our suite; None where that was not run."""
    if results is None:
        return None
    return results.only(auto.images, results.worst(model, auto.ladder[-1], "adaptive"))


def worst_of_all(results: ImageResults | None, auto: ImageResults, model: str) -> np.ndarray:
    """Who is right under AutoAttack, images of it that were made for a pathway, and our suite."""
    worst, suite = auto.worst(model, auto.ladder[-1], "adaptive"), suite_beside(results, auto, model)
    return worst if suite is None else worst & suite


def gap_to_auto(results: ImageResults | None, auto: ImageResults, model: str) -> Share | None:
    """What our suite leaves minus what AutoAttack leaves of its images, paired; None without a suite."""
    suite = suite_beside(results, auto, model)
    if suite is None:
        return None
    return auto.estimate(suite) - auto.estimate(auto.under(model, auto.ladder[-1], [AUTOATTACK]))


def auto_rows(results: ImageResults | None, auto: ImageResults) -> list[dict]:
    """Rows of results.csv about AutoAttack's images: the worst of all attacks on them, and how much more our suite
    leaves than AutoAttack."""
    eps, count = auto.ladder[-1], len(auto.images)
    base = {
        "subset": auto.manifest["subset"], "suite": AUTOATTACK, "eps": eps, "n_images": count, "units": count
    }  # fmt: skip
    rows = []
    for model in auto.targets:
        own = {**base, "model": model, "kind": auto.targets[model]["role"]}
        worst, gap = worst_of_all(results, auto, model), gap_to_auto(results, auto, model)
        value, low, high, _ = share(np.ones_like(worst), worst)
        figure = {"attack": WORST_OF_ALL, "metric": "top1", "value": value, "ci_low": low, "ci_high": high}
        rows.append({**own, **figure})
        if gap is not None:
            low, high = gap.interval()
            figure = {
                "metric": "top1_suite_minus_autoattack",
                "value": gap.value,
                "ci_low": low,
                "ci_high": high,
            }
            rows.append({**own, **figure, "attack": AUTOATTACK})
    return rows


def knows_router(results: ImageResults | None, mixture: str) -> bool:
    """Whether an attack that adapts to the mixture was run."""
    return results is not None and results.members(mixture) != results.members(mixture, "common")


def auto_findings(results: ImageResults | None, auto: ImageResults) -> list[Finding]:
    """Where our suite and AutoAttack leave not the same of its images: too weak is who leaves more. Of mixtures what
    was made for their pathways counts as ours, and that no attack knew the router is told."""
    found, eps = [], auto.ladder[-1]
    for model in auto.targets:
        mixture, suite = model in auto.mixtures, suite_beside(results, auto, model)
        attacked, paths = auto.under(model, eps, [AUTOATTACK]), auto.members(model)[1:]
        if suite is None and not mixture:
            continue
        text = f"AutoAttack leaves {percent(float(attacked.mean()))} % of {len(auto.images)} images right"
        ours, reasons = auto.under(model, eps, paths), []
        if suite is not None:
            ours = ours & suite
            text += f", our suite {percent(float(suite.mean()))} %"
        if paths:
            text += f", {'it and ' * (suite is not None)}images made for its pathways {percent(float(ours.mean()))} %"
        if attacked.mean() - ours.mean() > GAP:
            why = (
                "the router hides its gradient from AutoAttack" if mixture else "AutoAttack is too weak here"
            )
            reasons.append(f"{why}, whose figure means nothing")
        if mixture and not knows_router(results, model):
            reasons.append("no attack that knows the router was run: nothing here may be called robust")
        if suite is not None and suite.mean() - attacked.mean() > GAP:
            reasons.append("our suite is too weak here, its figures mean nothing: go by the worst of all")
        severity = "flag" if reasons else "ok"
        found.append(Finding(BESIDE, model, eps, AUTOATTACK, severity, "; ".join([text, *reasons])))
    return found


def write_classifier_tables(
    folder: str | Path, clean: Clean, about: Mapping[str, About], dataset: str, ledgers: Mapping[str, Path]
) -> list[str]:
    """Writes the tables of a folder; results.csv last: where it is, all is there. ledgers: SUITE and AUTOATTACK, those
    that are complete. Returns a summary for a terminal."""
    folder, findings, rows, timing, telemetry = Path(folder), [], clean_rows(clean, about), [], []
    results, auto = (load_images(ledgers[name]) if name in ledgers else None for name in (SUITE, AUTOATTACK))
    for name, one in ((SUITE, results), (AUTOATTACK, auto)):
        if one is None:
            continue
        manifest, units = read_manifest(ledgers[name]), read_units(ledgers[name])
        findings += check_manifest(manifest, units, None if name == SUITE else (plausibility,))
        rows += robust_rows(one)
        timing += timing_rows(name, one, read_seconds(ledgers[name]))
        kinds = {target: own["identity"]["kind"] for target, own in one.targets.items()}
        records = list(records_of(manifest, units))
        telemetry += telemetry_rows(records, kinds)
    findings += collapse_findings(clean, () if results is None else results.targets)
    if auto is not None:
        rows += auto_rows(results, auto)
        findings += auto_findings(results, auto)
    findings += read_beside(folder).findings
    files = {
        "classifiers.md": clean_markdown(clean, about, dataset),
        "routes.csv": csv_text(ROUTE_COLUMNS, route_rows(clean)),
    }
    if ledgers or findings:
        files["checks.csv"] = csv_text(FINDING_COLUMNS, finding_rows(findings))
    if ledgers:
        files |= {
            "robustness.md": robust_markdown(results, auto, findings, about),
            "timing.csv": csv_text(TIMING_COLUMNS, timing),
            "telemetry.csv": csv_text(TELEMETRY_COLUMNS, telemetry),
        }
    for name in OF_ATTACKS:  # of an earlier evaluation here
        (folder / name).unlink(missing_ok=True)
    for name, text in files.items():
        atomic_write(folder / name, text.encode())
    atomic_write(folder / "results.csv", csv_text(RESULT_COLUMNS, rows).encode())
    return summary(clean, results, auto, Flags(findings))


def collapse_findings(clean: Clean, checked: Collection[str]) -> list[Finding]:
    """Flags of mixtures whose routes hardly hang on the image, but for those whose ledger is checked for it."""
    text = f"one expert has over {100 * COLLAPSE:g} % of the {len(clean.labels)} clean images at every site"
    return [
        Finding("gate collapse", model, None, "", "flag", text)
        for model, own in clean.answers.items()
        if own.routed and model not in checked and is_collapsed(loads_by_site(own))
    ]


def timing_rows(ledger: str, results: ImageResults, seconds: Mapping[str, float]) -> list[dict]:
    """Seconds of every attack over all images; passes per image as counted."""
    whole: dict[tuple, float] = {}
    for unit, key in results.seconds_of.items():
        whole[key] = whole.get(key, 0.0) + seconds.get(unit, 0.0)
    return [
        {"ledger": ledger, "model": model, "eps": eps, "attack": member, "seconds": round(spent, 3),
         "passes": results.passes(model, eps, [member])}
        for (model, eps, member), spent in whole.items()
    ]  # fmt: skip


def summary(clean: Clean, results: ImageResults | None, auto: ImageResults | None, flags: Flags) -> list[str]:
    """For a terminal: clean top-1 of all images, the adaptive worst case at each eps, and the worst of all attacks on
    AutoAttack's images, marked where a flag touches it."""
    eps = results.ladder if results is not None else ()
    columns = [(one, f"eps {eps_text(one)}", results) for one in eps]
    if auto is not None:
        title = f"with AutoAttack, eps {eps_text(auto.ladder[-1])}, {len(auto.images)} images"
        columns.append((auto.ladder[-1], title, auto))
    lines = [["top-1 in %", "clean", *(title for _, title, _ in columns)]]
    for model, own in clean.answers.items():
        line = [model, percent(float((own.said == clean.labels).mean())) + flags.mark(model, 0.0)]
        for one, _, of in columns:
            there = model in of.targets
            right = None
            if there:
                right = worst_of_all(results, auto, model) if of is auto else of.worst(model, one, "adaptive")
            line.append((percent(float(right.mean())) if there else "-") + flags.mark(model, one) * there)
        lines.append(line)
    attacked = [percent(of.floor()) for _, _, of in columns]
    return aligned([*lines, [FLOOR, percent(floor_of(clean)), *attacked]], left=1) + told_of(flags)
