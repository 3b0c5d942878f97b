import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from trees import a2d2_tree, folder_tree, save, solid, write_lists

from dataloaders.a2d2 import a2d2
from dataloaders.a2d2_lists import Entry
from dataloaders.check import check, main
from dataloaders.folder import folder
from dataloaders.make_splits import main as make_splits

SIZE = (6, 10)
SCENES = ["20180807_145028", "20181108_084007", "20181016_125231", "20181108_141609"]
TRAIN, OTHER, TEST, VAL = ([Entry(scene, f"{n:09d}") for n in range(3)] for scene in SCENES)


@pytest.fixture
def root(tmp_path):
    a2d2_tree(tmp_path, TRAIN + OTHER + TEST + VAL, SIZE)
    write_lists(
        tmp_path / "splits",
        urban_train=[entry.path("label") for entry in TRAIN],
        highway_train=[entry.path("label") for entry in OTHER],
        urban_val=[entry.path("label") for entry in VAL],
        urban_test=[entry.path("label") for entry in TEST],
    )
    return tmp_path


def found(root: Path):
    return check(a2d2(root=str(root), frame_size=SIZE), workers=2)


def test_a_good_tree_has_no_problem_and_an_exact_histogram(root):
    label = solid(SIZE, (255, 0, 255))
    label[0, :3] = (135, 206, 255)
    save(root / TRAIN[0].path("label"), label)
    report = found(root)
    assert report.problems == report.warnings == []
    assert report.histogram.keys() == {
        ("highway", "train"), ("urban", "train"), ("urban", "val"), ("urban", "test"),
    }  # fmt: skip
    counts = report.histogram["urban", "train"]
    assert counts.shape == (39,)
    assert {n: int(count) for n, count in enumerate(counts) if count} == {33: 3 * 60 - 3, 34: 3}
    index = a2d2(root=str(root), frame_size=SIZE)
    lines = report.text(index).splitlines()
    assert next(line.split() for line in lines if line.startswith("Sky")) == ["Sky", "-", "1.67", "-", "-"]
    assert lines[-1] == "12 frames, 0 problems, 0 pixels of 0 unknown colours"


def test_planted_faults_are_all_found(root):
    label = solid(SIZE, (255, 0, 255))
    label[0, :4] = (1, 2, 3)
    label[1, 0] = (255, 255, 255)
    save(root / TRAIN[0].path("label"), label)
    (root / TRAIN[1].path("camera")).unlink()
    (root / TRAIN[2].path("label")).write_bytes(b"no picture")
    save(root / OTHER[0].path("camera"), solid((6, 12), (0, 0, 0)))
    problems = found(root).problems
    for text in (
        "unknown colour #010203: 4 pixels in 1 frame",
        "unknown colour #ffffff: 1 pixels in 1 frame",
        f"{root / TRAIN[1].path('camera')}: cannot be read",
        f"{root / TRAIN[2].path('label')}: cannot be decoded",
        f"{root / OTHER[0].path('camera')} is 12x6",
    ):
        assert sum(text in problem for problem in problems) == 1
    assert len(problems) == 5
    report = found(root)
    assert report.unknown == {"#010203": 4, "#ffffff": 1}
    assert report.histogram["urban", "train"][-1] == 5 and report.histogram["urban", "train"].sum() == 60


def test_overlap_and_shared_scenes_are_found(root):
    write_lists(
        root / "splits",
        urban_test=[entry.path("label") for entry in (*TEST, TRAIN[0], OTHER[1])],
        urban_val=[entry.path("label") for entry in (VAL[0], TRAIN[2])],
        urban_train=[entry.path("label") for entry in (TRAIN[0], TRAIN[1])],
        highway_train=[OTHER[0].path("label")],
    )
    report = found(root)
    assert report.problems == [
        "20180807145028_frontcenter_000000000 is listed in urban/train and urban/test",
        "train and test share 2 scenes (2 frames of test): 20180807_145028, 20181108_084007",
    ]
    assert report.warnings == [
        "train and val share 1 scene (1 frames of val): 20180807_145028",
        "val and test share 1 scene (1 frames of test): 20180807_145028",
    ]


def test_scenes_of_the_gate_must_not_be_in_test(root):
    write_lists(root / "splits", urban_gate=[TEST[0].path("label")], urban_test=[TEST[1].path("label")])
    assert found(root).problems == ["gate and test share 1 scene (1 frames of test): 20181016_125231"]


def test_values_out_of_range_and_frames_without_labels_are_told(tmp_path):
    rows = [{"name": name, "subset": "s", "split": "train"} for name in "abc"]
    folder_tree(tmp_path, rows)
    save(tmp_path / "labels" / "a.png", np.full((4, 6), 3, dtype=np.uint8))
    save(tmp_path / "labels" / "b.png", np.full((4, 6), 255, dtype=np.uint8))
    report = check(folder(root=str(tmp_path)), workers=1)
    (problem,) = report.problems
    assert "a.png: label value 3 (24 pixels); allowed: 0..2, 255" in problem
    assert report.warnings == ["1 frame without a labelled pixel: b"]


def config(tmp_path: Path, data: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"name: t\ndata: {{{data}, image_size: [32, 32], subsets: [all]}}\n"
        "network: {name: deeplabv3plus}\ntrain: {epochs: 1}\n"
    )
    return str(path)


def test_the_command_answers_0_or_2_with_the_list(root, tmp_path, capsys):
    path = config(tmp_path, f"name: a2d2, root: {root}, frame_size: [6, 10]")
    assert main([path]) == 0
    (root / TRAIN[0].path("label")).unlink()
    assert main([path]) == 2
    told = capsys.readouterr().out
    assert f"problem: {root / TRAIN[0].path('label')}: cannot be read" in told
    assert main([path, "data.root=" + str(root), "data.splits=" + str(root / "splits")]) == 2


def test_a_wrong_root_is_one_message_without_a_traceback(tmp_path):
    path = config(tmp_path, f"name: a2d2, root: {tmp_path / 'nowhere'}")
    command = [sys.executable, "-m", "dataloaders.check", path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("a2d2: there is no folder") and len(done.stderr.splitlines()) == 1


def test_a_pipeline_is_checked_stage_by_stage_each_data_once(root, tmp_path, capsys):
    config(tmp_path, f"name: a2d2, root: {root}, frame_size: [6, 10]")
    stages = "one: {config: run.yaml}, two: {config: run.yaml, set: {train.epochs: 2}}"
    text = f"name: p\nset: {{data.num_classes: 11}}\nstages: {{{stages}}}\n"
    (tmp_path / "pipeline.yaml").write_text(text)
    assert main([str(tmp_path / "pipeline.yaml")]) == 0
    told = capsys.readouterr().out
    assert told.count("a2d2 at") == 1 and "Nondrivable" in told


def test_the_real_frames_of_a2d2_have_no_unknown_colour(real_data, tmp_path, capsys):
    assert make_splits([str(real_data("a2d2_sample")), "--splits", str(tmp_path / "splits")]) == 0
    path = config(tmp_path, f"name: a2d2, root: {real_data('a2d2_sample')}, splits: {tmp_path / 'splits'}")
    assert main([path]) == 0
    assert capsys.readouterr().out.endswith("5 frames, 0 problems, 0 pixels of 0 unknown colours\n")
