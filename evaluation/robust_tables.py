"""Tables of a robust evaluation, each a function of its ledger: the same records give the same bytes."""

import csv
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from engine.checkpoints import atomic_write
from evaluation.beside import Beside, read_beside
from evaluation.certificate import Certified
from evaluation.deployment import deployed_rows, deployment_lines
from evaluation.detectors import DETECTION_COLUMNS, detection_table
from evaluation.findings import FINDING_COLUMNS, Flags, finding_lines, finding_rows, told_of
from evaluation.formats import aligned, csv_text, eps_text, in_brackets, markdown_table, percent, points
from evaluation.ledger import read_manifest, read_seconds, read_units
from evaluation.plan import records_of
from evaluation.record_checks import check_manifest
from evaluation.results import FLOOR, KINDS
from evaluation.robust_results import COLUMNS, RobustResults, Worst, within_floor
from evaluation.statistics import FEWEST_UNITS, Estimate
from evaluation.suites import CLEAN
from evaluation.tables import RESULT_COLUMNS
from evaluation.telemetry import COMPONENT_COLUMNS, TELEMETRY_COLUMNS, component_rows, telemetry_rows
from evaluation.transfer import (
    METRICS,
    TRANSFER_COLUMNS,
    below_worst_case,
    stronger_than_white_box,
    transfer_table,
)

NOTHING = Beside()
DETECTORS_TOLD = (
    "How well a score of the image tells attacked images from clean ones: of an attacker who knows nothing of it, and "
    "(adaptive) of one who lowers it while attacking, with the weight kappa that hides best among those that still "
    "take half as much accuracy (chosen on these very images, which its interval doesn't know). accuracy: clean > "
    "attacked > attacked by the adaptive one."
)
TITLES = {"miou": "mIoU", "aacc": "aAcc", "aacc_image_mean": "aAcc, mean of images"}
TABLES = (  # all that `write_robust` may write
    "robustness.csv", "robustness.md", "checks.csv", "telemetry.csv", "components.csv", "winners.csv", "timing.csv",
    "transfer.csv", "detectors.csv",
)  # fmt: skip
WINNER_COLUMNS = ("model", "eps", "column", "figure", "image", "attack", "attack_eps", "incumbent")
TIMING_COLUMNS = ("model", "eps", "attack", "seconds", "passes")


PASSES_TOLD = (
    "passes: forward passes per image at this eps, common / adaptive; what was found at smaller eps is a candidate "
    "too, and its passes come on top."
)


def load_robust(ledger: str | Path) -> RobustResults:
    """What a complete ledger says. UserError where there is none."""
    return RobustResults(read_manifest(ledger), read_units(ledger))


def write_robust(folder: str | Path, ledger: str | Path) -> tuple[RobustResults, Flags]:
    """Writes the tables of a complete ledger, and of what stands beside it in the folder (see evaluation.beside); puts
    their rows into results.csv where that is there. robustness.csv is last: where it is, all is there. Returns what
    they are made from, with the flags that were raised."""
    manifest, units = read_manifest(ledger), read_units(ledger)
    results, beside = RobustResults(manifest, units), read_beside(folder)
    too_weak = below_worst_case(
        beside.transfer, lambda target, eps: results.worst(target, eps, "adaptive").figures["aacc"].value
    )
    beside = replace(beside, findings=[*check_manifest(manifest, units), *beside.findings, *too_weak])
    records = list(records_of(manifest, units))
    kinds = {name: target["identity"]["kind"] for name, target in results.targets.items()}
    experts = {name: list(target["identity"].get("experts", ())) for name, target in results.targets.items()}
    rows = robust_rows(results, beside.certificates)
    files = {
        "checks.csv": csv_text(FINDING_COLUMNS, finding_rows(beside.findings)),
        "telemetry.csv": csv_text(
            TELEMETRY_COLUMNS, telemetry_rows(records, kinds, experts, results.classes)
        ),
        "components.csv": csv_text(COMPONENT_COLUMNS, component_rows(records, kinds, experts)),
        "winners.csv": csv_text(WINNER_COLUMNS, winner_rows(results)),
        "timing.csv": csv_text(TIMING_COLUMNS, timing_rows(results, read_seconds(ledger))),
        "transfer.csv": csv_text(TRANSFER_COLUMNS, beside.transfer),
        "detectors.csv": csv_text(DETECTION_COLUMNS, beside.detectors),
        "robustness.md": robust_markdown(results, beside),
    }
    for name, text in files.items():
        if text.count("\n") == 1 and name in ("transfer.csv", "detectors.csv"):  # not asked for
            continue
        atomic_write(Path(folder) / name, text.encode())
    if (Path(folder) / "results.csv").exists():
        add_to_results(Path(folder) / "results.csv", rows)
    atomic_write(Path(folder) / "robustness.csv", csv_text(RESULT_COLUMNS, rows).encode())
    return results, Flags(beside.findings)


