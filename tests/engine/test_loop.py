"""The training loop against closed forms, and against itself after kills, interruptions and bad numbers."""

import csv
import json
import math
import os
import random
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy
from torch import nn
from toy import Batches, Net, phase_of, train

from engine import learner, progress, resume
from engine.checkpoints import load_metadata, load_state, load_weights, save_state, tensors_sha256
from engine.config import Interrupted, UserError
from engine.interrupt import StopRequest
from engine.losses import cross_entropy
from engine.randomness import random_state, seed_everything, set_random_state
from engine.steps import Watch, compute_gradients

CROSS_ENTROPY = cross_entropy(None, 255)


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """progress.png takes longer than the toy's epochs; its own test draws it."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(progress, "draw", lambda *arguments: None)


def plain_net() -> nn.Module:
    """Without BatchNorm and dropout: a batch is the sum of its images."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, toy.CLASSES, 1))


def rows(run, name="metrics.csv") -> list[dict[str, str]]:
    with open(run.path / name, newline="") as file:
        return list(csv.DictReader(file))


def outcome(folder) -> tuple[bytes, bytes]:
    return (folder / "checkpoints/best.safetensors").read_bytes(), (folder / "metrics.csv").read_bytes()


def scripted(values):
    """A validation that gives these figures in turn."""
    given = iter(values)
    return lambda model: dict.fromkeys(toy.METRICS, next(given))


def flat(model) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


