"""What honesty checks found, and how it gets beside the figures that it touches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from evaluation.formats import eps_text

FINDING_COLUMNS = ("model", "eps", "attack", "check", "severity", "text")

# The six indicators of attack failure of Pintor et al. 2022 (arXiv 2106.09947), by the names of the checks that are
# built on them, in the paper's order.
INDICATORS = (
    "unavailable gradients",
    "unstable predictions",
    "silent success",
    "incomplete optimisation",
    "transfer failure",
    "unconstrained attack",
)


@dataclass(frozen=True)
class Finding:
    """What a check says of a target: nothing wrong (ok), something to know (note), or that figures are not to be
    believed as they stand (flag). eps None: of all; attack "": of none in particular."""

    check: str
    target: str
    eps: float | None
    attack: str
    severity: Literal["ok", "note", "flag"]
    text: str

    @property
    def indicator(self) -> int | None:
        """Number of the indicator of attack failure that it is, 1 to 6."""
        return INDICATORS.index(self.check) + 1 if self.check in INDICATORS else None

    @property
    def title(self) -> str:
        number = f" (indicator of attack failure {self.indicator})" if self.indicator else ""
        return self.check + number


class Flags:
    """The flags among findings, numbered: a mark behind a figure, and what it says below the table."""

    def __init__(self, findings: Iterable[Finding]):
        self.flags = [one for one in findings if one.severity == "flag"]

    def of_row(self, target: str, eps: float) -> list[Finding]:
        """Those that touch the figures of a target at an eps. What holds for all eps touches the clean row, 0, as
        well."""
        return [one for one in self.flags if one.target == target and one.eps in (None, eps)]

    def mark(self, target: str, eps: float) -> str:
        """Such as " !1,3", nothing for a row without flags."""
        numbers = [str(self.flags.index(one) + 1) for one in self.of_row(target, eps)]
        return " !" + ",".join(numbers) if numbers else ""

    def lines(self) -> list[str]:
        """Each flag with its number."""
        return [f"!{number} {in_words(one)}" for number, one in enumerate(self.flags, start=1)]


def told_of(flags: Flags) -> list[str]:
    """What a terminal says below figures that flags touch; nothing without flags."""
    return ["", *flags.lines()] if flags.flags else []


def in_words(finding: Finding) -> str:
    """Target, eps and attack, the check and what it says."""
    where = [finding.target]
    where += [] if finding.eps is None else [f"eps {eps_text(finding.eps)}"]
    where += [finding.attack] if finding.attack else []
    return f"{', '.join(where)}: {finding.title}: {finding.text}"


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Of a report: flags, then notes, in full; then which checks found nothing wrong at all, for which targets."""
    flags, notes, fine = (
        [one for one in findings if one.severity == severity] for severity in ("flag", "note", "ok")
    )
    lines = Flags(flags).lines() or ["No check raised a flag."]
    lines += [f"Note: {in_words(one)}" for one in notes]
    told = {(one.title, one.target) for one in (*flags, *notes)}
    passed: dict[str, dict[str, None]] = {}
    for one in fine:
        if (one.title, one.target) not in told:
            passed.setdefault(one.title, {})[one.target] = None
    return lines + [f"Nothing wrong: {title}: {', '.join(targets)}." for title, targets in passed.items()]


def finding_rows(findings: Iterable[Finding]) -> list[dict]:
    """One row per finding in the columns of FINDING_COLUMNS."""
    return [
        {
            "model": one.target,
            "eps": one.eps,
            "attack": one.attack,
            "check": one.title,
            "severity": one.severity,
            "text": one.text,
        }
        for one in findings
    ]
