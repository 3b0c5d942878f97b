import json

import numpy as np
import pytest
from PIL import Image
from trees import a2d2_tree, save, solid, write_lists

from dataloaders.a2d2 import a2d2, read_colour_label, unknown_colours
from dataloaders.a2d2_classes import CATEGORIES, class_map, list_entries
from dataloaders.a2d2_lists import Entry
from engine.config import UserError

ONE = Entry("20180807_145028", "000006882")
TWO = Entry("20181108_091945", "000022360")
SIZE = (6, 10)


@pytest.fixture
def root(tmp_path):
    a2d2_tree(tmp_path / "camera_lidar_semantic", [ONE, TWO], SIZE)
    write_lists(tmp_path / "splits", highway_train=[TWO.path("label")], urban_train=[ONE.path("label")])
    return tmp_path


@pytest.mark.parametrize(("num_classes", "ignored"), [(55, 0), (38, 0), (11, 2)])
def test_ids_equal_one_mask_per_colour_on_all_colours_and_unknown_ones(tmp_path, num_classes, ignored):
    random = np.random.default_rng(1)
    known = np.array([[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c, _, _ in list_entries().values()])
    assert known.shape == (55, 3)
    colours = np.concatenate([known, [[0, 0, 0], [255, 255, 255], [255, 0, 1], [0, 255, 255 - 1]]])
    label = colours[random.integers(0, len(colours), (64, 80))].astype(np.uint8)
    label[0, : len(colours)] = colours
    ids = class_map(num_classes).ids
    expected = np.full(label.shape[:2], 255)
    unknown = np.ones(label.shape[:2], dtype=bool)
    for colour, class_id in ids:
        mask = (label == (colour // 65536, colour // 256 % 256, colour % 256)).all(axis=2)
        expected[mask] = class_id
        unknown &= ~mask
    found, count = read_colour_label(save(tmp_path / "label.png", label), ids)
    assert found.dtype == np.uint8 and (found == expected).all()
    assert count == unknown.sum() > 0
    assert len([class_id for _, class_id in ids if class_id == 255]) == ignored
    counted = unknown_colours(tmp_path / "label.png", ids)
    assert counted.keys() == {"#000000", "#ffffff", "#ff0001", "#00fffe"}
    assert counted["#ff0001"] == (label == (255, 0, 1)).all(axis=2).sum()


def test_the_38_classes_are_those_of_the_sample(real_data):
    groups = json.loads((real_data("a2d2_sample") / "groups38.json").read_text())
    classes = class_map(38)
    assert classes.classes == tuple(group["name"] for group in groups)
    told = {int(colour[1:], 16): group["id"] for group in groups for colour in group["colours"]}
    assert dict(classes.ids) == told and len(told) == 55


def test_the_built_in_class_list_is_the_one_of_the_data(real_data):
    path = real_data("a2d2_sample") / "camera_lidar_semantic" / "class_list.json"
    told = json.loads(path.read_text())
    assert told == {f"#{colour}": name for name, (colour, _, _) in list_entries().items()}
    assert list(told.values()) == list(list_entries())
    for num_classes in (11, 38, 55):
        assert class_map(num_classes, path) == class_map(num_classes)


def test_the_eleven_groups():
    classes = class_map(11)
    assert " ".join(classes.classes) == (
        "Person Car Truck Drivable Nondrivable Blocker Info Sky Buildings Nature Lanes"
    )
    of = {category: group for category, group, _ in CATEGORIES}
    assert [of[name] for name in ("Animals", "Ego car", "Tractor", "Slow drive area")] == [
        "Person", "Car", "Truck", "Nondrivable",
    ]  # fmt: skip
    assert dict(classes.ids)[0x60458F] == dict(classes.ids)[0x352E52] == 255  # Blurred area, Rain dirt
    assert classes.palette[0] == (255, 0, 121)
    assert len(class_map(55).classes) == len(class_map(55).palette) == 55


def test_class_list_json_decides_which_colour_is_which_class(root):
    (root / "camera_lidar_semantic" / "class_list.json").write_text('{"#ff00ff": "Car 2", "#010203": "Sky"}')
    index = a2d2(root=str(root), frame_size=SIZE)
    _, labels, unknown = index.read(index.frames[0])
    assert (labels == index.classes.index("Car")).all() and unknown == 0
    (root / "camera_lidar_semantic" / "class_list.json").unlink()
    assert a2d2(root=str(root), frame_size=SIZE).label_map != index.label_map


@pytest.mark.parametrize("text", ["[]", "{", '{"red": "Car 1"}', '{"#ff0000": "Car 9"}'])
def test_a_malformed_class_list_is_refused_by_name(root, text):
    (root / "camera_lidar_semantic" / "class_list.json").write_text(text)
    with pytest.raises(UserError, match=r"class_list\.json"):
        a2d2(root=str(root))


def test_root_is_the_folder_of_the_scenes_or_its_parent(root):
    outer = a2d2(root=str(root), frame_size=SIZE)
    inner = a2d2(root=str(root / "camera_lidar_semantic"), splits=str(root / "splits"), frame_size=SIZE)
    assert outer.frames == inner.frames
    assert [frame.subset for frame in outer.frames] == ["highway", "urban"]
    image, labels, unknown = outer.read(outer.frames[1])
    assert image.shape == (*SIZE, 3) and unknown == 0
    assert (labels == outer.classes.index("RD normal street")).all()
    assert outer.num_classes == 38 and outer.palette[33] == (255, 0, 255)


@pytest.mark.parametrize(
    "form",
    [
        "urban/train_val/GT/20180807145028_label_frontcenter_000006882.png",
        "/20180807_145028/label/cam_front_center/20180807145028_label_frontcenter_000006882.png",
        "20180807145028_label_frontcenter_000006882.png",
        "C:\\a2d2\\20180807145028_label_frontcenter_000006882.png",
    ],
)
def test_only_the_base_name_of_a_line_counts(root, form):
    write_lists(root / "splits", urban_train=["", f"  {form}  ", ""])
    frame = a2d2(root=str(root), frame_size=SIZE).select("train", ["urban"])[0]
    scenes = root / "camera_lidar_semantic"
    assert (frame.image, frame.label) == (scenes / ONE.path("camera"), scenes / ONE.path("label"))
    assert frame.name == "20180807145028_frontcenter_000006882"
    assert (frame.scene, frame.block) == ("20180807_145028", "20180807_145028/6")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("20180807145028_camera_frontcenter_000006882.png", "urban_val_gt.txt:2: names a camera image"),
        ("20180807145028_label_frontleft_000006882.png", "urban_val_gt.txt:2: .* names no label"),
        ("nonsense", "urban_val_gt.txt:2: 'nonsense' names no label"),
    ],
)
def test_a_wrong_line_is_refused_with_file_and_line(root, line, message):
    write_lists(root / "splits", urban_val=[ONE.path("label"), line])
    with pytest.raises(UserError, match=message):
        a2d2(root=str(root))


def test_subsets_come_from_the_names_and_lists_of_all_only_count_alone(root):
    write_lists(root / "splits", all_train=[ONE.path("label")], ambiguous_test=[TWO.path("label")])
    index = a2d2(root=str(root))
    assert index.subsets == ("highway", "urban", "ambiguous")  # test-only subsets last
    for path in (root / "splits").glob("*"):
        if not path.name.startswith("all"):
            path.unlink()
    assert len(a2d2(root=str(root)).select("train", ["all"])) == 1


def test_missing_folders_and_lists_are_told_with_the_way_out(root):
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        a2d2(root=str(root / "nowhere"))
    with pytest.raises(UserError, match="no split lists.*none.*make_splits.*import_splits"):
        a2d2(root=str(root), splits="none")
    (root / "splits" / "urban_valid_gt.txt").write_text("")
    with pytest.raises(UserError, match="urban_valid_gt.txt: the name tells no split"):
        a2d2(root=str(root))


def test_frames_are_looked_for_when_they_are_read_and_sizes_are_checked(root):
    index = a2d2(root=str(root), frame_size=SIZE)
    label = index.frames[0].label
    save(label, solid((6, 12), (255, 0, 255)))
    with pytest.raises(
        UserError, match=r"camera_.*png is 10x6 and its label .*label_.*png is 12x6; allowed: 10x6"
    ):
        index.read(index.frames[0])
    label.unlink()
    with pytest.raises(UserError, match=f"{label.name}: cannot be read"):
        a2d2(root=str(root), frame_size=SIZE).read(index.frames[0])


def test_real_frames_have_no_unknown_colour(real_data, tmp_path):
    scenes = real_data("a2d2_sample") / "camera_lidar_semantic"
    labels = sorted(scenes.glob("*/label/cam_front_center/*.png"))
    write_lists(tmp_path, city_train=map(str, labels))
    index = a2d2(root=str(scenes.parent), splits=str(tmp_path), num_classes=55)
    assert len(index.frames) == 5
    for frame in index.frames[:2]:
        image, found, unknown = index.read(frame)
        assert unknown == 0 and image.shape == (1208, 1920, 3) and found.max() < 55
        pixels = np.asarray(Image.open(frame.label))
        assert (np.array(index.palette)[found] == pixels).all()
