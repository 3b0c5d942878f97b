"""Tables of classifiers: a function of ledgers made by hand, every figure known."""

import csv
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluation.beside import FINDINGS, write_beside
from evaluation.classifier_tables import (
    AUTOATTACK,
    SUITE,
    TIMING_COLUMNS,
    About,
    Clean,
    auto_findings,
    differences,
    load_images,
    read_clean,
    robust_markdown,
    share,
    summary,
    told,
    write_classifier_tables,
)
from evaluation.classifiers import Answers, save_answers
from evaluation.findings import Finding, Flags
from evaluation.results import FLOOR
from evaluation.tables import RESULT_COLUMNS
from tests.evaluation import image_ledgers as made
from tests.evaluation.image_ledgers import LABELS, MOE, PATHS, PLAIN, wrong

ROOT = Path(__file__).resolve().parents[2]
ABOUTS = {
    MOE: About("cnn_moe", 2000, 1100, 0.0123, 0.01, 0.0023, "advmoe", 0.004),
    PLAIN: About("cnn", 1000, 1000, 0.01, 0.01, 0.0, "trades"),
}


def clean():
    """The mixture has all but the last image right, of which expert 1 has every image wrong; the plain one all."""
    labels = np.array(LABELS)
    said = labels.copy()
    said[11] = 0
    ranked = np.stack([said, *((said + step) % 4 for step in (1, 2, 3))], axis=1)
    routes = np.array([[0]] * 9 + [[1]] * 3)
    moe = Answers(ranked, routes, np.stack([labels, (labels + 1) % 4], axis=1), labels)
    plain = np.stack([(labels + step) % 4 for step in range(4)], axis=1)
    return Clean(np.array(made.IMAGES), labels, tuple("abcd"), {MOE: moe, PLAIN: Answers(plain)}, "test")


def test_a_mixture_of_several_experts_at_once_has_loads_and_no_routes(tmp_path):
    both = clean()
    weights = np.tile(np.float32([0.25, 0.75]), (12, 1, 1))
    both.answers[MOE] = Answers(both.answers[MOE].ranked, weights=weights)
    write_classifier_tables(tmp_path, both, ABOUTS, "toy", {})
    figures = {
        row["metric"]: row["value"] for row in rows_of(tmp_path / "results.csv") if row["model"] == MOE
    }
    assert set(figures) == {"top1", "rise", "load_0", "load_1", "effective_experts"}
    assert float(figures["rise"]) == 0.004
    assert (float(figures["load_0"]), float(figures["load_1"])) == (0.25, 0.75)
    text = (tmp_path / "classifiers.md").read_text()
    assert f"| {MOE} | 1.75 | 25.00 | - | - | 75.00 | - | - | - | - | 91.67 | - |" in text
    assert "takes none of these routes; load is the share of the weight there" in text
    assert "images of each label" not in text and rows_of(tmp_path / "routes.csv") == []


@pytest.mark.parametrize("sites", [1, 2])
def test_a_mixture_that_sends_all_images_one_way_is_marked_without_attacks_too(sites, tmp_path):
    """Of two sites each has an expert of its own: loads alike, and a plain network all the same."""
    both, text = clean(), "moe: gate collapse: one expert has over 95 % of the 12 clean images at every site"
    own = both.answers[MOE]
    for name, route in (("routed", own.routes[:, 0]), ("collapsed", np.zeros(12, int))):
        both.answers[MOE] = replace(own, routes=np.stack([route, 1 - route][:sites], axis=1))
        told = write_classifier_tables(tmp_path / name, both, ABOUTS, "toy", {})
        lines = (tmp_path / name / "classifiers.md").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith((f"| {MOE} | 1.", f"| {MOE} ! | 1."))]
        found = [
            line.startswith(f"| {MOE} ! | 1.00 |"),
            f"!1 {text}" in told,
            any("91.67 !1" in one for one in told),
        ]
        assert found == [name == "collapsed"] * 3
        assert (tmp_path / name / "checks.csv").exists() == (name == "collapsed")
        assert any("!: at every site one expert has over 95 % of them" in line for line in lines)


def test_where_routes_have_several_sites_the_tables_say_what_an_image_counts_for(tmp_path):
    one, several = clean(), clean()
    own = one.answers[MOE]
    several.answers[MOE] = replace(own, routes=np.repeat(own.routes, 4, axis=1))
    texts = []
    for place, both in enumerate((one, several)):
        write_classifier_tables(tmp_path / str(place), both, ABOUTS, "toy", {})
        texts.append((tmp_path / str(place) / "classifiers.md").read_text())
    assert (
        f"## {MOE}: images of each label that take each expert\n" in texts[0]
        and "most of its sites" not in texts[0]
    )
    assert f"## {MOE}: images of each label that take each expert at most sites\n" in texts[1]
    assert "is that of the one which most of its sites take" in texts[1]


