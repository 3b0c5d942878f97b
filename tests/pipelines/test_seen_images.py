"""Images that a classifier was trained on are not scored: whatever data section, folder or former run hides them."""

import shutil
import struct

import numpy as np
import pytest

from dataloaders.digits import digits
from dataloaders.image_set import ImageSplit
from engine.checkpoints import load_weights, save_weights
from engine.config import UserError, from_dict
from pipelines.classification import build, description
from pipelines.classifier_evaluation import evaluate
from pipelines.cli import Options
from pipelines.export import export
from pipelines.seen_images import common, trainings_of

DIGITS = {"name": "digits", "test_images": 400, "val_images": 50}
NETWORK = {"name": "cnn", "arch": "resnet18", "ratio": 0.03}


def section(folder, data):
    both = {**DIGITS, **data, "cache_dir": str(folder / "cache")}
    return {key: value for key, value in both.items() if value is not None}


def training(folder, name="run", data=None, **train):
    own = {"method": "standard", "epochs": 1, **train}
    plain = {"name": name, "output": str(folder), "data": section(folder, data or {}), "network": NETWORK}
    return from_dict({**plain, "train": own})


def run(folder, name="run", data=None, **train):
    """The checkpoint of a training, as it would be with its first weights."""
    config = training(folder, name, data, **train)
    model, images = config.network.build(10), config.data.build(config.data.cache_dir)
    path = folder / name / "checkpoints" / "best.safetensors"
    path.parent.mkdir(parents=True)
    save_weights(path, model.state_dict(), description(config, images, model))
    return folder / name


def told_of(folder, model, data=None, split="test", dry=False):
    """What an evaluation is refused for, "" where it isn't; nothing is written before."""
    shutil.rmtree(folder / "asked", ignore_errors=True)
    config = from_dict(
        {
            "name": "asked",
            "output": str(folder),
            "data": section(folder, data or {}),
            "models": {"x": str(model)},
            "evaluate": {"split": split},
        }
    )
    try:
        evaluate(config, Options(device="cpu", dry_run=dry, overwrite=True))
    except UserError as error:
        assert "\n" not in str(error) and not (folder / "asked").exists()
        return str(error)
    return ""


def changed(path, tmp_path, **metadata):
    """A copy of a checkpoint with other metadata; None takes a key out."""
    tensors, about = load_weights(path / "checkpoints" / "best.safetensors")
    about = {key: value for key, value in {**about, **metadata}.items() if value is not None}
    save_weights(tmp_path / "changed.safetensors", tensors, about)
    return tmp_path / "changed.safetensors"


@pytest.mark.parametrize("dry", [True, False])
def test_a_larger_test_split_that_reaches_into_train_is_refused(tmp_path, dry):
    model = run(tmp_path)
    told = told_of(tmp_path, model, {"test_images": 900}, dry=dry)
    splits = digits("", test_images=400, val_images=50).splits
    train, val = splits["train"].names, splits["val"].names
    asked = {f"digit_{place:04d}" for place in range(1797 - 900, 1797)}
    both = (len(asked & set(train)), len(asked & set(val)))
    assert sum(both) == 500 and min(both) > 0
    assert told == (
        f"models.x: {model}/checkpoints/best.safetensors knows images of test: of 900, {both[0]} trained it and "
        f"{both[1]} chose its epoch, as val (data.test_images was 400, is 900); take the data section of its training"
    )


def test_its_own_splits_and_a_smaller_test_split_are_not(tmp_path):
    model = run(tmp_path)
    assert told_of(tmp_path, model) == told_of(tmp_path, model, split="val") == ""
    assert told_of(tmp_path, model, {"test_images": 300, "val_images": 100}) == ""


def test_another_choice_of_val_is_refused_on_val_alone(tmp_path):
    model = run(tmp_path)
    told = told_of(tmp_path, model, {"val_seed": 7}, split="val")
    assert "knows images of val: of 50, " in told and "(data.val_seed was 0, is 7)" in told
    assert "chose its epoch" not in told
    assert told_of(tmp_path, model, {"val_seed": 7}) == ""


def write_mnist(folder, *splits):
    """Ten images a class of each of t10k and train, all unlike."""
    folder.mkdir()
    for split in splits:
        seed = len(split)
        images = np.random.default_rng(seed).integers(0, 256, (100, 28, 28), np.uint8)
        labels = np.arange(100, dtype=np.uint8) % 10
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            head = b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape)
            (folder / f"{split}-{kind}-ubyte").write_bytes(head + values.tobytes())
    return str(folder)