# ---------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_batches_are_one_large_batch(tmp_path, accumulate):
    small = Batches(6, 2)
    large = Batches(6 // accumulate, 2 * accumulate)
    first, run, model = train(tmp_path / "a", batches=small, net=plain_net, accumulate=accumulate)
    second, other_run, other = train(tmp_path / "b", batches=large, net=plain_net)
    assert torch.allclose(flat(model), flat(other), atol=1e-6)
    assert (first.steps, first.images_seen) == (second.steps, second.images_seen) == (18 // accumulate, 36)
    losses = [[float(row["loss"]) for row in rows(one)] for one in (run, other_run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_last_step_of_an_epoch_takes_what_is_left(tmp_path):
    result, run, _ = train(tmp_path / "a", batches=Batches(5, 2), accumulate=2, epochs=2)
    assert (result.steps, result.images_seen) == (6, 20)
    assert [row["step"] for row in rows(run)] == ["3", "6"]


def test_training_is_the_plain_loop(tmp_path):
    """One phase without extras: the steps of a hand-written loop, rate by rate."""
    _, run, model = train(tmp_path / "a", net=plain_net, channels_last=False)
    torch.manual_seed(304)
    oracle = plain_net()
    optimizer = torch.optim.SGD(oracle.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-4)
    losses, rates = [], []
    for step, batch in enumerate(batch for epoch in range(3) for batch in Batches().epoch(epoch)):
        rate = 0.5 * (0.01 + 0.99 * (1 - step / 17) ** 0.9)
        optimizer.param_groups[0]["lr"] = rate
        loss = nn.functional.cross_entropy(
            oracle(batch.images / 255), batch.labels.long(), ignore_index=255, reduction="sum"
        )
        pixels = (batch.labels != 255).sum()
        optimizer.zero_grad()
        (loss / pixels).backward()
        optimizer.step()
        losses.append((loss.item(), pixels.item()))
        rates.append(rate)
    assert torch.allclose(flat(model), flat(oracle), atol=1e-6)
    for epoch, row in enumerate(rows(run)):
        part = slice(6 * epoch, 6 * epoch + 6)
        mean = sum(loss for loss, _ in losses[part]) / sum(pixels for _, pixels in losses[part])
        assert float(row["loss"]) == pytest.approx(mean, rel=1e-5)
        assert float(row["lr"]) == pytest.approx(rates[part][-1])


def test_images_reach_the_network_as_floats_between_0_and_1_in_channels_last(tmp_path):
    seen = []

    def loss(model, images, labels):
        seen.append((images, labels))
        return CROSS_ENTROPY(model(images), labels)

    train(tmp_path / "a", phases=lambda model, steps: [phase_of(model, steps, loss=loss)], epochs=1)
    (images, labels), batch = seen[0], next(Batches().epoch(0))
    assert torch.equal(images, batch.images.float() / 255) and images.max() <= 1
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64 and torch.equal(labels, batch.labels.long())


def test_a_batch_without_labels_moves_nothing(tmp_path):
    class Unlabelled(Batches):
        def frame(self, epoch, row):
            image, label = super().frame(epoch, row)
            return image, torch.full_like(label, 255)

    def phases(model, steps):
        return [phase_of(model, steps, weight_decay=0.0)]

    torch.manual_seed(304)
    before = flat(plain_net())
    _, run, model = train(tmp_path / "a", batches=Unlabelled(), net=plain_net, phases=phases, epochs=1)
    assert torch.equal(flat(model), before)
    assert rows(run)[0]["loss"] == "nan"


def test_the_gradient_is_clipped_to_its_norm(tmp_path):
    def phases(model, steps):
        return [phase_of(model, steps, momentum=0.0, weight_decay=0.0)]

    torch.manual_seed(304)
    before = flat(plain_net())
    _, _, model = train(
        tmp_path / "a", batches=Batches(1), net=plain_net, phases=phases, epochs=1, clip_norm=0.01
    )
    assert (flat(model) - before).norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_bf16_runs_the_network_in_bf16_and_keeps_float_weights(tmp_path):
    kinds = []

    def loss(model, images, labels):
        logits = model(images)
        kinds.append(logits.dtype)
        return CROSS_ENTROPY(logits, labels)

    def phases(model, steps):
        return [phase_of(model, steps, loss=loss)]

    _, _, model = train(tmp_path / "a", phases=phases, precision="bf16", epochs=1)
    assert set(kinds) == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


class Pair(nn.Module):
    """Two networks for two phases."""

    def __init__(self):
        super().__init__()
        self.one, self.two = plain_net(), plain_net()

    def forward(self, images):
        return self.one(images) + self.two(images)


def pair_of_phases(model, steps, loss=None):
    return [
        phase_of(model, steps, name="one", parameters=model.one.parameters(), loss=loss, lr=0.3),
        phase_of(model, steps, name="two", parameters=model.two.parameters(), loss=loss, lr=0.1),
    ]


def test_phases_take_turns_on_the_same_batch_each_with_its_own_parameters(tmp_path):
    seen = []

    def loss(model, images, labels):
        seen.append((flat(model.one).clone(), flat(model.two).clone(), images))
        return CROSS_ENTROPY(model(images), labels)

    train(tmp_path / "a", net=Pair, phases=lambda model, steps: pair_of_phases(model, steps, loss), epochs=1)
    assert len(seen) == 12
    for (one, two, images), (next_one, next_two, next_images) in zip(seen, seen[1:], strict=False):
        first_phase = torch.equal(images, next_images)  # the two phases of one batch
        assert torch.equal(one, next_one) != first_phase
        assert torch.equal(two, next_two) == first_phase


def test_a_phase_gives_no_gradient_to_parameters_of_others():
    model = Pair()
    batch = next(Batches().epoch(0))
    compute_gradients(pair_of_phases(model, 9)[0], model, [(batch.images.float() / 255, batch.labels.long())])
    assert all(parameter.grad is not None for parameter in model.one.parameters())
    assert all(parameter.grad is None for parameter in model.two.parameters())


def test_two_phases_are_the_plain_alternating_loop(tmp_path):
    """With momentum, so that a stray gradient of the other phase's loss would show."""
    _, run, model = train(tmp_path / "a", net=Pair, phases=pair_of_phases)
    torch.manual_seed(304)
    oracle = Pair()
    optimizers = [
        torch.optim.SGD(part.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
        for part, lr in ((oracle.one, 0.3), (oracle.two, 0.1))
    ]
    for step, batch in enumerate(batch for epoch in range(3) for batch in Batches().epoch(epoch)):
        for optimizer, lr in zip(optimizers, (0.3, 0.1), strict=True):
            optimizer.param_groups[0]["lr"] = lr * (0.01 + 0.99 * (1 - step / 17) ** 0.9)
            oracle.zero_grad()
            total, count = CROSS_ENTROPY(oracle(batch.images / 255), batch.labels.long())
            (total / count).backward()
            optimizer.step()
    assert torch.allclose(flat(model), flat(oracle), atol=1e-5)
    header = (run.path / "metrics.csv").read_text().splitlines()[0]
    assert header == "epoch,step,images_seen,one_loss,two_loss,one_lr,two_lr,miou,aacc"


# ------------------------------------------------------------------------------- validation, best, early stop


def test_best_is_the_first_of_equals_and_says_what_it_is(tmp_path):
    states = []

    def weights(model):
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return model.state_dict(), {"class_names": ["a"]}

    result, run, _ = train(tmp_path / "a", validate=scripted([0.2, 0.5, 0.5, 0.4]), weights=weights, epochs=4)
    assert (result.best, result.best_epoch, result.epochs) == (0.5, 2, 4)
    tensors, metadata = load_weights(run.best)
    assert len(states) == 2 and tensors_sha256(tensors) == tensors_sha256(states[1])
    assert metadata.pop("tensors_sha256") == tensors_sha256(tensors)
    assert metadata == {
        "class_names": ["a"], "epoch": 2, "steps": 12, "images_seen": 48, "monitor": "miou",
        "metrics": {"miou": 0.5, "aacc": 0.5}, "budget": {"steps": 24, "images": 96},
    }  # fmt: skip
    header = run.best.read_bytes()
    header = json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])
    assert list(header["__metadata__"]) == ["metadata"]


def test_the_monitored_figure_decides(tmp_path):
    figures = iter([{"miou": 0.9, "aacc": 0.1}, {"miou": 0.1, "aacc": 0.9}])
    result, run, _ = train(tmp_path / "a", validate=lambda model: next(figures), monitor="aacc", epochs=2)
    assert (result.best, result.best_epoch) == (0.9, 2)
    assert load_metadata(run.best)["metrics"]["miou"] == 0.1


def test_a_figure_that_is_nan_is_beaten_by_any_other_and_beats_none(tmp_path):
    nan = math.nan
    result, _, _ = train(tmp_path / "a", validate=scripted([nan, 0.1, nan]))
    assert (result.best, result.best_epoch) == (0.1, 2)


@pytest.mark.parametrize(
    ("figures", "interval", "patience", "epochs", "best"),
    [
        ([0.1, 0.3, 0.2, 0.3, 0.4], 1, 2, 4, 2),
        ([0.1, 0.3, 0.2, 0.4, 0.3, 0.2, 0.1], 1, 3, 7, 4),
        ([0.3, 0.2, 0.1, 0.4], 2, 3, 6, 2),  # validated after 2, 4 and 6 epochs: 4 without improvement
        ([0.3, 0.2, 0.4, 0.3], 2, 3, 8, 6),
    ],
)
def test_early_stop_counts_epochs(tmp_path, figures, interval, patience, epochs, best):
    result, run, _ = train(
        tmp_path / "a", batches=Batches(1), validate=scripted(figures), epochs=8,
        early_stop=patience, eval_interval=interval,
    )  # fmt: skip
    assert (result.epochs, result.best_epoch) == (epochs, best)
    assert ("early stop" in (run.path / "log.txt").read_text()) == (epochs < 8)


def test_validation_runs_each_interval_and_at_the_end_in_eval_mode(tmp_path):
    modes = []

    def validate(model):
        modes.append(model.training)
        return {"miou": 0.5, "aacc": 0.25}

    train_modes = []

    def loss(model, images, labels):
        train_modes.append(model.training)
        return CROSS_ENTROPY(model(images), labels)

    _, run, _ = train(
        tmp_path / "a", validate=validate, epochs=5, eval_interval=2,
        phases=lambda model, steps: [phase_of(model, steps, loss=loss)],
    )  # fmt: skip
    assert modes == [False] * 3 and all(train_modes)
    assert [(row["epoch"], row["miou"], row["aacc"]) for row in rows(run)] == [
        ("1", "", ""), ("2", "0.5", "0.25"), ("3", "", ""), ("4", "0.5", "0.25"), ("5", "0.5", "0.25"),
    ]  # fmt: skip


def test_the_average_follows_its_law_and_is_what_is_validated_and_saved(tmp_path):
    live, validated, holder = [], [], []

    def remember(epoch, index):
        live.append({name: tensor.clone() for name, tensor in holder[0].state_dict().items()})

    def net():
        holder.append(Net())
        return holder[0]

    def validate(model):
        validated.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"miou": len(validated), "aacc": 0}

    _, run, model = train(
        tmp_path / "a", batches=Batches(hook=remember), net=net, validate=validate, ema=0.5, epochs=2
    )
    live.append(model.state_dict())
    average = live[0]
    for step in range(1, 13):
        decay = min(0.5, (1 + step) / (10 + step))
        average = {
            name: decay * value + (1 - decay) * live[step][name]
            if value.is_floating_point()
            else live[step][name]
            for name, value in average.items()
        }
    saved, _ = load_weights(run.best)
    kept = load_state(run.last)
    for name, value in average.items():
        for other in (saved, validated[-1], kept["average"]):
            assert torch.allclose(other[name].double(), value.double(), atol=1e-6)
        assert torch.equal(kept["tensors"][name], live[-1][name])
    assert not torch.allclose(saved["0.weight"], live[-1]["0.weight"], atol=1e-3)


def test_a_monitor_that_is_not_measured_and_no_batches_are_refused(tmp_path):
    with pytest.raises(UserError, match="train.monitor: 'fwiou' isn't measured; allowed: miou, aacc"):
        train(tmp_path / "a", monitor="fwiou")
    with pytest.raises(UserError, match="train.batch_size: larger than the number of training frames"):
        train(tmp_path / "b", batches=Batches(0))


# ------------------------------------------------------------------------------------------- NaN and inf


def broken_from(step: int, value: str):
    """Phases whose loss or gradient is bad from a step (counted from 1) on."""
    calls = iter(range(1, 1000))

    def loss(model, images, labels):
        total, count = CROSS_ENTROPY(model(images), labels)
        if next(calls) < step:
            return total, count
        if value == "gradient":  # d sqrt(x) / dx at 0
            return total + torch.sqrt(0 * model[0].weight.sum()), count
        return total * float(value), count

    return lambda model, steps: [phase_of(model, steps, name="pathways", loss=loss)]


@pytest.mark.parametrize("at_once", [True, False], ids=["cpu", "as on a gpu"])
@pytest.mark.parametrize(
    ("value", "words"),
    [("nan", "the loss is nan"), ("inf", "the loss is inf"), ("gradient", "the norm of the gradient is nan")],
)
def test_bad_numbers_stop_with_step_loss_and_frames_and_spoil_nothing(
    tmp_path, monkeypatch, at_once, value, words
):
    monkeypatch.setattr(learner, "_looks_at_every_step", lambda device: at_once)
    kept, fetched = [], []

    def keep(epoch, index):
        fetched.append((epoch, index))
        if (epoch, index) == (1, 2):  # before the bad step 9: the state of step 8
            kept.append((tmp_path / "a/checkpoints/last.pt").read_bytes())

    with pytest.raises(UserError) as error:
        train(tmp_path / "a", batches=Batches(hook=keep), phases=broken_from(9, value), save_steps=4)
    message = str(error.value)
    assert f"stopped at step 9 (epoch 2), phase 'pathways': {words}" in message
    assert "frames of the batch: frame_1_8, frame_1_9, frame_1_10, frame_1_11. " in message
    assert "last.pt holds the state before" in message
    assert [(tmp_path / "a/checkpoints/last.pt").read_bytes()] == kept
    assert fetched[-1] == ((1, 2) if at_once else (1, 5))
    _, run, _ = train(tmp_path / "a", phases=broken_from(1000, "nan"), resume=True)
    assert len(rows(run)) == 3


def test_a_look_waits_only_for_the_steps_since_the_last(tmp_path):
    watch = Watch(tmp_path / "last.pt")
    for step in range(3):
        watch.add(f"step {step}", [], torch.tensor([1.0, 2.0, 3.0]))
        assert len(watch.steps) == 1
        watch.look()


def test_bad_numbers_before_the_first_save(tmp_path):
    with pytest.raises(UserError, match=r"step 1 \(epoch 1\).*no state was saved before"):
        train(tmp_path / "a", phases=broken_from(1, "nan"))
    assert not (tmp_path / "a/checkpoints/last.pt").exists()


def test_weights_that_a_step_has_blown_up_are_not_saved(tmp_path):
    def loss(model, images, labels):
        total, count = CROSS_ENTROPY(model(images), labels)
        return 1e9 * total, count

    def phases(model, steps):
        return [phase_of(model, steps, lr=1e38, loss=loss)]

    with pytest.raises(UserError, match="step 1: the weights of phase 'net' are not finite"):
        train(tmp_path / "a", phases=phases, save_steps=1)
    assert not (tmp_path / "a/checkpoints/last.pt").exists()


# ------------------------------------------------------------------------------------- resume, to the byte


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder, **toy.KILLED)
    return outcome(folder)


def test_killed_three_times_and_resumed_is_the_uninterrupted_run(tmp_path, uninterrupted):
    """SIGKILL at three random places; whatever the process was doing, the next one goes on from last.pt."""
    script = [sys.executable, toy.__file__, str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    dice = random.Random(3)
    for count, words in enumerate([f"kill={dice.randrange(4, 7)}"] for _ in range(3)):
        words += ["resume"] if count else []
        assert subprocess.run([*script, *words], env=environment).returncode == -signal.SIGKILL
    subprocess.run([*script, "resume"], env=environment, check=True)
    log = (tmp_path / "run/log.txt").read_text()
    assert log.count("resumed") == 3 and "warning" not in log
    assert outcome(tmp_path / "run") == uninterrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", [(0, 0), (1, 3), (2, 5)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, uninterrupted, number, place):
    def send(epoch, index):
        if (epoch, index) == place:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match="the same command with --resume goes on"):
        train(tmp_path / "run", batches=Batches(hook=send), **toy.KILLED)
    position = load_state(tmp_path / "run/checkpoints/last.pt")["position"]
    assert (position["epoch"], position["batch"]) == (place[0], place[1] // 2 * 2 + 2)
    assert "--resume" in (tmp_path / "run/log.txt").read_text().splitlines()[-1]
    train(tmp_path / "run", resume=True, **toy.KILLED)
    assert outcome(tmp_path / "run") == uninterrupted


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_signal_in_the_validation_repeats_it(tmp_path, uninterrupted, epoch):
    calls = iter(range(1, 10))

    def validate(model):
        figures = toy.validate(model)
        if next(calls) == epoch:
            os.kill(os.getpid(), signal.SIGINT)
        return figures

    with pytest.raises(Interrupted):
        train(tmp_path / "run", validate=validate, **toy.KILLED)
    train(tmp_path / "run", resume=True, **toy.KILLED)
    assert outcome(tmp_path / "run") == uninterrupted


def test_loader_workers_that_die_of_the_same_signal_do_no_harm(tmp_path, uninterrupted):
    def die(epoch, index):
        if (epoch, index) == (1, 2):
            os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("DataLoader worker exited unexpectedly")

    with pytest.raises(Interrupted):
        train(tmp_path / "run", batches=Batches(hook=die), **toy.KILLED)
    train(tmp_path / "run", resume=True, **toy.KILLED)
    assert outcome(tmp_path / "run") == uninterrupted


def test_every_generator_goes_back_to_where_it_was(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()

    seed_everything(5)
    first = draw()
    save_state(tmp_path / "state", random_state())
    second = draw()
    set_random_state(load_state(tmp_path / "state"))
    assert draw() == second != first
    seed_everything(5)
    assert draw() == first


@pytest.mark.parametrize(
    ("first", "other"), [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)]
)
def test_the_same_signal_again_does_not_wait_and_the_old_handlers_come_back(first, other):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        os.kill(os.getpid(), first)
        assert stop.requested
        os.kill(os.getpid(), other)  # that of a worker whose pipeline ended as well: there is time to save
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), first)
            signal.sigtimedwait([], 1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def interrupted_run(folder, place=(1, 3), **changed):
    def send(epoch, index):
        if (epoch, index) == place:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(folder, batches=Batches(hook=send), **changed)


def test_resuming_a_finished_run_says_so_and_changes_nothing(tmp_path):
    first, run, _ = train(tmp_path / "run")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    second, _, _ = train(tmp_path / "run", resume=True)
    assert first == second
    del before[run.path / "environment.json"], before[run.path / "log.txt"]
    assert before == {path: path.read_bytes() for path in before}
    assert "this training is done (3 epochs)" in (run.path / "log.txt").read_text()


def test_resuming_without_a_state_starts_from_the_beginning(tmp_path, uninterrupted):
    _, run, _ = train(tmp_path / "run", epochs=1)
    run.last.unlink()
    train(tmp_path / "run", resume=True, **toy.KILLED)
    assert outcome(tmp_path / "run") == uninterrupted


def test_rows_after_the_state_are_cut(tmp_path):
    interrupted_run(tmp_path / "run")
    for name in ("metrics.csv", "timing.csv"):
        path = tmp_path / "run" / name
        path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
    _, run, _ = train(tmp_path / "run", resume=True)
    assert [row["epoch"] for row in rows(run)] == ["1", "2", "3"]
    assert [row["epoch"] for row in rows(run, "timing.csv")] == ["1", "2", "3"]


def test_other_threads_warn(tmp_path):
    interrupted_run(tmp_path / "run")
    last = tmp_path / "run/checkpoints/last.pt"
    save_state(last, {**load_state(last), "threads": 7})
    train(tmp_path / "run", resume=True)
    assert "warning: the run used 7 threads and goes on with" in (tmp_path / "run/log.txt").read_text()


def test_other_frames_or_experts_are_refused(tmp_path):
    interrupted_run(tmp_path / "run", options={"identity": {"expert highway": "aaa"}})
    with pytest.raises(UserError, match=r"another expert highway \(was aaa, is bbb\)"):
        train(tmp_path / "run", resume=True, options={"identity": {"expert highway": "bbb"}})
    with pytest.raises(UserError, match=r"another expert highway \(was aaa, is None\)"):
        train(tmp_path / "run", resume=True)
    train(tmp_path / "run", resume=True, options={"identity": {"expert highway": "aaa"}})


def test_a_state_of_another_network_or_other_phases_is_refused(tmp_path):
    interrupted_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"last\.pt: of another network: \d+ tensors don't fit, the first is"):
        train(tmp_path / "run", resume=True, net=plain_net)
    with pytest.raises(UserError, match=r"last\.pt: of another training \('gate'\)"):
        train(
            tmp_path / "run", resume=True, phases=lambda model, steps: [phase_of(model, steps, name="gate")]
        )


