"""Full-resolution residual networks FRRN-A and FRRN-B, from the paper: any input size, images in [0, 1]."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.config import Positive, PositiveInt, UserError
from networks.gates import without_autocast
from networks.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from networks.resize import full_precision, pad_to, upsample

BASE_CHANNELS = 48  # of the pooling stream at full resolution
# Units and channels of each level: the encoder halves the resolution before it, the decoder doubles it.
ENCODERS = {
    "A": ((3, 96), (4, 192), (2, 384), (2, 384)),
    "B": ((3, 96), (4, 192), (2, 384), (2, 384), (2, 384)),
}
DECODERS = {"A": ((2, 192), (2, 192), (2, 96)), "B": ((2, 192), (2, 192), (2, 192), (2, 96))}
FEATURE_LEVEL = 4  # stride 16


class FRRN(nn.Module):
    """Full-resolution residual network (Pohlen et al. 2017, arXiv 1611.08323), trained from scratch.

    Every unit reads the residual stream through f x f max pooling and adds a residual to it that is constant
    on these f x f pixels. So the maximum moves by that constant, and the stream never has to be touched at
    full resolution: every level holds it as pooled to its own, next to the sum of what was added below. Same
    function, a fraction of the memory traffic.

    Args:
        num_classes: number of classes.
        variant: "A" (pooling stream down to stride 16) or "B" (down to 32).
        width: factor of the channels of the pooling stream, rounded to multiples of 8, at least 8.
        residual_channels: channels of the residual stream.
        checkpointing: keep only the inputs of the units for the backward pass and compute what is inside them
            again: less memory, about a third more time, the same gradients and BatchNorm statistics.
        mean: of the input normalisation, in units of [0, 1]; null: ImageNet's.
        std: like mean.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        variant: Literal["A", "B"] = "A",
        width: Positive = 1.0,
        residual_channels: PositiveInt = 32,
        checkpointing: bool = False,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.stride = 2 ** len(ENCODERS[variant])  # inputs are padded to multiples of it
        self.feature_channels = scaled(ENCODERS[variant][FEATURE_LEVEL - 1][1], width)
        self.normalize = Normalize(mean or IMAGENET_MEAN, std or IMAGENET_STD)
        self.encoder = Encoder(variant, width, residual_channels, checkpointing)
        self.decoder = Decoder(num_classes, variant, width, residual_channels, checkpointing)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, H, W] in [0, 1] -> logits [B, num_classes, H, W]."""
        return upsample(self.forward_features(images)[0], images.shape[-2:], self.stride)

    def forward_features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass: logits [B, num_classes, h, w] and pooling stream [B, F, h / 16, w / 16].

        h and w are the padded height and width; the pooling stream is the encoder's after its level at
        stride 16, for both variants.
        """
        state = self.encode(images)
        return self.decode(state), state.features

    def encode(self, images: torch.Tensor) -> "Encoded":
        """images [B, 3, H, W] in [0, 1] -> what a decoder needs of them, down to the deepest level.

        Raises UserError for a training batch that is a single pixel there.
        """
        padded = pad_to(self.normalize(images), self.stride)
        if self.training and padded[:, 0].numel() == self.stride**2:
            raise UserError(
                f"train.batch_size: FRRN can't be trained on a batch of 1 image of {self.stride} x {self.stride} "
                "pixels or less: BatchNorm needs at least 2 values per channel"
            )
        return self.encoder(padded)

    def decode(self, state: "Encoded") -> torch.Tensor:
        """Logits [B, num_classes, h, w] on the padded grid; the state stays as it is."""
        return self.decoder(state)


class Encoded(NamedTuple):
    """Both streams after the encoder. Level i has stride 2^i, L is the deepest one."""

    pooling: torch.Tensor  # [B, F, h / 2^L, w / 2^L]
    entered: tuple[torch.Tensor, ...]  # residual stream as it entered level 0 to L, max pooled 2^i x 2^i
    added: tuple[torch.Tensor, ...]  # what the units of level 1 to L have added to it
    features: torch.Tensor  # pooling stream after the level at stride 16


class Encoder(nn.Module):
    """Normalised images whose size fits the deepest level -> Encoded."""

    def __init__(self, variant: str, width: float, residual_channels: int, checkpointing: bool):
        super().__init__()
        self.checkpointing = checkpointing
        channels = scaled(BASE_CHANNELS, width)
        self.stem = Convolution(3, channels, 5)
        self.units = nn.ModuleList(ResidualUnit(channels, channels) for _ in range(3))
        self.split = Convolution(channels, residual_channels, 1)
        plan = [(units, scaled(level, width)) for units, level in ENCODERS[variant]]
        self.levels = levels(channels, plan, residual_channels, lambda: nn.MaxPool2d(2))
        self.apply(he_uniform)

    def forward(self, images: torch.Tensor) -> Encoded:
        pooling = F.relu(self.stem(images), inplace=True)
        for unit in self.units:
            pooling = run(unit, pooling, checkpointing=self.checkpointing)
        # Half precision is for the convolutions: the stream is a sum of many small terms.
        entered, added, outputs = [full_precision(self.split(pooling))], [], []
        residual = entered[0]
        for level in self.levels:
            entered.append(F.max_pool2d(residual, 2))
            nothing = torch.zeros_like(entered[-1])
            pooling, change = run_level(level, pooling, entered[-1], nothing, self.checkpointing)
            residual = entered[-1] + change
            added.append(change)
            outputs.append(pooling)
        return Encoded(pooling, tuple(entered), tuple(added), outputs[FEATURE_LEVEL - 1])


