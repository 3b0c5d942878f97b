"""What an evaluation prints: its results table, mIoU by row and subset, and notes."""

import math
from collections.abc import Iterable, Sequence

from engine.schema import ROBUST_EPS
from engine.sections import Section
from evaluation.formats import aligned, in_brackets, percent, points
from evaluation.intervals import COMPARED, Intervals, clean_estimates, difference_rows
from evaluation.results import KINDS, Results, main_subset
from evaluation.statistics import FEWEST_UNITS, LEVEL, units_named

HEADINGS = {
    "baseline": "further baselines",
    "expert": "further experts",
    "ensemble": "further ensembles",
    "gate": "further gates",
    "control": "controls: what a gate has to beat",
    "ceiling": "ceilings: may look at the label",
    "floor": "floor",
}

ATTACK_KEYS = (
    "eps", "norm", "attack_rows", "attack_images", "attack_batch_size", "attack_seed", "attack_checks", "pathways",
    "restarts",
)  # fmt: skip


def results_table(results: Results, subsets: Sequence[str], first: Sequence[str]) -> str:
    """Lines of rows x subsets, mIoU in percent with the number of classes counted in parentheses: the rows named
    in `first` in that order, then all others by kind. A dash where a row is not defined. Intervals only on "all" (or
    the first subset), where the chosen gate is compared below the table too."""
    protocol = results.protocol
    main = main_subset(subsets)
    intervals = clean_estimates(results, [main])
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
                [name + " *" * (name == results.chosen), *_cells(results, name, subsets, intervals)]
                for name in names
            ]
    where = "the label's own size" if protocol.resolution == "native" else "the network's input size"
    text = [
        f"mIoU in % (classes counted) on {protocol.dataset}, split {protocol.split}, "
        f"{len(results.images)} images, at {where}",
        "",
        *_aligned(lines),
        "",
        *_compared(results, main, intervals),
    ]
    return "\n".join([*text, "* gate chosen on val"] if results.chosen else text).rstrip()


def _cells(results: Results, name: str, subsets: Sequence[str], intervals: Intervals) -> Iterable[str]:
    for subset in subsets:
        value, estimate = results.miou(name, subset), intervals.get((name, subset, "miou"))
        interval = in_brackets(*estimate.interval()) if estimate else ""
        yield "-" if math.isnan(value) else f"{percent(value)}{interval} ({results.counted(name, subset)})"


def _compared(results: Results, subset: str, intervals: Intervals) -> list[str]:
    """The gate against the best of other kinds, a line each, and of how many units the intervals are."""
    rows = [row for row in difference_rows(results, [subset], intervals) if row["metric"] == COMPARED]
    lines = [
        f"{row['row']} minus {row['against']} (best {row['kind']}) on {subset}: {points(row['difference'])} points"
        f"{in_brackets(row['ci_low'], row['ci_high'])}"
        for row in rows
    ]
    units = next((estimate.units for estimate in intervals.values()), 0)
    told = f"[{100 * LEVEL:.0f} % intervals over {units} {units_named(results.blocks)}]"
    return [*lines, told] if units >= FEWEST_UNITS else lines


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """First column to the left, the others to the right; a line of one cell is a heading."""
    table = iter(aligned([line for line in lines if len(line) > 1], left=1))
    texts = []
    for line in lines:
        texts += ["", line[0]] if len(line) == 1 else [next(table)]
    return texts


def note_idle(settings: Section, keys: Sequence[str] = ATTACK_KEYS, attacker: str = "nothing") -> None:
    """Names on the terminal those of the keys that a config sets, where only the attacker attacks. What only another
    key would make use of is refused with the config; here `suite: none` may have turned attacks off at once."""
    fields = type(settings).model_fields
    idle = [
        f"evaluate.{key}"
        for key in keys
        if key in fields and getattr(settings, key) not in (fields[key].default, list(ROBUST_EPS))
    ]
    if idle:
        print(f"note: {attacker} attacks here (evaluate.suite: none), without effect: {', '.join(idle)}")
