"""Run folders are refused, resumed and overwritten as asked; files survive a full disk; damage is named."""

import errno
import json
import os
import re
import resource
import subprocess

import pytest
import torch
import yaml

from engine import checkpoints, runs
from engine.checkpoints import (
    atomic_write,
    load_metadata,
    load_state,
    load_weights,
    save_state,
    save_weights,
    tensors_sha256,
)
from engine.config import UserError
from engine.runs import RunFolder, Table, check_run_folder, differing_keys, environment

CONFIG = {
    "name": "expert",
    "output": "runs",
    "data": {"name": "folder", "workers": 2, "cache_dir": ".cache", "image_size": (48, 64)},
    "train": {"epochs": 3, "optimizer": {"name": "sgd", "lr": 1e-5}},
    "evaluate": {"batch_size": 4},
}

WRITTEN = {**CONFIG, "data": {**CONFIG["data"], "image_size": [48, 64]}}


def changed(**sections) -> dict:
    return {**CONFIG, **{name: {**CONFIG[name], **keys} for name, keys in sections.items()}}


def snapshot(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors():
    generator = torch.Generator().manual_seed(1)
    return {
        "weight": torch.randn(4, 3, 2, 2, generator=generator),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
    }


def test_a_new_folder_holds_config_and_environment(tmp_path):
    run = RunFolder(tmp_path / "expert", CONFIG)
    assert differing_keys(yaml.safe_load((run.path / "config.yaml").read_text()), WRITTEN) == []
    known = json.loads((run.path / "environment.json").read_text())
    assert known["versions"]["torch"] == torch.__version__.split("+")[0]
    assert (known["device"].split()[0], known["threads"]) == ("cpu", torch.get_num_threads())


def test_an_existing_folder_needs_a_flag_and_stays_as_it_was(tmp_path):
    run = RunFolder(tmp_path / "expert", CONFIG)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"expert: not empty; .*--resume.*--overwrite"):
        RunFolder(run.path, CONFIG)
    with pytest.raises(UserError, match="exclude each other"):
        RunFolder(run.path, CONFIG, resume=True, overwrite=True)
    assert snapshot(tmp_path) == before


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    (tmp_path / "expert").mkdir()
    check_run_folder(tmp_path / "expert", CONFIG)
    check_run_folder(tmp_path / "expert", CONFIG, resume=True)
    check_run_folder(tmp_path / "expert", CONFIG, overwrite=True)


def test_resume_names_every_key_that_differs(tmp_path):
    run = RunFolder(tmp_path / "expert", CONFIG)
    before = snapshot(tmp_path)
    other = changed(train={"epochs": 4, "optimizer": {"name": "sgd"}}, evaluate={"batch_size": 1})
    with pytest.raises(UserError) as error:
        RunFolder(run.path, other, resume=True)
    assert re.search(
        r"train\.epochs \(was 3, is 4\); train\.optimizer\.lr \(was 1.*, is None\)\.", str(error.value)
    )
    assert "evaluate" not in str(error.value)
    assert snapshot(tmp_path) == before


def test_resume_lets_evaluation_workers_cache_and_place_differ(tmp_path):
    RunFolder(tmp_path / "expert", CONFIG)
    other = changed(evaluate={"batch_size": 9}, data={"workers": 0, "cache_dir": "/elsewhere"})
    RunFolder(tmp_path / "expert", {**other, "output": "other"}, resume=True)


def test_what_decides_the_best_epoch_may_not_differ(tmp_path):
    RunFolder(tmp_path / "expert", changed(evaluate={"absent": "nan", "batch_size": 1}))
    with pytest.raises(UserError, match=r"different: evaluate.absent \(was nan, is zero\)"):
        RunFolder(tmp_path / "expert", changed(evaluate={"absent": "zero", "batch_size": 2}), resume=True)


def test_overwrite_starts_from_an_empty_folder(tmp_path):
    run = RunFolder(tmp_path / "expert", CONFIG)
    run.log("hello")
    save_state(run.last, {})
    RunFolder(run.path, changed(train={"epochs": 9}), overwrite=True)
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "environment.json"]
    assert "epochs: 9" in (run.path / "config.yaml").read_text()


@pytest.mark.parametrize("flag", ["overwrite", "resume"])
def test_no_flag_touches_a_folder_that_is_no_run(tmp_path, flag):
    thesis = tmp_path / "expert" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("three years of work")
    with pytest.raises(UserError, match="not the folder of a run"):
        RunFolder(thesis.parent, CONFIG, **{flag: True})
    assert thesis.read_text() == "three years of work"


