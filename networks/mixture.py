"""What a gate makes of the outputs of experts: weights, mixed logits, and a convolution of these."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from networks.gates import pool_to_grid, without_autocast
from networks.normalize import Normalize
from networks.resize import full_precision, pad_to, padded, upsample
from networks.routing import soft, spread, top1


@dataclass
class ExpertOutputs:
    """What the experts said about a batch: all that a gate and the mixing need, so that it may be stored."""

    logits: torch.Tensor  # [B, E, C, h, w] in float32 (or as stored), before upsampling, on the padded grid
    features: list[torch.Tensor]  # one [B, F, h', w'] per expert
    images: torch.Tensor | None  # [B, 3, H, W] in [0, 1]; None where no gate reads them
    size: tuple[int, int]  # (H, W) of the images


@dataclass
class Inspection:
    """Everything from one pass; h and w are those of the experts' logits before upsampling (padded grid).

    The gate's own grid [h', w'] is 1 x 1 unless it is spatial.
    """

    logits: torch.Tensor  # [B, C, H, W]
    expert_logits: torch.Tensor  # [B, E, C, h, w]
    weights: torch.Tensor  # [B, E, K, h', w'], summing to 1 over E; K = 1 or C
    gate_logits: torch.Tensor  # [1, B, E, K, h', w'], before softmax
    features: list[torch.Tensor]  # one [B, F, h', w'] per expert


class Mixture(nn.Module, ABC):
    """What a gate makes of the outputs of experts; `run_experts` of its subclasses tells where those come from.

    gate: list of [B, F, h', w'] -> gate logits [B, E, K, h', w'].
    conv: a 3x3 convolution of the mixed logits that starts as the identity; conv_at: "logits" (before
    upsampling) or "full" (after it, as published). mix: what is weighed, "logits" (as published), "log_probs"
    or "probs"; the result is always logits. With "logits" and a class-wise gate decisions depend on the
    constant by which an expert's logits of a pixel may be shifted without changing that expert.
    input: what the gate reads, see `gate_inputs`. routing: "soft" weights, or "top1", all to the best expert
    (the attribute then reads "hard"). temperature: gate logits are divided by it. calibrate: the logits of
    each expert are divided by its entry of `expert_temperatures`, ones until they are set, which then are part
    of the state.

    The weights of a spatial gate are made on the grid of what it reads, by softmax there, and then spread to
    the grid of the logits: a convex combination at every place. So where experts agree on the grid of the
    logits, a gate with one weight for all classes (K = 1) and no convolution agrees with them; after upsampling
    that holds for pixels whose (up to four) places of that grid all agree on one class.
    """

    def __init__(
        self,
        expert_names: tuple[str, ...],
        gate: nn.Module,
        num_classes: int,
        stride: int,
        *,
        conv: bool = False,
        conv_at: Literal["logits", "full"] = "logits",
        mix: Literal["logits", "log_probs", "probs"] = "logits",
        input: Literal["features", "logits", "image"] = "features",
        routing: Literal["soft", "top1"] = "soft",
        temperature: float = 1.0,
        calibrate: bool = False,
    ):
        super().__init__()
        self.expert_names, self.num_classes, self.stride = expert_names, num_classes, stride
        self.gate = gate
        self.conv = identity_conv(num_classes) if conv else nn.Identity()
        self.conv_at = conv_at
        self.mixing = mix
        self.input = input
        self.normalize = Normalize() if input == "image" else nn.Identity()
        self.routing = {"soft": "soft", "top1": "hard"}[routing]
        self.temperature = temperature
        self.calibrate = calibrate
        # only a calibrated mixture stores them: the files of others don't change
        self.register_buffer("expert_temperatures", torch.ones(len(expert_names)), persistent=calibrate)

    @abstractmethod
    def run_experts(self, images: torch.Tensor) -> ExpertOutputs:
        """Every expert, once. Images [B, 3, H, W] in [0, 1]."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, H, W] in [0, 1] -> logits [B, C, H, W]."""
        return self.inspect(images).logits

    def inspect(self, images: torch.Tensor) -> Inspection:
        """The logits and what they were made of, each expert run once."""
        outputs = self.run_experts(images)
        gate_logits = self.gate(self.gate_inputs(outputs))[None]
        logits, weights = self.combine(outputs, self.route(gate_logits)[0])
        return Inspection(logits, outputs.logits, weights, gate_logits, outputs.features)

    def gate_inputs(self, outputs: ExpertOutputs) -> list[torch.Tensor]:
        """What the gate reads, a list of [B, F, h', w'].

        features: the experts'. logits: those of each expert, before any calibration. image: normalised. Logits
        and image are averaged over cells of stride x stride pixels, the grid of features at that stride.
        """
        if self.input == "features":
            return outputs.features
        rows, columns = (edge // self.stride for edge in self.grid(outputs.size))
        whole = outputs.logits.unbind(1)
        if self.input == "image":
            whole = [pad_to(self.normalize(outputs.images), self.stride)]
        with without_autocast(outputs.logits):
            return [pool_to_grid(full_precision(one), (rows, columns)) for one in whole]

    @property
    def num_experts(self) -> int:
        return len(self.expert_names)

    def gate_logits(self, images: torch.Tensor) -> torch.Tensor:
        """[1, B, E, K, h', w'] (one routing site), differentiable, before softmax."""
        return self.gate_and_mix(images)[0]

    def gate_and_mix(
        self, images: torch.Tensor
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """(gate logits [1, B, E, K, h', w'], mix) from one pass of the experts.

        mix(weights) is forward_given(images, weights), so that mix(route(gate logits)) = forward(images), bit
        for bit; it may be called with any weights any number of times. Both are differentiable by images and
        weights. Nothing is kept for another call.
        """
        outputs = self.run_experts(images)
        gate_logits = self.gate(self.gate_inputs(outputs))[None]
        return gate_logits, lambda weights: self.combine(outputs, of_one_site(weights))[0]

    def route(self, gate_logits: torch.Tensor, straight_through: bool | None = None) -> torch.Tensor:
        """Weights of the same shape [..., E, K, h', w'] that sum to 1 over the experts.

        straight_through: hard ones have the gradient of soft ones; None: in training only.
        """
        if self.routing == "soft":
            return soft(gate_logits, self.temperature)
        straight_through = self.training if straight_through is None else straight_through
        return top1(gate_logits, self.temperature, straight_through)

    def forward_given(self, images: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Logits [B, C, H, W] for given weights [B, E, K, h', w'], or [1, B, ...] as `route` gives them.

        One-hot weights force one expert.
        """
        return self.combine(self.run_experts(images), of_one_site(weights))[0]

    def combine(
        self, outputs: ExpertOutputs, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [B, C, H, W], weights [B, E, K, h', w']); weights are the gate's where none are given."""
        mixed, weights = self.mix(outputs, weights)
        logits = upsample(mixed, outputs.size, self.stride)
        return (self.convolve(logits) if self.conv_at == "full" else logits), weights

    def mix(
        self, outputs: ExpertOutputs, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(mixed logits [B, C, h, w] on the experts' grid, weights [B, E, K, h', w']); not in place.

        The convolution is part of it where conv_at is "logits". `grid` tells what size to upsample to.
        """
        if weights is None:
            weights = self.route(self.gate(self.gate_inputs(outputs)))
        with without_autocast(outputs.logits):
            expert_logits = full_precision(outputs.logits)
            if self.calibrate:
                expert_logits = expert_logits / self.expert_temperatures.view(-1, 1, 1, 1)
            mixed = MIXES[self.mixing](
                expert_logits, spread(weights, expert_logits.shape[-2:], self.routing == "hard")
            )
        return (self.convolve(mixed) if self.conv_at == "logits" else mixed), weights

    def convolve(self, logits: torch.Tensor) -> torch.Tensor:
        with without_autocast(logits):  # the identity is one in float32 only
            return self.conv(logits)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) that mixed logits are upsampled to before they are cropped to the images' size."""
        return padded(size[0], self.stride), padded(size[1], self.stride)


def of_one_site(weights: torch.Tensor) -> torch.Tensor:
    """[1, B, E, K, h', w'] or [B, E, K, h', w'] -> the latter."""
    return weights.reshape(weights.shape[-5:])


def stack_logits(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logits [B, C, h, w] of each expert -> [B, E, C, h, w] in float32, with the classes of a pixel side by side in
    memory: mixing and convolutions are quicker so."""
    together = torch.stack([full_precision(one).permute(0, 2, 3, 1) for one in logits], dim=1)
    return together.permute(0, 1, 4, 2, 3)


def mix_logits(expert_logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum over the experts: [B, E, C, h, w] and [B, E, K, 1, 1] or [B, E, K, h, w] -> [B, C, h, w]."""
    mixed = weights[:, 0] * expert_logits[:, 0]
    for expert in range(1, expert_logits.shape[1]):  # one pass over memory for each, and its layout is kept
        mixed = torch.addcmul(mixed, weights[:, expert], expert_logits[:, expert])
    return mixed


def mix_log_probs(expert_logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return mix_logits(expert_logits.log_softmax(dim=2), weights)


def mix_probs(expert_logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Logarithm of the weighted sum of probabilities, finite also where they underflow."""
    log_probs = expert_logits.log_softmax(dim=2)
    largest = log_probs.detach().amax(dim=1)
    summed = mix_logits((log_probs - largest[:, None]).exp(), weights)
    return summed.clamp_min(torch.finfo(summed.dtype).tiny).log() + largest


MIXES = {"logits": mix_logits, "log_probs": mix_log_probs, "probs": mix_probs}


def identity_conv(num_classes: int) -> nn.Conv2d:
    conv = nn.Conv2d(num_classes, num_classes, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight)
    return conv
