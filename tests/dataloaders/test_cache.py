"""The cache gives what reading would give, bit for bit, and notices when it no longer can."""

import errno
import json
import multiprocessing
import os
import pickle
import shutil
from collections import namedtuple
from dataclasses import replace

import cv2
import numpy as np
import pytest
from tiny_index import write_index

from dataloaders import cache_parts
from dataloaders.cache import open_cache
from dataloaders.frames import IGNORE
from dataloaders.transforms import resize_image, resize_label
from engine import disk
from engine.config import UserError
from tests.damage import cut_off, empty, flip_a_bit

SIZE = (16, 20)


@pytest.fixture
def index(tmp_path):
    return write_index(tmp_path / "data")


def opened(index, tmp_path, subsets=("all",), split="train", size=SIZE, resize="squash"):
    return open_cache(index, index.select(split, subsets), size, resize, tmp_path / "cache")


def parts(tmp_path):
    return sorted(path for path in (tmp_path / "cache" / "frames").iterdir() if path.is_dir())


def made(capsys):
    """How many parts were made since the last call."""
    return capsys.readouterr().err.count("cached tiny")


def assert_right(index, cache, resize="squash"):
    for row, frame in enumerate(cache.frames):
        image, labels, unknown = index.read(frame)
        assert np.array_equal(cache.images[row], resize_image(image, SIZE, resize))
        assert np.array_equal(cache.labels[row], resize_label(labels, SIZE, resize))
        assert cache.unknown_pixels[row] == unknown
        assert tuple(cache.native_sizes[row]) == labels.shape


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_cache_equals_direct_reading(index, tmp_path, resize):
    cache = opened(index, tmp_path, resize=resize)
    assert len(cache.images) == len(cache.labels) == 11
    assert_right(index, cache, resize)


def test_rows_follow_the_order_of_the_frames(index, tmp_path):
    frames = index.select("train", ["all"])
    mixed = tuple(frames[row] for row in (9, 2, 7, 0))
    cache = open_cache(index, mixed, SIZE, "squash", tmp_path)
    assert cache.frames == mixed
    assert_right(index, cache)


def test_subsets_share_their_parts_and_an_opened_part_is_not_made_again(index, tmp_path, capsys):
    opened(index, tmp_path, ["east"])
    assert made(capsys) == 1
    opened(index, tmp_path, ["all"])
    assert made(capsys) == 1
    opened(index, tmp_path, ["west"])
    assert made(capsys) == 0
    opened(index, tmp_path, ["east"], split="test")
    assert made(capsys) == 1 and len(parts(tmp_path)) == 3


def test_class_pixels_count_the_cached_labels(index, tmp_path):
    cache = opened(index, tmp_path)
    labels = np.stack([cache.labels[row] for row in range(len(cache.frames))])
    assert cache.class_pixels().dtype == np.int64
    assert cache.class_pixels().tolist() == [(labels == class_id).sum() for class_id in range(5)]
    assert cache.class_counts[:, 5].tolist() == (labels == IGNORE).sum(axis=(1, 2)).tolist()
    assert (cache.class_counts.sum(axis=1) == SIZE[0] * SIZE[1]).all()


def change_the_type(path):
    path.write_bytes(path.read_bytes().replace(b"|u1", b"|i1", 1))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("images.npy", cut_off),
        ("images.npy", flip_a_bit),
        ("images.npy", change_the_type),
        ("images.npy", empty),
        ("images.npy", os.remove),
        ("labels.npy", cut_off),
        ("labels.npy", flip_a_bit),
        ("labels.npy", os.remove),
        ("meta.json", cut_off),
        ("meta.json", flip_a_bit),
        ("meta.json", os.remove),
    ],
)
def test_a_damaged_part_is_told_and_made_again(index, tmp_path, capsys, file, damage):
    opened(index, tmp_path, ["east"])
    capsys.readouterr()
    [part] = parts(tmp_path)
    damage(part / file)
    cache = opened(index, tmp_path, ["east"])
    told = capsys.readouterr().err
    assert "warning: frame cache of tiny east train" in told and file in told and "cached tiny" in told
    assert_right(index, cache)
    opened(index, tmp_path, ["east"])
    assert made(capsys) == 0


def test_changed_counts_in_the_metadata_are_noticed(index, tmp_path, capsys):
    pixels = opened(index, tmp_path, ["east"]).class_pixels()
    meta = parts(tmp_path)[0] / "meta.json"
    sealed = json.loads(meta.read_text())
    inner = json.loads(sealed["meta"])
    inner["class_counts"][0][0] += 1
    meta.write_text(json.dumps(sealed | {"meta": json.dumps(inner)}))
    assert np.array_equal(opened(index, tmp_path, ["east"]).class_pixels(), pixels)
    assert made(capsys) == 2


def rewrite(path, change):
    """Writes the picture anew, at a later time than before."""
    picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    before = path.stat().st_mtime_ns
    cv2.imwrite(str(path), change(picture))
    os.utime(path, ns=(before + 10**6, before + 10**6))


