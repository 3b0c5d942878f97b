"""The router: a small ResNet that looks at the image and scores the experts of every routing site."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.pooling import every, global_mean

WIDTHS, BLOCKS = (16, 32, 64), 3  # the CIFAR ResNet-20 of He et al. 2016, section 4.2
GROUPS = 8  # of channels that are normalised together, at most


def norm(channels: int) -> nn.GroupNorm:
    """GroupNorm, not BatchNorm: with statistics of the batch a router that divides its batches evenly in training
    sends all images to one expert in evaluation, and an image's route depends on its neighbours."""
    return nn.GroupNorm(math.gcd(channels, GROUPS), channels)


class Block(nn.Module):
    """Two 3x3 convolutions; where the shape changes the shortcut skips pixels and adds empty channels (option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = norm(channels)
        self.stride, self.added = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True)))
        x = every(x, self.stride)
        if self.added:
            x = F.pad(x, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        return F.relu(inner + x, inplace=True)


class Router(nn.Module):
    """images [B, 3, H, W], normalised, of any size -> scores [S, B, E] in float32, before softmax.

    Larger images are averaged down by a whole number first, to a shorter side of `pixels` or more, less than twice as
    many. width: times the channels of its ResNet-20. bound: scores stay within (-bound, bound), by a tanh: an unbounded
    gap is what makes softmax underflow and attacks on it stop.
    """

    def __init__(
        self, num_experts: int, sites: int = 1, width: float = 1.0, pixels: int = 32, bound: float = 15.0
    ):
        super().__init__()
        channels = [max(1, int(base * width)) for base in WIDTHS]
        self.num_experts, self.sites, self.pixels, self.bound = num_experts, sites, pixels, bound
        self.conv = nn.Conv2d(3, channels[0], 3, 1, 1, bias=False)
        self.norm = norm(channels[0])
        blocks, before = [], channels[0]
        for place, own in enumerate(channels):
            for index in range(BLOCKS):
                blocks.append(Block(before, own, 2 if place and not index else 1))
                before = own
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, sites * num_experts)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(before))
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        with torch.autocast(images.device.type, enabled=False):
            scores = F.linear(features, self.head.weight.float(), self.head.bias.float())
            scores = self.bound * torch.tanh(scores / self.bound)
        return scores.view(len(images), self.sites, self.num_experts).transpose(0, 1)

    def features(self, images: Tensor) -> Tensor:
        """What the scores are linear in, float32 [B, F]."""
        scale = min(images.shape[-2:]) // self.pixels
        images = F.avg_pool2d(images, scale) if scale > 1 else images
        return global_mean(self.blocks(F.relu(self.norm(self.conv(images)), inplace=True))).float()

    @torch.no_grad()
    def balance(self, batches: Iterable[Tensor]) -> None:
        """Sets the scores' bias and scale so that on these images [B, 3, H, W] (normalised) each expert's scores have
        mean 0 and a spread of 1: an untrained router sends nearly all images to one."""
        self.head.bias.zero_()
        raw = torch.cat([self.features(images) @ self.head.weight.T for images in batches])
        spread = raw.std(dim=0).clamp_min(1e-6)
        self.head.weight.div_(spread[:, None])
        self.head.bias.copy_(-(raw / spread).mean(dim=0))