def write(folder, names=(SUITE, AUTOATTACK)):
    ledgers = {}
    if SUITE in names:
        ledgers[SUITE] = made.suite(folder / "ledger")
    if AUTOATTACK in names:
        ledgers[AUTOATTACK] = made.auto(folder / "ledger_autoattack")
    write_classifier_tables(folder, clean(), ABOUTS, "toy", ledgers)
    return ledgers


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def value(written):
    """(value, interval, whole row) of the one row with these cells."""

    def find(**cells):
        cells = {key: str(one) for key, one in cells.items()}
        (row,) = [row for row in rows_of(written / "results.csv") if cells.items() <= row.items()]
        return float(row["value"]) * 12, row

    return find


def exact_interval(hits, images, level=0.95):
    """Clopper-Pearson by halving: the p at which that many hits, or more extreme counts, have half of 1 - level."""

    def at_least(p, hits):
        return sum(math.comb(images, k) * p**k * (1 - p) ** (images - k) for k in range(hits, images + 1))

    def solved(wanted, hits):
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if at_least(middle, hits) < wanted else (low, middle)
        return low

    tail = (1 - level) / 2
    return (solved(tail, hits) if hits else 0.0, solved(1 - tail, hits + 1) if hits < images else 1.0)


@pytest.mark.parametrize(("hits", "images"), [(0, 12), (1, 12), (7, 12), (12, 12), (41, 60)])
def test_shares_have_their_exact_interval(hits, images):
    counted = np.array([True] * images + [False] * 3)
    right = np.array([place < hits for place in range(images)] + [True] * 3)
    found = share(counted, right)
    assert found[0] == hits / images and found[3] == images
    assert found[1:3] == pytest.approx(exact_interval(hits, images), abs=1e-9)
    low, high = exact_interval(hits, images)
    assert told(counted, right) == f"{100 * hits / images:.2f} [{100 * low:.1f}, {100 * high:.1f}]"
    assert math.isnan(share(~counted, np.zeros_like(right))[0]) == (images == 0)
    assert told(np.zeros_like(counted), right) == "-"


def test_results_csv_has_one_row_for_every_figure(written, value):
    rows = rows_of(written / "results.csv")
    assert list(rows[0]) == list(RESULT_COLUMNS)
    keys = [tuple(row[key] for key in ("model", "suite", "attack", "eps", "metric")) for row in rows]
    assert len(keys) == len(set(keys))
    suite = {"suite": "standard", "eps": 0.02}
    assert value(model=MOE, suite="", metric="top1")[0] == pytest.approx(11)
    assert value(model=MOE, suite="", metric="constant_1")[0] == pytest.approx(0)
    assert value(model=MOE, suite="", metric="route_1")[1]["n_images"] == "3"
    assert value(model=MOE, suite="", metric="load_1")[0] == pytest.approx(3)
    assert value(model=MOE, attack="worst of adaptive", metric="top1", **suite)[0] == pytest.approx(3)
    worst, row = value(model=MOE, attack="worst of common", metric="top1", **suite)
    assert worst == pytest.approx(9) and float(row["passes_per_image"]) == 4
    assert (float(row["ci_low"]), float(row["ci_high"])) == pytest.approx(exact_interval(9, 12))
    assert value(model=MOE, metric="all_paths_empirical", **suite)[0] == pytest.approx(2)
    passes = value(model=MOE, metric="all_paths_empirical", **suite)[1]["passes_per_image"]
    assert float(passes) == 30 + 2 * (4 + 9)  # of the mixture and of both pathways
    router, row = value(model=MOE, metric="top1_attack_on_router", **suite)
    assert router == pytest.approx(12 - len({2, 7, 11}))
    assert (row["attack"], float(row["passes_per_image"])) == ("gate_only + change_route", 5 + 6)
    experts, row = value(model=MOE, metric="top1_attack_on_experts", **suite)
    assert experts == pytest.approx(12 - len({3, 11})) and row["attack"] == "experts_only"
    assert value(model=MOE, metric="route_stability", **suite)[0] == pytest.approx(8)
    assert value(model=FLOOR, suite="standard")[0] == pytest.approx(4)
    kinds = {row["model"]: row["kind"] for row in rows}
    assert kinds[PATHS[0]] == "pathway" and kinds[f"{MOE} - {PLAIN}"] == "difference"
    assert not [row for row in rows if row["model"] == PLAIN and row["metric"] == "route_stability"]


