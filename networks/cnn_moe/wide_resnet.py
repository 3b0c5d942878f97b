"""WideResNets (Zagoruyko & Komodakis 2016, arXiv 1605.07146), with pre-activation.

The shortcut of a block that changes shape takes the activated input, too."""

import torch.nn.functional as F
from torch import Tensor, nn

from networks.cnn_moe.body import Body, Stem, width
from networks.cnn_moe.moe_conv import ExpertConv

WIDTHS = (16, 32, 64)


class PreActivation(nn.Module):
    """BN, ReLU and a 3x3 convolution, twice."""

    def __init__(self, in_channels: int, channels: int, stride: int, num_experts: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = ExpertConv(in_channels, channels, 3, stride, num_experts=num_experts)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = ExpertConv(channels, channels, 3, num_experts=num_experts)
        changes = stride != 1 or in_channels != channels
        self.shortcut = (
            ExpertConv(in_channels, channels, 1, stride, num_experts=num_experts) if changes else None
        )

    def forward(self, x: Tensor, routes) -> Tensor:
        active = F.relu(self.bn1(x), inplace=True)
        inner = F.relu(self.bn2(self.conv1(active, routes)), inplace=True)
        return self.conv2(inner, routes) + (x if self.shortcut is None else self.shortcut(active, routes))


def wide_resnet(
    depth: int, widen: int, num_classes: int, ratio: float = 1.0, num_experts: int = 1, stem: str = "cifar"
) -> Body:
    """stem: see resnet."""
    channels = width(16, ratio)
    first = Stem(channels, stem, activated=stem == "imagenet")
    stages = []
    for place, base in enumerate(WIDTHS):
        inner, blocks = width(base * widen, ratio), []
        for index in range((depth - 4) // 6):
            blocks.append(PreActivation(channels, inner, 2 if place and not index else 1, num_experts))
            channels = inner
        stages.append(blocks)
    tail = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
    return Body(first, stages, tail, nn.Linear(channels, num_classes))


def wrn_28_4(num_classes: int, ratio: float = 1.0, num_experts: int = 1, stem: str = "cifar") -> Body:
    return wide_resnet(28, 4, num_classes, ratio, num_experts, stem)


def wrn_28_10(num_classes: int, ratio: float = 1.0, num_experts: int = 1, stem: str = "cifar") -> Body:
    return wide_resnet(28, 10, num_classes, ratio, num_experts, stem)


def wrn_34_10(num_classes: int, ratio: float = 1.0, num_experts: int = 1, stem: str = "cifar") -> Body:
    return wide_resnet(34, 10, num_classes, ratio, num_experts, stem)
