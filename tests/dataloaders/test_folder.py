import json
from collections import Counter

import numpy as np
import pytest
from trees import folder_tree, save, solid

from dataloaders.folder import folder
from dataloaders.frames import SPLITS
from engine.config import UserError

ROWS = [
    {"name": "a_1", "subset": "dry", "split": "train", "drive": "a"},
    {"name": "a_2", "subset": "dry", "split": "train", "drive": "a"},
    {"name": "b_1", "subset": "wet", "split": "test", "drive": "b"},
    {"name": "b_2", "subset": "wet", "split": "", "drive": "b"},
]
CAMVID = {
    "split_by": "blocks",
    "sequence_column": "sequence",
    "block_column": "block",
    "train_only": "official_split=val",
    "guard": 120,
}
BLOCKS = {"split_by": "blocks", "sequence_column": "drive"}
WIDE_TEST = {"gate": 0.1, "val": 0.1, "test": 0.35}


@pytest.fixture
def root(tmp_path):
    return folder_tree(tmp_path, ROWS)


def build(root, **keys):
    return folder(root=str(root), **keys)


def test_rows_become_frames_and_rows_without_a_split_are_not_used(root):
    index = build(root, sequence_column="drive")
    assert [(f.name, f.subset, f.split, f.scene, f.block) for f in index.frames] == [
        ("a_1", "dry", "train", "a", "a/0"),
        ("a_2", "dry", "train", "a", "a/0"),
        ("b_1", "wet", "test", "b", "b/0"),
    ]
    assert index.notes == ("split by column 'split': 1 of 4 frames have no split",)
    assert index.classes == ("class 0", "class 1", "class 2") and index.palette[2] == (2, 2, 2)
    image, labels, unknown = index.read(index.frames[0])
    assert (image == (10, 20, 30)).all() and (labels == 1).all() and unknown == 0
    assert [f.scene for f in build(root).frames] == ["a_1", "a_2", "b_1"]  # no column: each its own recording


def test_frames_of_no_recording_are_said_to_count_as_independent(root):
    assert "each counts as independent" in build(root).notes[0]
    assert "independent" not in build(root, block_column="drive").notes[0]


def test_endings_may_be_in_capitals(root):
    (root / "images" / "a_1.png").rename(root / "images" / "a_1.PNG")
    assert build(root).read(build(root).frames[0])[0].shape == (4, 6, 3)


def test_ten_consecutive_rows_of_a_sequence_are_a_block(tmp_path):
    rows = [{"name": f"x_{n}", "subset": "s", "split": "train", "drive": "pq"[n % 2]} for n in range(44)]
    index = build(folder_tree(tmp_path, rows), sequence_column="drive")
    assert [frame.block for frame in index.frames[::2]] == ["p/0"] * 10 + ["p/1"] * 10 + ["p/2"] * 2


def test_images_may_be_jpg_or_png_but_not_both(root):
    (root / "images" / "a_1.png").unlink()
    jpg = save(root / "images" / "a_1.jpg", solid((4, 6), (1, 1, 1)))
    index = build(root)
    assert [frame.image.name for frame in index.frames] == ["a_1.jpg", "a_2.png", "b_1.png"]
    assert index.read(index.frames[0])[0].shape == (4, 6, 3)
    save(root / "images" / "a_1.png", solid((4, 6), (1, 1, 1)))
    with pytest.raises(UserError, match="images/a_1: there are 2 images"):
        build(root)
    jpg.unlink()
    (root / "images" / "a_1.png").unlink()
    with pytest.raises(UserError, match=r"a_1\.{png,jpg,jpeg}: cannot be read"):
        build(root).read(build(root).frames[0])


def test_ignored_ids_and_255_are_ignored_and_the_others_are_numbered_through(root):
    classes = json.loads((root / "classes.json").read_text())
    classes[1]["ignore"] = True
    (root / "classes.json").write_text(json.dumps(classes[::-1]))  # the order in the file does not matter
    save(root / "labels" / "a_1.png", np.array([[0, 1, 2, 255]], dtype=np.uint8))
    index = build(root)
    assert index.classes == ("class 0", "class 2")
    assert index.read_label(index.frames[0].label)[0].tolist() == [[0, 255, 1, 255]]
    classes[1]["ignore"] = False
    (root / "classes.json").write_text(json.dumps(classes))
    assert build(root).label_map != index.label_map


@pytest.mark.parametrize("values", [[[0, 3]], [[7, 3, 1]]])
def test_a_value_that_is_no_class_is_refused_naming_file_value_and_what_is_allowed(root, values):
    save(root / "labels" / "a_1.png", np.array(values, dtype=np.uint8))
    with pytest.raises(UserError, match=r"labels/a_1\.png: label value 3 \(1 pixels\).*; allowed: 0..2, 255"):
        build(root).read_label(root / "labels" / "a_1.png")


