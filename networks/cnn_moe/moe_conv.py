"""A convolution of E experts of which each image runs one: the cost of one, whatever E."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.cnn_moe.routes import Route
from networks.pooling import every


class TimesOne(torch.autograd.Function):
    """Answers [B, C, H, W] times weights [B] that are all exactly 1: the answers themselves, and the weights' gradient
    without the two products."""

    @staticmethod
    def forward(ctx, answers: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(answers)
        ctx.dtype = weights.dtype
        return answers.view_as(answers)

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, Tensor]:
        (answers,) = ctx.saved_tensors
        return slope, (slope * answers).sum(dim=(1, 2, 3), dtype=ctx.dtype)


class Chunks(torch.autograd.Function):
    """`count` equal parts of a weight along its first dimension. Experts that nobody asked have a gradient of 0, in the
    layout of the weight: `chunk` makes it NCHW, and joining mixed layouts is slow."""

    @staticmethod
    def forward(ctx, weight: Tensor, count: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight)
        return weight.chunk(count)

    @staticmethod
    def backward(ctx, *slopes: Tensor | None) -> tuple[Tensor, None]:
        whole = torch.empty_like(ctx.saved_tensors[0])
        for part, slope in zip(whole.chunk(len(slopes)), slopes, strict=True):
            part.zero_() if slope is None else part.copy_(slope)
        return whole, None


class ExpertConv(nn.Module):
    """A convolution with a weight of its own for each expert; num_experts 1 is a plain one.

    Expert e owns output channels [e * out, (e + 1) * out) of `weight` [E * out, in, k, k], initialised for itself
    (Kaiming normal, fan out). It has no state beside its parameters: the route is an argument.
    `site`: which of a network's routes it takes.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, *, num_experts: int = 1,
        bias: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels, self.num_experts = in_channels, out_channels, num_experts
        self.kernel_size, self.stride, self.padding, self.site = kernel_size, stride, kernel_size // 2, 0
        shape = (num_experts * out_channels, in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(num_experts * out_channels)) if bias else None
        nn.init.normal_(self.weight, std=math.sqrt(2 / (out_channels * kernel_size**2)))

    def forward(self, images: Tensor, routes: "list[Route] | None" = None) -> Tensor:
        """images [B, in, H, W] in the order of the route, unless it sorts by itself; to [B, out, H', W']."""
        if self.num_experts == 1:
            return self.convolve(images, self.weight, self.bias)
        route = routes[self.site]
        images, own = route.sort(images), self.experts()
        if route.one_hot:
            parts = zip(route.split(images), route.shares, strict=True)
            answers = [self.convolve(part, *own(share.expert)) for part, share in parts]
            answer = torch.cat(answers) if len(answers) > 1 else answers[0]
            if route.shares[0].weight is not None:
                answer = TimesOne.apply(answer, torch.cat([share.weight for share in route.shares]))
            return route.unsort(answer)
        mixed = None
        for share in route.shares:
            answer = self.convolve(images[share.rows], *own(share.expert))
            if share.weight is not None:
                answer = answer * share.weight.to(answer.dtype).view(-1, 1, 1, 1)
            mixed = answer.new_zeros(len(images), *answer.shape[1:]) if mixed is None else mixed
            mixed = mixed.index_add(0, share.rows, answer)
        return mixed

    def experts(self) -> Callable[[int], tuple[Tensor, Tensor | None]]:
        """expert -> its (weight, bias)."""
        if torch.is_grad_enabled() and self.weight.requires_grad:
            weights = Chunks.apply(self.weight, self.num_experts)
        else:
            weights = self.weight.view(self.num_experts, -1, *self.weight.shape[1:])
        biases = [None] * self.num_experts if self.bias is None else self.bias.chunk(self.num_experts)
        return lambda expert: (weights[expert], biases[expert])

    def convolve(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.kernel_size == 1 and self.stride > 1:
            # The same sums over the pixels that it sees: oneDNN 3.13 (torch 2.15) writes beyond its memory in the
            # weights' gradient of a strided 1x1 of fewer than 16 channels (channels_last, AVX-512, several threads).
            return F.conv2d(every(images, self.stride), weight, bias)
        return F.conv2d(images, weight, bias, self.stride, self.padding)

    def keep_only(self, expert: int) -> None:
        """Becomes the plain convolution of one of its experts."""
        self.weight = nn.Parameter(self.weight.detach().chunk(self.num_experts)[expert].clone())
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.detach().chunk(self.num_experts)[expert].clone())
        self.num_experts = 1

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, stride={self.stride}, num_experts={self.num_experts}"
        )
