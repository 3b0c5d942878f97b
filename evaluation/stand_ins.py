"""Networks that stand in for a target while an attack's passes are counted: one of each kind, never wrong.

They offer what the protocol of targets asks for and nothing else, so they show it as well.
"""

import json
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from attacks.threat import Threat
from engine.config import Component, component
from evaluation.ledger import canonical
from evaluation.targets import Kind

CLASSES = 40
SIZE = (CLASSES, 2)  # a row of pixels for each class


class Sure:
    """A single network: each row of pixels is of a class of its own, and it can't be told otherwise."""

    def __call__(self, images: Tensor) -> Tensor:
        rows = torch.arange(images.shape[2]) % CLASSES
        right = torch.nn.functional.one_hot(rows, CLASSES).T[None, :, :, None].to(images)
        slope = torch.linspace(-1, 1, CLASSES)[None, :, None, None].to(images)
        return 10 * right + slope * images.mean(dim=1, keepdim=True)


class SureEnsemble:
    """Several of them."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def __call__(self, images: Tensor) -> Tensor:
        return self.combine(self.expert_logits(images))

    def expert_logits(self, images: Tensor) -> Tensor:
        """[B, E, K, H, W]"""
        return Sure()(images)[:, None].expand(-1, self.num_experts, -1, -1, -1)

    def combine(self, expert_logits: Tensor) -> Tensor:
        return expert_logits.mean(dim=1)


class SureMixture:
    """A routed model whose gate can't be told otherwise, either."""

    def __init__(self, num_experts: int, routing: str):
        self.num_experts, self.routing = num_experts, routing

    def __call__(self, images: Tensor) -> Tensor:
        return self.forward_given(images, self.route(self.gate_logits(images)))

    def gate_logits(self, images: Tensor) -> Tensor:
        """[1, B, E, 1, 1, 1]"""
        liking = 10.0 * torch.arange(self.num_experts).to(images)
        change = images.mean(dim=(1, 2, 3))[:, None] * torch.linspace(-1, 1, self.num_experts).to(images)
        return (liking + change)[None, :, :, None, None, None]

    def route(self, gate_logits: Tensor) -> Tensor:
        if self.routing == "soft":
            return gate_logits.softmax(dim=2)
        best = gate_logits.argmax(dim=2, keepdim=True)
        return torch.zeros_like(gate_logits).scatter(2, best, 1.0)

    def forward_given(self, images: Tensor, weights: Tensor) -> Tensor:
        weights = weights.reshape(weights.shape[-5:])  # [B, E, K, h, w]
        return (Sure()(images)[:, None] * weights).sum(dim=1)

    def gate_and_mix(self, images: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return self.gate_logits(images), partial(self.forward_given, images)


STAND_INS: dict[Kind, Callable] = {
    "single": lambda num_experts: Sure(),
    "ensemble": SureEnsemble,
    "soft": partial(SureMixture, routing="soft"),
    "hard": partial(SureMixture, routing="hard"),
}


def count_passes(
    attack: Component, kind: Kind, num_experts: int, size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """(forward, backward) passes per image of an attack on a kind of target, counted by running it."""
    return _count(attack.table, canonical(attack.plain()), kind, num_experts, size or SIZE)


@cache
def _count(table: str, attack: str, kind: Kind, num_experts: int, size: tuple[int, int]) -> tuple[int, int]:
    plain = json.loads(attack)
    built = component(table, plain.pop("name"), **plain)
    threat = Threat(1 / 255, seeds=(0,), class_weights=torch.ones(CLASSES))
    images = torch.full((1, 3, *size), 0.5)
    labels = (torch.arange(size[0]) % CLASSES)[None, :, None].expand(1, *size)
    found = built.build(STAND_INS[kind](num_experts), images, labels, threat)
    return found.forwards, found.backwards
