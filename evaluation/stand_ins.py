"""Networks that stand in for a target while an attack's passes are counted: one of each kind, never wrong.

They offer what the protocol of targets asks for and nothing else, so they show it as well.
"""

import importlib
import json
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from attacks.threat import Threat
from engine.config import Component, component, table_of
from evaluation.ledger import canonical
from evaluation.targets import ROUTED, Kind

Norm = Literal["linf", "l2"]
CLASSES = 40  # where nothing depends on it
MOST_CLASSES = (
    255  # of label maps of bytes; more would take long, and change the passes of no attack that is of use
)


class Sure:
    """A single network: each row of pixels is of a class of its own, and it can't be told otherwise."""

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def __call__(self, images: Tensor) -> Tensor:
        rows = torch.arange(images.shape[2]) % self.num_classes
        right = torch.nn.functional.one_hot(rows, self.num_classes).T[None, :, :, None].to(images)
        slope = torch.linspace(-1, 1, self.num_classes)[None, :, None, None].to(images)
        return 10 * right + slope * images.mean(dim=1, keepdim=True)


class SureEnsemble:
    """Several of them."""

    def __init__(self, num_experts: int, num_classes: int):
        self.num_experts, self.expert = num_experts, Sure(num_classes)

    def __call__(self, images: Tensor) -> Tensor:
        return self.combine(self.expert_logits(images))

    def expert_logits(self, images: Tensor) -> Tensor:
        """[B, E, K, H, W]"""
        return self.expert(images)[:, None].expand(-1, self.num_experts, -1, -1, -1)

    def combine(self, expert_logits: Tensor) -> Tensor:
        return expert_logits.mean(dim=1)


class SureMixture:
    """A routed model whose gate can't be told otherwise, either. top_k: experts with any weight, of a soft one. ran:
    networks that have run for an image if only those with any weight do."""

    def __init__(self, num_experts: int, num_classes: int, routing: str):
        self.num_experts, self.routing, self.top_k, self.ran = num_experts, routing, num_experts, 0
        self.expert = Sure(num_classes)

    def __call__(self, images: Tensor) -> Tensor:
        return self.forward_given(images, self.route(self.gate_logits(images)))

    def gate_logits(self, images: Tensor) -> Tensor:
        """[1, B, E, 1, 1, 1]"""
        liking = 10.0 * torch.arange(self.num_experts).to(images)
        change = images.mean(dim=(1, 2, 3))[:, None] * torch.linspace(-1, 1, self.num_experts).to(images)
        return (liking + change)[None, :, :, None, None, None]

    def route(self, gate_logits: Tensor) -> Tensor:
        if self.routing == "soft":
            others = gate_logits.argsort(dim=2, descending=True)[:, :, self.top_k :]
            return gate_logits.scatter(2, others, -torch.inf).softmax(dim=2)
        best = gate_logits.argmax(dim=2, keepdim=True)
        return torch.zeros_like(gate_logits).scatter(2, best, 1.0)

    def forward_given(self, images: Tensor, weights: Tensor) -> Tensor:
        weights = weights.reshape(weights.shape[-5:])  # [B, E, K, h, w]
        self.ran += int((weights[0] != 0).flatten(1).any(dim=1).sum())
        return (self.expert(images)[:, None] * weights).sum(dim=1)

    def gate_and_mix(self, images: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return self.gate_logits(images), partial(self.forward_given, images)


STAND_INS: dict[Kind, Callable] = {
    "single": lambda num_experts, num_classes: Sure(num_classes),
    "ensemble": SureEnsemble,
    "soft": partial(SureMixture, routing="soft"),
    "hard": partial(SureMixture, routing="hard"),
}


def count_passes(
    attack: Component,
    kind: Kind,
    num_experts: int,
    size: tuple[int, ...] | None = None,
    active: int = 0,
    num_classes: int = CLASSES,
    norm: Norm = "linf",
) -> tuple[int, int, int]:
    """(forward passes, backward passes, passes of networks) per image of an attack on a kind of target, counted by
    running it; of an attack that says itself what it takes at most (`passes_at_most`), that. size: (height, width) of
    the images, or (channels, height, width). active: as in Target. UserError for settings that are not for so many
    classes."""
    classes = min(num_classes, MOST_CLASSES)
    size = size or (max(classes, CLASSES), 2)  # a row of pixels for each class
    return _count(attack.table, canonical(attack.plain()), kind, num_experts, size, active, classes, norm)


@cache
def _count(
    table: str,
    attack: str,
    kind: Kind,
    num_experts: int,
    size: tuple[int, ...],
    active: int,
    num_classes: int,
    norm: Norm,
) -> tuple[int, int, int]:
    plain = json.loads(attack)
    built = component(table, plain.pop("name"), **plain)
    told = getattr(module_of(built), "passes_at_most", None)
    if told is not None:
        return told(kind, num_experts, active, **built.args)
    threat = Threat(1 / 255, norm, seeds=(0,), class_weights=torch.ones(num_classes))
    images = torch.full((1, *size) if len(size) == 3 else (1, 3, *size), 0.5)
    height, width = size[-2:]
    labels = (torch.arange(height) % num_classes)[None, :, None].expand(1, height, width)
    model = STAND_INS[kind](num_experts, num_classes)
    if active and kind in ROUTED:
        model.top_k = active
    found = built.build(model, images, labels, threat)
    networks = model.ran if active and kind in ROUTED else found.forwards * num_experts
    return found.forwards, found.backwards, networks


def module_of(attack: Component) -> ModuleType:
    """The module that an attack of a table is in."""
    return importlib.import_module(table_of(attack.table)[attack.name].split(":")[0])
