import os

import pytest
from trees import a2d2_tree

from dataloaders.a2d2 import a2d2
from dataloaders.a2d2_lists import Entry
from dataloaders.import_splits import contradictions, read_lists
from dataloaders.make_splits import assign, find_frames, main, road_ranges, scene_splits
from engine.config import UserError

# Highway, urban and ambiguous frames of the public lists in each scene. The shipped tables must agree.
SCENES = {
    "20180807_145028": (0, 478, 0),
    "20180810_142822": (0, 452, 0),
    "20180925_101535": (0, 523, 0),
    "20180925_112730": (0, 503, 0),
    "20180925_124435": (0, 473, 0),
    "20180925_135056": (0, 444, 0),
    "20181008_095521": (0, 402, 0),
    "20181016_082154": (0, 139, 0),
    "20181016_095036": (0, 467, 0),
    "20181016_125231": (0, 1421, 766),
    "20181107_132300": (0, 282, 0),
    "20181107_132730": (0, 481, 0),
    "20181107_133258": (0, 81, 0),
    "20181107_133445": (372, 465, 0),
    "20181108_084007": (1421, 0, 0),
    "20181108_091945": (1977, 99, 0),
    "20181108_103155": (0, 539, 0),
    "20181108_123750": (1642, 109, 0),
    "20181108_141609": (336, 0, 405),
    "20181204_135952": (2681, 1, 0),
    "20181204_154421": (0, 75, 250),
    "20181204_170238": (0, 40, 0),
    "20181204_191844": (0, 955, 0),
}
ROADS = ("highway", "urban", "ambiguous")


@pytest.fixture
def full_tree(tmp_path):
    """Empty label files of a copy that has all 23 scenes: first, last and middle frame of every stretch."""
    for scene, stretches in road_ranges().items():
        folder = tmp_path / "camera_lidar_semantic" / scene / "label" / "cam_front_center"
        folder.mkdir(parents=True)
        for first, last, _ in stretches:
            for number in (first, (first + last) // 2, last, last + 1):
                (folder / f"{scene.replace('_', '')}_label_frontcenter_{number:09d}.png").touch()
    return tmp_path


def test_the_tables_know_every_scene_and_its_roads():
    roads = road_ranges()
    assert scene_splits().keys() == roads.keys() == SCENES.keys()
    for scene, counts in SCENES.items():
        there = {road for _, _, road in roads[scene]}
        expected = {road for road, count in zip(ROADS, counts, strict=True) if count > 1}
        assert there == expected
        ordered = sorted(roads[scene])
        assert all(first <= last for first, last, _ in ordered)
        assert all(one[1] < other[0] for one, other in zip(ordered, ordered[1:], strict=False))
    assert scene_splits()["20181107_133445"] == "none"


def test_no_scene_is_in_two_splits_and_every_list_is_there(full_tree, capsys):
    assert main([str(full_tree)]) == 0
    names = [
        f"{subset}_{split}_gt.txt"
        for subset in ("highway", "urban", "all")
        for split in ("train", "gate", "val", "test")
    ]
    assert sorted(os.listdir(full_tree / "splits")) == sorted([*names, "ambiguous_test_gt.txt"])
    index = a2d2(root=str(full_tree))
    split_of = {}
    for frame in index.frames:
        assert split_of.setdefault(frame.scene, frame.split) == frame.split
    assert split_of.keys() == SCENES.keys() - {"20181107_133445"}
    lists, _ = read_lists(full_tree / "splits")
    assert all(contradictions(lists, subset) == [] for subset in lists)
    assert all(
        lists["all"][split] == lists["highway"][split] + lists["urban"][split] for split in lists["all"]
    )
    told = capsys.readouterr().out
    assert "left out: 16 frames: 20181107_133445 mixes highway and urban" in told
    assert "ambiguous frames of 20181108_141609, a scene of val" in told


def test_mixed_scenes_are_told_apart_by_frame_number():
    def subset_of(scene: str, number: int) -> str | None:
        lists, _ = assign([Entry(scene, f"{number:09d}")])
        return next((subset for (subset, _), entries in lists.items() if entries), None)

    assert subset_of("20181108_091945", 78503) == "highway"
    assert subset_of("20181108_091945", 78647) == "urban"
    assert subset_of("20181108_123750", 35262) == "urban"
    assert subset_of("20181108_123750", 35426) == "highway"
    assert subset_of("20181016_125231", 100000) == "ambiguous"
    assert subset_of("20181016_125231", 160000) == "urban"
    assert subset_of("20181107_133445", 3000) is None  # the interleaved scene
    assert subset_of("20181108_141609", 35000) is None  # ambiguous, but its scene validates highway
    assert subset_of("20181108_103155", 90000) is None  # between two stretches
    assert subset_of("20200101_000000", 1) is None


def test_shares_of_the_public_frames(real_data):
    entries = set()
    for subset, splits in read_lists(real_data("a2d2_split"))[0].items():
        if subset in ROADS:
            entries |= {entry for part in splits.values() for entry in part}
    lists, left_out = assign(sorted(entries))
    counts = {place: len(part) for place, part in lists.items()}
    assert [counts["highway", split] for split in ("train", "gate", "val", "test")] == [4658, 1642, 336, 1421]
    assert [counts["urban", split] for split in ("train", "gate", "val", "test")] == [4003, 1218, 964, 1778]
    assert counts["ambiguous", "test"] == 766 + 250 and counts["ambiguous", "train"] == 0
    assert sum(counts.values()) + left_out.total() == len(entries) == 2 * 8429 + 1421
    assert left_out["20181107_133445 mixes highway and urban too closely"] == 372 + 465


def test_the_result_does_not_depend_on_the_order_of_files(full_tree):
    entries = find_frames(full_tree)
    assert entries == sorted(entries)
    assert find_frames(full_tree / "camera_lidar_semantic") == entries


def test_a_partial_copy_works_and_says_what_is_missing(real_data, tmp_path, capsys):
    splits = tmp_path / "splits"
    assert main([str(real_data("a2d2_sample")), "--splits", str(splits)]) == 0
    told = capsys.readouterr().out
    assert "missing, so no list is written: highway val, highway test, urban gate, ambiguous test" in told
    assert "train: 2 of 10 scenes: 20180807_145028, 20181108_091945" in told
    index = a2d2(root=str(real_data("a2d2_sample")), splits=str(splits))
    assert len(index.frames) == 5
    assert [len(index.select(split, ["all"])) for split in ("train", "gate", "val", "test")] == [2, 1, 1, 1]


def test_a_copy_without_usable_frames_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(UserError, match="no SCENE/label/cam_front_center"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="there is no folder"):
        main([str(tmp_path / "nowhere")])
    a2d2_tree(tmp_path, [Entry("20181107_133445", "000003000")])
    with pytest.raises(UserError, match="none of the frames found can be used"):
        main([str(tmp_path)])
    assert not (tmp_path / "splits").exists()
