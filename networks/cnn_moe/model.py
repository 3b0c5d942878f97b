"""Classifiers: a plain CNN, and a mixture whose router picks one pathway through the same CNN for each image."""

import importlib
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import Positive, PositiveInt, Several, Share, UserError
from networks.cnn_moe import ARCHITECTURES, Architecture
from networks.cnn_moe.body import GRANULARITIES, Body, Granularity
from networks.cnn_moe.router import Router
from networks.cnn_moe.routes import routes_of
from networks.normalize import Normalize
from networks.routing import top1

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@dataclass(frozen=True)
class Inspection:
    """logits [B, classes]; scores [S, B, E] of the router, before softmax; routes int64 [S, B], the experts taken."""

    logits: Tensor
    scores: Tensor
    routes: Tensor


class Entry(nn.Module):
    """images [B, 1 or 3, H, W] in [0, 1] -> [B, 3, H * enlarge, W * enlarge], normalised: small or grey images become
    what a CNN takes inside the network, so that attacks change their own pixels."""

    def __init__(self, enlarge: int = 1, mean=MEAN, std=STD):
        super().__init__()
        self.enlarge, self.normalize = enlarge, Normalize(mean, std)

    def forward(self, images: Tensor) -> Tensor:
        if self.enlarge > 1:
            images = F.interpolate(images, scale_factor=self.enlarge, mode="bilinear", align_corners=False)
        return self.normalize(images.expand(-1, 3, -1, -1))


class CNN(nn.Module):
    """A plain CNN, images [B, 1 or 3, H, W] in [0, 1] -> logits [B, classes]: dense with ratio 1, slim below.

    arch: the network whose widths are scaled.
    ratio: of all widths, above 0, at most 1.
    stem: cifar, a 3x3 convolution, or imagenet, which halves the image twice.
    enlarge: whole times that images are enlarged inside the network.
    mean: of the channels, for the normalisation inside, for pixels in [0, 1].
    std: of the channels, likewise.

    UserError for numbers that make no network."""

    def __init__(
        self,
        num_classes: int,
        *,
        arch: Architecture,
        ratio: Share = 1.0,
        stem: Literal["cifar", "imagenet"] = "cifar",
        enlarge: PositiveInt = 1,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[Positive, Positive, Positive] = (0.25, 0.25, 0.25),
    ):
        super().__init__()
        self.num_classes = num_classes
        self.entry = Entry(enlarge, mean, std)
        self.body = build_body(arch, num_classes, ratio, 1, stem)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(self.entry(images))