def add_to_results(path: str | Path, robust: Iterable[Mapping]) -> None:
    """Puts rows of attacks behind the other rows of a results.csv, in place of earlier ones."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if not row["suite"]]
    atomic_write(path, csv_text(RESULT_COLUMNS, [*rows, *robust]).encode())


def robust_rows(results: RobustResults, certificates: Sequence[Certified] = ()) -> list[dict]:
    """One row per figure in the columns of results.csv: clean, each attack, worst cases, certificates, floor,
    differences; and the same in bf16, where the networks are deployed so."""
    manifest = results.manifest
    base = {
        "subset": manifest["subset"],
        "suite": manifest["suite"],
        "n_images": len(results.images),
        "units": results.resamples.units,
    }
    rows = []

    def add(model: str, kind: str, attack: str, eps: float, found: Mapping[str, Estimate], **more) -> None:
        for name, estimate in found.items():
            low, high = estimate.interval()
            own = {"model": model, "kind": kind, "attack": attack, "eps": eps, "metric": name}
            rows.append({**base, **own, "value": estimate.value, "ci_low": low, "ci_high": high, **more})

    for model, target in results.targets.items():
        role = target["role"]
        add(model, role, CLEAN.name, 0.0, results.clean(model))
        before = [results.hidden(model, 0.0, member) for member in results.members(model)]
        add(model, role, CLEAN.name, 0.0, {name: one for found in before for name, one in found.items()})
        gate_free = results.gate_free(model, 0.0)
        if isinstance(gate_free, Estimate):
            add(model, role, CLEAN.name, 0.0, {"aacc_gate_free": gate_free})
        for eps in results.ladder:
            for member in results.members(model):
                passes = results.passes(model, eps, [member])
                found = results.single(model, eps, member) | results.hidden(model, eps, member)
                add(model, role, member, eps, found, passes_per_image=passes)
            for column in COLUMNS:
                worst, attack = results.worst(model, eps, column), f"worst of {column}"
                passes = results.passes(model, eps, results.members(model, column))
                add(model, role, attack, eps, worst.figures, passes_per_image=passes)
                own = {"model": model, "kind": role, "attack": attack, "eps": eps}
                bound = {"metric": "miou_search_bound", "value": worst.bracket.lower}
                rows.append({**base, **own, **bound, "passes_per_image": passes})
                gate_free = results.gate_free(model, eps, column)
                if isinstance(gate_free, Estimate):
                    add(model, role, attack, eps, {"aacc_gate_free": gate_free}, passes_per_image=passes)
    for one in certificates:
        if one.value is not None:
            own = {
                "model": one.model,
                "kind": results.targets[one.model]["role"],
                "attack": "interval bounds",
            }
            own |= {"eps": one.eps, "metric": "aacc_certified", "value": one.value}
            rows.append({**base, **own})
    for name, value in results.floor().items():
        rows.append({**base, "model": FLOOR, "kind": "floor", "metric": name, "value": value})
    for eps in results.ladder:
        for column in COLUMNS:
            for (gate, rival), found in results.differences(eps, column).items():
                add(f"{gate} - {rival}", "difference", f"worst of {column}", eps, found)
        for gate in results.mixtures:
            add(gate, "difference", "worst of common - worst of adaptive", eps, results.gaps(gate, eps))
    if results.deployed is not None:
        rows += deployed_rows(robust_rows(results.deployed))
    return rows


def winner_rows(results: RobustResults) -> Iterable[dict]:
    """Which attack won on which image in each worst case."""
    for model in results.targets:
        for eps in results.ladder:
            for column in COLUMNS:
                worst = results.worst(model, eps, column)
                for figure, selection in (("aacc", worst.accuracy), ("miou", worst.iou)):
                    for image, place in zip(results.images, selection.tolist(), strict=True):
                        won = worst.candidates[place]
                        yield {
                            "model": model,
                            "eps": eps,
                            "column": column,
                            "figure": figure,
                            "image": image,
                            "attack": won.attack,
                            "attack_eps": won.eps,
                            "incumbent": won.incumbent,
                        }


def timing_rows(results: RobustResults, seconds: Mapping[str, float]) -> Iterable[dict]:
    """Seconds of every attack over all images; passes per image as counted."""
    whole: Counter = Counter()
    for unit, key in results.seconds_of.items():
        whole[key] += seconds.get(unit, 0.0)
    for (model, eps, member), spent in whole.items():
        passes = results.passes(model, eps, [member])
        yield {"model": model, "eps": eps, "attack": member, "seconds": round(spent, 3), "passes": passes}


def robust_markdown(results: RobustResults, beside: Beside = NOTHING) -> str:
    """Everything that a reader needs, in percent. Flags among the findings are marked in the tables."""
    flags = Flags(beside.findings)
    lines = ["# Robustness", "", *(f"- {line}" for line in header_lines(results))]
    for eps in results.ladder:
        lines += ["", f"## eps {eps_text(eps)}: worst case", "", *worst_table(results, eps, flags)]
        lines += ["", *difference_lines(results, eps)]
        lines += ["", *gap_lines(results, eps)]
    for eps in results.ladder:
        lines += ["", f"## eps {eps_text(eps)}: single attacks, mIoU / aAcc", "", *single_table(results, eps)]
        lines += ["", f"Images won, by accuracy, at eps {eps_text(eps)}:", ""]
        lines += [f"- {line}" for line in won_lines(results, eps)]
    if results.deployed is not None:
        lines += ["", "## Scored in bf16", "", *deployment_lines(results, ordered(results), adaptive_figures)]
    if beside.certificates:
        lines += ["", "## Certificates", "", *certificate_lines(beside.certificates)]
    if beside.transfer:
        lines += ["", "## Transfer", "", *transfer_lines(beside.transfer)]
    if beside.detectors:
        lines += ["", "## Detectors", "", DETECTORS_TOLD, "", *detection_table(beside.detectors)]
    if beside.findings:
        lines += ["", "## Checks", "", *(f"- {line}" for line in finding_lines(beside.findings))]
    names = ", ".join(results.images)
    return "\n".join([*lines, "", "## Images", "", names]) + "\n"


def robust_summary(results: RobustResults, flags: Flags) -> list[str]:
    """For a terminal: mIoU of every model on the clean images and in the adaptive worst case at each eps, marked where
    a flag touches it."""
    lines = [["mIoU in %", "clean", *(f"eps {eps_text(eps)}" for eps in results.ladder)]]
    for model in ordered(results):
        found = {0.0: results.clean(model)["miou"]}
        found |= {eps: results.worst(model, eps, "adaptive").figures["miou"] for eps in results.ladder}
        lines.append([model, *(percent(one.value) + flags.mark(model, eps) for eps, one in found.items())])
    floor = percent(results.floor()["miou"])
    return aligned([*lines, [FLOOR, *[floor] * (1 + len(results.ladder))]], left=1) + told_of(flags)


def adaptive_figures(results: RobustResults, model: str, eps: float) -> dict[str, Estimate]:
    """mIoU and aAcc in the adaptive worst case; eps 0: of the clean images."""
    found = results.worst(model, eps, "adaptive").figures if eps else results.clean(model)
    return {TITLES[name]: found[name] for name in ("miou", "aacc")}


def in_words(protocol: Mapping) -> str:
    """The protocol of a ledger for people."""
    return ", ".join(
        f"{key.replace('_', ' ')} {value if not isinstance(value, list) else ' x '.join(map(str, value))}"
        for key, value in protocol.items()
        if key not in ("classes", "ignore_index") and value != "none"
    )


def header_lines(results: RobustResults) -> list[str]:
    """What has to be told beside the figures."""
    manifest, about = results.manifest, in_words(results.protocol)
    units = results.resamples.units
    interval = f"95 % bootstrap over {units} blocks of images"
    if units < FEWEST_UNITS:
        interval = f"none, as there are {units} blocks of images and {FEWEST_UNITS} are needed"
    return [
        f"Suite {manifest['suite']} on {len(results.images)} images of {manifest['subset']}; {about}.",
        f"mIoU over the {len(results.counted)} classes with ground truth in these images, of {len(results.classes)}; "
        f"figures in percent; intervals: {interval}.",
        "common: worst case over attacks that are the same for every model (balanced_masked_ce weighs the classes by "
        "what the model was trained on). adaptive: over those and attacks that know the gate, the members of the "
        "ensemble, or (single networks) as many restarts. Both hold for the attacks that were run, and for no others.",
        PASSES_TOLD,
        "bound: no choice of one recorded attack per image has a lower mIoU; it says nothing of other attacks.",
        "any gate: pixels of the adaptive worst case that are right whatever weights a gate of this kind gives, from "
        "the experts alone (clean: of the clean images). With one weight for all classes: where it is far below aAcc, "
        "the experts are lost and only the gate holds. Weights for each class can break pixels that all experts have "
        "right, so that only the fall from clean tells anything there. A diagnostic of these images, no bound on "
        "others.",
        f"A figure marked * is within its interval of the floor ({FLOOR}): there nothing can be compared. "
        "A model marked !1 has a flag raised against its figures: see Checks.",
    ]


def worst_table(results: RobustResults, eps: float, flags: Flags) -> list[str]:
    floor = results.floor()
    titles = ["model", "kind", "passes"]
    for name in ("miou", "aacc", "aacc_image_mean"):
        titles += [f"{TITLES[name]} clean", "common", "adaptive"]
        titles += {"miou": ["bound"], "aacc": ["any gate"]}.get(name, [])
    lines = []
    for model in ordered(results):
        clean, found = results.clean(model), [results.worst(model, eps, column) for column in COLUMNS]
        passes = [results.passes(model, eps, results.members(model, column)) for column in COLUMNS]
        line = [
            model + flags.mark(model, eps),
            results.targets[model]["role"],
            " / ".join(f"{count:g}" for count in passes),
        ]
        for name in ("miou", "aacc", "aacc_image_mean"):
            line += [percent(clean[name].value), *(with_interval(one, name, floor) for one in found)]
            line += [percent(found[-1].bracket.lower)] * (name == "miou")
            line += [gate_free_cell(results, model, eps)] * (name == "aacc")
        lines.append(line)
    last = [FLOOR, "floor", "-"]
    for name in ("miou", "aacc", "aacc_image_mean"):
        last += [percent(floor[name]), "-", "-"] + ["-"] * (name != "aacc_image_mean")
    return markdown_table(titles, [*lines, last], left=2)


def transfer_lines(rows: Sequence[Mapping]) -> list[str]:
    """Images made for one model and shown to the others, and where they hurt more than those made for it."""
    first = rows[0]
    lines = [
        f"Images of {first['attack']} at eps {eps_text(first['eps'])}, {first['n_images']} of them, made for one model "
        "and shown to every model, in percent."
    ]
    for metric in METRICS:
        lines += ["", *transfer_table(rows, metric)]
    pairs = [
        f"made for {row['source']}, shown to {row['target']}, {points(row['against_own'])} points"
        + in_brackets(row["against_own_low"], row["against_own_high"])
        for row in stronger_than_white_box(rows)
    ]
    told = "; ".join(pairs) or "nowhere"
    return [
        *lines, "", f"Fewer right pixels than by the images made for the model itself: {told}.",
        "", f"Intervals over {first['units']} blocks are in transfer.csv.",
    ]  # fmt: skip


def certificate_lines(certificates: Sequence[Certified]) -> list[str]:
    """What no attack within eps can change, proved by interval bounds; or that there is no proof, and why."""
    lines: dict[str, list[str]] = {}
    for one in certificates:
        where = f"at {eps_text(one.eps)} " if one.value is not None else ""
        said = one.reason if one.value is None else f"{percent(one.value)} % of the pixels"
        lines.setdefault(one.model, []).append(where + said)
    return [f"- {model}: {', '.join(dict.fromkeys(said))}." for model, said in lines.items()]


def gate_free_cell(results: RobustResults, model: str, eps: float) -> str:
    """At the images of the worst case, and at the clean ones."""
    found, clean = (results.gate_free(model, one) for one in (eps, 0.0))
    if isinstance(found, Estimate) and isinstance(clean, Estimate):
        return f"{percent(found.value)} (clean {percent(clean.value)})"
    return next((one for one in (found, clean) if isinstance(one, str)), "-")


def with_interval(worst: Worst, name: str, floor: Mapping[str, float]) -> str:
    estimate = worst.figures[name]
    low, high = estimate.interval()
    text = percent(estimate.value) + in_brackets(low, high)
    return text + " *" * within_floor(estimate, floor[name])


def single_table(results: RobustResults, eps: float) -> list[str]:
    """mIoU / aAcc of every model under every attack; a dash where it is not among the model's attacks."""
    columns = dict.fromkeys(member for model in results.targets for member in results.members(model))
    lines = []
    for model in ordered(results):
        cells = []
        for member in columns:
            if member not in results.members(model):
                cells.append("-")
                continue
            found = results.single(model, eps, member)
            cells.append(f"{percent(found['miou'].value)} / {percent(found['aacc'].value)}")
        lines.append([model, *cells])
    return markdown_table(["model", *columns], lines, left=1)


