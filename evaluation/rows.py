"""The rows of the matrix: each a function of what the networks said about a batch. None runs a network."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.results import RowInfo


class Outputs:
    """What the networks say about one batch, in float32."""

    def __init__(self, networks: Mapping[str, nn.Module], images: Tensor, precision: str, upsample: Callable):
        """Runs every network once. Images [B, 3, H, W] in [0, 1]; for the rest see evaluate.evaluate."""
        self.size = tuple(images.shape[-2:])
        self._networks, self._upsample, self._full = networks, upsample, {}
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            pairs = {name: network.forward_features(images) for name, network in networks.items()}
        self.low_res = {name: logits.float() for name, (logits, _) in pairs.items()}  # [B, C, h, w]
        self.features = {name: features.float() for name, (_, features) in pairs.items()}  # [B, F, h', w']

    def logits(self, name: str) -> Tensor:
        """A network's logits at the size of its input, [B, C, H, W]; upsampled once, when first asked for."""
        if name not in self._full:
            self._full[name] = self._upsample(self.low_res[name], self.size, self._networks[name].stride)
        return self._full[name]

    def stacked(self, names: Iterable[str]) -> Tensor:
        """Logits of several networks, [B, E, C, H, W]."""
        return torch.stack([self.logits(name) for name in names], dim=1)


@dataclass(frozen=True)
class Row:
    """A row of the matrix; its kind is one of results.KINDS.

    `predict(outputs, batch)` gives logits [B, C, H, W] at the network's input size, and gate weights
    [B, E, K, h, w] or None. `experts` names the experts along E. `home`: the subsets it was trained on.
    `subsets`: the subsets of frames on which it is defined (None: all); elsewhere its answer is dropped.
    """

    name: str
    kind: str
    predict: Callable[[Outputs, object], tuple[Tensor, Tensor | None]]
    experts: tuple[str, ...] = ()
    home: tuple[str, ...] = ()
    subsets: tuple[str, ...] | None = None

    @property
    def info(self) -> RowInfo:
        return RowInfo(self.name, self.kind, self.experts, self.home, self.subsets)


@dataclass(frozen=True)
class Ceilings:
    """Rows that may look at the label: `decide[name](expert_logits [b, E, C, h, w], labels [b, h, w])` gives
    class ids [b, h, w]. Both are at the label's resolution; labels hold class ids or 255."""

    experts: tuple[str, ...] = ()
    decide: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)

    @property
    def infos(self) -> list[RowInfo]:
        return [RowInfo(name, "ceiling") for name in self.decide]


def network_row(name: str, kind: str, network: str, home: Sequence[str] = ()) -> Row:
    """A baseline or an expert by itself; `network` is its name among the networks."""
    return Row(name, kind, lambda outputs, batch: (outputs.logits(network), None), home=tuple(home))


def ensemble_row(
    name: str, experts: Sequence[str], combine: Callable[[Tensor], Tensor], kind: str = "ensemble"
) -> Row:
    """`combine(expert_logits [B, E, C, H, W]) -> logits [B, C, H, W]`, as in the table of ensembles."""
    experts = tuple(experts)
    return Row(name, kind, lambda outputs, batch: (combine(outputs.stacked(experts)), None), experts)


def gate_row(name: str, experts: Sequence[str], combine: Callable, kind: str = "gate") -> Row:
    """`combine(expert_logits [B, E, C, h, w], features: list, size) -> (logits, weights [B, E, K, 1, 1])`: a
    mixture's method of that name, which is fed with the outputs of the experts, run only once."""
    experts = tuple(experts)

    def predict(outputs: Outputs, batch) -> tuple[Tensor, Tensor]:
        expert_logits = torch.stack([outputs.low_res[expert] for expert in experts], dim=1)
        return combine(expert_logits, [outputs.features[expert] for expert in experts], outputs.size)

    return Row(name, kind, predict, experts)


def mixture_row(name: str, experts: Sequence[str], weights_of, subsets: Sequence[str] | None = None) -> Row:
    """A control that mixes logits by `weights_of(frames) -> [B, E]`, one line of weights per frame."""
    experts = tuple(experts)

    def predict(outputs: Outputs, batch) -> tuple[Tensor, Tensor]:
        expert_logits = outputs.stacked(experts)
        weights = torch.as_tensor(np.asarray(weights_of(batch.frames), dtype=np.float32))
        weights = weights.to(expert_logits.device)[:, :, None, None, None]  # [B, E, 1, 1, 1]
        return (weights * expert_logits).sum(dim=1), weights

    return Row(name, "control", predict, experts, subsets=None if subsets is None else tuple(subsets))


def constant_row(name: str, experts: Sequence[str], weights: Sequence[float]) -> Row:
    """The same weights for every image."""
    return mixture_row(name, experts, lambda frames: [weights] * len(frames))


def random_gate_row(name: str, experts: Sequence[str], seed: int) -> Row:
    """Weights drawn per image from the flat Dirichlet distribution, seeded by (seed, frame name) and so
    independent of order and batches."""

    def draw(frame) -> np.ndarray:
        digest = hashlib.sha256(f"{seed}/{frame.name}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big")).dirichlet(np.ones(len(experts)))

    return mixture_row(name, experts, lambda frames: [draw(frame) for frame in frames])


def subset_routing_row(name: str, experts: Sequence[str]) -> Row:
    """The expert named like the frame's subset answers; not defined on subsets that name no expert."""

    def route(frames) -> list[list[bool]]:
        return [[frame.subset == expert for expert in experts] for frame in frames]

    return mixture_row(name, experts, route, subsets=experts)


def simplex(num_experts: int, steps: int = 10) -> Iterator[tuple[float, ...]]:
    """All weights of `num_experts` experts that are multiples of 1 / steps and sum to 1: the candidates among
    which constant weights are picked on the validation split."""

    def parts(rest: int, experts: int) -> Iterator[tuple[int, ...]]:
        if experts == 1:
            yield (rest,)
            return
        for first in range(rest, -1, -1):
            for others in parts(rest - first, experts - 1):
                yield (first, *others)

    for counts in parts(steps, num_experts):
        yield tuple(count / steps for count in counts)
