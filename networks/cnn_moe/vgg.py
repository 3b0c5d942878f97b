"""VGG-16 (Simonyan & Zisserman 2015, arXiv 1409.1556) with a small classifier, with and without BatchNorm."""

import torch.nn.functional as F
from torch import Tensor, nn

from networks.cnn_moe.body import Body, width
from networks.cnn_moe.moe_conv import ExpertConv

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
GRID = 2  # the last map is pooled to it
HIDDEN = 256


class Layer(nn.Module):
    """3x3 convolution, BatchNorm or a bias, ReLU; pooled before, where a stage begins."""

    def __init__(self, in_channels: int, channels: int, num_experts: int, norm: bool, pool: bool):
        super().__init__()
        self.pool = pool
        self.conv = ExpertConv(in_channels, channels, 3, num_experts=num_experts, bias=not norm)
        self.bn = nn.BatchNorm2d(channels) if norm else nn.Identity()

    def forward(self, x: Tensor, routes) -> Tensor:
        x = F.max_pool2d(x, 2) if self.pool else x
        return F.relu(self.bn(self.conv(x, routes)))


class First(nn.Module):
    """The first convolution, which all images share; the imagenet stem pools behind it."""

    def __init__(self, channels: int, norm: bool, stem: str):
        super().__init__()
        self.halve = stem == "imagenet"
        self.layer = Layer(3, channels, 1, norm, pool=False)

    def forward(self, images: Tensor) -> Tensor:
        features = self.layer(images, None)
        return F.max_pool2d(features, 2) if self.halve else features


def vgg(norm: bool, num_classes: int, ratio: float = 1.0, num_experts: int = 1, stem: str = "cifar") -> Body:
    """stem: cifar, or imagenet, which pools once more after the first convolution."""
    channels = width(STAGES[0][0], ratio)
    first = First(channels, norm, stem)
    stages = []
    for place, widths in enumerate(STAGES):
        blocks = []
        for index, base in enumerate(widths):
            if place or index:
                inner = width(base, ratio)
                blocks.append(Layer(channels, inner, num_experts, norm, pool=bool(place) and not index))
                channels = inner
        stages.append(blocks)
    head = nn.Sequential(
        nn.Linear(channels * GRID**2, HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, num_classes),
    )  # fmt: skip
    return Body(first, stages, nn.Identity(), head, grid=GRID)


def vgg16(num_classes: int, ratio: float = 1.0, num_experts: int = 1, stem: str = "cifar") -> Body:
    return vgg(False, num_classes, ratio, num_experts, stem)


def vgg16_bn(num_classes: int, ratio: float = 1.0, num_experts: int = 1, stem: str = "cifar") -> Body:
    return vgg(True, num_classes, ratio, num_experts, stem)