def test_overwrite_spares_a_folder_with_the_config_of_something_else(tmp_path):
    for text in ("name: another\n", "volume: 11\n"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match="deletes only the folder of a run"):
            RunFolder(tmp_path, CONFIG, overwrite=True)
    for text in ("- a list\n", "a: [broken\n", ""):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match="config.yaml: "):
            RunFolder(tmp_path, CONFIG, overwrite=True)
        assert (tmp_path / "config.yaml").read_text() == text


def test_overwrite_follows_no_link(tmp_path):
    run = RunFolder(tmp_path / "expert", CONFIG)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "expert").symlink_to(run.path)
    with pytest.raises(UserError, match="deletes only the folder of a run"):
        RunFolder(tmp_path / "links" / "expert", CONFIG, overwrite=True)
    assert (run.path / "config.yaml").exists()


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "expert").write_text("")
    with pytest.raises(UserError, match="expert: should become the run's folder, but is a file"):
        RunFolder(tmp_path / "expert", CONFIG)


def test_resume_sweeps_what_a_killed_write_left(tmp_path):
    run = RunFolder(tmp_path / "expert", CONFIG)
    leftover = run.path / "checkpoints" / ".last.pt.123.tmp"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    RunFolder(run.path, CONFIG, resume=True)
    assert not leftover.exists()


def test_environment_outside_git(monkeypatch):
    failed = subprocess.CompletedProcess([], 128, "", "fatal: not a git repository")
    monkeypatch.setattr(runs.subprocess, "run", lambda *arguments, **options: failed)
    assert environment(torch.device("cpu"))["git"] == {"commit": None, "dirty": None}

    def missing(*arguments, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(runs.subprocess, "run", missing)
    assert environment(torch.device("cpu"))["git"] == {"commit": None, "dirty": None}


def test_log_is_printed_and_kept_with_the_time(tmp_path, capsys):
    run = RunFolder(tmp_path / "expert", CONFIG)
    run.log("first")
    run.log("second", show=False)
    assert capsys.readouterr().out == "first\n"
    assert [line[20:] for line in (run.path / "log.txt").read_text().splitlines()] == ["first", "second"]


def test_table_keeps_digits_empty_cells_and_the_rows_asked_for(tmp_path):
    table = Table(tmp_path / "metrics.csv", ["epoch", "loss"])
    table.append({"loss": 0.1 + 0.2, "epoch": 1})
    table.append({"epoch": 2, "loss": None})
    table.append({"epoch": 3, "loss": 1e-7})
    assert table.path.read_bytes() == b"epoch,loss\n1,0.30000000000000004\n2,\n3,1e-07\n"
    again = Table(table.path, ["epoch", "loss"], keep=1)
    assert again.rows == [{"epoch": "1", "loss": "0.30000000000000004"}]
    assert table.path.read_bytes() == b"epoch,loss\n1,0.30000000000000004\n"
    with pytest.raises(UserError, match="expected 2 rows of epoch, loss"):
        Table(table.path, ["epoch", "loss"], keep=2)
    with pytest.raises(UserError, match="expected 1 rows of epoch, lr"):
        Table(table.path, ["epoch", "lr"], keep=1)
    with pytest.raises(ValueError, match="row has"):
        again.append({"epoch": 1})


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    save_state(path, {"weights": torch.zeros(10)})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"last\.pt: can't be written: File too large; what was there"):
            save_state(path, {"weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_late_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "best.safetensors"
    save_weights(path, tensors(), {})
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints.os, call, fail)
    with pytest.raises(UserError, match=r"best\.safetensors: can't be written: No space left on device"):
        save_weights(path, {}, {})
    assert [file.name for file in tmp_path.iterdir()] == ["best.safetensors"]
    assert path.read_bytes() == before


def test_a_write_is_in_place_only_when_it_is_on_disk(tmp_path, monkeypatch):
    """Written, flushed to disk, renamed, in this order: a power cut leaves the old file or the new one."""
    path, order = tmp_path / "file", []
    path.write_bytes(b"old")
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(checkpoints.os, "fsync", lambda file: (order.append(path.read_bytes()), fsync(file)))
    monkeypatch.setattr(checkpoints.os, "replace", lambda *both: (order.append("renamed"), replace(*both)))
    atomic_write(path, b"new")
    assert order == [b"old", "renamed", b"new"]


def test_a_path_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"best\.safetensors: can't be written: File exists"):
        save_weights(tmp_path / "file" / "best.safetensors", {}, {})


