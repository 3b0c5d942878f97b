"""What all CNNs have in common: a stem, stages of blocks whose convolutions have experts, a pooling, a classifier."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import UserError
from networks.cnn_moe.moe_conv import ExpertConv
from networks.cnn_moe.routes import Route
from networks.pooling import global_mean

Granularity = Literal["model", "stage", "layer"]
GRANULARITIES = get_args(Granularity)
STEMS = ("cifar", "imagenet")


def width(channels: int, ratio: float) -> int:
    """Channels times a ratio, at least 1; what is behind the point is cut off, as published."""
    return max(1, int(channels * ratio + 1e-9))


class Stem(nn.Module):
    """The first convolution, which all images share: 3x3 (cifar), or 7x7 with stride 2 and a 3x3 pooling (imagenet).

    activated: BN and ReLU follow at once; networks with pre-activation have theirs in the first block."""

    def __init__(self, channels: int, stem: str, activated: bool = True):
        super().__init__()
        if stem not in STEMS:
            raise UserError(f"stem: {stem!r} is unknown; allowed: {', '.join(STEMS)}")
        self.large = stem == "imagenet"
        self.conv = ExpertConv(3, channels, 7 if self.large else 3, 2 if self.large else 1)
        self.bn = nn.BatchNorm2d(channels) if activated else None

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images)
        features = features if self.bn is None else F.relu(self.bn(features), inplace=True)
        return F.max_pool2d(features, 3, 2, 1) if self.large else features


class Body(nn.Module):
    """images [B, 3, H, W], normalised, and a route per site -> logits [B, classes].

    stages: lists of blocks, each (x, routes) -> x. tail: what follows the last stage. grid: edge of the map that the
    classifier reads. Expert convolutions of a stage or layer get their site by `set_granularity`."""

    def __init__(
        self, stem: nn.Module, stages: Sequence[Sequence[nn.Module]], tail: nn.Module, head: nn.Module, grid: int = 1
    ):  # fmt: skip
        super().__init__()
        self.stem, self.tail, self.head, self.grid = stem, tail, head, grid
        self.stages = nn.ModuleList(nn.ModuleList(blocks) for blocks in stages)
        self.granularity: Granularity = "model"
        *hidden, last = [module for module in head.modules() if isinstance(module, nn.Linear)]
        for module in hidden:
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
        nn.init.normal_(last.weight, std=0.01)
        nn.init.zeros_(last.bias)

    @property
    def num_experts(self) -> int:
        return max(conv.num_experts for conv in self.expert_convs())

    def expert_convs(self) -> list[ExpertConv]:
        """Those of the stages, in the order in which they were made."""
        return [module for module in self.stages.modules() if isinstance(module, ExpertConv)]

    def set_granularity(self, granularity: Granularity) -> int:
        """Routes for the whole model, for each stage, or for each convolution; returns how many sites there are."""
        self.granularity = granularity
        if granularity == "layer":
            for site, conv in enumerate(self.expert_convs()):
                conv.site = site
            return len(self.expert_convs())
        for site, stage in enumerate(self.stages):
            for module in stage.modules():
                if isinstance(module, ExpertConv):
                    module.site = site if granularity == "stage" else 0
        return len(self.stages) if granularity == "stage" else 1

    def forward(self, images: Tensor, routes: Sequence[Route] | None = None) -> Tensor:
        """The batch is sorted by expert once (model), or once a stage; a layer with a route of its own sorts for
        itself. The answer is in the order of the images."""
        if routes is None or self.granularity == "layer":
            return self.classify(self.run(self.stem(images), routes, self.stages))
        features, inside = self.stem(images), [route.sorted() for route in routes]
        if self.granularity == "model" and routes[0].one_hot and not self.training:
            # norms keep to each image then, so that the images of each expert go through on their own
            parts = routes[0].apart(routes[0].sort(features))
            logits = [self.classify(self.run(part, [own], self.stages)) for part, own in parts]
            return routes[0].unsort(torch.cat(logits))
        if self.granularity == "model":
            features = self.run(routes[0].sort(features), inside, self.stages)
            return routes[0].unsort(self.classify(features))
        for stage, route in zip(self.stages, routes, strict=True):
            features = route.unsort(self.run(route.sort(features), inside, [stage]))
        return self.classify(features)

    def run(self, features: Tensor, routes, stages) -> Tensor:
        for stage in stages:
            for block in stage:
                features = block(features, routes)
        return features

    def classify(self, features: Tensor) -> Tensor:
        features = self.tail(features)
        pooled = (
            global_mean(features) if self.grid == 1 else F.adaptive_avg_pool2d(features, self.grid).flatten(1)
        )
        return self.head(pooled)
