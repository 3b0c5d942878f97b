"""The page holds the numbers of its folders, is self-contained, and stands whatever rows there are."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from engine.config import UserError
from evaluation.results import Results
from evaluation.robust_tables import load_robust
from evaluation.tables import Cost, write_tables
from reports.report import write_report
from tests.evaluation import robust_toy as toy


def evaluation_folder(folder, results, **options):
    results.save(folder / "per_image.npz")
    write_tables(folder, results, **options)
    return folder


def run_folder(folder, gate=False):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"name: demo/{folder.name}\ngate: {'{type: simple}' if gate else 'null'}\n"
    )
    columns = "epoch,step,images_seen,loss,lr,miou"
    (folder / "metrics.csv").write_text(
        f"{columns}\n1,10,80,2.5,0.1,\n2,20,160,1.5,0.1,0.625\n3,30,240,1.2,0.1,0.5\n"
    )
    (folder / "timing.csv").write_text("epoch,seconds,validation_seconds\n1,40,0\n2,40,3.5\n3,40,3\n")
    environment = {
        "command": ["/here/train_deeplab.py", "configs/a b.yaml"],
        "git": {"commit": "c" * 40, "dirty": True},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


class Page(HTMLParser):
    """Text, tables (rows of cells with their classes) and everything that points somewhere."""

    def __init__(self, path):
        super().__init__()
        self.words, self.rows, self.links, self.open = [], [], [], []
        self.feed(path.read_text())
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "data")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(["", dict(attrs).get("class") or ""])

    def handle_data(self, data):
        if "style" not in self.open[-1:]:
            self.words.append(data)
        if self.rows and self.rows[-1] and {"td", "th"} & set(self.open[-2:]):
            self.rows[-1][-1][0] += data

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def row(self, name):
        return next(row for row in self.rows if row and row[0][0].strip() == name)


def test_the_matrix_with_its_marks(tmp_path, results_of):
    costs = {"moe_simple": Cost(8_912_345, 112_345, 2.449, 18000, 2300)}
    results = replace(results_of(), dead={"moe_simple": np.full(12, 0.125)})
    folder = evaluation_folder(tmp_path / "eval", results, costs=costs)
    write_report([folder], [], tmp_path / "demo" / "report.html")
    page = Page(tmp_path / "demo" / "report.html")
    expert = page.row("highway")
    assert [cell for cell, _ in expert[1:5]] == ["81.82", "33.33", "53.85", "33.33"]
    assert "home" in expert[1][1] and "best" in expert[1][1]
    assert "abroad" in expert[2][1] and "best" not in expert[2][1]
    assert "home" not in expert[3][1] + expert[4][1] and "abroad" not in expert[3][1] + expert[4][1]
    assert [cell for cell, _ in page.row("true subset")[1:5]] == ["81.82", "81.82", "81.82", "-"]
    for name in ("best gate, simple", "true subset"):
        assert not any("best" in marks for _, marks in page.row(name))
    assert [cell for cell, _ in page.row("moe_simple")[9:]] == [
        "8.91 M",
        "112 345",
        "2.45",
        "18 000",
        "2 300",
    ]
    assert "12.5 %" in page.text and "0.90 ± 0.00" in page.text
    assert "On highway the highway expert is 48.48 points above the urban expert." in page.text
    assert "demo" in page.text and "no evidence about real roads" in page.text


def test_intervals_and_the_comparison_of_the_gate(tmp_path, results_of):
    few = results_of()
    results = Results(
        **{**vars(few), "blocks": few.images}
    )  # four of each subset, eight of highway and urban
    twice = {"images": tuple(f"frame{index}" for index in range(24)), "subsets": few.subsets * 2}
    twice |= {"blocks": twice["images"], "matrices": np.concatenate([few.matrices] * 2, axis=1)}
    for name in ("truth", "luma"):
        twice[name] = np.concatenate([getattr(few, name)] * 2)
    for name in ("weights", "cases", "scores"):
        twice[name] = {row: np.concatenate([array] * 2) for row, array in getattr(few, name).items()}
    many = Results(**{**vars(few), **twice})
    for name, one in (("few", results), ("many", many)):
        write_report([evaluation_folder(tmp_path / name, one)], [], tmp_path / f"{name}.html")
    few, many = (Page(tmp_path / f"{name}.html") for name in ("few", "many"))
    assert few.row("highway")[3][0] == "53.85"
    text = many.row("highway")[3][0]  # on all: 16 units
    value, low, high = re.fullmatch(r"([\d.]+) \[([\d.]+), ([\d.]+)\]", text).groups()
    assert value == "53.85" and float(low) < 53.85 < float(high)
    assert many.row("highway")[1][0] == "81.82"  # eight
    assert "moe_classwise against the best of the others" in many.text
    (line,) = [row for row in many.rows if row and row[0][0] == "all" and "baseline" in row[1][0]]
    assert line[2][0] == "16" and line[3][0] == "+7.25 [7.2, 7.2]"  # no image differs from another in that
    (line,) = [row for row in few.rows if row and row[0][0] == "all" and "baseline" in row[1][0]]
    assert line[2][0] == "8" and line[3][0] == "+7.25"


def test_disagreement_regret_and_light_have_their_columns(tmp_path, results_of):
    results = results_of()
    results.weights["moe_simple"][:4, 0, 0] = [0.9, 0.8, 0.7, 0.75]
    folder = evaluation_folder(tmp_path / "eval", results)
    write_report([folder], [], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    rows = [row for row in page.rows if row and row[0][0].strip() == "moe_simple"]
    (cases,) = [row for row in rows if "60.00" in row[1][0]]
    texts = [" ".join(text.split()) for text, _ in cases[1:]]
    right, wrong = 149, 51
    differ = f"{(1 + 35 / wrong - 35 / right) / 2:.2f}"
    assert texts == ["60.00 92", "5.00 40", "30.00 50", "0.00 -", "5.00 50", differ, "0.70"]
    (gate,) = [row for row in rows if "±" in row[2][0]]  # its first line, of highway
    texts = [" ".join(text.split()) for text, _ in gate[1:]]
    assert texts[:3] == ["highway", "0.79 ± 0.07 -0.80", "0.10 ± 0.00 -"]
    assert texts[6:8] == ["16.56", "10.00"]
    assert "Where the experts differ" in page.text


def test_the_page_is_self_contained_and_real_data_get_no_warning(tmp_path, results_of):
    folder = evaluation_folder(tmp_path / "eval", results_of(dataset="camvid"), subsets=["all"])
    (folder / "overlays").mkdir()
    for name in ("urban_b.png", "highway_a.png"):
        (folder / "overlays" / name).write_bytes(b"\x89PNG" + name.encode())
    write_report(
        [folder],
        [run_folder(tmp_path / "one"), run_folder(tmp_path / "two", gate=True)],
        tmp_path / "report.html",
    )
    page = Page(tmp_path / "report.html")
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search("https?:|@import|url[(]|<script", (tmp_path / "report.html").read_text())
    assert "no evidence" not in page.text and "camvid" in page.text
    assert page.text.index("highway: a") < page.text.index("urban: b")


def test_runs_commands_and_configs(tmp_path, results_of):
    folder = evaluation_folder(tmp_path / "eval", results_of())
    runs = [run_folder(tmp_path / name) for name in ("highway", "urban")]
    (tmp_path / "urban" / "metrics.csv").unlink()
    write_report([folder], runs, tmp_path / "report.html", title="A <b>bold</b> title")
    page = Page(tmp_path / "report.html")
    (run,) = [row for row in page.rows if len(row) == 7 and row[0][0] == "highway"]
    assert [cell for cell, _ in run] == ["highway", "3", "30", "240", "62.50", "2", "2:06"]
    assert page.text.count("python train_deeplab.py 'configs/a b.yaml'") == 1
    assert "c" * 12 + " with local changes" in page.text
    assert "name: demo/urban" in page.text and "A <b>bold</b> title" in page.text


def test_other_evaluations_than_the_usual_one(tmp_path, results_of):
    three = evaluation_folder(tmp_path / "three", results_of(experts=("highway", "urban", "fog")))
    alone = evaluation_folder(tmp_path / "alone", results_of(experts=(), gates=()))
    no_gate = evaluation_folder(tmp_path / "no_gate", results_of(gates=()), subsets=["fog", "highway"])
    whole = evaluation_folder(tmp_path / "whole", results_of(), subsets=["all"])
    write_report([three, alone, no_gate, whole], [], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert all(name in page.text for name in ("three", "alone", "no_gate", "whole", "weight of fog"))


def test_a_robust_evaluation_has_its_curves_and_tables(tmp_path, results_of):
    folder = evaluation_folder(tmp_path / "eval", results_of())
    write_report([folder], [], tmp_path / "clean.html")
    toy.run_to_tables(folder)
    (folder / "corruptions.md").write_text("- Data roadscenes.\n\n## all\n")
    write_report([folder], [], tmp_path / "attacked.html")
    clean, page = Page(tmp_path / "clean.html"), Page(tmp_path / "attacked.html")
    assert "Robustness" not in clean.text and "Corruptions" not in clean.text
    assert (
        "Robustness" in page.text and "eps 2/255: worst case" in page.text and "Data roadscenes." in page.text
    )
    results = load_robust(folder / "ledger")
    worst = 100 * results.worst("gate", 2 / 255, "adaptive").figures["miou"].value
    rows = [row for row in page.rows if len(row) > 5 and row[0][0].split(" !")[0] == "gate"]
    assert any(row[5][0].startswith(f"{worst:.2f}[") for row in rows)
    assert sum(link.startswith("data:image/png") for link in page.links) == 1 + sum(
        link.startswith("data:image/png") for link in clean.links
    )
    (folder / "robustness.csv").unlink()  # the ledger goes on: its tables are old
    write_report([folder], [], tmp_path / "half.html")
    assert 'alt="mIoU over eps"' not in (tmp_path / "half.html").read_text()


def test_missing_folders_are_told_and_nothing_is_written(tmp_path, results_of):
    with pytest.raises(UserError, match="per_image.npz: no evaluation here"):
        write_report([tmp_path / "nowhere"], [], tmp_path / "report.html")
    folder = evaluation_folder(tmp_path / "eval", results_of())
    (folder / "matrix.csv").unlink()
    with pytest.raises(UserError, match="matrix.csv: missing"):
        write_report([folder], [], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_curves_of_runs_that_have_one_name_are_told_apart(tmp_path, results_of, monkeypatch):
    shown = []
    monkeypatch.setattr("reports.charts.progress", lambda runs, experts: shown.extend(runs) or b"")
    folders = [
        run_folder(tmp_path / name, gate=True) for name in ("gates/moe", "on_train/moe", "gates/other")
    ]
    write_report([evaluation_folder(tmp_path / "test", results_of())], folders, tmp_path / "page.html")
    assert [run.name for run in shown] == ["gates/moe", "on_train/moe", "other"]