def test_a_lost_best_file_is_named(tmp_path):
    interrupted_run(tmp_path / "run")
    (tmp_path / "run/checkpoints/best.safetensors").unlink()
    with pytest.raises(UserError, match="best.safetensors: no weights here"):
        train(tmp_path / "run", resume=True)


def test_a_best_file_newer_than_the_state_is_kept(tmp_path, monkeypatch):
    """Killed between best.safetensors of epoch 2 and last.pt, and the next time the figure is another one."""
    saves = iter(range(10))

    def save_once(path, state):
        if next(saves):
            raise RuntimeError("killed")
        save_state(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_state", save_once)
        with pytest.raises(RuntimeError, match="killed"):
            train(tmp_path / "run", validate=scripted([0.1, 0.9]))
    before, told = load_weights(tmp_path / "run/checkpoints/best.safetensors")
    result, run, _ = train(tmp_path / "run", resume=True, validate=scripted([0.8, 0.7]))
    assert (result.best, result.best_epoch) == (0.9, 2)
    after, metadata = load_weights(run.best)
    assert tensors_sha256(after) == tensors_sha256(before)
    assert {**metadata, "budget": None} == {
        **told,
        "budget": None,
    }  # but for what the training took as a whole


def test_only_what_training_changes_is_in_the_state(tmp_path):
    def gate(model):
        return {name: tensor for name, tensor in model.state_dict().items() if name.startswith("two")}

    def phases(model, steps):
        return [phase_of(model, steps, parameters=model.two.parameters())]

    options = {"state": gate}
    interrupted_run(tmp_path / "run", net=Pair, phases=phases, options=options, ema=0.9)
    state = load_state(tmp_path / "run/checkpoints/last.pt")
    assert all(name.startswith("two") for name in [*state["tensors"], *state["average"]])
    _, _, resumed = train(tmp_path / "run", resume=True, net=Pair, phases=phases, options=options, ema=0.9)
    _, _, whole = train(tmp_path / "whole", net=Pair, phases=phases, options=options, ema=0.9)
    assert torch.equal(flat(resumed), flat(whole))


# --------------------------------------------------------------------------------------------- what it says


def test_lines_tell_rate_loss_speed_waiting_and_time_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learner, "LOG_STEPS", 4)
    _, run, _ = train(tmp_path / "run", epochs=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line[20:] for line in (run.path / "log.txt").read_text().splitlines()] == lines
    number = r"[\d.e-]+"
    assert len(lines) == 3
    pattern = (
        rf"epoch 1/1, step 4/6: loss {number}, lr {number}, {number} images/s, waiting for data \d+%, "
        r"\d:\d\d:\d\d left"
    )
    assert re.fullmatch(pattern, lines[0])
    assert re.match(rf"epoch 1/1 done: loss {number}, lr {number}, miou {number}, aacc {number}, ", lines[1])


