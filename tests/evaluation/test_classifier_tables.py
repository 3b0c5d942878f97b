"""Tables of classifiers: a function of ledgers made by hand, every figure known."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.beside import FINDINGS, write_beside
from evaluation.classifier_autoattack import AUTOATTACK
from evaluation.classifier_clean import read_clean
from evaluation.classifier_tables import (
    SUITE,
    TIMING_COLUMNS,
    robust_markdown,
    summary,
    write_classifier_tables,
)
from evaluation.classifiers import save_answers
from evaluation.findings import Finding, Flags
from evaluation.image_results import load_images
from evaluation.results import FLOOR
from evaluation.tables import RESULT_COLUMNS
from tests.evaluation import image_ledgers as made
from tests.evaluation.classifier_folder import ABOUTS, clean, exact_interval, rows_of, write
from tests.evaluation.image_ledgers import MOE, PATHS, PLAIN

ROOT = Path(__file__).resolve().parents[2]


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
    costs = "0.0123 (0.01 + 0.0023) | 2,000 | 1,100"
    assert f"| moe | cnn_moe | advmoe | 91.67 [61.5, 99.8] | - | {costs} | +0.40 |" in names
    assert f"| {PLAIN} | cnn | trades |" in names and "| 0.01 | 1,000 | 1,000 |" in names
    assert (
        "| moe | 1.75 | 75.00 | 100.00 | 100.00 | 25.00 | 66.67 | 0.00 | 100.00 | 0.00 | 91.67 | 100.00 |"
        in names
    )
    assert "| a | 3 | 1 |" in names and "| d | 2 | 0 |" in names


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


def test_parts_of_a_mixture_are_told_on_the_images_that_the_worst_case_left(written):
    """Images 0 to 7 and 11 are lost to some attack; joint flips 1, gate_only 2 and 3, change_route 7."""
    rows = [row for row in rows_of(written / "components.csv") if row["eps"] == "0.02"]
    assert {row["model"] for row in rows} == {MOE}
    parts = {row["part"]: (round(12 * float(row["value"]), 6), row["n_images"]) for row in rows}
    assert parts["model"] == (3, "12") and parts["clean"] == (11, "12")
    assert parts[f"expert {PATHS[0]}, attacked by itself"] == (9, "12")
    assert parts[f"expert {PATHS[1]}, attacked by itself"] == (9, "12")
    assert parts["route changed at a recorded point"] == (4, "12")


def test_made_again_they_are_the_same_bytes(written):
    before = files_of(written)
    assert set(before) == {
        "classifiers.md", "routes.csv", "robustness.md", "checks.csv", "timing.csv", "telemetry.csv", "components.csv",
        "results.csv",
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
    assert set(whole) == set(killed) and len(whole) == 8
    assert [name for name in whole if whole[name] != killed[name]] in ([], ["timing.csv"])
