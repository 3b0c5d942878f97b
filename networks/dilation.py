"""Dilated depthwise convolutions, as in separable ASPP and in encoders whose last stage keeps its grid.

oneDNN makes their gradient up to twenty times slower than a pass forward, and both up to fifty times slower where the
dilation is large. The gradient of a frozen one is such a convolution itself, with the kernel turned round. And a tap
that looks further than the map is wide sees padding alone and can be left out; those that are left see a part of the
map, each a product and a sum over a slice. Where no tap but the middle one is left and there is no bias, the sums are
the same to the last bit.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST = 2  # dilation from which oneDNN's gradient is slow
LARGE = 6  # dilation from which a 3x3 may be quicker by taps
FEW = 5.5  # products of the size of the map that taps may cost, to be quicker


class DilatedDepthwise(nn.Conv2d):
    """A depthwise convolution of stride 1 and odd size whose padding keeps the grid; quick when frozen, in float32 on a
    CPU.

    While its weights are trained it is nn.Conv2d: their gradient keeps its sums."""

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] to the same shape."""
        frozen = not (self.weight.requires_grad and torch.is_grad_enabled())
        plain = images.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if not (frozen and plain and images.device.type == "cpu"):
            return super().forward(images)
        answer = Depthwise.apply(images, self.weight.detach(), self.dilation)
        return answer if self.bias is None else answer + self.bias.view(-1, 1, 1)


class Depthwise(torch.autograd.Function):
    """(images [B, C, H, W], weight [C, 1, k, k], dilation of rows and columns) -> [B, C, H, W]; no gradient of the
    weight."""

    @staticmethod
    def forward(ctx, images: Tensor, weight: Tensor, dilation: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dilation = dilation
        return convolved(images, weight, dilation)

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return convolved(slope, weight.flip(2, 3), ctx.dilation), None, None


def convolved(images: Tensor, weight: Tensor, dilation: tuple[int, int]) -> Tensor:
    """By taps where that is quicker."""
    size = images.shape[-2:]
    if weight.shape[-2:] == (3, 3) and min(dilation) >= LARGE:
        tall, wide = (edge + 2 * max(0, edge - step) for edge, step in zip(size, dilation, strict=True))
        if tall * wide <= FEW * size[0] * size[1]:
            return summed(images, weight, dilation)
    padding = [step * (edge // 2) for step, edge in zip(dilation, weight.shape[-2:], strict=True)]
    return F.conv2d(images, weight, None, 1, padding, dilation, len(weight))


def summed(images: Tensor, weight: Tensor, dilation: tuple[int, int]) -> Tensor:
    """What every tap that sees a part of the map sees there, times its weight."""
    rows, columns = (list(seen(size, step)) for size, step in zip(images.shape[-2:], dilation, strict=True))
    taps = weight[:, 0, :, :, None, None]  # [C, 3, 3, 1, 1]
    total = images * taps[:, 1, 1]
    for row, tall, high in rows:
        for column, wide, far in columns:
            if (row, column) != (1, 1):
                total[..., tall, wide].addcmul_(images[..., high, far], taps[:, row, column])
    return total


def seen(size: int, step: int) -> Iterator[tuple[int, slice, slice]]:
    """Of three taps `step` apart those that see any of `size` places: (tap, where it answers, what it sees there)."""
    yield 1, slice(None), slice(None)
    if step < size:
        yield 0, slice(step, None), slice(None, size - step)
        yield 2, slice(None, size - step), slice(step, None)


def quick_dilation(network: nn.Module) -> None:
    """Makes DilatedDepthwise of every convolution that can be one, in place; names and weights stay as they are."""
    for parent in network.modules():
        for name, conv in parent.named_children():
            if type(conv) is nn.Conv2d and is_dilated_depthwise(conv):
                setattr(parent, name, as_dilated_depthwise(conv))


def is_dilated_depthwise(conv: nn.Conv2d) -> bool:
    kept = tuple(step * (edge // 2) for step, edge in zip(conv.dilation, conv.kernel_size, strict=True))
    return (
        conv.groups == conv.in_channels == conv.out_channels > 1
        and all(edge % 2 for edge in conv.kernel_size)
        and conv.stride == (1, 1)
        and conv.padding == kept
        and min(conv.dilation) >= LEAST
        and conv.padding_mode == "zeros"
    )


def as_dilated_depthwise(conv: nn.Conv2d) -> DilatedDepthwise:
    """With the parameters of `conv` themselves."""
    made = DilatedDepthwise.__new__(DilatedDepthwise)
    made.__dict__.update(conv.__dict__)
    return made
