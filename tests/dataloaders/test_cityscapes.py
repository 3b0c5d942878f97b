import numpy as np
import pytest
from trees import save, solid

from dataloaders.cityscapes import CLASSES, cityscapes
from engine.config import UserError

CITIES = {
    "train": ["aachen", "bremen", "cologne", "jena", "ulm"],
    "val": ["lindau", "munster"],
    "test": ["bonn"],
}


@pytest.fixture
def root(tmp_path):
    for part, cities in CITIES.items():
        for city in cities:
            for number in range(12):
                name = f"{city}_{number:06d}_000019"
                save(tmp_path / f"leftImg8bit/{part}/{city}/{name}_leftImg8bit.png", solid((2, 4), (5, 6, 7)))
                labels = np.array([[0, 7, 8, 33], [-1 % 256, 26, 29, 24]], dtype=np.uint8)
                save(tmp_path / f"gtFine/{part}/{city}/{name}_gtFine_labelIds.png", labels)
    return tmp_path


def cities_of(index, split: str) -> set[str]:
    return {frame.scene for frame in index.frames if frame.split == split}


def test_label_ids_become_the_19_train_ids(root):
    index = cityscapes(root=str(root))
    assert index.num_classes == len(index.palette) == 19
    image, labels, unknown = index.read(index.frames[0])
    assert (image == (5, 6, 7)).all() and unknown == 0
    assert labels.tolist() == [[255, 0, 1, 18], [255, 13, 255, 11]]
    assert [name for _, name, _ in CLASSES][11:14] == ["person", "rider", "car"]
    counted = [
        7,
        8,
        11,
        12,
        13,
        17,
        19,
        20,
        21,
        22,
        23,
        24,
        25,
        26,
        27,
        28,
        31,
        32,
        33,
    ]  # ids of the 19 classes
    every = save(root / "every.png", np.arange(34, dtype=np.uint8)[None])
    expected = [counted.index(label) if label in counted else 255 for label in range(34)]
    assert index.read_label(every)[0].tolist() == [expected]
    save(index.frames[0].label, np.full((2, 4), 34, dtype=np.uint8))
    with pytest.raises(UserError, match=r"labelIds\.png: label value 34 .*allowed: 0..33, 255"):
        index.read(index.frames[0])


def test_no_city_is_in_two_splits_and_the_official_test_split_is_not_used(root):
    index = cityscapes(root=str(root))
    assert {split: cities_of(index, split) for split in ("train", "gate", "val", "test")} == {
        "train": {"aachen", "bremen", "ulm"},
        "gate": {"cologne"},
        "val": {"jena"},
        "test": {"lindau", "munster"},
    }
    assert len(index.select("train", ["all"])) == 36
    assert {frame.block for frame in index.frames if frame.scene == "ulm"} == {"ulm/0", "ulm/1"}


def test_subsets_and_splits_by_city(root):
    index = cityscapes(
        root=str(root),
        cities={"north": ["bremen", "munster"], "west": ["aachen", "cologne", "ulm", "lindau"]},
        gate_cities=["ulm"],
        val_cities=["cologne"],
    )
    assert index.subsets == ("north", "west")
    counts = {place: count for place, count in index.counts.items() if count}
    expected = [
        ("north", "train"),
        ("north", "test"),
        ("west", "train"),
        ("west", "gate"),
        ("west", "val"),
        ("west", "test"),
    ]
    assert counts == dict.fromkeys(expected, 12)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"cities": {"a": ["atlantis"]}}, "there is no 'atlantis'; there are aachen"),
        ({"cities": {"a": ["ulm"], "b": ["ulm"]}}, "'ulm' stands in two subsets"),
        ({"gate_cities": ["munster"]}, "gate_cities: there is no 'munster' in train"),
        ({"gate_cities": ["ulm"], "val_cities": ["ulm"]}, "ulm stands in gate_cities and in val_cities"),
    ],
)
def test_wrong_cities_are_refused(root, keys, message):
    with pytest.raises(UserError, match=message):
        cityscapes(root=str(root), **keys)


def test_folders_of_another_layout_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        cityscapes(root=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="has no leftImg8bit/train/CITY"):
        cityscapes(root=str(tmp_path))


@pytest.mark.parametrize("below", ["", "training"])
def test_kitti_is_refused_by_name_with_both_sizes(real_data, below):
    root = real_data("kitti_semantic_sample") / below
    with pytest.raises(
        UserError, match="layout of KITTI.*the image 000000_10.png is 1224x370, its label 1242x375"
    ):
        cityscapes(root=str(root))
