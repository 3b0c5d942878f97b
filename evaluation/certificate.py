"""Certificates by interval bounds, for small plain networks: pixels that no image in an linf ball makes wrong.

Interval bound propagation (Gowal et al. 2018, arXiv 1810.12715): from the box of values that the attacker may give
the input to a box around the output of each layer, in float64; the last linear layer bounds differences of logits, as
in its section 3. What it certifies holds, up to the rounding of a network that runs in float32; what it doesn't may
hold as well: the bounds are loose, and looser with each layer.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.routed import look_inside
from attacks.threat import count_labelled, is_ignored
from engine.config import IGNORE
from engine.steps import under_attack
from evaluation.floor import is_close, parts_of, some_weights
from evaluation.plan import Scene, Setup
from evaluation.targets import ROUTED, Target
from networks.external import External, ExternalClassifier
from networks.moe import Frozen
from networks.normalize import Normalize

NONE = "none computed"
AFFINE = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)
# Averages with weights of at least 0, of each channel by itself; and functions that never fall.
AVERAGES = (
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Upsample,
    nn.Flatten,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
)
MONOTONE = (*AVERAGES, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.MaxPool2d)
SUPPORTED = (*AFFINE, *MONOTONE, Normalize)
UPSAMPLING = ("nearest", "nearest-exact", "bilinear")  # bicubic has weights below 0


@dataclass(frozen=True)
class Certificate:
    """right: bool [B, *S], pixels that are right all over the ball; False where there is no label. None where
    nothing was computed, for the reason given."""

    right: Tensor | None
    reason: str = ""


@dataclass(frozen=True)
class Certified:
    """Share of a target's pixels on n_images that are certified at an eps; None with the reason why none is."""

    model: str
    eps: float
    value: float | None
    reason: str
    n_images: int


def certify_targets(
    targets: Sequence[Target], scenes: Iterable[Scene], setup: Setup, device: torch.device | str = "cpu"
) -> list[Certified]:
    """Of each target at each eps, over all images; nothing more is run once one batch has no certificate."""
    found = []
    for target in targets:
        for eps in setup.eps:
            right = valid = images = 0
            reason = "" if setup.norm == "linf" else f"{NONE}: interval bounds are for linf"
            for scene in scenes if not reason else ():
                points, labels = scene.images.to(device), scene.labels.to(device)
                with under_attack(target.model):
                    one = certify_target(target, points, labels, eps, setup.ignore_index)
                if one.right is None:
                    reason = one.reason
                    break
                right += int(one.right.sum())
                valid += count_labelled(labels, setup.ignore_index)
                images += len(points)
            value = right / valid if valid and not reason else None
            found.append(Certified(target.name, eps, value, reason, images))
    return found


def certify_target(
    target: Target, images: Tensor, labels: Tensor, eps: float, ignore_index: int
) -> Certificate:
    """As its kind allows."""
    if target.kind in ROUTED:
        return certify_mixture(target.model, images, labels, eps, ignore_index)
    if target.kind == "ensemble":
        return Certificate(None, f"{NONE}: an ensemble")
    return certify(target.model, images, labels, eps, ignore_index)


@torch.no_grad()
def certify(
    network: nn.Module, images: Tensor, labels: Tensor, eps: float, ignore_index: int | None = IGNORE
) -> Certificate:
    """Of a network in eval mode that is a chain of simple layers, for all images within eps (linf) in [0, 1]."""
    layers = chain(network)
    odd = next((layer for layer in layers if not is_supported(layer)), None)
    if odd is not None:
        return Certificate(None, f"{NONE}: no interval bounds through {type(odd).__name__}")
    layers = [deepcopy(layer).double() for layer in layers]
    head = head_of(layers)
    images = images.double()
    low, high = (images - eps).clamp(0, 1), (images + eps).clamp(0, 1)
    for layer in layers[:head]:
        low, high = bounds(layer, low, high)
    ignored = is_ignored(labels, ignore_index)
    right = torch.zeros_like(ignored)
    for label in labels[~ignored].unique().tolist():
        if head < len(layers):
            lead = bounds(differences(layers[head], label), low, high)[0]
            for layer in layers[head + 1 :]:
                lead = layer(lead)
        else:
            lead = low[:, [label]] - high
        if lead.shape[2:] != labels.shape[1:]:  # as External enlarges logits, with weights of at least 0
            lead = F.interpolate(lead, size=labels.shape[1:], mode="bilinear", align_corners=False)
        lead[:, label] = torch.inf
        right |= (labels == label) & (lead.amin(dim=1) > 0)
    return Certificate(right)


