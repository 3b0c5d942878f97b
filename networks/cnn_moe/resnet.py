"""ResNet-18 to -152 (He et al. 2016, arXiv 1512.03385): widths times a ratio, convolutions of blocks of E experts."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from networks.cnn_moe.body import Body, Stem, width
from networks.cnn_moe.moe_conv import ExpertConv

WIDTHS = (64, 128, 256, 512)


class Basic(nn.Module):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, num_experts: int):
        super().__init__()
        self.conv1 = ExpertConv(in_channels, channels, 3, stride, num_experts=num_experts)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = ExpertConv(channels, channels, 3, num_experts=num_experts)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = Shortcut(in_channels, channels, stride, num_experts)

    def forward(self, x: Tensor, routes) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x, routes)), inplace=True)
        return F.relu(self.bn2(self.conv2(inner, routes)) + self.shortcut(x, routes), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 to four times the channels."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, num_experts: int):
        super().__init__()
        out = channels * self.expansion
        self.conv1 = ExpertConv(in_channels, channels, 1, num_experts=num_experts)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = ExpertConv(channels, channels, 3, stride, num_experts=num_experts)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = ExpertConv(channels, out, 1, num_experts=num_experts)
        self.bn3 = nn.BatchNorm2d(out)
        self.shortcut = Shortcut(in_channels, out, stride, num_experts)

    def forward(self, x: Tensor, routes) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x, routes)), inplace=True)
        inner = F.relu(self.bn2(self.conv2(inner, routes)), inplace=True)
        return F.relu(self.bn3(self.conv3(inner, routes)) + self.shortcut(x, routes), inplace=True)


class Shortcut(nn.Module):
    """The identity, or a 1x1 convolution where shapes differ."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, num_experts: int):
        super().__init__()
        self.conv = self.bn = None
        if stride != 1 or in_channels != out_channels:
            self.conv = ExpertConv(in_channels, out_channels, 1, stride, num_experts=num_experts)
            self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor, routes) -> Tensor:
        return x if self.conv is None else self.bn(self.conv(x, routes))


def resnet(
    block: type,
    counts: Sequence[int],
    num_classes: int,
    ratio: float = 1.0,
    num_experts: int = 1,
    stem: str = "cifar",
) -> Body:
    """stem: cifar (3x3) or imagenet (7x7 with stride 2, then a pooling)."""
    channels = width(WIDTHS[0], ratio)
    first = Stem(channels, stem)
    stages = []
    for place, (base, count) in enumerate(zip(WIDTHS, counts, strict=True)):
        inner, blocks = width(base, ratio), []
        for index in range(count):
            stride = 2 if place and not index else 1
            blocks.append(block(channels, inner, stride, num_experts))
            channels = inner * block.expansion
        stages.append(blocks)
    return Body(first, stages, nn.Identity(), nn.Linear(channels, num_classes))


def resnet18(num_classes: int, ratio: float = 1.0, num_experts: int = 1, stem: str = "cifar") -> Body:
    return resnet(Basic, (2, 2, 2, 2), num_classes, ratio, num_experts, stem)


def resnet34(num_classes: int, ratio: float = 1.0, num_experts: int = 1, stem: str = "cifar") -> Body:
    return resnet(Basic, (3, 4, 6, 3), num_classes, ratio, num_experts, stem)


def resnet50(num_classes: int, ratio: float = 1.0, num_experts: int = 1, stem: str = "cifar") -> Body:
    return resnet(Bottleneck, (3, 4, 6, 3), num_classes, ratio, num_experts, stem)


def resnet101(num_classes: int, ratio: float = 1.0, num_experts: int = 1, stem: str = "cifar") -> Body:
    return resnet(Bottleneck, (3, 4, 23, 3), num_classes, ratio, num_experts, stem)


def resnet152(num_classes: int, ratio: float = 1.0, num_experts: int = 1, stem: str = "cifar") -> Body:
    return resnet(Bottleneck, (3, 8, 36, 3), num_classes, ratio, num_experts, stem)
