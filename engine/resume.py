"""What last.pt holds, and how a training goes on from it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.average import Average
from engine.checkpoints import copy_tensors, load_metadata, load_state, save_state
from engine.config import UserError
from engine.randomness import set_random_state
from engine.runs import RunFolder
from engine.steps import Phase


@dataclass
class Position:
    """Where a training stands, in plain values."""

    epoch: int = 0  # complete epochs
    batch: int = 0  # batches of the running epoch that were used
    step: int = 0
    images_seen: int = 0
    epoch_images: int = 0
    best: float | None = None
    best_epoch: int = 0
    finished: bool = False
    seconds: float = 0.0  # of the running epoch
    waited: float = 0.0  # of these, for data
    rates: list[float] = field(default_factory=list)  # learning rate of each phase in the last step


@dataclass
class TrainingState:
    """Everything that a step changes, but the random generators.

    tensors: the live tensors of the network that training changes. sums: (loss, count) of each phase in the
    running epoch, float64 [phases, 2]. identity: hashes of what training depends on besides the config."""

    at: Position
    tensors: dict[str, Tensor]
    average: Average | None
    phases: Sequence[Phase]
    sums: Tensor
    identity: Mapping[str, str]

    def save(self, run: RunFolder, random: Mapping[str, Any]) -> None:
        """Writes last.pt with this state of the random generators. Raises UserError as atomic_write."""
        state = {
            "tensors": self.tensors,
            "average": self.average.tensors if self.average else {},
            "phases": {
                phase.name: {
                    "optimizer": phase.optimizer.state_dict(),
                    "scheduler": phase.scheduler.state_dict(),
                }
                for phase in self.phases
            },
            "position": asdict(self.at),
            "sums": self.sums,
            "random": random,
            "threads": torch.get_num_threads(),
            "identity": dict(self.identity),
        }
        save_state(run.last, state)

    def restore(self, run: RunFolder, monitor: str) -> None:
        """Goes back to where last.pt stands, random generators too. Raises UserError if it doesn't fit."""
        state = load_state(run.last)
        try:
            self._check_identity(run, state["identity"])
            copy_tensors(self.tensors, state["tensors"], run.last)
            if self.average:
                copy_tensors(self.average.tensors, state["average"], run.last)
            for phase in self.phases:
                phase.optimizer.load_state_dict(state["phases"][phase.name]["optimizer"])
                phase.scheduler.load_state_dict(state["phases"][phase.name]["scheduler"])
            self.at = Position(**state["position"])
            self.sums.copy_(state["sums"])
            set_random_state(state["random"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{run.last}: of another training ({error}); start again with --overwrite"
            ) from error
        if self.at.best_epoch or run.best.exists():
            # A kill after a validation leaves a file that is newer than last.pt: the state follows it.
            metadata = load_metadata(run.best)
            if metadata.get("epoch", 0) > self.at.best_epoch:
                self.at.best, self.at.best_epoch = metadata["metrics"][monitor], metadata["epoch"]
        if state["threads"] != torch.get_num_threads():
            run.log(
                f"warning: the run used {state['threads']} threads and goes on with "
                f"{torch.get_num_threads()}: results may differ in the last digits"
            )
        run.log(f"resumed {run.last} after step {self.at.step}")

    def _check_identity(self, run: RunFolder, before: Mapping[str, str]) -> None:
        for name in {**before, **self.identity}:
            was, now = before.get(name), self.identity.get(name)
            if was != now:
                raise UserError(
                    f"{run.last}: the run began with another {name} (was {was}, is {now}); "
                    "start again with --overwrite"
                )