@torch.no_grad()
def certify_mixture(
    model: nn.Module, images: Tensor, labels: Tensor, eps: float, ignore_index: int | None = IGNORE
) -> Certificate:
    """Of a mixture whose gate has one weight for all classes and places: pixels that all its experts are certified
    on, since a convex combination of logits that rank the label first does so too. Whatever the gate is."""
    seen = look_inside(model, images)
    sites, _, experts, *finer = seen.gate_logits.shape
    if sites > 1 or finer != [1, 1, 1]:
        return Certificate(None, f"{NONE}: the gate has more than one weight per expert and image")
    alone, weights = parts_of(seen, 0), some_weights(seen)
    each = list(getattr(model, "experts", ()))
    same = len(each) == experts and is_close(alone, torch.stack([expert(images) for expert in each], dim=1))
    if not same or not is_close((weights[0] * alone).sum(dim=1), seen.mix(weights)):
        return Certificate(None, f"{NONE}: the mixture is no weighted sum of its experts' logits")
    right = ~torch.zeros_like(labels, dtype=torch.bool)
    for expert in each:
        found = certify(expert, images, labels, eps, ignore_index)
        if found.right is None:
            return found
        right &= found.right
    return Certificate(right)


def chain(network: nn.Module) -> list[nn.Module]:
    """The layers of nested nn.Sequential, of a frozen expert and of an external network that pads nothing, in order;
    else the network as its own layer."""
    if type(network) in (External, ExternalClassifier) and network.stride == 1 and is_plain(network):
        return [network.normalize] * network.changes_images + chain(network.network)
    if getattr(type(network), "forward", None) is nn.Sequential.forward and is_plain(network):
        return [layer for child in network for layer in chain(child)]
    return chain(network.network) if type(network) is Frozen and is_plain(network) else [network]


def is_plain(module: nn.Module) -> bool:
    """Whether a call does what forward of its class does, and nothing else."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return not hooked and type(module).__call__ is nn.Module.__call__


def is_supported(layer: nn.Module) -> bool:
    """Whether `bounds` hold for it. A subclass may do anything, so that only these very classes are known."""
    if type(layer) not in SUPPORTED or not is_plain(layer):
        return False
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        return not layer.training and layer.running_var is not None
    if isinstance(layer, nn.Dropout | nn.Dropout2d):
        return not layer.training
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros"
    if isinstance(layer, nn.Upsample):
        return layer.mode in UPSAMPLING
    return True


def bounds(layer: nn.Module, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Of a layer's outputs for inputs between low and high, exact for each output by itself."""
    if isinstance(layer, Normalize):  # falls where std is below 0
        ends = layer(low), layer(high)
        return torch.minimum(*ends), torch.maximum(*ends)
    if not isinstance(layer, AFFINE):
        return layer(low), layer(high)
    middle, reach = layer((low + high) / 2), (high - low) / 2
    if isinstance(layer, nn.Linear):
        reach = F.linear(reach, layer.weight.abs())
    elif isinstance(layer, nn.Conv2d):
        keys = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "groups")}
        reach = F.conv2d(reach, layer.weight.abs(), **keys)
    else:
        scale = (layer.running_var + layer.eps).rsqrt() * (1 if layer.weight is None else layer.weight.abs())
        reach = reach * scale.view(-1, *[1] * (reach.ndim - 2))
    return middle - reach, middle + reach


def head_of(layers: list[nn.Module]) -> int:
    """Place of the last linear layer that only averages follow, so that differences of its outputs become those of
    the logits; as many as there are layers where there is none."""
    for place in reversed(range(len(layers))):
        layer = layers[place]
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
            return place
        if not isinstance(layer, AVERAGES):
            break
    return len(layers)


def differences(layer: nn.Linear | nn.Conv2d, label: int) -> nn.Linear | nn.Conv2d:
    """The layer whose outputs are what `label` leads each class by."""
    lead = deepcopy(layer)
    lead.weight.copy_(layer.weight[label] - layer.weight)
    if layer.bias is not None:
        lead.bias.copy_(layer.bias[label] - layer.bias)
    return lead
