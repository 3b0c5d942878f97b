"""The training loop: learners in, run folders out. Knows no network, data set, attack or metric by name."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from engine.arithmetic import autocast_of, layout_of
from engine.config import Interrupted, UserError
from engine.interrupt import StopRequest
from engine.learner import Learner, Result, Training
from engine.randomness import random_state, set_random_state, untouched_torch
from engine.steps import PhaseLoss


def supervised(loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> PhaseLoss:
    """The phase loss that compares the network's logits with the labels."""
    return PhaseLoss(
        run=lambda model, images: model(images),
        logits=lambda model, logits: logits,
        loss=lambda model, logits, labels: loss(logits, labels),
    )


def optimizer_steps(batches, settings) -> int:
    """Optimiser steps of the whole training; the last one of an epoch may take fewer batches.

    Raises UserError where there is no batch."""
    if not len(batches):
        raise UserError("train.batch_size: larger than the number of training frames, so there is no batch")
    return settings.epochs * math.ceil(len(batches) / settings.accumulate)


def images_of(batch, device: torch.device, layout: torch.memory_format) -> Tensor:
    """The batch's images on the device, float [B, 3, H, W] in [0, 1]."""
    return batch.images.to(device, non_blocking=True, memory_format=layout).float() / 255


def fit(
    learners: Sequence[Learner],
    batches,
    validate: Callable[[Sequence[nn.Module]], Sequence[Mapping[str, float]]],
    settings,
    device: torch.device | str,
    *,
    metrics: Sequence[str],
    prepare: Callable[[Any, torch.device, torch.memory_format], Any] = images_of,
) -> list[Result]:
    """Trains the learners on the same batches, each from its run folder's last.pt if there is one.

    Every learner ends as if it were trained alone; one that fails, ends early or was saved less often than
    the others does not disturb them.

    batches: len() is batches an epoch; epoch(number, start) gives those from `start` on, each with uint8
        images [B, 3, H, W], labels, and frames, which have a name.
    validate: figures of each model, in eval mode, one for each name in metrics; one is settings.monitor.
    settings: the config's train section.
    prepare: what the phases' losses get of a batch; done once per batch, without gradients.

    Raises Interrupted after Ctrl-C or SIGTERM, with the state saved; UserError for NaN or inf in loss,
    gradients or weights, for a state that doesn't fit and for files that can't be written."""
    if settings.monitor not in metrics:
        raise UserError(f"train.monitor: {settings.monitor!r} isn't measured; allowed: {', '.join(metrics)}")
    steps = optimizer_steps(batches, settings)
    company = len(learners) > 1
    trainings = [Training(learner, settings, torch.device(device), company) for learner in learners]
    _Loop(trainings, batches, validate, settings, torch.device(device), list(metrics), prepare).run(steps)
    failed = [training for training in trainings if training.failure]
    if failed:
        raise UserError("\n".join(f"{training.name}{training.failure}" for training in failed))
    return [training.result for training in trainings]