def test_autoattack_stands_with_its_own_figures(written, value):
    suite = {"suite": "autoattack", "eps": 0.02, "model": MOE}

    def of_ten(**cells):
        return value(**suite, **cells)[0] / 12 * 10

    assert of_ten(attack="autoattack", metric="top1") == pytest.approx(9)
    assert of_ten(attack="autoattack path 0", metric="top1") == pytest.approx(8)
    assert of_ten(attack="autoattack path 0", metric="top1_of_pathway") == pytest.approx(2)
    assert of_ten(attack="worst of adaptive", metric="top1") == pytest.approx(7)
    assert of_ten(attack="worst of all", metric="top1") == pytest.approx(2)
    gap, row = value(**suite, metric="top1_suite_minus_autoattack")
    assert gap == pytest.approx(12 * (0.2 - 0.9)) and float(row["ci_low"]) < -0.7 < float(row["ci_high"]) < 0


def test_markdown_tells_what_the_ledgers_say(written):
    text = (written / "robustness.md").read_text().splitlines()
    table = text[text.index("## eps 5.1/255: worst case, top-1") :]
    (line,) = [line for line in table[:8] if line.startswith(f"| {MOE} !")]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1:4] == ["cnn_moe", "4 / 30", "91.67"]
    assert cells[4] == "75.00 [42.8, 94.5]" and cells[5] == "25.00* [5.5, 57.2]"  # the floor is at 33.33
    assert [cell.split()[0] for cell in cells[6:]] == ["16.67", "75.00", "83.33", "66.67"]
    (near,) = [line for line in text[: text.index(table[0])] if line.startswith(f"| {MOE} !")]
    assert "| 58.33* [27.7, 84.8] |" in near  # its interval reaches the floor
    pairs = [line for line in text if line.startswith(f"- {MOE} - {PLAIN}: ")]
    assert len(pairs) == 2 and all(
        line.endswith(" (no ranking)") for line in pairs
    )  # nobody knows of PLAIN's training
    ended = {name: replace(one, rise=0.0049) for name, one in ABOUTS.items()}
    again = robust_markdown(load_images(written / "ledger"), None, [], ended)
    told = [
        line.endswith(" (no ranking)")
        for line in again.splitlines()
        if line.startswith(f"- {MOE} - {PLAIN}: ")
    ]
    assert told == [False, True]  # at the larger eps both are at the floor
    (plain,) = [line for line in table[:12] if line.startswith(f"| {PLAIN} ")]
    assert plain.split("|")[7:11] == [" - "] * 4
    auto = text[text.index("## AutoAttack") :]
    assert "at eps 5.1/255 on the first 10 of the attacked images, seed 3, in batches of 5" in auto[2]
    (line,) = [line for line in auto if line.startswith(f"| {MOE} !")]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    # of ten images the suite leaves 8, 9 right, AutoAttack all but 0
    assert cells[1] == "100.00" and cells[2].startswith("20.00* [") and cells[3].startswith("90.00 [")
    assert cells[4:6] == ["20.00, 80.00", "90.00, 100.00"] and cells[6].startswith("20.00* [")
    assert cells[7].startswith("-70.00 [")
    (plain,) = [line for line in auto if line.startswith(f"| {PLAIN} ")]
    assert "| - | - |" in plain and "+10.00 [" in plain
    assert "*: within its interval of the floor of these images, 40.00." in auto[2]
    assert f"| {FLOOR} | 40.00 | 40.00 | 40.00 | - | - | 40.00 | - |" in auto
    assert "-16.67 [" in [line for line in text if line.startswith(f"- {MOE} - {PLAIN}")][0]
    names = (written / "classifiers.md").read_text()
    costs = "0.0123 (0.0100 + 0.0023) | 2,000 | 1,100"
    assert f"| moe | cnn_moe | advmoe | 91.67 [61.5, 99.8] | - | {costs} | +0.40 |" in names
    assert f"| {PLAIN} | cnn | trades |" in names and "| 0.0100 | 1,000 | 1,000 |" in names
    assert (
        "| moe | 1.75 | 75.00 | 100.00 | 100.00 | 25.00 | 66.67 | 0.00 | 100.00 | 0.00 | 91.67 | 100.00 |"
        in names
    )
    assert "| a | 3 | 1 |" in names and "| d | 2 | 0 |" in names


def test_differences_are_of_whole_models_and_paired(written):
    results = load_images(written / "ledger")
    found = differences(results, 0.01)
    assert list(found) == [(MOE, PLAIN)]
    assert found[MOE, PLAIN].value == pytest.approx((7 - 9) / 12)
    low, high = found[MOE, PLAIN].interval()
    assert low < (7 - 9) / 12 < high


