"""A gate that looks at places: a logit per expert for each place of what it reads."""

import torch
import torch.nn.functional as F
from torch import nn

from engine.config import PositiveInt
from networks.gates import without_autocast
from networks.resize import full_precision


class SpatialGate(nn.Module):
    """A weight per image, place and expert: on the grid of what it reads, spread to the experts' logits.

    Two 3x3 convolutions with ReLU and a 1x1 convolution, over any grid. It starts with nearly equal weights.

    Args:
        in_channels: channels of what it reads, of all experts together.
        num_experts: number of experts.
        num_classes: number of classes, used with per_class.
        width: channels of the two 3x3 convolutions.
        per_class: a weight for each class as well, from the same two convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        num_classes: int,
        *,
        width: PositiveInt = 32,
        per_class: bool = False,
    ):
        super().__init__()
        self.num_experts = num_experts
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1)
        self.context = nn.Conv2d(width, width, 3, padding=1)
        self.expert_conv = nn.Conv2d(width, num_experts * (num_classes if per_class else 1), 1)
        for conv in (self.conv, self.context):
            nn.init.constant_(conv.bias, 0.5)  # as in the class-wise gate: none is dead from the start
        nn.init.normal_(self.expert_conv.weight, std=0.05)
        nn.init.zeros_(self.expert_conv.bias)

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """List of [B, F, h, w] -> gate logits [B, E, K, h, w] in float32, before softmax; K = 1 or classes."""
        first = F.relu(self.conv(torch.cat(inputs, dim=1)))
        with without_autocast(first):
            logits = self.expert_conv(F.relu(self.context(full_precision(first))))
        return logits.unflatten(1, (self.num_experts, -1))

    def dead_share(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """1 for images on which one of the two ReLU layers is zero everywhere, else 0: [B].

        The gate gives the same weights to all places that are far enough from the border.
        """
        first = F.relu(self.conv(torch.cat(inputs, dim=1)))
        with without_autocast(first):
            second = F.relu(self.context(full_precision(first)))
        alive = [(layer.amax((1, 2, 3)) > 0) for layer in (first, second)]
        return 1 - (alive[0] & alive[1]).float()
