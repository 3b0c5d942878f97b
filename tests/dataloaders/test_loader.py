"""Batches are a function of seed, epoch and step: workers and resuming don't change them."""

import multiprocessing
import os
import signal
from collections import namedtuple
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_index import write_index

from dataloaders import loader
from dataloaders.frames import IGNORE
from dataloaders.loader import eval_loader, train_loader
from dataloaders.transforms import augmentation, augmented
from engine.config import UserError

SIZE = (16, 20)
AUGMENT = SimpleNamespace(scale=(0.5, 2.0), flip=0.5, color=0.5, blur=0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    return write_index(folder / "data"), folder / "cache"


def training(data, workers=0, batch_size=2, seed=304, augment=AUGMENT, subsets=("all",)):
    index, cache_dir = data
    return train_loader(
        index,
        index.select("train", subsets),
        image_size=SIZE,
        resize="squash",
        augment=augment,
        cache_dir=cache_dir,
        batch_size=batch_size,
        seed=seed,
        workers=workers,
    )


def evaluation(data, workers=0, batch_size=4, size=SIZE, resolution="native", index=None):
    return eval_loader(
        index or data[0],
        (index or data[0]).select("train", ["all"]),
        image_size=size,
        resize="squash",
        cache_dir=data[1],
        batch_size=batch_size,
        workers=workers,
        resolution=resolution,
    )


def all_of(batches):
    """The batches, of which there has to be one: else a loop over them asserts nothing."""
    found = list(batches)
    assert found
    return found


def names(batches):
    return [frame.name for batch in batches for frame in batch.frames]


def content(batches):
    return [
        (batch.images.numpy().tobytes(), batch.labels.numpy().tobytes(), names([batch])) for batch in batches
    ]


def test_workers_do_not_change_the_batches(data):
    alone, helped = training(data, workers=0), training(data, workers=2)
    for epoch in (0, 3):
        expected = content(alone.epoch(epoch))
        assert len(expected) == len(alone) == len(helped) == 5
        assert content(helped.epoch(epoch)) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_be_entered_at_any_step(data, workers):
    batches = training(data, workers)
    whole = content(batches.epoch(1))
    for start in (0, 1, 3, 5):
        assert content(batches.epoch(1, start=start)) == whole[start:]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_is_left_early_does_not_disturb_the_next(data, workers):
    batches = training(data, workers)
    expected = content(training(data).epoch(1))
    next(batches.epoch(0))
    assert content(batches.epoch(1)) == expected


def test_an_epoch_shows_each_frame_once(data):
    batches = training(data, batch_size=3)
    first, second = names(batches.epoch(0)), names(batches.epoch(1))
    assert len(batches) == 4 and len(first) == len(set(first)) == len(set(second)) == 11
    assert first != second
    assert first != names(training(data, batch_size=3, seed=5).epoch(0))


def test_a_last_batch_of_one_is_dropped_and_over_the_epochs_no_frame_is_left_out(data):
    batches = training(data, batch_size=5)
    assert len(batches) == 2 and len(names(batches.epoch(0))) == 10
    assert len({name for epoch in range(6) for name in names(batches.epoch(epoch))}) == 11
    assert len(training(data, batch_size=1)) == 11


def test_a_frame_is_changed_by_its_own_seed(data):
    batches = training(data, batch_size=3)
    row = {frame.name: row for row, frame in enumerate(batches.cache.frames)}
    for batch in all_of(batches.epoch(2)):
        for place, frame in enumerate(batch.frames):
            number = row[frame.name]
            image, labels = augmented(
                augmentation(AUGMENT, SIZE),
                batches.cache.images[number],
                batches.cache.labels[number],
                seed=304,
                epoch=2,
                index=number,
            )
            assert np.array_equal(batch.images[place].permute(1, 2, 0), image)
            assert np.array_equal(batch.labels[place], labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_and_flipped_tell_what_a_batch_was_made_from(data, workers):
    flips = training(data, workers, augment=SimpleNamespace(scale=(1.0, 1.0), flip=0.5, color=0.0, blur=0.0))
    turned = [flip for epoch in range(3) for batch in flips.epoch(epoch) for flip in batch.flipped]
    assert 0.2 < np.mean(turned) < 0.8
    for batch in flips.epoch(2):
        assert [flips.cache.frames[row] for row in batch.rows] == batch.frames
        for place, (row, flipped) in enumerate(zip(batch.rows, batch.flipped, strict=True)):
            image, labels = flips.cache.images[row], flips.cache.labels[row]
            if flipped:
                image, labels = image[:, ::-1], labels[:, ::-1]
            assert np.array_equal(batch.images[place].permute(1, 2, 0), image)
            assert np.array_equal(batch.labels[place], labels)


def test_flipped_is_right_beside_other_changes(data):
    """A frame of two halves, and a zoom that leaves a middle row of both: a flip can be seen."""
    cache = training(data).cache
    frame = np.zeros((*SIZE, 3), np.uint8)
    frame[:, SIZE[1] // 2 :] = 200
    labels = (frame[..., 0] > 0).astype(np.uint8)
    shown = replace(cache, images=[frame] * 11, labels=[labels] * 11)
    augment = SimpleNamespace(scale=(0.9, 1.1), flip=0.5, color=0.5, blur=0.5)
    source = loader.Batches(shown, augmentation(augment, SIZE), seed=304)
    seen = source.batch([(epoch, row) for epoch in range(4) for row in range(11)])
    left = [(one[8, 4:7] == 1).all().item() for one in seen.labels]
    assert seen.flipped == left and 10 < sum(left) < 34


def test_without_flips_nothing_is_flipped(data):
    for batches in (training(data, augment="none").epoch(0), evaluation(data)):
        for batch in batches:
            assert batch.flipped == [False] * len(batch.frames)
    never = SimpleNamespace(scale=(0.5, 2.0), flip=0.0, color=0.5, blur=0.5)
    assert not any(flip for batch in training(data, augment=never).epoch(0) for flip in batch.flipped)


def test_evaluation_rows_are_the_places_of_the_frames(data):
    assert [row for batch in evaluation(data) for row in batch.rows] == list(range(11))


def test_the_changes_of_a_frame_differ_between_epochs(data):
    batches = training(data, batch_size=1)
    first = {batch.frames[0].name: batch.images for batch in all_of(batches.epoch(0))}
    second = {batch.frames[0].name: batch.images for batch in batches.epoch(1)}
    assert all(not torch.equal(first[name], second[name]) for name in first)


def test_without_augmentation_batches_are_the_cached_frames(data):
    batches = training(data, augment="none")
    row = {frame.name: row for row, frame in enumerate(batches.cache.frames)}
    for batch in all_of(batches.epoch(0)):
        assert batch.images.dtype == batch.labels.dtype == torch.uint8
        for place, frame in enumerate(batch.frames):
            image, labels = batches.cache.images[row[frame.name]], batches.cache.labels[row[frame.name]]
            assert np.array_equal(batch.images[place].permute(1, 2, 0), image)
            assert np.array_equal(batch.labels[place], labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_stored_channels_last(data, workers):
    batch = next(training(data, workers).epoch(0))
    assert batch.images.shape == (2, 3, *SIZE)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers", [0, 2])
def test_torch_random_numbers_are_left_alone(data, workers):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    content(training(data, workers).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_ctrl_c_does_not_reach_the_workers(data):
    batches = training(data, workers=2)
    epoch = batches.epoch(0)
    first = content([next(epoch)])
    for worker in batches.loader._iterator._workers:
        os.kill(worker.pid, signal.SIGINT)
    assert first + content(epoch) == content(training(data).epoch(0))


def test_ctrl_c_does_not_reach_workers_that_have_not_run_a_line_yet(data, monkeypatch):
    batches, start = training(data, workers=2), multiprocessing.context.ForkProcess.start

    def start_under_fire(process):
        start(process)
        os.kill(process.pid, signal.SIGINT)

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", start_under_fire)
    assert content(batches.epoch(0)) == content(training(data).epoch(0))
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_fewer_frames_than_a_batch_is_refused(data):
    with pytest.raises(UserError, match=r"train.batch_size: 12 is more than the 11 frames that data.subsets"):
        training(data, batch_size=12)
    assert len(training(data, batch_size=11)) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_keeps_the_order_and_the_last_batch(data, workers):
    batches = evaluation(data, workers)
    frames = data[0].select("train", ["all"])
    for _ in range(2):  # any number of times
        found = list(batches)
        assert [len(batch.frames) for batch in found] == [4, 4, 3] and len(batches) == 3
        assert [frame for batch in found for frame in batch.frames] == list(frames)
        images = torch.cat([batch.images for batch in found])
        for row in range(11):
            assert np.array_equal(images[row].permute(1, 2, 0), batches.cache.images[row])


@pytest.mark.parametrize("workers", [0, 2])
def test_native_labels_are_those_of_the_source(data, workers):
    for batch in all_of(evaluation(data, workers)):
        assert len(batch.native_labels) == len(batch.frames)
        for labels, frame in zip(batch.native_labels, batch.frames, strict=True):
            assert np.array_equal(labels, data[0].read_label(frame.label)[0])


def test_native_labels_are_none_where_they_would_repeat_the_labels(data):
    assert all(batch.native_labels is None for batch in all_of(evaluation(data, resolution="network")))
    for batch in all_of(evaluation(data, size=(24, 40))):
        assert batch.native_labels is None
        for labels, frame in zip(batch.labels, batch.frames, strict=True):
            assert np.array_equal(labels, data[0].read_label(frame.label)[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_found_in_a_worker_arrives_as_one_clear_message(tmp_path, workers):
    index = write_index(tmp_path / "data")
    batches = evaluation((index, tmp_path / "cache"), workers)
    broken = index.select("train", ["all"])[5]

    def read(path):
        if path == broken.label:
            raise UserError(f"{path}: cannot be read")
        return index.read_label(path)

    batches.source.read_native = read
    with pytest.raises(UserError) as caught:
        list(batches)
    assert str(caught.value) == f"{broken.label}: cannot be read"


@pytest.mark.parametrize(("free", "workers"), [(10**9, 4), (2 * 2 * 2 * 2560, 2), (1000, 0)])
def test_workers_are_as_many_as_the_shared_memory_carries(data, monkeypatch, capsys, free, workers):
    content(training(data).epoch(0))  # the cache is made
    capsys.readouterr()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: usage(10**9, 10**9, free))
    monkeypatch.setattr(loader, "SHARED_MEMORY", data[1])
    batches = training(data, workers=4)
    assert batches.workers == workers
    assert (f"data.workers: {workers} instead of 4" in capsys.readouterr().err) == (workers < 4)


def test_padding_is_ignored(data):
    small = SimpleNamespace(scale=(0.5, 0.5), flip=0.0, color=0.0, blur=0.0)
    for batch in all_of(training(data, augment=small).epoch(0)):
        assert (batch.labels == IGNORE).sum(dim=(1, 2)).min() >= SIZE[0] * SIZE[1] * 3 // 4
