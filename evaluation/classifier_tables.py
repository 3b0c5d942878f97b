"""All tables of an evaluation of classifiers, as a function of its clean answers and its ledgers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.checkpoints import atomic_write
from evaluation.beside import read_beside
from evaluation.classifier_attacked import attacked_lines, robust_rows
from evaluation.classifier_autoattack import AUTOATTACK, auto_findings, auto_lines, auto_rows, worst_of_all
from evaluation.classifier_clean import (
    ROUTE_COLUMNS,
    About,
    Clean,
    clean_markdown,
    clean_rows,
    collapse_findings,
    floor_of,
    route_rows,
)
from evaluation.findings import FINDING_COLUMNS, Flags, finding_lines, finding_rows, told_of
from evaluation.formats import aligned, csv_text, eps_text, percent
from evaluation.image_results import ImageResults
from evaluation.ledger import read_manifest, read_seconds, read_units
from evaluation.plan import records_of
from evaluation.record_checks import check_manifest, plausibility
from evaluation.results import FLOOR
from evaluation.tables import RESULT_COLUMNS
from evaluation.telemetry import COMPONENT_COLUMNS, TELEMETRY_COLUMNS, component_rows, telemetry_rows

SUITE = "suite"
OF_ATTACKS = (
    "robustness.md",
    "checks.csv",
    "timing.csv",
    "telemetry.csv",
    "components.csv",
)  # only attacks have these
TIMING_COLUMNS = ("ledger", "model", "eps", "attack", "seconds", "passes")


def write_classifier_tables(
    folder: str | Path, clean: Clean, about: Mapping[str, About], dataset: str, ledgers: Mapping[str, Path]
) -> list[str]:
    """Writes the tables of a folder; results.csv last: where it is, all is there. ledgers: SUITE and AUTOATTACK, those
    that are complete. Returns a summary for a terminal."""
    folder, findings, rows = Path(folder), [], clean_rows(clean, about)
    timing, telemetry, parts = [], [], []
    found: dict[str, ImageResults] = {}
    for name in (SUITE, AUTOATTACK):
        if name not in ledgers:
            continue
        manifest, units = read_manifest(ledgers[name]), read_units(ledgers[name])
        found[name] = one = ImageResults(manifest, units)
        findings += check_manifest(manifest, units, None if name == SUITE else (plausibility,))
        rows += robust_rows(one)
        timing += timing_rows(name, one, read_seconds(ledgers[name]))
        kinds = {target: own["identity"]["kind"] for target, own in one.targets.items()}
        records = list(records_of(manifest, units))
        telemetry += telemetry_rows(records, kinds)
        if name == SUITE:
            parts += component_rows(records, kinds, {model: one.pathways(model) for model in one.mixtures})
    results, auto = found.get(SUITE), found.get(AUTOATTACK)
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
            "components.csv": csv_text(COMPONENT_COLUMNS, parts),
        }
    for name in OF_ATTACKS:  # of an earlier evaluation here
        (folder / name).unlink(missing_ok=True)
    for name, text in files.items():
        atomic_write(folder / name, text.encode())
    atomic_write(folder / "results.csv", csv_text(RESULT_COLUMNS, rows).encode())
    return summary(clean, results, auto, Flags(findings))


def robust_markdown(
    results: ImageResults | None, auto: ImageResults | None, findings: Sequence, about: Mapping[str, About]
) -> str:
    """Everything that a reader needs of the attacked images, in percent. Flags among the findings are marked."""
    flags, lines = Flags(findings), ["# Robustness", ""]
    if results is not None:
        lines += attacked_lines(results, about, flags)
    if auto is not None:
        lines += ["", "## AutoAttack", "", *auto_lines(results, auto, flags)]
    if findings:
        lines += ["", "## Checks", "", *(f"- {line}" for line in finding_lines(findings))]
    return "\n".join(lines) + "\n"


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
