"""Mixtures with a shared encoder: from configs and checkpoints, and their losses in separate and joint training."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from engine.checkpoints import tensors_sha256
from engine.config import Component, Gate, Run, UserError
from engine.loop import images_of, supervised
from engine.steps import PhaseLoss, evaluating
from networks.complexity import parameters
from networks.moe import ExpertOutputs, gate_channels
from networks.shared_encoder import SharedEncoderMixture
from pipelines.gates import loss_of_images, mixture_logits
from pipelines.models import (
    Trained,
    load_tensors,
    mixture_arguments,
    normalisation,
    stored_network,
    without_pretrained,
)

PhaseParts = tuple[str, PhaseLoss, list[nn.Parameter]]  # name, loss(model, inputs, labels), what it trains


@dataclass
class OwnImages:
    """Images, and for each the index of the decoder that it trains."""

    images: Tensor  # [B, 3, H, W] in [0, 1]
    decoders: list[int]

    def __getitem__(self, rows: Tensor) -> "OwnImages":
        return OwnImages(self.images[rows], [self.decoders[row] for row in rows.tolist()])


def build(network: Component, gate: Gate, num_classes: int, names: Sequence[str]) -> SharedEncoderMixture:
    """An untrained mixture with a decoder of each name, each with first weights of its own."""
    others = without_pretrained(network)  # only their decoders are used
    networks = {name: (others if place else network).build(num_classes) for place, name in enumerate(names)}
    readers = networks if gate.input == "logits" else {names[0]: networks[names[0]]}  # one feature map
    head = gate.build(gate_channels(readers, num_classes, gate.input), len(names), num_classes)
    return SharedEncoderMixture(networks, head, num_classes, **mixture_arguments(gate))


def description(config: Run, mixture: SharedEncoderMixture) -> dict:
    """What its checkpoint says beside what every checkpoint says: all that it takes to build it again."""
    return {
        "network": config.network.plain(),
        "gate": config.gate.plain(),
        "shared_encoder": {**config.shared_encoder.plain(), "decoders": list(mixture.expert_names)},
        **normalisation(mixture.encoder),
    }


def from_checkpoint(
    file: Path, tensors: Mapping, metadata: dict, where: str
) -> tuple[Trained, dict[str, Trained]]:
    """The trained mixture, and each of its decoders as a network that shares the encoder with it."""
    about = metadata["shared_encoder"]
    gate, names = Gate.model_validate(metadata["gate"]), about["decoders"]
    mixture = build(stored_network(metadata), gate, len(metadata["classes"]), names)
    load_tensors(mixture, tensors, where)
    mixture.eval().requires_grad_(False)
    experts = {}
    for name in names:
        expert = mixture.decoder_of(name)
        size = parameters(expert)[0]
        home = [name] if about["training"] == "separate" else metadata["subsets"]
        own = {**metadata, "subsets": home, "parameters": size, "trained_parameters": size}
        experts[name] = Trained(file, expert, own, tensors_sha256(expert.state_dict()))
    return Trained(file, mixture, metadata, tensors_sha256(tensors)), experts


def phases(
    mixture: SharedEncoderMixture, training: Literal["separate", "joint"], loss: Callable, mixed: Callable
) -> list[PhaseParts]:
    """What is done in a step, in turn: name, loss(mixture, inputs, labels) -> (sum, count), parameters.

    loss: of (logits, labels); mixed: of (mixture, experts' outputs, labels), as a gate's.
    joint: all is trained by the loss of the mixture; inputs are images.
    separate: first encoder and decoders, each image through its own decoder alone; then gate and convolution
    (where there is anything to train in them). Inputs are `OwnImages`.
    """
    if training == "joint":
        return [("mixture", loss_of_images(mixed), list(mixture.parameters()))]
    own, on_top = separate_losses(loss, mixed)
    gate = [*mixture.gate.parameters(), *mixture.conv.parameters()]
    return [
        ("experts", own, [*mixture.encoder.parameters(), *mixture.decoders.parameters()]),
        *([("gate", on_top, gate)] if gate else []),
    ]


def separate_losses(loss: Callable, mixed: Callable) -> tuple[PhaseLoss, PhaseLoss]:
    """The losses (mixture, OwnImages, labels) -> (sum, count) of the decoders, and of the gate on top of them.

    The gate learns to mix what encoder and decoders say in evaluation mode, as they will when it is used; its
    loss leaves them as they are, BatchNorm's running statistics included, and gives them no gradient.
    """
    own = replace(
        supervised(loss), run=lambda mixture, inputs: mixture.forward_own(inputs.images, inputs.decoders)
    )
    on_top = PhaseLoss(
        run=lambda mixture, inputs: settled_outputs(mixture, inputs.images),
        logits=mixture_logits,
        loss=mixed,
    )
    return own, on_top


def settled_outputs(mixture: SharedEncoderMixture, images: Tensor) -> ExpertOutputs:
    """What the decoders say in evaluation mode, without gradients but to images that ask for one."""
    with evaluating(mixture.encoder, mixture.decoders), torch.set_grad_enabled(images.requires_grad):
        return mixture.run_experts(images)


def refuse_lone_images(mixture: SharedEncoderMixture, name: str, size: tuple[int, int]) -> None:
    """UserError for a network whose decoder can't be trained on one image: a batch may hold one of a subset."""
    shadow, each = deepcopy(mixture).to("meta").train(), range(len(mixture.decoders))
    try:
        shadow.forward_own(torch.empty(len(each), 3, *size, device="meta"), list(each))
    except UserError as error:
        raise UserError(
            f"shared_encoder.training: separate gives each decoder the images of its own subset, of which a batch may "
            f"hold one alone, and {name} can't be trained so; take training: joint, or another network ({error})"
        ) from error


def own_images(mixture: SharedEncoderMixture) -> Callable:
    """prepare of `fit` for separate training: images with the decoder that is named like the frame's subset."""

    def prepare(batch, device: torch.device, layout: torch.memory_format) -> OwnImages:
        decoders = [mixture.expert_names.index(frame.subset) for frame in batch.frames]
        return OwnImages(images_of(batch, device, layout), decoders)

    return prepare
