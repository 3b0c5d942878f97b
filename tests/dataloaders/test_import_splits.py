import os

import pytest
from trees import write_lists

from dataloaders.a2d2 import a2d2
from dataloaders.a2d2_lists import Entry
from dataloaders.import_splits import contradictions, main, nearest, read_lists
from engine.config import UserError

PUBLIC = {"highway": (6132, 876, 1421), "urban": (6132, 876, 1421), "all": (12264, 1752, 2842)}
REFUSED = ("highway-motorway", "highway-secondary")


def labels(scene: str, *numbers: int) -> list[str]:
    return [Entry(scene, f"{number:09d}").path("label") for number in numbers]


def test_counts_of_the_public_lists(real_data):
    lists, form = read_lists(real_data("a2d2_split"))
    counts = {subset: tuple(map(len, splits.values())) for subset, splits in lists.items()}
    motorway = dict.fromkeys(REFUSED, (5642, 784, 1134))
    assert counts == {**PUBLIC, "ambiguous": (1421,), **motorway}
    assert {subset for subset, reasons in form.items() if reasons} == set(REFUSED)


def test_the_public_lists_are_refused_as_a_whole_telling_the_leak(real_data, tmp_path, capsys):
    with pytest.raises(UserError, match="nothing was written: highway-motorway, highway-secondary") as error:
        main([str(real_data("a2d2_split")), "--root", str(tmp_path)])
    assert "--skip-refused" in str(error.value)
    assert os.listdir(tmp_path) == []
    told = capsys.readouterr().out
    for fact in (
        "highway-motorway_train contains 1389 of the 1421 frames of highway_test",
        "highway-motorway_train_gt.txt:1 names a camera image",
        "highway-secondary_train_gt.txt:1 names a camera image",
        "highway_val: 5 of its 5 scenes are in highway_train",
        "highway_test: 0 of its 1 scenes are in highway_train",
        "highway_train: 38% of its frames are of 20181204_135952",
        "highway_val: its frames lie a median of 15 frame numbers",
        "urban_val: its frames lie a median of 30 frame numbers",
        "76% within 50",
        "highway_test: 1421 frames of 20181108_084007",
        "urban_test: 1421 frames of 20181016_125231",
        "ambiguous_test: 766 frames of 20181016_125231",
        "ambiguous_test: 405 frames of 20181108_141609",
        "ambiguous_test: 250 frames of 20181204_154421",
        "ambiguous_test: 655 of its 1421 frames are of scenes that are trained on",
        "all is highway followed by urban",
    ):
        assert fact in told


def test_the_good_public_lists_are_imported_and_can_be_loaded(real_data, tmp_path):
    assert main([str(real_data("a2d2_split")), "--root", str(tmp_path), "--skip-refused"]) == 0
    names = [f"{subset}_{split}_gt.txt" for subset in PUBLIC for split in ("train", "val", "test")]
    assert sorted(os.listdir(tmp_path / "splits")) == sorted([*names, "ambiguous_test_gt.txt"])
    index = a2d2(root=str(tmp_path))
    assert [len(index.select(split, ["all"])) for split in ("train", "val", "test")] == [12264, 1752, 2842]
    assert len(index.select("test", ["ambiguous"])) == 1421
    public = [
        line.split("/")[-1] for line in (real_data("a2d2_split") / "urban_val_gt.txt").read_text().split()
    ]
    assert [frame.label.name for frame in index.select("val", ["urban"])] == public


@pytest.mark.parametrize(
    ("lists", "reason"),
    [
        ({"urban_train": labels("20180807_145028", 1, 2, 2)}, "1 frames are repeated in urban_train"),
        (
            {"urban_train": labels("20180807_145028", 1, 2), "urban_val": labels("20180807_145028", 2, 3)},
            "1 frames are in urban_train and in urban_val",
        ),
        (
            {
                "urban_train": labels("20180807_145028", 1, 2),
                "highway_test": labels("20180807_145028", 1, 2, 3),
            },
            "urban_train contains 2 of the 3 frames of highway_test",
        ),
    ],
)
def test_what_makes_lists_unusable(tmp_path, lists, reason):
    write_lists(tmp_path / "public", **lists)
    found, _ = read_lists(tmp_path / "public")
    assert contradictions(found, "urban") == [reason]
    with pytest.raises(UserError, match="nothing was written: urban"):
        main([str(tmp_path / "public"), "--root", str(tmp_path)])
    assert not (tmp_path / "splits").exists()


def test_other_lists_must_not_contain_what_the_main_ones_train_on(tmp_path):
    write_lists(tmp_path, urban_train=labels("20180807_145028", 1), rain_test=labels("20180807_145028", 1, 2))
    lists, _ = read_lists(tmp_path)
    assert contradictions(lists, "rain") == ["urban_train contains 1 of the 2 frames of rain_test"]
    assert contradictions(lists, "urban") == []


def test_distance_to_the_nearest_frame_of_the_same_scene():
    here, there = "20180807_145028", "20181108_084007"
    others = [Entry(here, "10"), Entry(here, "100"), Entry(there, "55")]
    assert list(nearest([Entry(here, "12"), Entry(here, "55"), Entry("x", "1")], others)) == [2, 45]


def test_wrong_folders_are_told(tmp_path):
    with pytest.raises(UserError, match="there are no split lists"):
        main([str(tmp_path)])
    write_lists(tmp_path, urban_train=labels("20180807_145028", 1))
    with pytest.raises(UserError, match="there is no folder .*nowhere; give the data's folder with --root"):
        main([str(tmp_path), "--root", str(tmp_path / "nowhere")])
