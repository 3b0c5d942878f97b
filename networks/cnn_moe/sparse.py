"""The structured-sparse baseline: a dense CNN that learns which filters to keep, the same share in every layer.

Scores choose the filters, with a straight-through gradient (edge-popup: Ramanujan et al. 2020, arXiv 1911.13299; HYDRA:
Sehwag et al. 2020, arXiv 2002.10509), here one score for a whole filter instead of one for each weight."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from engine.config import Positive, PositiveInt, Share, UserError
from networks.cnn_moe import Architecture
from networks.cnn_moe.body import Body
from networks.cnn_moe.densenet import Dense, Transition
from networks.cnn_moe.model import CNN, Entry, build_body, plain_cnn
from networks.cnn_moe.moe_conv import ExpertConv
from networks.cnn_moe.resnet import Basic, Bottleneck
from networks.cnn_moe.vgg import Layer
from networks.cnn_moe.wide_resnet import PreActivation

# What stands along a dimension of a tensor: (number of a prunable convolution, its filters), or (None, channels that
# always stay), one behind the other. Nothing: all of them always stay.
Channels = tuple[tuple[int | None, int], ...]


@dataclass(frozen=True)
class Cut:
    """A tensor of the body that has a place for each of `channels` along `dim`, `places` in a row for each.

    gate: forward multiplies the tensor by their masks there; elsewhere a pruned channel is stopped by another one."""

    tensor: str
    dim: int
    channels: Channels
    gate: bool
    places: int = 1


@dataclass(frozen=True)
class Wiring:
    """cuts: all tensors that lose something where filters go. sums: the modules (convolution or norm) whose output is
    added to others, so that only they may have fewer channels, each with the number of its convolution."""

    cuts: tuple[Cut, ...]
    sums: dict[str, int]


class SparseCNN(nn.Module):
    """A CNN that keeps a share of the filters of each convolution, images [B, 1 or 3, H, W] in [0, 1] -> logits
    [B, classes].

    The stem keeps all its filters. A pruned filter says nothing to what follows, its norm's bias included: its channel
    is multiplied by 0 where it is read, behind norm and ReLU, or, where it goes into a sum, behind the norm. This is
    done in the weights there, which is the same, quicker, and lets the gradient reach the scores of pruned filters,
    which a ReLU at 0 would stop. The norms of pruned filters go on counting, so that these may come back.

    arch: the network, of full width.
    ratio: share of the filters that every convolution keeps, above 0, at most 1; 1 filter at least.
    stem: cifar, a 3x3 convolution, or imagenet, which halves the image twice.
    enlarge: whole times that images are enlarged inside the network.
    mean: of the channels, for the normalisation inside, for pixels in [0, 1].
    std: of the channels, likewise.

    UserError for numbers that make no network."""

    def __init__(
        self,
        num_classes: int,
        *,
        arch: Architecture,
        ratio: Share = 0.5,
        stem: Literal["cifar", "imagenet"] = "cifar",
        enlarge: PositiveInt = 1,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[Positive, Positive, Positive] = (0.25, 0.25, 0.25),
    ):
        super().__init__()
        if not 0 < ratio <= 1:
            raise UserError(f"network.ratio: {ratio} is wrong; expected above 0, at most 1")
        self.num_classes, self.ratio = num_classes, ratio
        self.entry = Entry(enlarge, mean, std)
        self.body = build_body(arch, num_classes, 1.0, 1, stem)
        self.scores = nn.ParameterList(first_scores(conv.weight) for conv in self.body.expert_convs())
        self.wiring = wiring(self.body)

    def forward(self, images: Tensor) -> Tensor:
        return functional_call(self.body, self.gated(), (self.entry(images),))

    def masks(self) -> list[Tensor]:
        """Of each prunable convolution [filters]: 1 for those that stay, else 0; in the order of body.expert_convs."""
        return [mask(scores, self.ratio) for scores in self.scores]

    def gated(self) -> dict[str, Tensor]:
        """The parameters of the body that pruned filters would be read by, times 0 at these."""
        tensors, masks = dict(self.body.named_parameters()), self.masks()
        found = {}
        for cut in self.wiring.cuts:
            if cut.gate:
                tensor = found.get(cut.tensor, tensors[cut.tensor])
                found[cut.tensor] = tensor * along(cut, masks, tensor)
        return found

    @torch.no_grad()
    def folded(self) -> CNN:
        """The plain CNN of full width with the same logits, bit for bit, a copy: all weights of pruned filters and
        those that would read them are 0."""
        plain = plain_cnn(self.num_classes, deepcopy(self.entry), deepcopy(self.body)).train(self.training)
        tensors, masks = dict(plain.body.named_parameters()), self.masks()
        for cut in self.wiring.cuts:
            if cut.tensor in tensors:  # running statistics stay
                tensors[cut.tensor].mul_(along(cut, masks, tensors[cut.tensor]))
        return plain

    @torch.no_grad()
    def kept(self) -> CNN:
        """What is left without the pruned filters, with the same logits but for rounding, a copy: their weights, norms
        and the weights that would read them are gone. Where filters are added to others (residual networks) the sum
        keeps all its channels, and those that are left are added to theirs."""
        plain = plain_cnn(self.num_classes, deepcopy(self.entry), deepcopy(self.body)).train(self.training)
        masks = self.masks()
        for cut in self.wiring.cuts:
            owner, _, name = cut.tensor.rpartition(".")
            module = plain.body.get_submodule(owner)
            tensor = getattr(module, name)
            left = selection(cut, masks).nonzero()[:, 0]
            shorter = tensor.detach().index_select(cut.dim, left.to(tensor.device))
            setattr(module, name, nn.Parameter(shorter) if isinstance(tensor, nn.Parameter) else shorter)
        for module in plain.body.modules():
            tell_sizes(module)
        for name, number in self.wiring.sums.items():
            owner, _, own = name.rpartition(".")
            spread = Spread(plain.body.get_submodule(name), masks[number].bool())
            setattr(plain.body.get_submodule(owner), own, spread)
        return plain


class Spread(nn.Module):
    """A module that answers for the channels kept (bool [C]) alone: [B, kept, H, W] at their places in [B, C, H, W]."""

    def __init__(self, module: nn.Module, kept: Tensor):
        super().__init__()
        self.module = module
        places = torch.where(kept, kept.cumsum(0) - 1, kept.sum())  # behind the last one: an empty channel
        self.register_buffer("places", places)

    def forward(self, *inputs) -> Tensor:
        return F.pad(self.module(*inputs), (0, 0, 0, 0, 0, 1))[:, self.places]


def first_scores(weight: Tensor) -> nn.Parameter:
    """L1 norms of filters [F, in, k, k], divided by their mean: [F]."""
    norms = weight.detach().abs().sum(dim=(1, 2, 3))
    return nn.Parameter(norms / norms.mean())


def mask(scores: Tensor, ratio: float) -> Tensor:
    """1 for the round(ratio F) scores [F] of largest size, at least one, the lowest index of equals first, else 0; with
    the gradient of the sizes (straight-through)."""
    sizes = scores.abs()
    best = sizes.argsort(descending=True, stable=True)[: max(1, round(ratio * len(sizes)))]
    return torch.zeros_like(sizes).scatter(0, best, 1.0) + (sizes - sizes.detach())


def selection(cut: Cut, masks: list[Tensor]) -> Tensor:
    """The masks of a cut's channels, one after the other."""
    ones = masks[0].new_ones
    parts = [ones(count) if conv is None else masks[conv] for conv, count in cut.channels]
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole.repeat_interleave(cut.places) if cut.places > 1 else whole


