"""Mixture of frozen experts: a gate weighs the logits of the experts, nothing changes the experts."""

from collections.abc import Mapping

import torch
from torch import nn

from engine.config import UserError
from networks.gates import UniformGate
from networks.mixture import ExpertOutputs, Mixture, stack_logits


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


class MixtureOfExperts(Mixture):
    """A mixture of frozen networks: only gate and convolution are trained, and belong to its state.

    experts: name -> network with forward_features, frozen here if not yet; for the rest see Mixture.

    Raises UserError where experts don't fit together.
    """

    def __init__(self, experts: dict[str, nn.Module], gate: nn.Module, num_classes: int, **keys):
        check_experts(experts, num_classes, at_least=1 if isinstance(gate, UniformGate) else 2)
        super().__init__(tuple(experts), gate, num_classes, next(iter(experts.values())).stride, **keys)
        self.experts = nn.ModuleList(e if isinstance(e, Frozen) else Frozen(e) for e in experts.values())

    def run_experts(self, images: torch.Tensor) -> ExpertOutputs:
        """Every expert, once. Images [B, 3, H, W] in [0, 1]."""
        logits, features = zip(*(expert.forward_features(images) for expert in self.experts), strict=True)
        check_grids(self.expert_names, logits, features)
        return ExpertOutputs(stack_logits(logits), list(features), images, tuple(images.shape[-2:]))

    def trainable_state(self) -> dict[str, torch.Tensor]:
        """Its own tensors (gate, convolution, experts' temperatures) by name; experts live in their own files."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("experts.")}


def gate_channels(experts: Mapping[str, nn.Module], num_classes: int, input: str) -> int:
    """Channels of all that a gate reads, the sum over what `MixtureOfExperts.gate_inputs` gives."""
    if input == "image":
        return 3
    return sum(num_classes if input == "logits" else expert.feature_channels for expert in experts.values())


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
