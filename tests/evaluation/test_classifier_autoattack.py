"""AutoAttack beside our own suite."""

from dataclasses import replace

import numpy as np

from evaluation.classifier_autoattack import AUTOATTACK, auto_findings
from evaluation.classifier_tables import SUITE, write_classifier_tables
from evaluation.image_results import load_images
from tests.evaluation import image_ledgers as made
from tests.evaluation.classifier_folder import ABOUTS, clean, rows_of, write
from tests.evaluation.image_ledgers import MOE, PLAIN, wrong


def test_autoattack_alone_calls_no_mixture_robust(tmp_path):
    write(tmp_path, [AUTOATTACK])
    (found,) = auto_findings(None, load_images(tmp_path / "ledger_autoattack"))
    assert found.severity == "flag" and found.target == MOE
    assert found.text.endswith("no attack that knows the router was run: nothing here may be called robust")
    text = (tmp_path / "robustness.md").read_text()
    assert f"| {MOE} !1 | 100.00 | - |" in text and "worst case" in text


def test_autoattack_alone_tells_of_collapse(tmp_path):
    """Its ledger isn't asked; that of a suite is, so that nothing is told twice (here its gate says 100 % as well)."""
    collapsed = clean()
    collapsed.answers[MOE] = replace(collapsed.answers[MOE], routes=np.zeros((12, 1), int))
    makers = {SUITE: made.suite, AUTOATTACK: made.auto}
    for names in (AUTOATTACK,), (SUITE, AUTOATTACK):
        folder = tmp_path / "_".join(names)
        ledgers = {name: makers[name](folder / name) for name in names}
        write_classifier_tables(folder, collapsed, ABOUTS, "toy", ledgers)
        flags = [row for row in rows_of(folder / "checks.csv") if row["check"] == "gate collapse"]
        assert [(row["model"], row["severity"]) for row in flags] == [(MOE, "flag")]


def test_autoattack_alone_is_checked_for_plausibility_and_says_nothing_of_routes(tmp_path):
    write(tmp_path, [AUTOATTACK])
    rows = rows_of(tmp_path / "checks.csv")
    assert {row["check"] for row in rows if row["model"] == PLAIN} == {"plausibility"}
    assert not [row for row in rows_of(tmp_path / "results.csv") if row["metric"] == "route_stability"]


def test_no_gap_no_flag(tmp_path):
    every = {key: made.wrong(*range(12)) for key in ((MOE, 0.02, "autoattack"), (PLAIN, 0.02, "autoattack"))}
    auto = load_images(made.write(tmp_path / "auto", made.auto_plan(), every))
    results = load_images(made.suite(tmp_path / "suite"))
    found = auto_findings(results, auto)  # of the mixture the suite leaves 20 %, of the plain network 10 %
    assert [(one.target, one.severity) for one in found] == [(MOE, "flag"), (PLAIN, "flag")]
    few = {(MOE, 0.02, "autoattack"): wrong(*range(8)), (PLAIN, 0.02, "autoattack"): wrong(*range(9))}
    auto = load_images(made.write(tmp_path / "few", made.auto_plan(), few))
    assert [one.severity for one in auto_findings(results, auto)] == ["ok", "ok"]
    auto = load_images(made.write(tmp_path / "none", made.auto_plan(), {}))
    moe, plain = auto_findings(results, auto)
    assert moe.text.endswith("the router hides its gradient from AutoAttack, whose figure means nothing")
    assert plain.text.endswith("AutoAttack is too weak here, whose figure means nothing")


def test_a_plain_attack_beside_autoattack_knows_no_router(tmp_path):
    plan = made.suite_plan()
    for target in plan["targets"]:
        target["members"] = [one for one in target["members"] if one["column"] == "common"]
    results = load_images(made.write(tmp_path / "plain", plan, {}))
    auto = load_images(made.write(tmp_path / "auto", made.auto_plan(), {}))
    moe, plain = auto_findings(results, auto)
    assert moe.severity == "flag" and moe.text.endswith("nothing here may be called robust")
    assert plain.severity == "ok"