def along(cut: Cut, masks: list[Tensor], tensor: Tensor) -> Tensor:
    """The selection in the shape that multiplies the tensor."""
    shape = [1] * tensor.dim()
    shape[cut.dim] = -1
    return selection(cut, masks).view(shape)


def tell_sizes(module: nn.Module) -> None:
    """A module's own numbers of channels, after its tensors."""
    if isinstance(module, ExpertConv):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = len(module.weight)


def wiring(body: Body) -> Wiring:
    """What is written and read by the filters of the prunable convolutions: those that have experts in a mixture. A new
    kind of block has to be told here."""
    plan, channels = _Plan(body), ()
    for block in (block for stage in body.stages for block in stage):
        match block:
            case Basic():
                plan.chain((block.conv1, block.bn1), (block.conv2, block.bn2))
                plan.shortcut(block.shortcut.conv, block.shortcut.bn)
            case Bottleneck():
                plan.chain((block.conv1, block.bn1), (block.conv2, block.bn2), (block.conv3, block.bn3))
                plan.shortcut(block.shortcut.conv, block.shortcut.bn)
            case PreActivation():
                plan.chain((block.conv1, block.bn2), (block.conv2, None))
                plan.shortcut(block.shortcut, None)
            case Layer():
                plan.reads(block.conv, channels)
                channels = plan.writes(block.conv, block.bn)
            case Dense():
                channels = channels or ((None, block.bn1.num_features),)
                plan.normed(block.bn1, channels)
                plan.reads(block.conv1, channels)
                plan.reads(block.conv2, plan.writes(block.conv1, block.bn2))
                channels += plan.writes(block.conv2)
            case Transition():
                plan.normed(block.bn, channels)
                plan.reads(block.conv, channels)
                channels = plan.writes(block.conv)
            case _:
                raise TypeError(f"{type(block).__name__}: unknown to networks.cnn_moe.sparse")
    for module in body.tail.modules():
        plan.normed(module, channels)
    first = next(module for module in body.head.modules() if isinstance(module, nn.Linear))
    plan.reads(first, channels, body.grid**2)
    return Wiring(tuple(plan.cuts), plan.sums)