def test_a_line_tells_the_mean_since_the_line_before(tmp_path, monkeypatch):
    monkeypatch.setattr(learner, "LOG_STEPS", 2)
    told, values = [], iter([1.0, 3.0, 10.0, 30.0, 5.0, 5.0])
    monkeypatch.setattr(progress.Progress, "line", lambda self, losses: told.append(losses))

    def loss(model, images, labels):
        value = next(values)
        return 0 * model(images).sum() + value * value, torch.tensor(value)

    train(tmp_path / "run", phases=lambda model, steps: [phase_of(model, steps, loss=loss)], epochs=1)
    assert told == [[10 / 4], [1000 / 40], [5.0]]


def test_metrics_hold_no_times_and_timing_does(tmp_path):
    _, run, _ = train(tmp_path / "run")
    assert (run.path / "metrics.csv").read_text().splitlines()[
        0
    ] == "epoch,step,images_seen,loss,lr,miou,aacc"
    for row in rows(run, "timing.csv"):
        assert 0 <= float(row["waiting_for_data"]) <= 1 and float(row["peak_memory_mb"]) > 10
        assert float(row["images_per_second"]) == pytest.approx(24 / float(row["seconds"]))


def test_progress_is_a_picture_of_the_rows(tmp_path):
    from matplotlib.image import imread

    _, run, _ = train(tmp_path / "run", net=Pair, phases=pair_of_phases, eval_interval=2)
    picture = imread(run.path / "progress.png")
    assert picture.shape[:2] == (800, 700) and picture.std() > 0.01
    assert not list(run.path.glob(".*"))