def test_state_comes_back_as_it_was(tmp_path):
    state = {"tensors": tensors(), "position": {"epoch": 2, "best": None, "rates": [0.1]}, "pair": (1, "a")}
    save_state(tmp_path / "last.pt", state)
    loaded = load_state(tmp_path / "last.pt")
    assert tensors_sha256(loaded.pop("tensors")) == tensors_sha256(state.pop("tensors"))
    assert loaded == {"version": checkpoints.STATE_VERSION, **state}


def test_damaged_states_are_named(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(UserError, match="last.pt: no training state here"):
        load_state(path)
    save_state(path, {"tensors": tensors()})
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(tensors()["weight"].numpy().tobytes()) + 5] ^= 1
    for data in (b"", whole[:100], whole[:-100], whole[1:], bytes(flipped)):
        path.write_bytes(data)
        with pytest.raises(UserError, match="last.pt: damaged .*--overwrite"):
            load_state(path)
    for foreign in ({"version": 0}, [1, 2], torch.zeros(2)):
        torch.save(foreign, path)
        with pytest.raises(UserError, match=f"not {checkpoints.STATE_VERSION}; start again with --overwrite"):
            load_state(path)


def test_states_run_no_code(tmp_path):
    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"version": checkpoints.STATE_VERSION, "x": Malice()}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="last.pt: damaged"):
        load_state(tmp_path / "last.pt")
    assert not (tmp_path / "owned").exists()


def test_weights_come_back_with_their_metadata(tmp_path):
    path = tmp_path / "best.safetensors"
    nan, names = float("nan"), ["Straße"]
    metadata = {"metrics": {"miou": 0.25, "macc": nan}, "image_size": (48, 64), "class_names": names}
    save_weights(path, tensors(), metadata)
    loaded, read = load_weights(path)
    assert tensors_sha256(loaded) == tensors_sha256(tensors()) == read.pop("tensors_sha256")
    assert read == {"metrics": {"miou": 0.25, "macc": None}, "image_size": [48, 64], "class_names": names}
    assert load_metadata(path)["image_size"] == [48, 64]


def test_weights_have_the_same_bytes_whatever_the_order(tmp_path):
    some, other = tensors(), dict(reversed(tensors().items()))
    other["weight"] = other["weight"].contiguous(memory_format=torch.channels_last)
    save_weights(tmp_path / "a", some, {"x": 1, "y": {"b": 2, "a": 3}})
    save_weights(tmp_path / "b", other, {"y": {"a": 3, "b": 2}, "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tied_weights_can_be_saved(tmp_path):
    weight = torch.randn(3, 3)
    save_weights(tmp_path / "best.safetensors", {"in": weight, "out": weight, "part": weight[:, 0]}, {})
    loaded, _ = load_weights(tmp_path / "best.safetensors")
    assert torch.equal(loaded["in"], loaded["out"]) and torch.equal(loaded["part"], weight[:, 0])


def test_damaged_weights_are_named(tmp_path):
    path = tmp_path / "best.safetensors"
    with pytest.raises(UserError, match="best.safetensors: no weights here"):
        load_weights(path)
    save_weights(path, tensors(), {})
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for data in (b"", whole[:5], whole[:100], whole[:-1], b"PK" + whole, flipped):
        path.write_bytes(data)
        with pytest.raises(UserError, match="best.safetensors: damaged"):
            load_weights(path)


def test_weights_of_others_are_named(tmp_path):
    import safetensors.torch

    path = tmp_path / "model.safetensors"
    for metadata in (None, {"format": "pt"}, {"metadata": "[1]"}):
        safetensors.torch.save_file({"a": torch.zeros(2)}, path, metadata)
        with pytest.raises(UserError, match="model.safetensors: no metadata in it"):
            load_weights(path)


def test_hash_depends_on_names_types_shapes_and_values_only():
    base = tensors_sha256(tensors())
    same = dict(reversed(tensors().items()))
    same["weight"] = torch.nn.Parameter(same["weight"].contiguous(memory_format=torch.channels_last))
    assert tensors_sha256(same) == base
    value, shape, kind, name = tensors(), tensors(), tensors(), tensors()
    value["count"] += 1
    shape["weight"] = shape["weight"].reshape(3, 4, 2, 2)
    kind["mask"] = kind["mask"].to(torch.uint8)
    name["Count"] = name.pop("count")
    assert len({base, *map(tensors_sha256, (value, shape, kind, name))}) == 5
