"""One optimiser step: gradients of a phase over its micro-batches, and the watch for NaN and inf."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.arithmetic import autocast_of
from engine.config import UserError


@dataclass
class Phase:
    """A loss with the parameters that it trains. Every step takes the phases in turn on the same images.

    loss(model, inputs, labels) gives (sum, count) for int64 labels and what `prepare` of fit made of a batch:
    float images [B, 3, H, W] in [0, 1] unless told otherwise.
    The parameters are those of the optimizer; no others get a gradient. The scheduler moves per step.
    attack(model, inputs, labels, first) gives what the loss gets instead of the inputs; first is the number of
    their first image, counted through the whole training. clip_norm: largest norm of its gradient; None: that of the
    train section.
    """

    name: str
    loss: Callable[[nn.Module, Any, Tensor], tuple[Tensor, Tensor]]
    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    attack: Callable[[nn.Module, Any, Tensor, int], Any] | None = None
    clip_norm: float | None = None


@dataclass(frozen=True)
class PhaseLoss:
    """The loss of a phase in its parts: run(model, inputs) -> outputs, logits(model, outputs) -> [B, K, *S] in
    float32, and loss(model, outputs, labels) -> (sum, count). Gradients reach images that ask for one."""

    run: Callable[[nn.Module, Any], Any]
    logits: Callable[[nn.Module, Any], Tensor]
    loss: Callable[[nn.Module, Any, Tensor], tuple[Tensor, Tensor]]

    def __call__(self, model: nn.Module, inputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss(model, self.run(model, inputs), labels)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """The modules are in evaluation mode inside the block, and afterwards in the mode that they were in."""
    training = [part for module in modules for part in module.modules() if part.training]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def under_attack(model: Callable) -> Iterator[None]:
    """The model as an attack needs it: in eval mode, no gradient to its weights; afterwards as it was."""
    if not isinstance(model, nn.Module):
        yield
        return
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, mode in wanted.items():
            parameter.requires_grad_(mode)


def compute_gradients(
    phase: Phase,
    network: nn.Module,
    inputs: Sequence[tuple[Any, Tensor]],
    precision: str = "fp32",
    first: int = 0,
) -> Tensor:
    """Leaves in the phase's parameters the gradient of sum / count over all micro-batches together.

    inputs: (inputs of the loss, int64 labels) of each micro-batch; first: the number of their first image in
    the training, which only an attack looks at. Returns float64 (sum, count, gradient norm)."""
    phase.optimizer.zero_grad()
    total = count = torch.zeros((), dtype=torch.float64, device=inputs[0][1].device)
    for prepared, labels in inputs:
        if phase.attack:
            prepared = phase.attack(network, prepared, labels, first)
            first += len(labels)
        with autocast_of(precision, labels.device):
            loss, number = phase.loss(network, prepared, labels)
        loss.backward(inputs=list(phase.parameters))
        total, count = total + loss.detach(), count + number
    gradients = [parameter.grad for parameter in phase.parameters if parameter.grad is not None]
    # Divided at the end, since only then the count is known; without any labelled pixel the gradient is 0.
    torch._foreach_mul_(gradients, torch.where(count > 0, 1 / count, 0.0).float())
    norm = torch.nn.utils.get_total_norm(gradients)
    return torch.stack([total, count, norm.double()])


class Watch:
    """Loss and gradient norm of the last steps, left on the device: only a look waits for them."""

    def __init__(self, last: Path):
        self.last = last  # last.pt, for the message
        self.steps: list[tuple[str, list[str], Tensor]] = []

    def add(self, place: str, frames: list[str], values: Tensor) -> None:
        """values: what compute_gradients returns."""
        self.steps.append((place, frames, values))

    def look(self) -> None:
        """Raises UserError for the first NaN or inf since the last look: step, loss, frames, what to do."""
        if not self.steps:
            return
        for (place, frames, _), (total, count, norm) in zip(
            self.steps, torch.stack([values for *_, values in self.steps]).tolist(), strict=True
        ):
            loss = total / count if count else total
            if not math.isfinite(loss):
                raise UserError(self.message(f"{place}: the loss is {loss}", frames))
            if not math.isfinite(norm):
                raise UserError(
                    self.message(f"{place}: the norm of the gradient is {norm} (loss {loss})", frames)
                )
        self.steps.clear()

    def look_at_weights(self, place: str, phases: Sequence[Phase]) -> None:
        """Raises UserError where a step has left NaN or inf in the weights."""
        for phase in phases:
            if not torch.nn.utils.get_total_norm(
                [parameter.detach() for parameter in phase.parameters]
            ).isfinite():
                frames = self.steps[-1][1] if self.steps else []
                raise UserError(
                    self.message(f"{place}: the weights of phase {phase.name!r} are not finite", frames)
                )

    def message(self, what: str, frames: list[str]) -> str:
        kept = f"{self.last} holds the state before" if self.last.exists() else "no state was saved before"
        return (
            f"training stopped at {what}; frames of the batch: {', '.join(frames) or 'unknown'}. "
            f"{kept}. Lower train.optimizer.lr, set train.clip_norm or precision: fp32, or check the frames"
        )