def won_lines(results: RobustResults, eps: float) -> Iterable[str]:
    for model in ordered(results):
        worst = results.worst(model, eps, "adaptive")
        won = [worst.candidates[place] for place in worst.accuracy.tolist()]
        counts = Counter(
            one.attack + ("" if one.eps in (0.0, eps) else f" at {eps_text(one.eps)}") for one in won
        )
        yield f"{model}: " + ", ".join(f"{name} {count}" for name, count in counts.most_common())


def difference_lines(results: RobustResults, eps: float) -> list[str]:
    """The gate with the highest adaptive worst case against each ensemble and baseline, and what that says."""
    differences = results.differences(eps, "adaptive")
    if not differences:
        return []
    floor, lines = results.floor(), []
    for name in ("miou", "aacc"):
        values = {
            model: results.worst(model, eps, "adaptive").figures[name]
            for model in (*results.mixtures, *results.rivals)
        }
        best = max(results.mixtures, key=lambda gate: values[gate].value)
        for rival in results.rivals:
            gap = differences[best, rival][name]
            low, high = gap.interval()
            at_floor = all(within_floor(values[model], floor[name]) for model in (best, rival))
            shown = (
                f"{TITLES[name]}, adaptive: {best} - {rival} = {percent(gap.value)}{in_brackets(low, high)}"
            )
            lines.append(f"- {shown}: {verdict(low, high, at_floor)}.")
    chosen = len(results.mixtures) > 1
    return [*lines, *["", "The gate is the best of several on these very images, which favours it."] * chosen]


def gap_lines(results: RobustResults, eps: float) -> list[str]:
    """What attacks find that know a gate, beyond those that don't."""
    lines = []
    for model in results.mixtures:
        gaps = results.gaps(model, eps)
        told = (
            f"{percent(gaps[name].value)}{in_brackets(*gaps[name].interval())} {TITLES[name]}"
            for name in ("miou", "aacc")
        )
        lines.append(f"- {model}: {', '.join(told)}")
    return ["Common minus adaptive worst case, in points:", "", *lines] if lines else []


def verdict(low: float, high: float, at_floor: bool, first: str = "the gate") -> str:
    """What a paired difference with this interval says of what was subtracted from."""
    if at_floor:
        return "both are at the floor, nothing can be said"
    if math.isnan(low):
        return "too few blocks of images to tell"
    if low > 0:
        return f"{first} is more robust on data like these"
    return f"{first} is less robust on data like these" if high < 0 else "these data can't tell"


def ordered(results: RobustResults) -> Sequence[str]:
    """Models by the kind of their row, as other tables have them."""
    order = {kind: place for place, kind in enumerate(KINDS)}
    return sorted(results.targets, key=lambda name: order.get(results.targets[name]["role"], -1))
