"""What is attacked: a network, ensemble or mixture by the protocol it offers, with what identifies it."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from attacks.threat import Threat
from engine.checkpoints import tensors_sha256
from engine.config import UserError

Kind = Literal["single", "ensemble", "soft", "hard"]
ROUTED = ("soft", "hard")
PATH = " path "  # between a mixture's name and the number of a pathway, in the name of its row


@dataclass(frozen=True)
class Target:
    """A network under attack: `model(images [B, C, H, W] in [0, 1]) -> logits [B, K, *S]`, S = (H, W) or empty.

    kind: what it offers beside that, as `kind_of` tells. num_experts: networks that it joins.
    fingerprint: what identifies it, plain values; other values are another target. role: kind of its row in the
    tables. class_pixels: labelled pixels of each class in its training split, the weights of class-balanced
    losses (None: of the data set that it is evaluated on). conditional: a pass runs only the experts that its weights
    name, not all of them.
    """

    name: str
    kind: Kind
    model: Callable[[Tensor], Tensor]
    num_experts: int = 1
    fingerprint: dict = field(default_factory=dict)
    role: str = "model"
    class_pixels: tuple[int, ...] | None = None
    conditional: bool = False

    @property
    def networks(self) -> int:
        """That run in a plain pass, at most."""
        return 1 if self.conditional and self.kind == "hard" else self.num_experts

    @property
    def identity(self) -> dict:
        """Everything that a record of it depends on, as JSON holds it."""
        weights = None if self.class_pixels is None else list(self.class_pixels)
        return {
            **self.fingerprint,
            "kind": self.kind,
            "num_experts": self.num_experts,
            "networks": self.networks,
            "class_pixels": weights,
        }


def target_of(
    name: str,
    model: Callable[[Tensor], Tensor],
    *,
    role: str = "model",
    class_pixels: Sequence[int] | None = None,
    **about,
) -> Target:
    """A target of any callable. about: what identifies it beside its tensors, such as its architecture."""
    kind = kind_of(model)
    pixels = None if class_pixels is None else tuple(int(count) for count in class_pixels)
    fingerprint = {**about, **fingerprint_of(model)}
    conditional = bool(getattr(model, "conditional", False))
    return Target(name, kind, model, experts_of(model, kind), fingerprint, role, pixels, conditional)


def kind_of(model: Callable) -> Kind:
    """soft or hard: it routes (gate_logits, route, forward_given, routing). ensemble: it combines networks
    (expert_logits, combine). single: anything else. UserError for a routing that is neither soft nor hard."""
    if hasattr(model, "gate_logits") and hasattr(model, "forward_given"):
        routing = getattr(model, "routing", None)
        if routing not in ROUTED:
            raise UserError(f"{type(model).__name__}.routing: {routing!r} is unknown; allowed: soft, hard")
        return routing
    return "ensemble" if hasattr(model, "expert_logits") and hasattr(model, "combine") else "single"


def experts_of(model: Callable, kind: Kind) -> int:
    """Networks that it joins. UserError where a routed model or an ensemble doesn't tell."""
    if kind == "single":
        return 1
    for count in (
        getattr(model, "num_experts", None),
        len(getattr(model, "expert_names", ())) or None,
    ):
        if count is not None:
            return int(count)
    raise UserError(f"{type(model).__name__}: has several experts but no num_experts that says how many")


def fingerprint_of(model: Callable) -> dict[str, str]:
    """{"tensors": SHA-256 over all parameters and buffers, "modules": one over its modules and their settings}.
    A plain function, which has neither, is known by its name only: see `has_tensors`."""
    if not isinstance(model, nn.Module):
        return {"function": getattr(model, "__qualname__", type(model).__qualname__)}
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    return {
        "tensors": tensors_sha256(tensors),
        "modules": hashlib.sha256(repr(model).encode()).hexdigest(),
    }


def has_tensors(model: Callable) -> bool:
    """Whether its fingerprint tells it from others: it is a module that holds its weights itself."""
    return isinstance(model, nn.Module) and any(True for _ in chain(model.parameters(), model.buffers()))


def class_weights(class_pixels: Sequence[int]) -> Tensor:
    """float32 [K]: one over the pixels of each class, times a factor that makes the mean over those pixels 1.
    A class without any weighs as much as the rarest of the others."""
    pixels = np.asarray(class_pixels, dtype=np.float64)
    seen = pixels > 0
    if not seen.any():
        raise UserError("class weights: no class has a labelled pixel in the training split")
    weights = pixels.sum() / (seen.sum() * np.where(seen, pixels, pixels[seen].min()))
    return torch.from_numpy(weights.astype(np.float32))


def threat_on(target: Target, threat: Threat, device: torch.device | str) -> Threat:
    """With the target's own class weights, where it has some."""
    if target.class_pixels is None:
        return threat
    return replace(threat, class_weights=class_weights(target.class_pixels).to(device))


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """float32 is float32 inside: no autocast, no TF32, and no algorithm that gives other bits the next time."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn
    before = (matmul, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.backends.cuda.matmul.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = False
    cudnn.deterministic = True
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before
        torch.use_deterministic_algorithms(deterministic, warn_only=warn)
