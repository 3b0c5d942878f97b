"""What is trained: a network with its phases and run folder, and how far it has come."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.arithmetic import layout_of
from engine.average import Average
from engine.checkpoints import load_weights, save_weights
from engine.config import UserError
from engine.progress import Progress
from engine.randomness import random_state, set_random_state
from engine.resume import Position, TrainingState
from engine.runs import RunFolder
from engine.steps import Phase, Watch, compute_gradients

LOG_STEPS = 50  # steps between two lines; on a GPU also between two looks at the losses


@dataclass(frozen=True)
class Learner:
    """A network to be trained, and where what it learns is kept.

    weights: tensors and metadata of best.safetensors; epoch, steps, images_seen, monitor, metrics are added.
    state: the live tensors that training changes; what is left out (frozen experts) is not in last.pt.
    identity: hashes of what training depends on besides the config (frames, experts), compared on resume.
    random: the generators' state that its training begins with; made with the learner.
    """

    model: nn.Module
    phases: Sequence[Phase]
    run: RunFolder
    weights: Callable[[nn.Module], tuple[Mapping[str, Tensor], Mapping[str, Any]]]
    state: Callable[[nn.Module], Mapping[str, Tensor]] = nn.Module.state_dict
    identity: Mapping[str, str] = field(default_factory=dict)
    random: Mapping[str, Any] = field(default_factory=random_state)


@dataclass(frozen=True)
class Result:
    """What a training came to. Epochs count from 1; best is the monitored figure of best_epoch."""

    epochs: int
    steps: int
    images_seen: int
    best: float
    best_epoch: int


class Training:
    """A learner under way. Its random numbers are its own, whatever is trained beside it."""

    def __init__(self, learner: Learner, settings, device: torch.device, company: bool):
        """settings: the config's train section; company: others are trained on the same batches.

        Goes on from the run folder's last.pt if there is one. Raises UserError if that doesn't fit."""
        self.model, self.phases, self.run = learner.model, learner.phases, learner.run
        self.weights, self.settings, self.device, self.company = learner.weights, settings, device, company
        self.name = f"{learner.run.path.name}: " if company else ""
        layout = layout_of(settings)
        learner.model.to(device=device, memory_format=layout)
        compiled = settings.compile and device.type == "cuda"
        self.network = torch.compile(learner.model) if compiled else learner.model
        self.watch = Watch(self.run.last)
        tensors = {name: tensor.detach() for name, tensor in learner.state(learner.model).items()}
        average = None if settings.ema is None else Average(tensors, settings.ema)
        sums = torch.zeros(len(self.phases), 2, dtype=torch.float64, device=device)
        self.state = TrainingState(Position(), tensors, average, self.phases, sums, learner.identity)
        self.failure: UserError | None = None
        self.random = learner.random
        with self.own_random_numbers():
            if self.run.last.exists():
                self.state.restore(self.run, settings.monitor)

    @property
    def at(self) -> Position:
        return self.state.at

    @property
    def result(self) -> Result:
        at = self.at
        return Result(at.epoch, at.step, at.images_seen, at.best, at.best_epoch)

    @property
    def active(self) -> bool:
        return not self.at.finished and self.failure is None

    @contextmanager
    def own_random_numbers(self) -> Iterator[None]:
        """All generators are this training's own inside the block."""
        outside = random_state()
        set_random_state(self.random)
        try:
            yield
        finally:
            self.random = random_state()
            set_random_state(outside)

    @contextmanager
    def failing_alone(self) -> Iterator[None]:
        """In company a UserError ends this training only; `failure` keeps it."""
        try:
            yield
        except UserError as error:
            if not self.company:
                raise
            self.failure = error
            self.run.log(f"{self.name}{error}; what is trained beside it goes on")

    def begin(self, steps: int, metrics: Sequence[str], with_bar: bool) -> AbstractContextManager:
        """The context that shows the training's progress over `steps` optimizer steps."""
        if self.at.finished:
            run = self.run
            run.log(f"{run.path}: this training is done ({self.at.epoch} epochs); there is nothing to resume")
            return nullcontext()
        names = [phase.name for phase in self.phases]
        self.progress = Progress(self.run, self.settings, names, metrics, steps, self.at, self.name, with_bar)
        return self.progress

    def begin_epoch(self) -> None:
        self.model.train()
        self.progress.begin_window()
        self.told, self.count = self.state.sums.tolist(), 0

    def step(self, inputs: Sequence[tuple[Any, Tensor]], batches: Sequence) -> None:
        """One step of every phase's optimizer and scheduler on the batches, given as (inputs, labels) too."""
        at, settings = self.at, self.settings
        frames = [frame.name for batch in batches for frame in batch.frames]
        at.rates = [phase.optimizer.param_groups[0]["lr"] for phase in self.phases]
        for phase, sums in zip(self.phases, self.state.sums, strict=True):
            values = compute_gradients(phase, self.network, inputs, settings.precision, at.images_seen)
            self.watch.add(f"step {at.step + 1} (epoch {at.epoch + 1}), phase {phase.name!r}", frames, values)
            if _looks_at_every_step(self.device):
                self.watch.look()
            sums += values[:2]
            largest = phase.clip_norm or settings.clip_norm
            if largest is not None:
                torch.nn.utils.clip_grads_with_norm_(phase.parameters, largest, values[2].float())
            phase.optimizer.step()
            phase.scheduler.step()
        images = sum(len(batch.images) for batch in batches)
        at.batch, at.step = at.batch + len(batches), at.step + 1
        at.images_seen, at.epoch_images = at.images_seen + images, at.epoch_images + images
        if self.state.average:
            self.state.average.update(at.step)
        self.progress.bar.update()

    def tell_and_save(self) -> None:
        """After a step: a line and last.pt where they are due."""
        self.count += 1
        if self.count % LOG_STEPS == 0 or self.progress.line_is_due():
            self.watch.look()
            now = self.state.sums.tolist()
            self.progress.line([_ratio(a - c, b - d) for (a, b), (c, d) in zip(now, self.told, strict=True)])
            self.told = now
        if self.settings.save_steps and self.at.step % self.settings.save_steps == 0:
            self.save()

    def take(self, figures: Mapping[str, float]) -> None:
        """Figures of the (averaged) model: writes best.safetensors if the monitored one beats all before."""
        at, monitor = self.at, self.settings.monitor
        if at.best is None or math.isnan(at.best) or figures[monitor] > at.best:
            at.best, at.best_epoch = figures[monitor], at.epoch + 1
            tensors, metadata = self.weights(self.model)
            added = {
                "epoch": at.best_epoch,
                "steps": at.step,
                "images_seen": at.images_seen,
                "budget": self.seen(),
            }
            added |= {"monitor": monitor, "metrics": dict(figures)}
            save_weights(self.run.best, tensors, {**metadata, **added})

    def seen(self) -> dict[str, int]:
        """Optimiser steps and images of the training so far."""
        return {"steps": self.at.step, "images": self.at.images_seen}

    def settle(self) -> None:
        """The file of the best weights says what the whole training took, the epochs after the best one included."""
        tensors, metadata = load_weights(self.run.best)
        save_weights(self.run.best, tensors, {**metadata, "budget": self.seen()})

    def close_epoch(self, figures: Mapping[str, float | None], seconds: float, due: bool) -> None:
        """The epoch's rows, early stop and last.pt. seconds: of the validation; due: there was one."""
        at, settings = self.at, self.settings
        epoch = at.epoch + 1
        losses = [_ratio(total, count) for total, count in self.state.sums.tolist()]
        self.progress.close_epoch(losses, figures, seconds)
        late = bool(due and settings.early_stop and epoch - at.best_epoch >= settings.early_stop)
        if late:
            self.run.log(
                f"{self.name}early stop: {settings.monitor} is no better than {at.best} of epoch {at.best_epoch}"
            )
        at.finished = late or epoch == settings.epochs
        if at.finished and self.run.best.exists():
            self.settle()
        at.epoch, at.batch, at.epoch_images, at.seconds, at.waited = epoch, 0, 0, 0.0, 0.0
        self.state.sums.zero_()
        self.save()
        if at.finished:
            self.run.log(
                f"{self.name}done: best {settings.monitor} {at.best} at epoch {at.best_epoch}, in {self.run.best}"
            )

    def averaged(self) -> AbstractContextManager:
        """The model holds its moving average inside the block, if there is one."""
        return self.state.average.in_place() if self.state.average else nullcontext()

    def save(self) -> None:
        """Writes last.pt, unless NaN or inf has got into the training."""
        self.watch.look()
        self.watch.look_at_weights(f"step {self.at.step}", self.phases)
        self.state.save(self.run, random_state())

    def close_steps(self, began: float) -> None:
        """A last look at the losses of an epoch; the time since `began` was spent in it too."""
        self.watch.look()
        self.at.seconds += time.perf_counter() - began


def _looks_at_every_step(device: torch.device) -> bool:
    """On a GPU a look would wait for it, so there it is done every LOG_STEPS and before every save."""
    return device.type == "cpu"


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan
