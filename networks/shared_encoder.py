"""A mixture whose experts are decoders on one encoder, which runs once whatever their number."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from networks.mixture import ExpertOutputs, Mixture, stack_logits
from networks.moe import check_experts
from networks.resize import upsample


class SharedEncoderMixture(Mixture):
    """One encoder, a decoder per expert, and a gate that reads the one feature map of the encoder.

    networks: name -> network of one architecture with encode(images) -> state, whose `features` are the gate's,
    and decode(state) -> logits. Copies are taken: the encoder of the first, the decoder of each, so that
    decoders start from weights of their own. All of it is trained here and belongs to the state. The gate is
    built for the features of one network; for it and the rest see Mixture.

    Raises UserError where networks don't fit together.
    """

    def __init__(self, networks: dict[str, nn.Module], gate: nn.Module, num_classes: int, **keys):
        check_experts(networks, num_classes, at_least=2)
        first = next(iter(networks.values()))
        super().__init__(tuple(networks), gate, num_classes, first.stride, **keys)
        self.feature_channels = first.feature_channels
        self.encoder = without_decoder(first)
        self.decoders = nn.ModuleList(without_encoder(network) for network in networks.values())

    def run_experts(self, images: torch.Tensor) -> ExpertOutputs:
        """The encoder once, every decoder once; a single feature map. Images [B, 3, H, W] in [0, 1]."""
        state = self.encoder.encode(images)
        logits = stack_logits([decoder.decode(state) for decoder in self.decoders])
        return ExpertOutputs(logits, [state.features], images, tuple(images.shape[-2:]))

    def gate_inputs(self, outputs: ExpertOutputs) -> list[torch.Tensor]:
        """As of one expert, since decoders that were run by themselves name the same feature map each."""
        return super().gate_inputs(replace(outputs, features=outputs.features[:1]))

    def forward_own(self, images: torch.Tensor, decoders: Sequence[int]) -> torch.Tensor:
        """Logits [B, C, H, W], each image's by the decoder that `decoders` gives for it (an index).

        The images of one decoder are a batch of their own to it, BatchNorm included; one without images
        doesn't run. The encoder sees all images together.
        """
        state = self.encoder.encode(images)
        rows = [
            [row for row, own in enumerate(decoders) if own == index] for index in range(len(self.decoders))
        ]
        logits = [
            decoder.decode(rows_of(state, torch.tensor(own, device=images.device)))
            for decoder, own in zip(self.decoders, rows, strict=True)
            if own
        ]
        places = torch.tensor([row for own in rows for row in own], device=images.device).argsort()
        return upsample(torch.cat(logits)[places], images.shape[-2:], self.stride)

    def decoder_of(self, name: str) -> "SharedEncoderExpert":
        """One decoder with the encoder, as a plain network; its modules are the mixture's, not copies."""
        expert = SharedEncoderExpert(self.encoder, self.decoders[self.expert_names.index(name)])
        expert.training = self.training  # train() would set the mode of the mixture's modules
        return expert


class SharedEncoderExpert(nn.Module):
    """A plain network of an encoder that others may use too, and one of the decoders on it."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.num_classes, self.feature_channels = decoder.num_classes, encoder.feature_channels
        self.stride = encoder.stride

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, H, W] in [0, 1] -> logits [B, C, H, W]."""
        return upsample(self.forward_features(images)[0], images.shape[-2:], self.stride)

    def forward_features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [B, C, h, w] before upsampling, features [B, F, h', w'])"""
        state = self.encode(images)
        return self.decode(state), state.features

    def encode(self, images: torch.Tensor) -> Any:
        return self.encoder.encode(images)

    def decode(self, state: Any) -> torch.Tensor:
        return self.decoder.decode(state)


def without_decoder(network: nn.Module) -> nn.Module:
    """A copy of the network that can `encode` only; it holds no tensor of the decoder."""
    copy = deepcopy(network)
    for name in decoder_parts(copy):
        copy.set_submodule(name, nn.Identity())
    return copy


def without_encoder(network: nn.Module) -> nn.Module:
    """A copy of the network that can `decode` only; it holds no tensor of the encoder."""
    copy = deepcopy(network)
    keep_only(copy, decoder_parts(copy))
    return copy


def decoder_parts(network: nn.Module) -> tuple[str, ...]:
    """Names of the submodules that `decode` uses: what the network says, else the one called decoder."""
    return getattr(network, "decoder_parts", ("decoder",))


def keep_only(module: nn.Module, names: Sequence[str]) -> None:
    """Empties every submodule that neither is one of the named ones nor holds one."""
    for child, submodule in module.named_children():
        below = [name.removeprefix(f"{child}.") for name in names if name.startswith(f"{child}.")]
        if below:
            keep_only(submodule, below)
        elif child not in names:
            module.set_submodule(child, nn.Identity())


def rows_of(state: Any, rows: torch.Tensor) -> Any:
    """The state of some images of a batch: tensors with the batch first, in tuples of any depth."""
    if isinstance(state, torch.Tensor):
        return state[rows]
    parts = [rows_of(part, rows) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
