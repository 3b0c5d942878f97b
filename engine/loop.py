"""The training loop: phases in, a run folder out. Knows no network, data set, attack or metric by name."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.average import Average
from engine.checkpoints import save_weights
from engine.config import Interrupted, UserError
from engine.interrupt import StopRequest
from engine.progress import Progress
from engine.randomness import random_state, untouched_torch
from engine.resume import Position, TrainingState
from engine.runs import RunFolder
from engine.steps import Phase, Watch, compute_gradients

LOG_STEPS = 50  # steps between two lines; on a GPU also between two looks at the losses


@dataclass(frozen=True)
class Result:
    """What a training came to. Epochs count from 1; best is the monitored figure of best_epoch."""

    epochs: int
    steps: int
    images_seen: int
    best: float
    best_epoch: int


def supervised(loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable:
    """The phase loss that compares the network's logits with the labels."""
    return lambda model, images, labels: loss(model(images), labels)


def optimizer_steps(batches, settings) -> int:
    """Optimiser steps of the whole training; the last one of an epoch may take fewer batches.

    Raises UserError where there is no batch."""
    if not len(batches):
        raise UserError("train.batch_size: larger than the number of training frames, so there is no batch")
    return settings.epochs * math.ceil(len(batches) / settings.accumulate)


def fit(
    model: nn.Module,
    phases: Sequence[Phase],
    batches,
    validate: Callable[[nn.Module], Mapping[str, float]],
    run: RunFolder,
    settings,
    device: torch.device | str,
    *,
    weights: Callable[[nn.Module], tuple[Mapping[str, Tensor], Mapping[str, Any]]],
    metrics: Sequence[str],
    state: Callable[[nn.Module], Mapping[str, Tensor]] = nn.Module.state_dict,
    identity: Mapping[str, str] | None = None,
) -> Result:
    """Trains the model, from the run folder's last.pt if there is one, else from the beginning.

    batches: len() is batches an epoch; epoch(number, start) gives those from `start` on, each with uint8
        images [B, 3, H, W], labels, and frames, which have a name.
    validate: figures of the model in eval mode, one for each name in metrics; one is settings.monitor.
    settings: the config's train section.
    weights: tensors and metadata of best.safetensors; epoch, steps, images_seen, monitor, metrics are added.
    state: the live tensors that training changes; what is left out (frozen experts) is not in last.pt.
    identity: hashes of what training depends on besides the config (frames, experts), compared on resume.

    Raises Interrupted after Ctrl-C or SIGTERM, with the state saved; UserError for NaN or inf in loss,
    gradients or weights, for a state that doesn't fit and for files that can't be written."""
    if settings.monitor not in metrics:
        raise UserError(f"train.monitor: {settings.monitor!r} isn't measured; allowed: {', '.join(metrics)}")
    steps = optimizer_steps(batches, settings)
    training = _Training(model, phases, batches, validate, run, settings, torch.device(device), weights)
    tensors = {name: tensor.detach() for name, tensor in state(model).items()}
    average = None if settings.ema is None else Average(tensors, settings.ema)
    sums = torch.zeros(len(phases), 2, dtype=torch.float64, device=device)
    training.state = TrainingState(Position(), tensors, average, phases, sums, identity or {})
    if run.last.exists():
        training.state.restore(run, settings.monitor)
    training.run_epochs(steps, list(metrics))
    at = training.state.at
    return Result(at.epoch, at.step, at.images_seen, at.best, at.best_epoch)


