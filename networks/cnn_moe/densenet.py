"""DenseNet-BC (Huang et al. 2017, arXiv 1608.06993): growth 12, bottlenecks of 4, compression 0.5, 3 x 6 layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.cnn_moe.body import Body, Stem, width
from networks.cnn_moe.moe_conv import ExpertConv

GROWTH, BOTTLENECK, COMPRESSION, BLOCKS, LAYERS, FIRST = 12, 4, 0.5, 3, 6, 24


class Dense(nn.Module):
    """BN, ReLU, 1x1; BN, ReLU, 3x3 to `growth` channels that are put behind the input."""

    def __init__(self, in_channels: int, growth: int, num_experts: int):
        super().__init__()
        inner = BOTTLENECK * growth
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = ExpertConv(in_channels, inner, 1, num_experts=num_experts)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = ExpertConv(inner, growth, 3, num_experts=num_experts)

    def forward(self, x: Tensor, routes) -> Tensor:
        inner = self.conv1(F.relu(self.bn1(x), inplace=True), routes)
        return torch.cat([x, self.conv2(F.relu(self.bn2(inner), inplace=True), routes)], dim=1)


class Transition(nn.Module):
    """BN, ReLU, 1x1, average pooling by 2."""

    def __init__(self, in_channels: int, channels: int, num_experts: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = ExpertConv(in_channels, channels, 1, num_experts=num_experts)

    def forward(self, x: Tensor, routes) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x), inplace=True), routes), 2)


def densenet(num_classes: int, ratio: float = 1.0, num_experts: int = 1, stem: str = "cifar") -> Body:
    """stem: see resnet."""
    channels, growth = width(FIRST, ratio), width(GROWTH, ratio)
    first = Stem(channels, stem, activated=stem == "imagenet")
    stages = []
    for place in range(BLOCKS):
        blocks = []
        if place:
            fewer = width(channels, COMPRESSION)
            blocks.append(Transition(channels, fewer, num_experts))
            channels = fewer
        for _ in range(LAYERS):
            blocks.append(Dense(channels, growth, num_experts))
            channels += growth
        stages.append(blocks)
    tail = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
    return Body(first, stages, tail, nn.Linear(channels, num_classes))
