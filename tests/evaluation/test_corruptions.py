"""Passes under corruptions: what is counted, what is read again, and tables that follow from the counts."""

import csv
import io
from dataclasses import replace

import numpy as np
import pytest
import torch

from dataloaders.loader import Batch
from engine.config import UserError
from evaluation.corruptions import MEAN, Corrupted, CorruptionTables, rounds, write_corruptions
from evaluation.results import FLOOR, Protocol, Results, RowInfo
from evaluation.tables import RESULT_COLUMNS, write_tables
from metrics.confusion import aacc, miou

CLASSES = ("road", "sky", "rail")
GRID = [("fog", 1), ("fog", 5), ("snow", 1), ("snow", 5)]


def results_with(right, seed=0, frames=24) -> Results:
    """Of two networks and a gate that is defined on `day` only; `right` of 50 pixels of each class are right."""
    random = np.random.default_rng(seed)
    matrices = np.zeros((3, frames, 3, 3), np.int32)
    for row, share in enumerate((right, right / 2, right)):
        good = random.binomial(50, share / 50, (frames, 2))
        matrices[row, :, 0, 0], matrices[row, :, 0, 2] = good[:, 0], 50 - good[:, 0]
        matrices[row, :, 1, 1], matrices[row, :, 1, 0] = good[:, 1], 50 - good[:, 1]
    rows = (
        RowInfo("base", "baseline"),
        RowInfo("expert", "expert"),
        RowInfo("router", "control", subsets=("day",)),
        RowInfo(FLOOR, "floor"),
    )
    half = frames // 2
    return Results(
        protocol=Protocol("toy", "test", CLASSES, ("day", "night"), (4, 8), absent="nan"),
        rows=rows,
        images=tuple(f"frame{index}" for index in range(frames)),
        subsets=("day",) * half + ("night",) * half,
        blocks=tuple(f"block{index}" for index in range(frames)),
        matrices=matrices,
        truth=np.tile([50, 50, 0], (frames, 1)),
        luma=np.full(frames, 0.5),
    )


def filled(subsets=("day", "all"), grid=GRID):
    corruptions = list(dict.fromkeys(corruption for corruption, _ in grid))
    severities = sorted({severity for _, severity in grid})
    tables = CorruptionTables(results_with(40), subsets, corruptions, severities, seed=3)
    for number, (corruption, severity) in enumerate(grid):
        tables.add(corruption, severity, results_with(30 - 5 * number, seed=number + 1))
    return tables


def batch(names, seed):
    images = torch.randint(0, 256, (len(names), 4, 6, 3), generator=torch.Generator().manual_seed(seed))
    frames = [type("Frame", (), {"name": name})() for name in names]
    pixels = images.to(torch.uint8).permute(0, 3, 1, 2)
    return Batch(pixels, torch.zeros(len(names), 4, 6, dtype=torch.uint8), frames, [0], [False])


def test_every_image_is_changed_by_its_name_and_the_batch_stays():
    batches = [batch(["a", "b"], 0), batch(["c"], 1)]
    before = [one.images.clone() for one in batches]
    seen = []

    def change(image, name):
        assert image.dtype == np.uint8 and image.shape == (4, 6, 3)
        seen.append(name)
        return image[:, ::-1] // 2

    corrupted = Corrupted(batches, change)
    assert len(corrupted) == 2
    for new, old, kept in zip(corrupted, batches, before, strict=True):
        assert torch.equal(new.images, kept.flip(3) // 2) and new.images.dtype == torch.uint8
        assert new.images.permute(0, 2, 3, 1).is_contiguous()
        assert new.labels is old.labels and new.frames is old.frames
        assert torch.equal(old.images, kept)
    assert seen == ["a", "b", "c"]


def test_passes_go_on_where_they_stopped(tmp_path):
    done = []

    def evaluate(corruption, severity):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append((corruption, severity))
        return results_with(severity)

    with pytest.raises(KeyboardInterrupt):
        list(rounds(tmp_path, GRID, {"seed": 1}, evaluate))
    assert done == GRID[:2]
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def rest(corruption, severity):
        assert (corruption, severity) in GRID[2:]
        return results_with(severity)

    got = list(rounds(tmp_path, GRID, {"seed": 1}, rest))
    assert [pair for *pair, _ in got] == [list(pair) for pair in GRID]
    assert all((tmp_path / name).read_bytes() == data for name, data in first.items())
    assert np.array_equal(got[1][2].matrices, results_with(5).matrices)
    again = list(rounds(tmp_path, GRID, {"seed": 1}, lambda *_: pytest.fail("ran again")))
    assert len(again) == 4


def test_passes_of_something_else_are_refused(tmp_path):
    list(rounds(tmp_path, GRID[:1], {"seed": 1, "networks": {"a": "x"}}, lambda *_: results_with(30)))
    with pytest.raises(UserError, match=r"another evaluation, .*networks\.a \(was x, is y\); --overwrite"):
        next(rounds(tmp_path, GRID[:1], {"seed": 1, "networks": {"a": "y"}}, lambda *_: results_with(30)))
    (tmp_path / "fog_1.npz").write_bytes(b"damaged")
    with pytest.raises(UserError, match="fog_1.npz: damaged"):
        list(rounds(tmp_path, GRID[:1], {"seed": 1, "networks": {"a": "x"}}, lambda *_: results_with(30)))


def test_rows_are_the_figures_of_each_pass_over_classes_with_truth():
    tables = filled()
    rows = {
        (row["model"], row["subset"], row["corruption"], row["severity"], row["metric"]): row
        for row in tables.rows()
    }
    for number, (corruption, severity) in enumerate(GRID):
        results = results_with(30 - 5 * number, seed=number + 1)
        for model in ("base", "expert", FLOOR):
            total = results.total(model, "all")
            where = (model, "all", corruption, severity)
            assert rows[*where, "miou_gt_only"]["value"] == pytest.approx(miou(total, "gt_only"))
            assert rows[*where, "aacc"]["value"] == pytest.approx(aacc(total))
    expected = np.mean(
        [miou(results_with(30 - 5 * n, seed=n + 1).total("base", "all"), "gt_only") for n in range(4)]
    )
    mean = rows["base", "all", MEAN, MEAN, "miou_gt_only"]
    assert mean["value"] == pytest.approx(expected)
    assert mean["ci_low"] < expected < mean["ci_high"] and mean["units"] == 24
    fog = [rows["base", "all", "fog", severity, "miou_gt_only"]["value"] for severity in (1, 5)]
    assert rows["base", "all", "fog", MEAN, "miou_gt_only"]["value"] == pytest.approx(np.mean(fog))
    strong = [rows["base", "all", corruption, 5, "miou_gt_only"]["value"] for corruption in ("fog", "snow")]
    assert rows["base", "all", MEAN, 5, "miou_gt_only"]["value"] == pytest.approx(np.mean(strong))
    clean = miou(results_with(40).total("base", "all"), "gt_only")
    drop = rows["base", "all", MEAN, MEAN, "relative_drop"]
    assert drop["value"] == pytest.approx(1 - expected / clean)
    assert drop["ci_low"] < drop["value"] < drop["ci_high"]
    assert {row["model"] for row in tables.rows() if row["subset"] == "all"} == {"base", "expert", FLOOR}
    assert ("router", "day", MEAN, MEAN, "miou_gt_only") in rows


def test_the_class_set_is_that_of_the_truth_also_where_others_are_predicted():
    """Stray pixels of rail, which no frame has, move a mean over non-empty classes by a third, but not this one."""
    tables = filled()
    total = results_with(30, seed=1).total("base", "all")
    assert total[:, 2].sum() > 0 and miou(total, "nan") < miou(total, "gt_only")
    assert tables.figures["base", "all", "fog", 1]["miou_gt_only"].value == pytest.approx(
        miou(total, "gt_only")
    )


def test_the_floor_is_that_of_the_clean_frames():
    tables = filled()
    assert {tables.mean(FLOOR, "all").value, tables.mean(FLOOR, "all", MEAN, 5).value} == {
        tables.clean_miou(FLOOR, "all").value
    }
    values = {tables.mean(FLOOR, "all", corruption, severity).value for corruption, severity in GRID}
    assert values == {tables.clean_miou(FLOOR, "all").value} and tables.drop(FLOOR, "all").value == 0


def test_other_images_are_refused():
    with pytest.raises(ValueError, match="fog 1: other images"):
        filled(grid=GRID[:1]).add("fog", 1, results_with(10, frames=22))


def test_a_network_that_is_always_wrong_loses_nothing_that_can_be_told():
    clean = results_with(0)
    tables = CorruptionTables(clean, ["all"], ["fog"], [1], seed=0)
    tables.add("fog", 1, clean)
    assert np.isnan(tables.drop("base", "all").value)
    assert "| base | baseline | 0.00 [0.0, 0.0] | 0.00 | 0.00 [0.0, 0.0] | - |" in tables.markdown()


def test_tables_on_disk(tmp_path):
    clean, tables = results_with(40), filled()
    write_tables(tmp_path, clean, subsets=["day", "all"])
    before = (tmp_path / "results.csv").read_text()
    write_corruptions(tmp_path, tables)
    once = {
        name: (tmp_path / name).read_bytes() for name in ("results.csv", "corruptions.csv", "corruptions.md")
    }
    text = once["results.csv"].decode()
    assert text.startswith(before)
    added = list(csv.DictReader(io.StringIO(text)))[len(before.splitlines()) - 1 :]
    assert tuple(added[0]) == RESULT_COLUMNS and {row["corruption"] for row in added} == {"fog", "snow", MEAN}
    write_corruptions(tmp_path, tables)  # in place of the rows that were there
    assert all((tmp_path / name).read_bytes() == data for name, data in once.items())
    wide = list(csv.DictReader(io.StringIO(once["corruptions.csv"].decode())))
    line = next(row for row in wide if (row["model"], row["subset"]) == ("base", "all"))
    assert list(line) == [
        "model", "kind", "subset", "clean", "fog", "snow", "mean", "relative_drop", "severity_1", "severity_5"
    ]  # fmt: skip
    assert float(line["mean"]) == pytest.approx((float(line["fog"]) + float(line["snow"])) / 2)
    assert float(line["mean"]) == pytest.approx((float(line["severity_1"]) + float(line["severity_5"])) / 2)
    assert float(line["relative_drop"]) == pytest.approx(1 - float(line["mean"]) / float(line["clean"]))
    page = once["corruptions.md"].decode()
    assert "frost is drawn, not photographed" in page and "labels don't follow" in page
    assert "24 images, 24 blocks, 2 classes." in page and "corruption seed 3." in page
    assert f"{100 * float(line['mean']):.2f} [" in page


def test_results_of_a_pass_keep_what_gates_said(tmp_path):
    cases = {"gate": np.zeros((24, 3, 7, 4), np.int32)}
    given = replace(results_with(30), weights={"gate": np.full((24, 2, 1), 0.5, np.float32)}, cases=cases)
    ((_, _, kept),) = rounds(tmp_path, GRID[:1], {}, lambda *_: given)
    assert np.array_equal(kept.weights["gate"], given.weights["gate"]) and not kept.cases
