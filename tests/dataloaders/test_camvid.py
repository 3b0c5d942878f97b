"""The SegNet release of CamVid as a folder with blocks and kinds of road."""

import csv
import json
import os
import shutil
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataloaders.camvid import main
from dataloaders.folder import folder
from engine.command import run

DATA = Path(os.environ.get("MOE_DATA", "")) / "camvid"


def put(release, split, name, built_up):
    """A frame of which so many of ten columns are buildings."""
    for kind in (split, f"{split}annot"):
        (release / kind).mkdir(parents=True, exist_ok=True)
    mask = np.full((4, 10), 3, np.uint8)
    mask[:, :built_up] = 1
    cv2.imwrite(str(release / split / f"{name}.png"), np.full((4, 10, 3), 9 * built_up, np.uint8))
    cv2.imwrite(str(release / f"{split}annot" / f"{name}.png"), mask)


@pytest.fixture
def release(tmp_path):
    """12 frames of one recording, the tenth and those behind it built up; 3 of another."""
    for place in range(12):
        put(
            tmp_path / "in",
            "train" if place < 6 else "test",
            f"0001TP_{990 + 30 * place:06d}",
            1 + 4 * (place > 8),
        )
    for place in range(3):
        put(tmp_path / "in", "val", f"Seq05VD_f{990 + 30 * place:05d}", 2)
    return tmp_path / "in"


def rows_of(out):
    with open(out / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_blocks_are_ten_frames_in_the_order_of_their_numbers(release, tmp_path, capsys):
    assert run(main, [str(release), str(tmp_path / "out")]) == 0
    assert "15 frames in 3 blocks (10 open, 5 street)" in capsys.readouterr().out
    rows = rows_of(tmp_path / "out")
    assert [row["block"] for row in rows] == ["0001TP_00"] * 10 + ["0001TP_01"] * 2 + ["Seq05VD_00"] * 3
    assert [row["name"] for row in rows[:3]] == ["0001TP_000990", "0001TP_001020", "0001TP_001050"]
    assert [row["official_split"] for row in rows] == ["train"] * 6 + ["test"] * 6 + ["val"] * 3
    # 9 x 0.1 + 0.5 are 0.14 on average: open, though the last frame alone is a street; 0.2 is built up
    assert [row["scene"] for row in rows] == ["open"] * 10 + ["street"] * 5
    assert rows[9]["building_fraction"] == "0.5"


def test_the_folder_loads_with_its_classes(release, tmp_path):
    main([str(release), str(tmp_path / "out")])
    index = folder(root=str(tmp_path / "out"), subset_column="scene", split_column="official_split")
    assert index.num_classes == 11 and index.classes[1] == "Building"
    assert index.counts["open", "train"] == 6 and index.counts["street", "val"] == 3
    (frame,) = [one for one in index.select("test", ["street"]) if one.name == "0001TP_001290"]
    assert (index.read_label(frame.label)[0] == np.array([1] * 5 + [3] * 5)).all()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda release: shutil.rmtree(release / "val"), "there is no folder"),
        (lambda release: (release / "valannot/Seq05VD_f00990.png").unlink(), "is missing or no image"),
        (
            lambda release: shutil.copy(release / "val/Seq05VD_f00990.png", release / "valannot"),
            "no mask of class ids",
        ),
        (lambda release: put(release, "val", "nonumber", 1), "is no SEQUENCE_NUMBER"),
        (lambda release: [path.unlink() for path in release.glob("*/*.png")], "no image in"),
    ],
)
def test_another_folder_is_refused_and_nothing_written(release, tmp_path, capsys, spoil, words):
    spoil(release)
    assert run(main, [str(release), str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_earlier_manifest_stays_unless_told(release, tmp_path, capsys):
    arguments = [str(release), str(tmp_path / "out")]
    assert run(main, arguments) == 0
    put(release, "val", "Seq05VD_f02000", 9)
    assert run(main, arguments) == 2 and "--overwrite" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "out")) == 15
    assert run(main, [*arguments, "--overwrite"]) == 0 and len(rows_of(tmp_path / "out")) == 16


def test_a_place_that_cannot_be_written_is_told(release, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(main, [str(release), str(tmp_path / "file")]) == 2
    assert "can't be written" in capsys.readouterr().err


@pytest.mark.skipif(not DATA.is_dir(), reason="MOE_DATA names no folder with camvid")
def test_real_frames_get_the_blocks_and_scenes_of_the_sample(tmp_path):
    """The sample has two thirds of the blocks: its whole ones stay together, in the kind of road that it says."""
    sample = {row["name"]: row for row in rows_of(DATA)}
    for name, row in sample.items():
        image = tmp_path / "in" / row["official_split"] / f"{name}.png"
        mask = tmp_path / "in" / f"{row['official_split']}annot" / f"{name}.png"
        for path in (image, mask):  # what an image shows is copied, not looked at
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(DATA / "labels" / f"{name}.png")
    assert main([str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    ours = {row["name"]: row for row in rows_of(tmp_path / "out")}
    assert ours.keys() == sample.keys()
    assert json.loads((tmp_path / "out/classes.json").read_text()) == json.loads(
        (DATA / "classes.json").read_text()
    )
    blocks = defaultdict(set)
    for name, row in ours.items():
        assert row["sequence"] == sample[name]["sequence"]
        assert row["building_fraction"] == sample[name]["building_fraction"]
        blocks[row["block"]].add(sample[name]["block"])
    whole = [name for name, row in ours.items() if len(blocks[row["block"]]) == 1]
    assert len(whole) > 0.9 * len(sample)
    assert all(ours[name]["scene"] == sample[name]["scene"] for name in whole)
