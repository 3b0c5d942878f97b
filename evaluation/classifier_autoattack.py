"""Tables of AutoAttack on classifiers, beside our own suite on the same images."""

import numpy as np

from evaluation.classifier_attacked import with_floor
from evaluation.classifier_clean import share
from evaluation.findings import Finding, Flags
from evaluation.formats import eps_text, in_brackets, markdown_table, percent, points
from evaluation.image_results import ImageResults
from evaluation.record_checks import GAP
from evaluation.results import FLOOR
from evaluation.statistics import ShareGap

AUTOATTACK = "autoattack"  # the member; on one pathway: autoattack path 0
WORST_OF_ALL = "worst of all"  # of our suite, AutoAttack, and AutoAttack on pathways
BESIDE = "AutoAttack beside our suite"


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
    suite = "-" if results is None else floor
    cells.append([FLOOR, floor, suite, floor, *["-"] * len(paths), floor, "-"])
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


def gap_to_auto(results: ImageResults | None, auto: ImageResults, model: str) -> ShareGap | None:
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