class _Training:
    """One call of fit."""

    state: TrainingState

    def __init__(self, model, phases, batches, validate, run, settings, device, weights):
        self.model, self.phases, self.batches, self.validate = model, phases, batches, validate
        self.run, self.settings, self.device, self.weights = run, settings, device, weights
        self.layout = torch.channels_last if settings.channels_last else torch.preserve_format
        self.watch = Watch(run.last)
        model.to(device=device, memory_format=self.layout)
        self.network = torch.compile(model) if settings.compile and device.type == "cuda" else model

    def run_epochs(self, steps: int, metrics: list[str]) -> None:
        at, run = self.state.at, self.run
        if at.finished:
            run.log(f"{run.path}: this training is done ({at.epoch} epochs); there is nothing to resume")
            return
        names = [phase.name for phase in self.phases]
        self.progress = Progress(run, self.settings, names, metrics, steps, at)
        with StopRequest() as self.stop, self.progress:
            while not at.finished:
                self.train_epoch()
                self.close_epoch(metrics)
                if self.stop.requested and not at.finished:
                    raise self.interrupted()
        run.log(f"done: best {self.settings.monitor} {at.best} at epoch {at.best_epoch}, in {run.best}")

    def train_epoch(self) -> None:
        at = self.state.at
        self.model.train()
        self.progress.begin_window()
        told = self.state.sums.tolist()
        clock = time.perf_counter()
        for count, group in enumerate(self.groups(), start=1):
            self.train_step(group)
            now = time.perf_counter()
            at.seconds, clock = at.seconds + now - clock, now
            if self.stop.requested:
                break
            if count % LOG_STEPS == 0 or self.progress.line_is_due():
                told = self.tell(told)
            if self.settings.save_steps and at.step % self.settings.save_steps == 0:
                self.save()
        if self.stop.requested:
            self.save()
            raise self.interrupted()
        self.watch.look()
        at.seconds += time.perf_counter() - clock

    def groups(self) -> Iterator[list]:
        """The batches of one optimiser step after the other, from where the epoch stands."""
        at = self.state.at
        if at.batch >= len(self.batches):  # interrupted in the validation
            return
        iterator = iter(self.batches.epoch(at.epoch, at.batch))
        while True:
            began = time.perf_counter()
            try:
                with untouched_torch():
                    group = list(itertools.islice(iterator, self.settings.accumulate))
            except RuntimeError:
                if self.stop.requested:  # Ctrl-C has ended the loader's worker processes as well
                    return
                raise
            at.waited += time.perf_counter() - began
            if not group:
                return
            yield group

    def train_step(self, group: list) -> None:
        """One step of every phase's optimizer and scheduler on the batches of the group."""
        at, settings = self.state.at, self.settings
        inputs = [
            (
                batch.images.to(self.device, non_blocking=True, memory_format=self.layout),
                batch.labels.to(self.device, non_blocking=True).long(),
            )
            for batch in group
        ]
        frames = [frame.name for batch in group for frame in batch.frames]
        at.rates = [phase.optimizer.param_groups[0]["lr"] for phase in self.phases]
        for phase, sums in zip(self.phases, self.state.sums, strict=True):
            values = compute_gradients(phase, self.network, inputs, settings.precision == "bf16")
            self.watch.add(f"step {at.step + 1} (epoch {at.epoch + 1}), phase {phase.name!r}", frames, values)
            if _looks_at_every_step(self.device):
                self.watch.look()
            sums += values[:2]
            if settings.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(phase.parameters, settings.clip_norm, values[2].float())
            phase.optimizer.step()
            phase.scheduler.step()
        images = sum(len(batch.images) for batch in group)
        at.batch, at.step = at.batch + len(group), at.step + 1
        at.images_seen, at.epoch_images = at.images_seen + images, at.epoch_images + images
        if self.state.average:
            self.state.average.update(at.step)
        self.progress.bar.update()

    def tell(self, told: list) -> list:
        """A line about the steps since the sums were `told`; returns the sums now."""
        self.watch.look()
        now = self.state.sums.tolist()
        self.progress.line([_ratio(a - c, b - d) for (a, b), (c, d) in zip(now, told, strict=True)])
        return now

    def close_epoch(self, metrics: list[str]) -> None:
        """Validation where it is due, the rows, best.safetensors if it is a better one, and last.pt."""
        at, settings = self.state.at, self.settings
        epoch = at.epoch + 1
        figures: dict[str, float | None] = dict.fromkeys(metrics)
        began = time.perf_counter()
        due = epoch % settings.eval_interval == 0 or epoch == settings.epochs
        if due:
            figures |= self.validated()
        losses = [_ratio(total, count) for total, count in self.state.sums.tolist()]
        self.progress.close_epoch(losses, figures, time.perf_counter() - began)
        late = bool(due and settings.early_stop and epoch - at.best_epoch >= settings.early_stop)
        if late:
            self.run.log(
                f"early stop: {settings.monitor} is no better than {at.best} of epoch {at.best_epoch}"
            )
        at.finished = late or epoch == settings.epochs
        at.epoch, at.batch, at.epoch_images, at.seconds, at.waited = epoch, 0, 0, 0.0, 0.0
        self.state.sums.zero_()
        self.save()

    def validated(self) -> dict[str, float]:
        """Figures of the (averaged) model; writes best.safetensors if the monitored one beats all before."""
        at, average, monitor = self.state.at, self.state.average, self.settings.monitor
        before = random_state()
        self.model.eval()
        with average.in_place() if average else nullcontext():
            try:
                with self.stop.at_once():
                    figures = {name: float(value) for name, value in self.validate(self.model).items()}
            except KeyboardInterrupt:
                figures = None
            if figures and (at.best is None or math.isnan(at.best) or figures[monitor] > at.best):
                at.best, at.best_epoch = figures[monitor], at.epoch + 1
                tensors, metadata = self.weights(self.model)
                added = {"epoch": at.best_epoch, "steps": at.step, "images_seen": at.images_seen}
                added |= {"monitor": monitor, "metrics": figures}
                save_weights(self.run.best, tensors, {**metadata, **added})
        if figures is None:
            self.save(before)  # the epoch's steps are done, its validation is to be repeated
            raise self.interrupted()
        return figures

    def save(self, random: Mapping[str, Any] | None = None) -> None:
        """Writes last.pt, unless NaN or inf has got into the training."""
        self.watch.look()
        self.watch.look_at_weights(f"step {self.state.at.step}", self.phases)
        self.state.save(self.run, random or random_state())

    def interrupted(self) -> Interrupted:
        step = self.state.at.step
        text = f"interrupted after step {step}; the state is saved: the same command with --resume goes on"
        self.run.log(text, show=False)  # the script prints the exception
        return Interrupted(text)


def _looks_at_every_step(device: torch.device) -> bool:
    """On a GPU a look would wait for it, so there it is done every LOG_STEPS and before every save."""
    return device.type == "cpu"


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan
