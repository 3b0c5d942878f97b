"""How a training shows itself: bar or lines, metrics.csv, timing.csv, progress.png, TensorBoard, W&B."""

import io
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from tqdm import tqdm

from engine.checkpoints import atomic_write
from engine.config import UserError
from engine.resume import Position
from engine.runs import RunFolder

LINE_SECONDS = 30  # a line at least this often, however slow the steps
TIMING = ("epoch", "seconds", "images_per_second", "waiting_for_data", "validation_seconds", "peak_memory_mb")


class Progress:
    """A context for the time of a training. Holds nothing that a resume needs."""

    def __init__(
        self,
        run: RunFolder,
        settings,
        phases: Sequence[str],
        metrics: Sequence[str],
        steps: int,
        at: Position,
        title: str = "",
        with_bar: bool = True,
    ):
        """phases: their names; steps: optimiser steps of the whole training; at: where it stands, which the
        training moves on. Rows of later epochs are cut. Lines begin with the title.

        Raises UserError where W&B is asked for and not installed."""
        self.run, self.settings, self.steps, self.at, self.first_step = run, settings, steps, at, at.step
        self.wandb = _import_wandb() if settings.wandb else None
        prefixes = [f"{name}_" if len(phases) > 1 else "" for name in phases]
        self.losses = [f"{prefix}loss" for prefix in prefixes]
        self.rates = [f"{prefix}lr" for prefix in prefixes]
        columns = ["epoch", "step", "images_seen", *self.losses, *self.rates, *metrics]
        self.rows = run.table("metrics.csv", columns, at.epoch)
        self.timing = run.table("timing.csv", TIMING, at.epoch)
        self.title, self.with_bar = title, with_bar and sys.stderr.isatty()
        self.began = time.perf_counter()

    def __enter__(self) -> "Progress":
        with ExitStack() as stack:
            self.bar = stack.enter_context(
                tqdm(total=self.steps, initial=self.first_step, unit="step", disable=not self.with_bar)
            )
            self.writer = self._writer(stack) if self.settings.tensorboard else None
            if self.wandb:
                self.wandb.init(name=self.run.path.name, dir=str(self.run.path), config=self.run.config)
                stack.callback(self.wandb.finish)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self.stack.close()

    def begin_window(self) -> None:
        """The next line tells what happened from here on."""
        self.window = (time.perf_counter(), self.at.images_seen, self.at.waited)

    def line_is_due(self) -> bool:
        return time.perf_counter() - self.window[0] > LINE_SECONDS

    def line(self, losses: Sequence[float]) -> None:
        """Tells the phases' mean losses since the window began, speed, share of waiting, time left."""
        now, at = time.perf_counter(), self.at
        seconds = max(now - self.window[0], 1e-9)
        speed = (at.images_seen - self.window[1]) / seconds
        waiting = (at.waited - self.window[2]) / seconds
        scalars = dict(zip([*self.losses, *self.rates], [*losses, *at.rates], strict=True))
        text = f"{_text(scalars)}, {speed:.1f} images/s, waiting for data {waiting:.0%}"
        left = (now - self.began) / (at.step - self.first_step) * (self.steps - at.step)
        place = f"epoch {at.epoch + 1}/{self.settings.epochs}, step {at.step}/{self.steps}"
        self.bar.set_postfix_str(text)
        self.run.log(f"{self.title}{place}: {text}, {_duration(left)} left", show=not self.with_bar)
        speeds = {"speed/images_per_second": speed, "speed/waiting_for_data": waiting}
        self.scalars({f"train/{name}": value for name, value in scalars.items()} | speeds)
        self.begin_window()

    def close_epoch(
        self, losses: Sequence[float], figures: Mapping[str, float | None], validation_seconds: float
    ) -> None:
        """The epoch's rows and, where it was validated, progress.png. losses: means over the epoch."""
        at = self.at
        epoch = at.epoch + 1
        trained = dict(zip([*self.losses, *self.rates], [*losses, *at.rates], strict=True))
        row = {"epoch": epoch, "step": at.step, "images_seen": at.images_seen, **trained, **figures}
        self.rows.append(row)
        seconds = max(at.seconds, 1e-9)
        speed, waiting = at.epoch_images / seconds, at.waited / seconds
        timing = (epoch, at.seconds, speed, waiting, validation_seconds, _peak_memory_mb())
        self.timing.append(dict(zip(TIMING, timing, strict=True)))
        scalars = {name: value for name, value in row.items() if isinstance(value, float)}
        place = f"{self.title}epoch {epoch}/{self.settings.epochs} done"
        took = f"{_duration(at.seconds)} + {_duration(validation_seconds)} validation"
        self.run.log(f"{place}: {_text(scalars)}, {speed:.1f} images/s, {took}")
        self.scalars({f"epoch/{name}": value for name, value in scalars.items()})
        if figures[self.settings.monitor] is not None:
            draw(
                self.run.path / "progress.png", self.rows.rows, self.losses, self.settings.monitor, self.rates
            )

    def scalars(self, scalars: Mapping[str, float]) -> None:
        """Adds figures to TensorBoard and W&B."""
        if self.writer:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, self.at.step)
        if self.wandb:
            self.wandb.log(dict(scalars), step=self.at.step)

    def _writer(self, stack: ExitStack):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        # What a killed process wrote after the state that is resumed is hidden.
        writer = SummaryWriter(self.run.path / "tensorboard", purge_step=self.first_step + 1)
        stack.callback(writer.close)
        return writer


def draw(path, rows: Sequence[Mapping[str, str]], losses: Sequence[str], monitor: str, rates: Sequence[str]):
    """progress.png from the rows of metrics.csv: losses, monitored figure and learning rates."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 8))
    FigureCanvasAgg(figure)
    for panel, columns in zip(figure.subplots(3, 1, sharex=True), (losses, [monitor], rates), strict=True):
        for column in columns:
            known = [(int(row["epoch"]), float(row[column])) for row in rows if row[column]]
            panel.plot(*zip(*known, strict=True), marker=".", label=column)
        panel.legend()
        panel.grid(alpha=0.3)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel("epoch")
    figure.subplots_adjust(top=0.97, bottom=0.07, hspace=0.1)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    atomic_write(path, png.getbuffer())


def _text(scalars: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _peak_memory_mb() -> float:
    """Of this process on its GPU if it uses one, else of its main memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _import_wandb():
    try:
        import wandb
    except ImportError:
        raise UserError(
            "train.wandb: true needs the package wandb; pip install it, or leave the key out"
        ) from None
    return wandb