def test_the_checks_say_why_plain_attacks_are_not_believed(written, tmp_path):
    flags = {(row["model"], row["check"], row["eps"]): row["text"] for row in rows_of(written / "checks.csv")
             if row["severity"] == "flag"}  # fmt: skip
    told = flags[MOE, "AutoAttack beside our suite", "0.02"]
    assert told == (
        "AutoAttack leaves 90.00 % of 10 images right, our suite 20.00 %, it and images made for its pathways 20.00 %; "
        "the router hides its gradient from AutoAttack, whose figure means nothing"
    )
    assert "the common figure means nothing" in flags[MOE, "masking", "0.02"]
    told = flags[PLAIN, "AutoAttack beside our suite", "0.02"]
    assert told == (
        "AutoAttack leaves 0.00 % of 10 images right, our suite 10.00 %; our suite is too weak here, its figures mean "
        "nothing: go by the worst of all"
    )


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


def test_made_again_they_are_the_same_bytes(written):
    before = files_of(written)
    assert set(before) == {
        "classifiers.md", "routes.csv", "robustness.md", "checks.csv", "timing.csv", "telemetry.csv", "results.csv",
    }  # fmt: skip
    write(written)
    assert files_of(written) == before
    timing = rows_of(written / "timing.csv")
    assert tuple(timing[0]) == TIMING_COLUMNS and {row["ledger"] for row in timing} == {SUITE, AUTOATTACK}
    units = {
        row["attack"]: float(row["seconds"]) for row in timing if row["model"] == MOE and row["eps"] == "0.02"
    }
    assert units["pgd"] == 3.0 and units["autoattack"] == 2.0  # a second for each batch


def test_without_attacks_no_table_of_earlier_ones_is_left(tmp_path):
    write(tmp_path)
    write_classifier_tables(tmp_path, clean(), ABOUTS, "toy", {})
    assert {name for name in files_of(tmp_path)} == {"classifiers.md", "results.csv", "routes.csv"}
    assert not [row for row in rows_of(tmp_path / "results.csv") if row["suite"]]


def test_what_checks_of_the_networks_found_stands_there(tmp_path):
    found = Finding("batch invariance", PLAIN, None, "", "flag", "it draws lots")
    write_beside(tmp_path / FINDINGS, [found])
    write(tmp_path, [SUITE])
    assert "batch invariance: it draws lots" in (tmp_path / "robustness.md").read_text()
    assert "## AutoAttack" not in (tmp_path / "robustness.md").read_text()


def test_answers_of_the_clean_pass_are_read_from_its_folder(tmp_path):
    given = clean()
    save_answers(tmp_path / "per_image.npz", given.names, given.labels, given.answers)
    found = read_clean(tmp_path, list("abcd"), "test")
    assert found.split == "test" and found.classes == tuple("abcd") and list(found.answers) == [MOE, PLAIN]
    flags = Flags([Finding("masking", MOE, 0.02, "", "flag", "a gap")])
    lines = summary(found, load_images(made.suite(tmp_path / "ledger")), None, flags)
    assert lines[0].split() == ["top-1", "in", "%", "clean", "eps", "2.55/255", "eps", "5.1/255"]
    assert lines[1].split() == [MOE, "91.67", "58.33", "25.00", "!1"]
    assert lines[3].split() == ["best", "constant", "class", *["33.33"] * 3] and lines[-1].startswith("!1 ")
    alone = summary(replace(found, answers={PLAIN: found.answers[PLAIN]}), None, None, Flags([]))
    assert alone[1].split() == [PLAIN, "100.00"] and len(alone) == 3
    suite, auto = load_images(tmp_path / "ledger"), load_images(made.auto(tmp_path / "auto"))
    both = summary(found, suite, auto, flags)
    assert both[0].endswith("eps 5.1/255  with AutoAttack, eps 5.1/255, 10 images")
    assert both[1].split() == [MOE, "91.67", "58.33", "25.00", "!1", "20.00", "!1"]
    assert both[2].split() == [PLAIN, "100.00", "75.00", "25.00", "0.00"]


def test_killed_within_autoattack_and_between_units_the_tables_are_those_of_an_uninterrupted_run(tmp_path):
    command = [sys.executable, "-m", "tests.evaluation.classifier_toy", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "[9,",
        *["9,"] * 5,
        "9]",
        "0",
    ]  # each of them by SIGKILL, the last by itself
    whole, killed = (files_of(tmp_path / name) for name in ("whole", "killed"))
    assert set(whole) == set(killed) and len(whole) == 7
    assert [name for name in whole if whole[name] != killed[name]] in ([], ["timing.csv"])