class _Loop:
    """One call of fit."""

    def __init__(self, trainings, batches, validate, settings, device, metrics, prepare):
        self.trainings, self.batches, self.validate = trainings, batches, validate
        self.settings, self.device, self.metrics, self.prepare = settings, device, metrics, prepare
        self.layout = layout_of(settings)

    def run(self, steps: int) -> None:
        with StopRequest() as self.stop, ExitStack() as stack:
            for place, training in enumerate(self.trainings):
                stack.enter_context(training.begin(steps, self.metrics, with_bar=place == 0))
            while active := [training for training in self.trainings if training.active]:
                epoch = min(training.at.epoch for training in active)
                behind = [training for training in active if training.at.epoch == epoch]
                self.train_epoch(behind)
                self.close_epoch([training for training in behind if training.active])
                if self.stop.requested and any(training.active for training in self.trainings):
                    raise self.interrupted()

    def train_epoch(self, trainings: Sequence[Training]) -> None:
        """The rest of an epoch: each training takes the batches that it has not seen."""
        at = trainings[0].at
        epoch, start = at.epoch, min(training.at.batch for training in trainings)
        for training in trainings:
            training.begin_epoch()
        clock = time.perf_counter()
        for place, group, waited in self.groups(epoch, start):
            due = [training for training in trainings if training.active and training.at.batch == place]
            if not due:
                continue
            inputs = [self.input_of(batch) for batch in group]
            for training in due:
                with training.failing_alone(), training.own_random_numbers():
                    training.step(inputs, group)
            now = time.perf_counter()
            for training in due:
                training.at.seconds += now - clock
                training.at.waited += waited
            clock = now
            if self.stop.requested:
                break
            for training in due:
                if training.active:
                    with training.failing_alone(), training.own_random_numbers():
                        training.tell_and_save()
        if self.stop.requested:
            self.save(trainings)
            raise self.interrupted()
        for training in trainings:
            if training.active:
                with training.failing_alone():
                    training.close_steps(clock)

    def groups(self, epoch: int, start: int) -> Iterator[tuple[int, list, float]]:
        """(place of its first batch, batches, seconds waited) of one optimiser step after the other."""
        if start >= len(self.batches):  # interrupted in the validation
            return
        iterator = iter(self.batches.epoch(epoch, start))
        for place in range(start, len(self.batches), self.settings.accumulate):
            began = time.perf_counter()
            try:
                with untouched_torch():
                    group = list(itertools.islice(iterator, self.settings.accumulate))
            except RuntimeError:
                if self.stop.requested:  # Ctrl-C has ended the loader's worker processes as well
                    return
                raise
            yield place, group, time.perf_counter() - began

    def input_of(self, batch) -> tuple[Any, Tensor]:
        """What the losses get of a batch, and its labels as int64."""
        with torch.no_grad(), autocast_of(self.settings.precision, self.device):
            inputs = self.prepare(batch, self.device, self.layout)
        return inputs, batch.labels.to(self.device, non_blocking=True).long()

    def close_epoch(self, trainings: Sequence[Training]) -> None:
        """Validation where it is due, the rows, best.safetensors of those that got better, and last.pt."""
        if not trainings:
            return
        settings, epoch = self.settings, trainings[0].at.epoch + 1
        due = epoch % settings.eval_interval == 0 or epoch == settings.epochs
        began = time.perf_counter()
        figures = self.validated(trainings) if due else [dict.fromkeys(self.metrics)] * len(trainings)
        seconds = time.perf_counter() - began
        for training, found in zip(trainings, figures, strict=True):
            with training.failing_alone(), training.own_random_numbers():
                training.close_epoch(found, seconds, due)

    def validated(self, trainings: Sequence[Training]) -> list[dict[str, float]]:
        """Figures of every (averaged) model; writes best.safetensors where the monitored one beats all before.

        What validation draws of random numbers is nothing to the trainings."""
        before = random_state()
        with ExitStack() as stack:
            for training in trainings:
                training.model.eval()
                stack.enter_context(training.averaged())
            try:
                with self.stop.at_once():
                    measured = self.validate([training.model for training in trainings])
                    figures = [{name: float(one[name]) for name in self.metrics} for one in measured]
            except KeyboardInterrupt:
                figures = []
            set_random_state(before)
            for training, found in zip(trainings, figures, strict=False):
                with training.failing_alone():
                    training.take(found)
        if not figures:
            self.save(trainings)  # the epoch's steps are done, its validation is to be repeated
            raise self.interrupted()
        return figures

    def save(self, trainings: Sequence[Training]) -> None:
        for training in trainings:
            if training.active:
                with training.failing_alone(), training.own_random_numbers():
                    training.save()

    def interrupted(self) -> Interrupted:
        steps = max(training.at.step for training in self.trainings)
        text = (
            f"interrupted after step {steps}; the state is saved: the same command with --resume goes on (that of a "
            "pipeline by itself)"
        )
        for training in self.trainings:
            training.run.log(text, show=False)  # the script prints the exception
        return Interrupted(text)