@pytest.mark.parametrize("kind", ["image", "label"])
def test_a_changed_source_makes_its_part_anew_and_no_other(index, tmp_path, capsys, kind):
    opened(index, tmp_path)
    made(capsys)
    rewrite(getattr(index.frames[1], kind), lambda picture: picture[::-1])
    assert_right(index, opened(index, tmp_path))
    assert made(capsys) == 1


def test_size_resize_and_class_map_have_caches_of_their_own(index, tmp_path, capsys):
    opened(index, tmp_path)
    opened(index, tmp_path, size=(20, 16))
    opened(index, tmp_path, resize="letterbox")
    opened(replace(index, label_map="tiny 2"), tmp_path)
    told = capsys.readouterr().err
    assert told.count("cached tiny") == 8 and "warning" not in told


def test_a_moved_data_set_keeps_its_cache(index, tmp_path, capsys):
    opened(index, tmp_path)
    made(capsys)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    root = tmp_path / "elsewhere"
    frames = [
        replace(frame, image=root / frame.image.name, label=root / frame.label.name) for frame in index.frames
    ]
    opened(replace(index, root=root, frames=tuple(frames)), tmp_path)
    assert made(capsys) == 0


def assert_nothing_left(tmp_path):
    root = tmp_path / "cache" / "frames"
    assert not root.is_dir() or not [path for path in root.iterdir() if path.is_dir()]


def test_a_missing_source_is_named(index, tmp_path):
    index.frames[2].image.unlink()
    with pytest.raises(UserError, match="east_train_2.png: cannot be read"):
        opened(index, tmp_path)


def test_an_undecodable_source_is_named_and_leaves_nothing(index, tmp_path):
    index.frames[2].image.write_bytes(b"no picture")
    with pytest.raises(UserError, match="east_train_2.png: cannot be decoded"):
        opened(index, tmp_path)
    assert_nothing_left(tmp_path)


def test_a_label_value_out_of_range_is_named_and_leaves_nothing(index, tmp_path):
    rewrite(index.frames[3].label, lambda ids: np.where(ids == 0, 77, ids).astype(np.uint8))
    with pytest.raises(UserError, match=r"east_train_3_ids.png: label value 77, allowed: 0\.\.4 and 255"):
        opened(index, tmp_path)
    assert_nothing_left(tmp_path)


def test_image_and_label_of_different_size_are_named(index, tmp_path):
    rewrite(index.frames[0].label, lambda ids: ids[:-1])
    with pytest.raises(UserError, match=r"east_train_0.png is 40x24 and its label .*_0_ids.png is 40x23"):
        opened(index, tmp_path)


def test_a_full_disk_is_told_before_anything_is_written(index, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache_parts.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"cache/frames: only 1000 bytes are free; it needs 7936 bytes"):
        opened(index, tmp_path, ["east"])
    assert_nothing_left(tmp_path)


def test_a_disk_that_fills_up_leaves_nothing_and_a_later_try_works(index, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "pwrite", full)
        with pytest.raises(UserError, match="No space left on device; it needs"):
            opened(index, tmp_path)
    assert_nothing_left(tmp_path)
    assert_right(index, opened(index, tmp_path))


def test_a_folder_that_cannot_be_written_is_named(index, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="data.cache_dir: .*cache/frames"):
        opened(index, tmp_path)


def test_what_a_killed_process_left_is_not_taken_for_a_part(index, tmp_path):
    opened(index, tmp_path, ["east"])
    [part] = parts(tmp_path)
    part.rename(part.with_suffix(".building"))
    flip_a_bit(part.with_suffix(".building") / "images.npy")
    assert_right(index, opened(index, tmp_path, ["east"]))
    assert parts(tmp_path) == [part]


def open_and_save(index, folder, barrier, number):
    barrier.wait()
    cache = opened(index, folder)
    np.save(folder / f"{number}.npy", [cache.images[row] for row in range(len(cache.frames))])


def test_processes_that_need_the_same_part_make_it_once(index, tmp_path, capfd):
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(3)
    workers = [fork.Process(target=open_and_save, args=(index, tmp_path, barrier, n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    first, second, third = (np.load(tmp_path / f"{number}.npy") for number in range(3))
    assert np.array_equal(first, second) and np.array_equal(first, third)
    assert made(capfd) == 2 and len(parts(tmp_path)) == 2


def test_only_the_frames_in_use_are_checked(index, tmp_path, capsys):
    east = index.select("train", ["east"])
    open_cache(index, east, SIZE, "squash", tmp_path / "cache")
    flip_a_bit(parts(tmp_path)[0] / "images.npy")  # in the last frame
    made(capsys)
    open_cache(index, east[:5], SIZE, "squash", tmp_path / "cache")
    assert made(capsys) == 0
    open_cache(index, east, SIZE, "squash", tmp_path / "cache")
    assert made(capsys) == 1


def test_rows_travel_to_other_processes_without_their_bytes(index, tmp_path):
    cache = opened(index, tmp_path)
    sent = pickle.dumps(cache.images)
    assert len(sent) < cache.images[0].nbytes
    assert np.array_equal(pickle.loads(sent)[7], cache.images[7])


def test_an_opened_cache_outlives_its_files(index, tmp_path):
    cache = opened(index, tmp_path)
    before = cache.images[3].copy()
    shutil.rmtree(tmp_path / "cache")
    assert np.array_equal(cache.images[3], before)