def test_an_image_and_a_mask_of_different_size_are_refused_naming_both(root):
    save(root / "labels" / "a_1.png", np.ones((5, 6), dtype=np.uint8))
    with pytest.raises(UserError, match=r"a_1\.png is 6x4 and its label .*labels/a_1\.png is 6x5"):
        build(root).read(build(root).frames[0])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"subset_column": "subst"}, r"manifest\.csv: there is no column 'subst'.*did you mean 'subset'"),
        (
            {"split_column": "drive"},
            r"manifest\.csv:2: drive is 'a'; allowed: train, gate, val, test or empty",
        ),
        ({"subset_column": "split"}, r"manifest\.csv:5: the column 'split' is empty"),
        ({"manifest": "other.csv"}, r"other\.csv: cannot be read"),
        ({"classes": "other.json"}, r"other\.json: cannot be read"),
        ({"guard": 3}, "guard, split_shares and split_seed are for split_by: blocks"),
        ({"split_by": "blocks"}, "split_by: blocks needs sequence_column"),
        (
            {"split_by": "blocks", "sequence_column": "drive", "train_only": "drive=z"},
            "no row has drive=z",
        ),
        ({"split_shares": {"gate": 0.1}}, "split_shares and split_seed are for split_by: blocks"),
        ({"split_seed": 9}, "split_shares and split_seed are for split_by: blocks"),
        (BLOCKS | {"split_shares": {"gate": 0.1}}, "split_shares takes gate, val, test.*found {'gate': 0.1}"),
        (BLOCKS | {"split_shares": {"gate": 0.1, "val": 0, "test": 0.1}}, "each above 0"),
        (BLOCKS | {"split_shares": {"gate": 0.3, "val": 0.3, "test": 0.4}}, "together below 1"),
    ],
)
def test_wrong_keys_are_told_with_file_and_line(root, keys, message):
    with pytest.raises(UserError, match=message):
        build(root, **keys)


def test_a_subset_cannot_be_named_like_all_of_them(tmp_path):
    rows = [ROWS[0], {**ROWS[1], "subset": "all"}]
    with pytest.raises(
        UserError, match=r"manifest\.csv:3: a subset can't be named all, which stands for all"
    ):
        build(folder_tree(tmp_path, rows))


def test_a_name_without_a_number_cannot_be_split_by_blocks(tmp_path):
    root = folder_tree(tmp_path, [{"name": "x", "subset": "s", "drive": "p"}])
    with pytest.raises(UserError, match=r"manifest\.csv:2: 'x' ends in no frame number"):
        build(root, split_by="blocks", sequence_column="drive")


@pytest.mark.parametrize("subset_column", ["scene", "light"])
def test_camvid_split_by_block(real_data, subset_column):
    index = build(real_data("camvid"), subset_column=subset_column, **CAMVID)
    frames = index.frames
    counts = Counter((frame.subset, frame.split) for frame in frames)
    assert len(index.subsets) == 2
    assert all(counts[subset, split] >= 6 for subset in index.subsets for split in SPLITS)
    total = len(frames)
    wide = build(real_data("camvid"), subset_column=subset_column, split_shares=WIDE_TEST, **CAMVID).frames
    assert len({frame.block for frame in wide if frame.split == "test"}) >= 13
    shares = {split: sum(frame.split == split for frame in frames) / total for split in SPLITS}
    assert total >= 420 and 0.5 <= shares["train"] <= 0.6
    assert shares["test"] >= 0.15 and min(shares["gate"], shares["val"]) >= 0.09
    for block in {frame.block for frame in frames}:
        assert len({frame.split for frame in frames if frame.block == block}) == 1
    for one in frames:
        for other in frames:
            if one.split != other.split and sequence(one) == sequence(other):
                assert abs(number(one) - number(other)) > 120
    clip = [f for f in frames if sequence(f) == "0016E5" and 7959 <= number(f) <= 8160]
    assert {frame.split for frame in clip} == {"train"} and len({frame.block for frame in clip}) == 1
    assert len(clip) == 71
    assert all(frame.scene == frame.block for frame in frames)  # what train and test must not share
    assert index.classes[0] == "Sky" and index.num_classes == 11
    _, labels, _ = index.read(frames[0])
    assert set(np.unique(labels)) <= {*range(11), 255}


def sequence(frame) -> str:
    return frame.name.split("_")[0]


def number(frame) -> int:
    return int(frame.name.split("_")[1].lstrip("f"))


def test_the_kitti_layout_is_refused_by_name(real_data, tmp_path):
    kitti = real_data("kitti_semantic_sample")
    with pytest.raises(UserError, match="layout of KITTI.*1224x370.*1242x375"):
        build(kitti)
    rows = [{"name": "000000_10", "subset": "s", "split": "train"}]
    root = folder_tree(tmp_path, rows, classes=34)
    paths = {"images": str(kitti / "training/image_2"), "labels": str(kitti / "training/semantic")}
    index = build(root, **paths)
    with pytest.raises(
        UserError, match=r"image_2/000000_10.png is 1224x370 and .*semantic/000000_10.png is 1242x375"
    ):
        index.read(index.frames[0])