class _Plan:
    """The wiring as it is written down, block by block."""

    def __init__(self, body: Body):
        self.names = {module: name for name, module in body.named_modules()}
        self.numbers = {conv: number for number, conv in enumerate(body.expert_convs())}
        self.cuts: list[Cut] = []
        self.sums: dict[str, int] = {}

    def cut(
        self, module: nn.Module, dim: int, channels: Channels, gate: bool, places: int, *names: str
    ) -> None:
        """Those of the module's tensors of these names that it has."""
        for name in names:
            if getattr(module, name, None) is not None:
                self.cuts.append(Cut(f"{self.names[module]}.{name}", dim, channels, gate, places))

    def reads(self, module: nn.Module, channels: Channels, places: int = 1) -> None:
        """A convolution or linear layer whose inputs are these channels; those of pruned filters are stopped."""
        if channels:
            self.cut(module, 1, channels, True, places, "weight")

    def normed(self, module: nn.Module, channels: Channels, gate: bool = False) -> None:
        """A norm, or something else that has no channels of its own."""
        if channels and isinstance(module, nn.BatchNorm2d):
            self.cut(module, 0, channels, gate, 1, "weight", "bias")
            self.cut(module, 0, channels, False, 1, "running_mean", "running_var")

    def writes(self, conv: ExpertConv, norm: nn.Module | None = None, gate: bool = False) -> Channels:
        """A convolution whose filters, behind their norm, are read by others; returns their channels. gate: its filters
        are stopped here, by the last of the two."""
        channels = ((self.numbers[conv], conv.out_channels),)
        self.cut(conv, 0, channels, gate and norm is None, 1, "weight", "bias")
        self.normed(norm, channels, gate)
        return channels

    def adds(self, conv: ExpertConv, norm: nn.Module | None) -> None:
        """A convolution whose filters, behind their norm, are added to other channels."""
        self.writes(conv, norm, gate=True)
        self.sums[self.names[norm or conv]] = self.numbers[conv]

    def chain(self, *units: tuple[ExpertConv, nn.Module | None]) -> None:
        """Convolutions with their norms, each reading the one before; the last is added."""
        channels: Channels = ()
        for place, (conv, norm) in enumerate(units):
            self.reads(conv, channels)
            if place < len(units) - 1:
                channels = self.writes(conv, norm)
        self.adds(*units[-1])

    def shortcut(self, conv: ExpertConv | None, norm: nn.Module | None) -> None:
        if conv is not None:
            self.adds(conv, norm)
