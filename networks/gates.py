"""Gates: from the experts' features to a logit per expert, for an image or for each of its classes."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from engine.config import PositiveInt, Size
from networks.resize import full_precision


class ClasswiseGate(nn.Module):
    """One gate per class, all computed at once: a weight per image, class and expert.

    Each gate is a 3x3 convolution of the concatenated expert features, ReLU, average pooling to a fixed grid
    (so that any input size fits), a hidden layer with ReLU, and a logit per expert. With width 1 and the grid
    of the features it is the published gate (Pavlitskaya et al. 2020, "Using mixture of expert models to gain
    insights into semantic segmentation"). It starts with nearly equal weights.

    Args:
        in_channels: feature channels of all experts together.
        num_experts: number of experts.
        num_classes: number of classes.
        width: channels of the convolution; a gate of width 1, as published, can die.
        grid: rows and columns of the pooled features.
        hidden: units of the hidden layer.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        num_classes: int,
        *,
        width: PositiveInt = 16,
        grid: Size = (8, 8),
        hidden: PositiveInt = 128,
    ):
        super().__init__()
        self.grid = tuple(grid)
        self.conv = nn.Conv2d(in_channels, num_classes * width, 3, padding=1)
        # above the spread that random weights give to a channel's mean: none is dead from the start
        nn.init.constant_(self.conv.bias, 0.5)
        inputs = width * self.grid[0] * self.grid[1]
        bound = inputs**-0.5  # as nn.Linear
        self.hidden_weight = nn.Parameter(torch.empty(num_classes, inputs, hidden).uniform_(-bound, bound))
        self.hidden_bias = nn.Parameter(torch.empty(num_classes, hidden).uniform_(-bound, bound))
        # nearly equal weights at first; smaller still, class-wise gates hardly start to learn in 60 steps
        self.expert_weight = nn.Parameter(torch.empty(num_classes, hidden, num_experts).normal_(std=0.1))
        self.expert_bias = nn.Parameter(torch.zeros(num_classes, num_experts))

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """One [B, F, h, w] per expert -> gate logits [B, E, K, 1, 1] in float32, before softmax.

        K is the number of classes, 1 in a simple gate.
        """
        activations = F.relu(self.conv(torch.cat(features, dim=1)))  # [B, K * width, h, w]
        with without_autocast(activations):
            pooled = pool_to_grid(full_precision(activations), self.grid)
            pooled = pooled.reshape(len(pooled), len(self.hidden_bias), -1)  # [B, K, width * rows * columns]
            hidden = F.relu(torch.einsum("bki,kih->bkh", pooled, self.hidden_weight) + self.hidden_bias)
            logits = torch.einsum("bkh,khe->bek", hidden, self.expert_weight) + self.expert_bias.T
        return logits[..., None, None]

    def dead_share(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Share [B] of the gates (0 or 1 for a simple gate) that are zero everywhere after ReLU, by image.

        A gate gives the same weights to all images that it is dead for.
        """
        alive = F.relu(self.conv(torch.cat(features, dim=1))).amax((2, 3)) > 0  # [B, K * width]
        return 1 - alive.reshape(len(alive), len(self.hidden_bias), -1).any(dim=2).float().mean(dim=1)


class SimpleGate(ClasswiseGate):
    """One weight per image and expert: the class-wise gate with a single gate for all classes.

    Args:
        in_channels: feature channels of all experts together.
        num_experts: number of experts.
        num_classes: not used, all classes share a weight.
        width: channels of the convolution; a gate of width 1, as published, can die.
        grid: rows and columns of the pooled features.
        hidden: units of the hidden layer.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        num_classes: int,
        *,
        width: PositiveInt = 16,
        grid: Size = (8, 8),
        hidden: PositiveInt = 128,
    ):
        super().__init__(in_channels, num_experts, 1, width=width, grid=grid, hidden=hidden)


class UniformGate(nn.Module):
    """Equal weights and nothing to learn: the control for gates, and for one network with a convolution."""

    def __init__(self, in_channels: int, num_experts: int, num_classes: int):
        super().__init__()
        self.num_experts = num_experts

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Gate logits [B, E, 1, 1, 1], all zero."""
        return features[0].new_zeros(len(features[0]), self.num_experts, 1, 1, 1, dtype=torch.float32)

    def dead_share(self, features: list[torch.Tensor]) -> torch.Tensor:
        """No gate, none dead: zeros [B]."""
        return features[0].new_zeros(len(features[0]), dtype=torch.float32)


def pool_to_grid(features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """adaptive_avg_pool2d as two matrix products, whose backward pass is deterministic on CUDA too."""
    rows = bin_means(features.shape[-2], grid[0]).to(features)
    columns = bin_means(features.shape[-1], grid[1]).to(features)
    return rows @ features @ columns.T


def bin_means(size: int, bins: int) -> torch.Tensor:
    """Matrix [bins, size]; row i is the mean over [floor(i * size / bins), ceil((i + 1) * size / bins))."""
    index = torch.arange(bins)
    start, stop = index * size // bins, -(-(index + 1) * size // bins)
    pixel = torch.arange(size)
    inside = (pixel >= start[:, None]) & (pixel < stop[:, None])
    return inside / inside.sum(dim=1, keepdim=True)


def without_autocast(tensor: torch.Tensor):
    """Context in which operations keep float32, whatever precision training runs in."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
