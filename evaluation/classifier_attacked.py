"""Tables of what the attacks of a suite leave of classifiers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from evaluation.classifier_clean import About, all_told, share
from evaluation.deployment import deployed_rows, deployment_lines
from evaluation.findings import Flags
from evaluation.formats import eps_text, in_brackets, markdown_table, percent, points
from evaluation.image_results import ON_EXPERTS, ImageResults
from evaluation.record_checks import ON_GATE
from evaluation.results import FLOOR
from evaluation.robust_results import COLUMNS
from evaluation.robust_tables import PASSES_TOLD, in_words
from evaluation.statistics import Estimate
from evaluation.suites import CLEAN


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


def attacked_lines(results: ImageResults, about: Mapping[str, About], flags: Flags) -> list[str]:
    """Everything that a reader needs of a suite, in percent."""
    lines = [f"- {line}" for line in header_lines(results)]
    for eps in results.ladder:
        title = f"## eps {eps_text(eps)}: worst case, top-1"
        lines += ["", title, "", *worst_table(results, eps, flags), *difference_lines(results, eps, about)]
    for eps in results.ladder:
        title = f"## eps {eps_text(eps)}: single attacks, top-1"
        lines += ["", title, "", *single_table(results, eps, flags)]
    if results.deployed is not None:
        lines += ["", "## Scored in bf16", "", *deployment_lines(results, results.targets, adaptive_figures)]
    return lines


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
        "mixture broke; empirical, no proof. Of routes by stage or layer attacks on a pathway force the same expert at "
        "every site, and no others of the many routes, and there is no such figure. on the router, on "
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


def difference_lines(results: ImageResults, eps: float, about: Mapping[str, About]) -> list[str]:
    """Of every pair of models; none where there is but one."""
    pairs = differences(results, eps)
    if not pairs:
        return []
    lowest = {one for one in results.whole if at_floor(results.worst(one, eps, "adaptive"), results)}

    def unranked(pair: tuple[str, str]) -> bool:
        return any(about[one].unfinished for one in pair) or lowest.issuperset(pair)

    return [
        "",
        "Paired differences of adaptive worst cases, in points, 95 % bootstrap over images; (no ranking) "
        "where the training of one had not ended, or is not known to have, or both are at the floor:",
        "",
        *(
            f"- {' - '.join(pair)}: {points(found.value)}{in_brackets(*found.interval())}"
            + " (no ranking)" * unranked(pair)
            for pair, found in pairs.items()
        ),
    ]


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