def test_tensorboard_has_the_rows(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, run, _ = train(tmp_path / "run", tensorboard=True)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    for name in ("loss", "lr", "miou"):
        written = [(event.step, event.value) for event in events.Scalars(f"epoch/{name}")]
        expected = [(int(row["step"]), pytest.approx(float(row[name]), rel=1e-6)) for row in rows(run)]
        assert written == expected


def test_wandb_is_used_only_when_asked_for(tmp_path, monkeypatch):
    calls = []
    fake = SimpleNamespace(
        init=lambda **options: calls.append(("init", options["name"])),
        log=lambda scalars, step: calls.append((step, scalars)),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(tmp_path / "without", epochs=1)
    assert not calls
    train(tmp_path / "with", epochs=1, wandb=True)
    assert calls[0] == ("init", "with") and calls[-1] == "finish"
    assert calls[1][0] == 6 and set(calls[1][1]) == {"epoch/loss", "epoch/lr", "epoch/miou", "epoch/aacc"}
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="train.wandb: true needs the package wandb"):
        train(tmp_path / "missing", epochs=1, wandb=True)


def test_the_engine_imports_no_picture_or_board_library_before_it_draws():
    heavy = {"matplotlib", "tensorboard", "wandb"}
    code = f"import engine.loop, sys; sys.exit(bool({heavy} & set(sys.modules)))"
    root = Path(learner.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
