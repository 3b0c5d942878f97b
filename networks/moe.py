"""Mixture of frozen experts: a gate weighs the logits of the experts, nothing changes the experts."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from engine.config import UserError
from networks.gates import UniformGate, without_autocast
from networks.resize import full_precision, upsample


class Frozen(nn.Module):
    """An expert that stays as it is: evaluation mode whatever train() says, no gradient to its weights.

    Gradients to the input pass. The given network is frozen itself, not a copy of it.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.requires_grad_(False)
        self.num_classes, self.feature_channels, self.stride = (
            network.num_classes,
            network.feature_channels,
            network.stride,
        )
        self.train()

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)

    def forward_features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.network.forward_features(images)


@dataclass
class Inspection:
    """Everything from one pass; h and w are those of the experts' logits before upsampling (padded grid)."""

    logits: torch.Tensor  # [B, C, H, W]
    expert_logits: torch.Tensor  # [B, E, C, h, w]
    weights: torch.Tensor  # [B, E, K, 1, 1], summing to 1 over E; K = 1 or C
    gate_logits: torch.Tensor  # [1, B, E, K, 1, 1], before softmax
    features: list[torch.Tensor]  # one [B, F, h', w'] per expert


class MixtureOfExperts(nn.Module):
    """Experts, weighed by a gate.

    experts: name -> network with forward_features, frozen here if not yet. gate: features -> gate logits.
    conv: a 3x3 convolution of the mixed logits that starts as the identity; conv_at: "logits" (before
    upsampling) or "full" (after it, as published). mix: what is weighed, "logits" (as published), "log_probs"
    or "probs"; the result is always logits. With "logits" and a class-wise gate decisions depend on the
    constant by which an expert's logits of a pixel may be shifted without changing that expert.

    Raises UserError where experts don't fit together.
    """

    routing = "soft"

    def __init__(
        self,
        experts: dict[str, nn.Module],
        gate: nn.Module,
        num_classes: int,
        conv: bool = False,
        conv_at: Literal["logits", "full"] = "logits",
        mix: Literal["logits", "log_probs", "probs"] = "logits",
    ):
        super().__init__()
        check_experts(experts, num_classes, at_least=1 if isinstance(gate, UniformGate) else 2)
        self.expert_names = tuple(experts)
        self.experts = nn.ModuleList(e if isinstance(e, Frozen) else Frozen(e) for e in experts.values())
        self.stride = self.experts[0].stride
        self.gate = gate
        self.num_classes = num_classes
        self.conv = identity_conv(num_classes) if conv else nn.Identity()
        self.conv_at = conv_at
        self.mix = mix

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, H, W] in [0, 1] -> logits [B, C, H, W]."""
        return self.inspect(images).logits

    def inspect(self, images: torch.Tensor) -> Inspection:
        """The logits and what they were made of, each expert run once."""
        expert_logits, features = self.run_experts(images)
        gate_logits = self.gate(features)[None]
        weights = self.route(gate_logits)[0]
        logits = self.combine_given(expert_logits, weights, images.shape[-2:])
        return Inspection(logits, expert_logits, weights, gate_logits, features)

    def run_experts(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(logits [B, E, C, h, w] in float32, one feature map [B, F, h', w'] per expert)."""
        logits, features = zip(*(expert.forward_features(images) for expert in self.experts), strict=True)
        check_grids(self.expert_names, logits, features)
        return torch.stack([full_precision(one) for one in logits], dim=1), list(features)

    def gate_logits(self, images: torch.Tensor) -> torch.Tensor:
        """[1, B, E, K, 1, 1] (one routing site), differentiable, before softmax."""
        return self.gate(self.run_experts(images)[1])[None]

    def route(self, gate_logits: torch.Tensor) -> torch.Tensor:
        """Weights of the same shape [..., E, K, h, w]: softmax over the experts."""
        return gate_logits.softmax(dim=-4)

    def forward_given(self, images: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Logits [B, C, H, W] for given weights [B, E, K, 1, 1], or [1, B, E, K, 1, 1] as `route` gives them.

        One-hot weights force one expert.
        """
        expert_logits = self.run_experts(images)[0]
        return self.combine_given(expert_logits, weights.reshape(weights.shape[-5:]), images.shape[-2:])

    def combine(
        self, expert_logits: torch.Tensor, features: list[torch.Tensor], size
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [B, C, *size], weights [B, E, K, 1, 1]) from the outputs of `run_experts`."""
        weights = self.route(self.gate(features))
        return self.combine_given(expert_logits, weights, size), weights

    def combine_given(
        self, expert_logits: torch.Tensor, weights: torch.Tensor, size: tuple[int, int]
    ) -> torch.Tensor:
        """Logits [B, C, *size] of expert logits [B, E, C, h, w] and weights [B, E, K, 1, 1]; not in place."""
        with without_autocast(expert_logits):  # the identity is one in float32 only
            mixed = MIXES[self.mix](full_precision(expert_logits), weights)
            if self.conv_at == "logits":
                return upsample(self.conv(mixed), size, self.stride)
            return self.conv(upsample(mixed, size, self.stride))

    def trainable_state(self) -> dict[str, torch.Tensor]:
        """The tensors of gate and convolution, by name; the experts live in their own files."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("experts.")}

    def load_trainable_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes what `trainable_state` gave. UserError where it belongs to another gate."""
        expected = self.trainable_state()
        wrong = [name for name in expected.keys() ^ tensors.keys()]
        wrong += [
            name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape
        ]
        if wrong:
            raise UserError(
                f"gate: the stored weights are of another gate, {len(wrong)} tensors differ "
                f"({', '.join(sorted(wrong)[:3])}); take its config, and as many experts"
            )
        self.load_state_dict(tensors, strict=False)


def mix_logits(expert_logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum over the experts: [B, E, C, h, w] and [B, E, K, 1, 1] -> [B, C, h, w]."""
    return (weights * expert_logits).sum(dim=1)


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


def check_experts(experts: dict[str, nn.Module], num_classes: int, at_least: int) -> None:
    """UserError for too few experts, another number of classes, or paddings that don't agree."""
    if len(experts) < at_least:
        raise UserError(
            f"experts: at least {at_least} are needed, got {len(experts)}: {', '.join(experts) or 'none'}"
        )
    for name, expert in experts.items():
        if expert.num_classes != num_classes:
            raise UserError(f"experts.{name}: {expert.num_classes} classes, the data has {num_classes}")
    strides = {name: expert.stride for name, expert in experts.items()}
    if len(set(strides.values())) > 1:
        raise UserError(
            f"experts: inputs are padded to different multiples, {strides}; take experts of one kind"
        )


def check_grids(names: tuple[str, ...], logits: tuple, features: tuple) -> None:
    """UserError where the experts' logits or features have different heights and widths."""
    for kind, maps in (("logits", logits), ("features", features)):
        grids = {name: tuple(one.shape[-2:]) for name, one in zip(names, maps, strict=True)}
        if len(set(grids.values())) > 1:
            raise UserError(
                f"experts: their {kind} have different grids, {grids}; take experts of one output stride"
            )