class Decoder(nn.Module):
    """Encoded -> logits at full resolution. Any number of decoders may share one encoder."""

    def __init__(
        self, num_classes: int, variant: str, width: float, residual_channels: int, checkpointing: bool
    ):
        super().__init__()
        self.checkpointing = checkpointing
        channels = scaled(BASE_CHANNELS, width)
        deepest = scaled(ENCODERS[variant][-1][1], width)
        plan = [(units, scaled(level, width)) for units, level in DECODERS[variant]]
        self.levels = levels(deepest, plan, residual_channels, unpool)
        self.join = Join(plan[-1][1] + residual_channels, channels)
        self.units = nn.ModuleList(ResidualUnit(channels, channels) for _ in range(2))
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.apply(he_uniform)

    def forward(self, state: Encoded) -> torch.Tensor:
        pooling, change = state.pooling, state.added[-1]
        for level, entered, before in zip(
            self.levels, state.entered[-2:0:-1], state.added[-2::-1], strict=True
        ):
            change = before + doubled(change)
            pooling, change = run_level(level, pooling, entered, change, self.checkpointing)
        residual = state.entered[0] + doubled(change)
        pooling = run(self.join, pooling, residual, checkpointing=self.checkpointing)
        for unit in self.units:
            pooling = run(unit, pooling, checkpointing=self.checkpointing)
        with without_autocast(pooling):  # bfloat16 logits tie
            return self.classifier(full_precision(pooling))


class Convolution(nn.Module):
    """k x k convolution without bias, then BatchNorm; in evaluation mode the two are one convolution."""

    def __init__(self, in_channels: int, channels: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.training:
            return self.norm(self.conv(features))
        scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
        shift = self.norm.bias - self.norm.running_mean * scale
        weight = self.conv.weight * scale.view(-1, 1, 1, 1)
        return F.conv2d(features, weight, shift, padding=self.conv.padding)


class ResidualUnit(nn.Module):
    """RU of the paper, without a ReLU after the addition; a bare 1x1 convolution where the channels change."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.first = Convolution(in_channels, channels, 3)
        self.second = Convolution(channels, channels, 3)
        same = in_channels == channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        change = self.second(F.relu(self.first(features), inplace=True))
        return change.add_(self.skip(features))  # a map less at full resolution


class FullResolutionUnit(nn.Module):
    """FRRU of the paper at the resolution of its level; `resize` brings the pooling stream there."""

    def __init__(self, in_channels: int, channels: int, residual_channels: int, resize: nn.Module):
        super().__init__()
        self.resize = resize
        self.first = Convolution(in_channels + residual_channels, channels, 3)
        self.second = Convolution(channels, channels, 3)
        self.residual = nn.Conv2d(channels, residual_channels, 1)

    def forward(self, pooling: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(pooling stream after the unit, what it adds to the residual stream)"""
        both = torch.cat([self.resize(pooling), residual.to(pooling.dtype)], dim=1)
        pooling = F.relu(self.second(F.relu(self.first(both), inplace=True)), inplace=True)
        return pooling, self.residual(pooling)


class Join(nn.Module):
    """Both streams at full resolution, and the first RU on them."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.resize = unpool()
        self.unit = ResidualUnit(in_channels, channels)

    def forward(self, pooling: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.unit(torch.cat([self.resize(pooling), residual.to(pooling.dtype)], dim=1))


def levels(
    in_channels: int, plan: list[tuple[int, int]], residual_channels: int, resize: Callable[[], nn.Module]
) -> nn.ModuleList:
    """One list of units per level; the first unit of each begins with `resize`."""
    found = nn.ModuleList()
    for units, channels in plan:
        first = FullResolutionUnit(in_channels, channels, residual_channels, resize())
        others = [
            FullResolutionUnit(channels, channels, residual_channels, nn.Identity()) for _ in range(units - 1)
        ]
        found.append(nn.ModuleList([first, *others]))
        in_channels = channels
    return found


def run_level(
    level: nn.ModuleList,
    pooling: torch.Tensor,
    entered: torch.Tensor,
    added: torch.Tensor,
    checkpointing: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(pooling stream, sum of what was added to the residual stream since it entered this level)"""
    for unit in level:
        pooling, residual = run(unit, pooling, entered + added, checkpointing=checkpointing)
        added = added + residual
    return pooling, added


def run(unit: nn.Module, *streams: torch.Tensor, checkpointing: bool):
    """unit(*streams), on request without keeping what is inside for the backward pass."""
    if not (checkpointing and streams[0].requires_grad):
        return unit(*streams)
    return checkpoint(
        unit,
        *streams,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing is random in a unit
        context_fn=lambda: (nullcontext(), statistics_left_alone(unit)),
    )


@contextmanager
def statistics_left_alone(unit: nn.Module) -> Iterator[None]:
    """A second pass over the same batch updates copies of BatchNorm's statistics, which are then forgotten."""
    kept = [
        (module, name, buffer)
        for module in unit.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in kept:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in kept:
            setattr(module, name, buffer)


def scaled(channels: int, width: float) -> int:
    return max(8, 8 * round(channels * width / 8))


def unpool() -> nn.Module:
    return nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)


def doubled(residual: torch.Tensor) -> torch.Tensor:
    return F.interpolate(residual, scale_factor=2, mode="nearest")


def he_uniform(module: nn.Module) -> None:
    """He et al. 2015, as the authors' code has it; biases start at 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
