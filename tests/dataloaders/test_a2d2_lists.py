import os

import pytest

from dataloaders.a2d2_lists import Entry, find_lists, parse, read_list, write_lists
from engine.config import UserError


def test_a_frame_has_one_name_and_two_files():
    entry = Entry("20181204_135952", "000094929")
    assert entry.path("label") == (
        "20181204_135952/label/cam_front_center/20181204135952_label_frontcenter_000094929.png"
    )
    assert parse(entry.path("label")) == (entry, "label")
    assert parse(entry.path("camera")) == (entry, "camera")
    assert parse("20181204135952_label_rearcenter_000094929.png") is None


def test_the_last_line_counts_without_a_newline_and_the_first_camera_line_is_told(tmp_path):
    path = tmp_path / "x_train_gt.txt"
    camera = Entry("20181204_135952", "2").path("camera")
    path.write_text(f"{Entry('20181204_135952', '1').path('label')}\n{camera}\n{camera}")
    entries, first_camera = read_list(path)
    assert [entry.number for entry in entries] == ["1", "2", "2"] and first_camera == 2


def test_written_lists_are_the_only_ones_and_other_lists_are_not_mixed_in(tmp_path):
    folder = tmp_path / "new" / "splits"
    write_lists(folder, {"a_train_gt.txt": "1\n", "a_test_gt.txt": "2\n"}, overwrite=False)
    (folder / "notes.txt").write_text("mine")
    write_lists(folder, {"a_train_gt.txt": "1\n", "a_test_gt.txt": "2\n"}, overwrite=False)  # nothing to do
    with pytest.raises(UserError, match="already holds 2 other lists; --overwrite"):
        write_lists(folder, {"b_train_gt.txt": "3\n"}, overwrite=False)
    write_lists(folder, {"b_train_gt.txt": "3\n"}, overwrite=True)
    assert sorted(os.listdir(folder)) == ["b_train_gt.txt", "notes.txt"]
    assert find_lists(folder) == {"b": {"train": folder / "b_train_gt.txt"}}


def test_a_disk_that_fills_up_leaves_the_old_lists(tmp_path, monkeypatch):
    write_lists(tmp_path, {"a_train_gt.txt": "old\n"}, overwrite=False)
    written = type(tmp_path).write_text

    def full(path, text, **kwargs):
        if path.name.startswith("b_test"):
            raise OSError(28, "No space left on device")
        return written(path, text, **kwargs)

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    with pytest.raises(UserError, match="No space left"):
        write_lists(tmp_path, {"a_train_gt.txt": "new\n", "b_test_gt.txt": "new\n"}, overwrite=True)
    assert os.listdir(tmp_path) == ["a_train_gt.txt"]
    assert (tmp_path / "a_train_gt.txt").read_text() == "old\n"
