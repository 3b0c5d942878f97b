"""Gates in training: what their loss sees of the experts, and several of them in one pass."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from engine.arithmetic import layout_of
from engine.config import IGNORE, Gate, Run, Train, from_dict
from engine.steps import PhaseLoss
from engine.temperatures import fit_temperatures
from networks.mixture import Mixture
from networks.moe import ExpertOutputs, MixtureOfExperts
from networks.routing import routing_penalty


def runs_in(config: Run) -> list[Run]:
    """The run itself, or one for each of its gates as if it were trained alone in the folder NAME/gate."""
    if not config.gates:
        return [config]
    runs = []
    for name in config.gates:
        run = config.resolved()
        run |= {"name": f"{config.name}/{name}", "gate": run.pop("gates")[name]}
        if config.starts:
            run["train"]["start_from"] = config.starts[f"start_from/{name}"]
        runs.append(from_dict(run, "run", origin=config.name))
    return runs


def gate_loss(loss: Callable, gate: Gate) -> Callable:
    """The phase loss (mixture, experts' outputs, labels [B, H, W]) -> (sum, count) of a gate.

    gate.loss_at "full": of logits at the images' size; "logits": on the logits' own grid, labels reduced to
    it. The penalties that the gate asks for are added to the mean loss."""

    def value(mixture: MixtureOfExperts, outputs: ExpertOutputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        if gate.loss_at == "full" and (mixture.conv_at == "full" or not hasattr(loss, "upsampled")):
            logits, weights = mixture.combine(outputs)
            total, count = loss(logits, labels)
        else:
            mixed, weights = mixture.mix(outputs)
            grid = mixture.grid(outputs.size)
            if gate.loss_at == "full":
                total, count = loss.upsampled(mixed, labels, grid)
            else:
                total, count = loss(mixed, reduced(labels, grid, mixed.shape[-2:]))
        return total + count * routing_penalty(weights, gate.balance, gate.entropy), count

    return value


def loss_of_images(mixed: Callable) -> PhaseLoss:
    """The phase loss (mixture, images, labels) -> (sum, count) that runs the experts itself.

    mixed: of (mixture, experts' outputs, labels), as gate_loss gives it."""
    return PhaseLoss(
        run=lambda mixture, images: mixture.run_experts(images), logits=mixture_logits, loss=mixed
    )


def mixture_logits(mixture: Mixture, outputs: ExpertOutputs) -> Tensor:
    """[B, C, H, W]. Hard gates have their straight-through gradient in evaluation mode as well: what attacks of a
    training climb has to lead to other routes."""
    weights = mixture.route(mixture.gate(mixture.gate_inputs(outputs)), straight_through=True)
    return mixture.combine(outputs, weights)[0]


def reduced(labels: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Labels [B, H, W] at the centres of the cells of a `size` raster laid over the padded grid; 255 in what
    was padded."""
    rows, columns = (
        ((2 * torch.arange(cells, device=labels.device) + 1) * whole) // (2 * cells)
        for cells, whole in zip(size, grid, strict=True)
    )
    height, width = labels.shape[-2:]
    taken = labels[:, rows.clamp(max=height - 1)][:, :, columns.clamp(max=width - 1)]
    inside = (rows < height)[:, None] & (columns < width)
    return torch.where(inside, taken, IGNORE)


def calibrate(
    mixtures: Sequence[MixtureOfExperts],
    batches: Iterable,
    prepare: Callable,
    settings: Train,
    device: torch.device,
) -> None:
    """Sets the experts' temperatures of the mixtures that want them, fitted on the validation frames. settings: the
    config's train section."""
    wanting = [mixture for mixture in mixtures if mixture.calibrate]
    if not wanting:
        return
    layout = layout_of(settings)
    seen = ((prepare(batch, device, layout), batch.labels.to(device)) for batch in batches)
    temperatures = fit_temperatures(seen, wanting[0].grid)
    for mixture in wanting:
        mixture.expert_temperatures.copy_(torch.tensor(temperatures))
