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
from engine.steps import under_attack

Kind = Literal["single", "ensemble", "soft", "hard"]
ROUTED = ("soft", "hard")
PRODUCTS = {  # of float32, on a type of device: how exactly they are computed, by `fp32_precision` of each
    "cuda": (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn),
    "cpu": (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn),
}
PATH = " path "  # between a mixture's name and the number of a pathway, in the name of its row


@dataclass(frozen=True)
class Target:
    """A network under attack: `model(images [B, C, H, W] in [0, 1]) -> logits [B, K, *S]`, S = (H, W) or empty.

    kind: what it offers beside that, as `kind_of` tells. num_experts: networks that it joins.
    fingerprint: what identifies it, plain values; other values are another target. role: kind of its row in the
    tables. class_pixels: labelled pixels of each class in its training split, the weights of class-balanced
    losses (None: of the data set that it is evaluated on). active: experts that the weights of an image name, where a
    pass runs no others; 0: it runs all of them.
    """

    name: str
    kind: Kind
    model: Callable[[Tensor], Tensor]
    num_experts: int = 1
    fingerprint: dict = field(default_factory=dict)
    role: str = "model"
    class_pixels: tuple[int, ...] | None = None
    active: int = 0

    @property
    def networks(self) -> int:
        """That run in a plain pass, at most."""
        return self.active or self.num_experts

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
    num_experts = experts_of(model, kind)
    return Target(
        name, kind, model, num_experts, fingerprint, role, pixels, active_of(model, kind, num_experts)
    )


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


def active_of(model: Callable, kind: Kind, num_experts: int) -> int:
    """`Target.active`: of a routed model that says that it is conditional 1, or the top_k best of a soft one."""
    if kind not in ROUTED or not getattr(model, "conditional", False):
        return 0
    return 1 if kind == "hard" else int(getattr(model, "top_k", num_experts))


def fingerprint_of(model: Callable) -> dict[str, str]:
    """{"tensors": SHA-256 over all parameters and buffers, "modules": one over its modules and their settings}.
    Of a plain function, which has neither, its name; what it says tells it from others (see `with_answers`)."""
    if not isinstance(model, nn.Module):
        return {"function": getattr(model, "__qualname__", type(model).__qualname__)}
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    return {
        "tensors": tensors_sha256(tensors),
        "modules": hashlib.sha256("\n".join(settings_of(model)).encode()).hexdigest(),
    }


def settings_of(model: nn.Module) -> Iterator[str]:
    """What tells modules of equal tensors apart: what they print, and their attributes that are plain values, functions
    or tensors which are no buffers, such as the rule of an ensemble, the temperature of a gate or the mean of a
    normalisation; of private ones the tensors."""
    yield repr(model)
    for path, module in model.named_modules():
        for name, value in sorted(vars(module).items()):
            private = name.startswith("_") and not isinstance(value, Tensor | np.ndarray)
            text = None if private or name == "training" else text_of(value)
            if text:
                yield f"{path}.{name} = {text}"


def text_of(value: object) -> str | None:
    """What tells a value from others: numbers and words as they are, tensors and arrays by a digest, functions and
    classes by their names, and lists of these; None for anything else."""
    if isinstance(value, list | tuple):
        parts = [text_of(one) for one in value]
        return None if None in parts else f"[{', '.join(parts)}]"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
        value = value.detach().cpu().resolve_conj().resolve_neg()
        return tensors_sha256({"": value})
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return getattr(value, "__qualname__", None)


def with_answers(target: Target, images: Tensor) -> Target:
    """The target as it is where its weights identify it: it is a module that holds them. Any other, such as a function,
    is identified by what it says of the first of the images [B, C, H, W], to the bit, as well."""
    model = target.model
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    held = any(True for module in modules for _ in chain(module.parameters(), module.buffers()))
    if held and not any(getattr(module, "opaque", False) for module in modules):
        return target
    if modules:
        model.to(images.device, memory_format=torch.channels_last)  # the same layout, and bits, whoever asks
    with under_attack(model), exact_float32(images.device), torch.no_grad():
        answers = tensors_sha256({"": model(images[:1])})
    return replace(target, fingerprint={**target.fingerprint, "answers": answers})


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
    """float32 is float32 inside: no autocast, neither TF32 nor bf16 for its products, on CPUs either, and no algorithm
    that gives other bits the next time."""
    cudnn, products = torch.backends.cudnn, [*chain(*PRODUCTS.values())]
    before, precisions = (cudnn.deterministic, cudnn.benchmark), [one.fp32_precision for one in products]
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn.deterministic, cudnn.benchmark = True, False
    set_products(["ieee"] * len(products))
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        set_products(precisions)
        cudnn.deterministic, cudnn.benchmark = before
        torch.use_deterministic_algorithms(deterministic, warn_only=warn)


def set_products(precisions: Sequence[str]) -> None:
    """`fp32_precision` of all PRODUCTS in their order. The older flags say the same: where the two differ, PyTorch
    refuses to read them."""
    torch.backends.cuda.matmul.allow_tf32 = precisions[0] == "tf32"
    torch.backends.cudnn.allow_tf32 = precisions[1] == "tf32"
    for one, precision in zip(chain(*PRODUCTS.values()), precisions, strict=True):
        one.fp32_precision = precision
