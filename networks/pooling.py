"""Means and steps over a map whose gradients keep its memory layout.

Those of `mean` and of slices are NCHW whatever the layout of the features, and drag all that they meet on to the first
block (ReLU, BatchNorm, the sums of skip connections) down the slow path of mixed layouts.
"""

import torch.nn.functional as F
from torch import Tensor


def global_mean(features: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C]."""
    return F.avg_pool2d(features, features.shape[-2:]).flatten(1)


def every(features: Tensor, stride: int) -> Tensor:
    """features[:, :, ::stride, ::stride]."""
    return features if stride == 1 else F.avg_pool2d(features, 1, stride)