class CNNMoE(nn.Module):
    """E pathways of width `ratio` that share stem, BatchNorm and classifier; a router picks one for each image.

    Nothing is kept in modules between calls.

    arch: the network whose widths are scaled.
    ratio: of all widths, above 0, at most 1.
    num_experts: pathways, 2 or more.
    stem: cifar, a 3x3 convolution, or imagenet, which halves the image twice.
    granularity: one choice for the model (as published), one for each stage, or one for each layer.
    top_k: 1: hard routing with a straight-through gradient; more: a weighted sum of the k best, their weights by
        softmax over them.
    router_width: times the channels of the router.
    router_pixels: shorter side of the averaged image that the router sees, at least; smaller images it sees whole.
    enlarge: whole times that images are enlarged inside the network.
    mean: of the channels, for the normalisation inside, for pixels in [0, 1].
    std: of the channels, likewise.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        arch: Architecture,
        ratio: Share = 0.5,
        num_experts: Several = 2,
        stem: Literal["cifar", "imagenet"] = "cifar",
        granularity: Granularity = "model",
        top_k: PositiveInt = 1,
        router_width: Positive = 1.0,
        router_pixels: PositiveInt = 32,
        enlarge: PositiveInt = 1,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[Positive, Positive, Positive] = (0.25, 0.25, 0.25),
    ):
        super().__init__()
        if num_experts < 2:
            raise UserError(f"network.num_experts: {num_experts} is wrong; expected 2 or more")
        if not 1 <= top_k <= num_experts:
            raise UserError(f"network.top_k: {top_k} is wrong; expected 1 to num_experts, {num_experts}")
        if granularity not in GRANULARITIES:
            allowed = ", ".join(GRANULARITIES)
            raise UserError(f"network.granularity: {granularity!r} is unknown; allowed: {allowed}")
        self.num_classes, self.num_experts, self.top_k = num_classes, num_experts, top_k
        self.entry = Entry(enlarge, mean, std)
        self.body = build_body(arch, num_classes, ratio, num_experts, stem)
        sites = self.body.set_granularity(granularity)
        self.router = Router(num_experts, sites, router_width, router_pixels)

    conditional = True  # a pass runs the pathways that its weights name, no others

    @property
    def granularity(self) -> Granularity:
        return self.body.granularity

    @property
    def routing(self) -> Literal["soft", "hard"]:
        return "hard" if self.top_k == 1 else "soft"

    def gate_logits(self, images: Tensor) -> Tensor:
        """Scores of the router [S, B, E, 1, 1, 1], before softmax."""
        return self.router(self.entry(images))[..., None, None, None]

    def route(self, gate_logits: Tensor) -> Tensor:
        """Weights of the same shape. Of top_k 1: one-hot in value (the lowest index of equals), with the gradient of
        softmax (straight-through)."""
        if self.top_k > 1:
            best = gate_logits.topk(self.top_k, dim=2)
            return torch.zeros_like(gate_logits).scatter(2, best.indices, best.values.softmax(dim=2))
        return top1(gate_logits, straight_through=True)

    def forward_given(self, images: Tensor, weights: Tensor) -> Tensor:
        """logits [B, classes] under weights [S, B, E, 1, 1, 1]; one-hot ones run one pathway for each image."""
        return self.body(self.entry(images), routes_of(weights.flatten(2)))

    def forward(self, images: Tensor) -> Tensor:
        return self.inspect(images).logits

    def inspect(self, images: Tensor) -> Inspection:
        """Everything from one pass."""
        entered = self.entry(images)
        scores = self.router(entered)
        weights = self.route(scores[..., None, None, None]).flatten(2)
        return Inspection(self.body(entered, routes_of(weights)), scores, scores.argmax(dim=2))

    def gate_and_mix(self, images: Tensor):
        """(gate logits, a function weights -> logits) of one batch."""
        return self.gate_logits(images), partial(self.forward_given, images)

    def pathway(self, expert: int) -> CNN:
        """The plain CNN that an image sees which takes this expert at all sites; a copy."""
        if not 0 <= expert < self.num_experts:
            raise UserError(f"pathway: {expert} is wrong; expected 0 to {self.num_experts - 1}")
        plain = plain_cnn(self.num_classes, deepcopy(self.entry), deepcopy(self.body))
        plain.body.set_granularity("model")
        for conv in plain.body.expert_convs():
            conv.keep_only(expert)
        return plain.train(self.training)


def plain_cnn(num_classes: int, entry: Entry, body: Body) -> CNN:
    """A CNN of these parts, none of which is made anew."""
    plain = CNN.__new__(CNN)
    nn.Module.__init__(plain)
    plain.num_classes, plain.entry, plain.body = num_classes, entry, body
    return plain


def build_body(arch: str, num_classes: int, ratio: float, num_experts: int, stem: str) -> Body:
    """By the one rule of all architectures. UserError for an unknown one, or numbers that make no network."""
    if arch not in ARCHITECTURES:
        raise UserError(f"network.arch: {arch!r} is unknown; allowed: {', '.join(ARCHITECTURES)}")
    if not 0 < ratio <= 1:
        raise UserError(f"network.ratio: {ratio} is wrong; expected above 0, at most 1")
    module, name = ARCHITECTURES[arch].split(":")
    return getattr(importlib.import_module(module), name)(num_classes, ratio, num_experts, stem)
