"""Findings beside the figures that they touch."""

from dataclasses import replace

from evaluation.findings import Finding, Flags, finding_lines, finding_rows

LOW, HIGH = 2 / 255, 8 / 255
MASKED = Finding("masking", "moe", HIGH, "", "flag", "a gap")
COLLAPSED = Finding("gate collapse", "moe", None, "", "flag", "one expert")
LOST = Finding("silent success", "net", HIGH, "pgd", "flag", "lost")
SHORT = Finding("incomplete optimisation", "net", LOW, "pgd", "note", "short")
FINE = Finding("float32", "net", None, "", "ok", "float32")
ALL = [FINE, MASKED, COLLAPSED, LOST, SHORT]


def test_marks_touch_the_rows_of_their_target_and_eps():
    flags = Flags(ALL)
    assert flags.mark("moe", HIGH) == " !1,2"
    assert flags.mark("moe", LOW) == flags.mark("moe", 0.0) == " !2"  # all of its rows
    assert flags.mark("net", HIGH) == " !3"
    assert flags.mark("net", LOW) == flags.mark("other", HIGH) == ""  # a note is no flag
    assert flags.lines() == [
        "!1 moe, eps 8/255: masking: a gap",
        "!2 moe: gate collapse: one expert",
        "!3 net, eps 8/255, pgd: silent success (indicator of attack failure 3): lost",
    ]


def test_a_report_tells_flags_notes_and_what_was_fine():
    assert finding_lines(ALL)[3:] == [
        "Note: net, eps 2/255, pgd: incomplete optimisation (indicator of attack failure 4): short",
        "Nothing wrong: float32: net.",
    ]
    assert finding_lines([FINE])[0] == "No check raised a flag."


def test_a_check_that_flags_or_notes_a_model_anywhere_does_not_call_it_fine():
    """At another eps, or of another attack, it may well be."""
    fine = [replace(one, eps=1 / 255, attack="fgsm", severity="ok") for one in (MASKED, LOST, SHORT)]
    other = replace(fine[1], target="other")
    assert finding_lines([*ALL, *fine, other])[4:] == [
        "Nothing wrong: float32: net.",
        "Nothing wrong: silent success (indicator of attack failure 3): other.",
    ]


def test_rows_hold_everything():
    assert finding_rows([LOST])[0] == {
        "model": "net", "eps": HIGH, "attack": "pgd", "check": "silent success (indicator of attack failure 3)",
        "severity": "flag", "text": "lost",
    }  # fmt: skip
