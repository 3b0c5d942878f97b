import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from trees import save, solid

from dataloaders.frames import Frame, FrameIndex, read_image
from engine.config import UserError

LISTED = [("a", "dry", "train"), ("b", "dry", "test"), ("c", "wet", "train"), ("d", "fog", "test")]


def read_ones(path: Path):
    return np.ones((4, 6), dtype=np.uint8), 0


def index_of(root: Path, listed=LISTED, **changes) -> FrameIndex:
    frames = [
        Frame(name, root / f"{name}.png", root / f"{name}_ids.png", subset, split, "s", "s/0")
        for name, subset, split in listed
    ]
    values = dict(name="toy", root=root, classes=("x",), palette=((0, 0, 0),), frames=tuple(frames))
    return FrameIndex(
        **{**values, "read_label": read_ones, "unknown_values": read_ones, "label_map": "toy", **changes}
    )


def names(frames) -> list[str]:
    return [frame.name for frame in frames]


def test_all_means_every_subset_that_has_train_frames():
    index = index_of(Path("data"), [*LISTED, ("e", "wet", "test")])
    assert index.subsets == ("dry", "wet", "fog")
    assert names(index.select("test", ["all"])) == ["b", "e"]  # not d: nothing is trained on fog
    assert names(index.select("train", ["all", "dry"])) == ["a", "c"]  # in index order, each once
    assert names(index.select("test", ["fog", "dry"])) == ["b", "d"]


@pytest.mark.parametrize(("split", "subsets"), [("test", ["rain"]), ("train", ["fog"]), ("gate", ["all"])])
def test_a_selection_without_frames_is_refused_and_told_what_there_is(split, subsets):
    with pytest.raises(UserError) as error:
        index_of(Path("data")).select(split, subsets)
    assert f"subset {subsets[0]!r} has no {split} frames" in str(error.value)
    assert "there is dry: 1 train, 1 test; wet: 1 train; fog: 1 test" in str(error.value)


def test_an_unknown_split_is_refused():
    with pytest.raises(UserError, match="no split 'valid'; allowed: train, gate, val, test"):
        index_of(Path("data")).select("valid", ["dry"])


def test_a_frame_of_two_splits_is_refused():
    index = index_of(Path("data"), [*LISTED, ("a", "wet", "test")])
    with pytest.raises(UserError, match="a in dry/train and wet/test"):
        index.select("train", ["dry"])


def test_the_manifest_changes_with_name_subset_split_order_and_file_sizes(tmp_path):
    index = index_of(tmp_path)
    for frame in index.frames:
        save(frame.image, solid((4, 6), (1, 2, 3)))
        save(frame.label, np.ones((4, 6), dtype=np.uint8))
    hashes = {index.manifest(index.frames)}
    first, *others = index.frames
    for changed in ({"name": "z"}, {"subset": "wet"}, {"split": "val"}):
        hashes.add(index.manifest([replace(first, **changed), *others]))
    hashes.add(index.manifest([*others, first]))
    assert index.manifest(index.frames) in hashes
    with open(first.label, "ab") as file:
        file.write(b"\0")
    hashes.add(index.manifest(index.frames))
    assert len(hashes) == 6
    first.label.unlink()
    with pytest.raises(UserError, match="a_ids.png: cannot be read"):
        index.manifest(index.frames)


def test_read_returns_rgb_and_refuses_another_size_naming_both_files(tmp_path):
    index = index_of(tmp_path)
    frame = index.frames[0]
    save(frame.image, solid((4, 6), (1, 2, 3)))
    image, labels, unknown = index.read(frame)
    assert (image == (1, 2, 3)).all() and image.shape == (4, 6, 3)
    assert labels.shape == (4, 6) and unknown == 0
    with pytest.raises(UserError, match=r"a\.png is 6x4 and its label .*a_ids\.png is 6x4; allowed: 8x5"):
        replace(index, frame_size=(5, 8)).read(frame)
    save(frame.image, solid((5, 6), (1, 2, 3)))
    with pytest.raises(
        UserError, match=r"a\.png is 6x5 and its label .*a_ids\.png is 6x4; allowed: the same"
    ):
        index.read(frame)
    with pytest.raises(UserError, match=r"a\.png is 6x5 and its label .*a_ids\.png is 6x4; allowed: 6x4"):
        replace(index, frame_size=(4, 6)).read(frame)


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_missing_empty_foreign_or_cut_off_image_is_refused_by_name(tmp_path, ending):
    path = save(
        tmp_path / f"image.{ending}", np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    )
    whole = path.read_bytes()
    for content in (b"", b"no image", whole[: len(whole) // 2], whole[:-20]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"image\.{ending}: cannot be decoded"):
            read_image(path)
    path.unlink()
    with pytest.raises(UserError, match=rf"image\.{ending}: cannot be read"):
        read_image(path)


def test_a_rotation_noted_in_the_file_is_not_applied(tmp_path):
    from PIL import Image

    picture = Image.fromarray(solid((4, 6), (9, 9, 9)))
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (4, 6, 3)


def test_an_index_can_be_sent_to_other_processes():
    index = index_of(Path("data"))
    assert index.subsets == pickle.loads(pickle.dumps(index)).subsets