def mnist(root):
    return {"name": "mnist", "root": root, "val_images": 10, "test_images": None}


def test_a_part_of_the_test_files_that_was_trained_on_is_found_in_the_whole(tmp_path):
    part, whole = (
        write_mnist(tmp_path / name, *splits) for name, splits in (("a", ["t10k"]), ("b", ["t10k", "train"]))
    )
    model = run(tmp_path, data=mnist(part))
    told = told_of(tmp_path, model, mnist(whole))
    assert (
        "of 100, 60 trained it and 10 chose its epoch" in told and f"data.root was {part}, is {whole}" in told
    )
    full = run(tmp_path, "full", data=mnist(whole))
    assert told_of(tmp_path, full, mnist(part)) == ""  # its test images are of t10k, which it never saw


def test_the_same_files_in_another_folder_are_the_same_images(tmp_path):
    model = run(tmp_path, data=mnist(write_mnist(tmp_path / "a", "t10k")))
    (tmp_path / "a").rename(tmp_path / "moved")
    moved = mnist(str(tmp_path / "moved"))
    assert told_of(tmp_path, model, moved) == ""
    assert "trained it" in told_of(tmp_path, model, {**moved, "test_share": 0.5})


def test_images_that_are_not_to_be_had_can_t_be_told(tmp_path):
    model = run(tmp_path, data=mnist(write_mnist(tmp_path / "a", "t10k")))
    for path in (tmp_path / "a").iterdir():
        path.unlink()
    (tmp_path / "a").rmdir()
    told = told_of(tmp_path, model, mnist(write_mnist(tmp_path / "b", "t10k", "train")))
    assert "was trained on other images of mnist than data has now (data.root was " in told
    assert "whether some of test are among them can't be told" in told


def test_what_the_run_saw_that_it_started_from_counts_too(tmp_path):
    first = run(tmp_path, "first", {"test_images": 100})
    second = run(tmp_path, "second", start_from=str(first))
    told = told_of(tmp_path, second)
    assert "second/checkpoints/best.safetensors knows images of test: of 400, " in told
    old = changed(
        second, tmp_path, start_from=None
    )  # as earlier versions wrote: config.train.start_from alone
    assert "knows images of test: of 400, " in told_of(tmp_path, old)
    first.rename(tmp_path / "away")
    assert told_of(tmp_path, second) == told
    told = told_of(tmp_path, old)
    assert f"started from {first}, which is gone or another run now; whether that saw images of test" in told
    other = run(tmp_path, "other")
    old = changed(second, tmp_path, start_from={"path": str(other), "sha256": "of another"})
    assert f"started from {other}, which is gone or another run now" in told_of(tmp_path, old)


def test_images_that_trained_the_first_weights_do_not_choose_the_epoch(tmp_path):
    first = run(tmp_path, "first")

    def started(**data):
        one = training(tmp_path, "second", data, start_from=str(first))
        return build(one, one.data.build(one.data.cache_dir))

    started()
    with pytest.raises(
        UserError, match="train.start_from: .* knows images of val: of 50, .* trained it"
    ) as told:
        started(val_seed=7)
    assert "data.val_seed was 0, is 7" in str(told.value)


def test_an_export_knows_what_its_run_knew(tmp_path):
    run(tmp_path, "first", {"test_images": 100})
    model = run(tmp_path, start_from=str(tmp_path / "first"))
    export(str(model), tmp_path / "out")
    told = [told_of(tmp_path, one).partition(" knows ")[2] for one in (model, tmp_path / "out")]
    assert told[0] == told[1] != ""


def test_checkpoints_that_tell_nothing_are_taken_as_they_are(tmp_path):
    assert trainings_of({"classes": ["a"]}) == []
    assert told_of(tmp_path, changed(run(tmp_path), tmp_path, config=None)) == ""


def test_the_same_name_is_the_same_image_if_its_pixels_are():
    pixels = np.arange(6 * 4, dtype=np.uint8).reshape(6, 1, 2, 2)
    one = ImageSplit(pixels[:4], np.zeros(4), ["a", "b", "c", "d"])
    two = ImageSplit(pixels[1:5], np.zeros(4), ["b", "x", "d", "a"])
    assert common(one, two) == 2
    assert common(one, ImageSplit(np.zeros((2, 1, 3, 3), np.uint8), np.zeros(2), ["a", "y"])) == 1
