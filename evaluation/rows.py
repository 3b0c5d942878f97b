"""The rows of the matrix: each a function of what the networks said about a batch. None runs a network."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from engine.arithmetic import autocast_of
from evaluation.enlarge import Enlargement, Enlargements
from evaluation.results import RowInfo


class Outputs:
    """What the networks say about one batch, in float32."""

    def __init__(
        self, networks: Mapping[str, nn.Module], images: Tensor, precision: str, enlargements: Enlargements
    ):
        """Runs every network once, an encoder that several share as well. Images [B, 3, H, W] in [0, 1]; for the
        rest see evaluate.evaluate."""
        self.images, self.size = images, tuple(images.shape[-2:])
        self.precision = precision
        self.strides = {name: network.stride for name, network in networks.items()}
        with self.autocast():
            pairs = run_networks(networks, images)
        self.low_res = {name: logits.float() for name, (logits, _) in pairs.items()}  # [B, C, h, w]
        self.features = {name: features.float() for name, (_, features) in pairs.items()}  # [B, F, h', w']
        self._enlargements = enlargements
        self._together: dict[tuple[str, ...], tuple[Tensor, int | None]] = {}
        self._largest: dict[str, Tensor] = {}

    def autocast(self) -> torch.autocast:
        """The context that networks and gates run in."""
        return autocast_of(self.precision, self.images.device)

    def together(self, names: tuple[str, ...]) -> tuple[Tensor, int | None]:
        """Logits of several networks on the grid that they share, [B, E, C, h, w], and its stride; where they
        share none, at the size of the input, stride None. Made once."""
        if names not in self._together:
            logits = [self.low_res[name] for name in names]
            strides = {self.strides[name] for name in names}
            if len({one.shape for one in logits}) > 1 or len(strides) > 1:
                logits = [self._to_input(name).whole(self.low_res[name]) for name in names]
                strides = {None}
            stacked = torch.stack(
                [one.permute(0, 2, 3, 1) for one in logits]
            )  # channels last: quicker to mix
            self._together[names] = stacked.permute(1, 0, 4, 2, 3), strides.pop()
        return self._together[names]

    def combined(self, names: Sequence[str], combine: Callable[[Tensor], Tensor]) -> Tensor:
        """combine(logits [B, E, C, r, W] of several networks at the input's size) -> [B, C, r, W], in bands
        of r rows: a function of each pixel. All of them, [B, C, H, W]."""
        bands = zip(*(self._to_input(name).bands(self.low_res[name]) for name in names), strict=True)
        whole = None
        for parts in bands:
            stacked = torch.stack([band.permute(0, 2, 3, 1) for _, band in parts])  # [E, B, r, W, C]
            band = combine(stacked.permute(1, 0, 4, 2, 3))
            if whole is None:
                shape = (*band.shape[:2], *self.size)
                whole = torch.empty(
                    shape, dtype=band.dtype, device=band.device, memory_format=torch.channels_last
                )
            whole[:, :, parts[0][0]] = band
        return whole

    def largest(self, names: tuple[str, ...]) -> Tensor:
        """Largest magnitude of the networks' logits on each image, [B]."""
        for name in names:
            if name not in self._largest:
                self._largest[name] = torch.linalg.vector_norm(self.low_res[name], torch.inf, dim=(1, 2, 3))
        return torch.stack([self._largest[name] for name in names]).amax(dim=0)

    def prediction(self, name: str) -> "Prediction":
        """What a network says by itself."""
        return Prediction(self.low_res[name], self.strides[name])

    def _to_input(self, name: str) -> Enlargement:
        return self._enlargements.to_input(self.low_res[name], self.strides[name], self.size)


@dataclass(frozen=True)
class Prediction:
    """Logits [B, C, h, w] on a network's grid, to be upsampled as `stride` says; of stride None, at the input's
    size. Weights [B, E, K, h', w'] of a gate; dead [B]: share of its hidden units that say nothing of the image."""

    logits: Tensor
    stride: int | None = None
    weights: Tensor | None = None
    dead: Tensor | None = None


def run_networks(networks: Mapping[str, nn.Module], images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """(logits, features) of every network. A network with an `encoder` offers encode(images) -> state and
    decode(state) -> logits; an encoder that several networks share runs once."""
    pairs, states = {}, {}
    for name, network in networks.items():
        encoder = getattr(network, "encoder", None)
        if encoder is None:
            pairs[name] = network.forward_features(images)
            continue
        if encoder not in states:
            states[encoder] = network.encode(images)
        pairs[name] = network.decode(states[encoder]), states[encoder].features
    return pairs


@dataclass(frozen=True)
class Row:
    """A row of the matrix; its kind is one of results.KINDS.

    `predict(outputs, batch)` says what it predicts. `network`: the one whose answer it gives as it is ("": none).
    `experts` names the experts that it combines, along E. `home`: the subsets it was trained on. `subsets`: the
    subsets of frames on which it is defined (None: all); elsewhere its answer is dropped.
    """

    name: str
    kind: str
    predict: Callable[[Outputs, object], Prediction]
    network: str = ""
    experts: tuple[str, ...] = ()
    home: tuple[str, ...] = ()
    subsets: tuple[str, ...] | None = None

    @property
    def info(self) -> RowInfo:
        return RowInfo(self.name, self.kind, self.experts, self.home, self.subsets)

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that have to run for it."""
        return self.experts or (self.network,)


def is_combination(row: Row | RowInfo) -> bool:
    """Whether it is asked where its experts agree, and whom it follows: a gate or an ensemble of several."""
    return row.kind in ("gate", "ensemble") and len(row.experts) > 1


def network_row(name: str, kind: str, network: str, home: Sequence[str] = ()) -> Row:
    """A baseline or an expert by itself; `network` is its name among the networks."""
    return Row(name, kind, lambda outputs, batch: outputs.prediction(network), network, home=tuple(home))


def ensemble_row(
    name: str, experts: Sequence[str], combine: Callable[[Tensor], Tensor], kind: str = "ensemble"
) -> Row:
    """`combine(expert_logits [B, E, C, H, W]) -> logits [B, C, H, W]`, as in the table of ensembles: a function of
    each pixel by itself, so that it is applied to bands of rows. Logits of -inf become the smallest number:
    enlarged, they would make their neighbours NaN."""
    experts = tuple(experts)

    def predict(outputs: Outputs, batch) -> Prediction:
        logits = outputs.combined(experts, combine)
        return Prediction(logits.clamp_(min=torch.finfo(logits.dtype).min))

    return Row(name, kind, predict, experts=experts)


def gate_row(
    name: str,
    experts: Sequence[str],
    mix: Callable,
    kind: str = "gate",
    full_size: bool = False,
    dead: Callable | None = None,
) -> Row:
    """`mix(expert_logits [B, E, C, h, w], features: list, images, size) -> (logits, weights [B, E, K, h', w'])`
    mixes what the experts, run only once, said about the images: on their own grid, or `full_size`: at the size
    of the images. dead: of the same, Prediction.dead."""
    experts = tuple(experts)

    def predict(outputs: Outputs, batch) -> Prediction:
        expert_logits, stride = outputs.together(experts)
        said = expert_logits, [outputs.features[expert] for expert in experts], outputs.images, outputs.size
        with outputs.autocast():
            logits, weights = mix(*said)
            share = dead and dead(*said)
        return Prediction(logits, None if full_size else stride, weights, share)

    return Row(name, kind, predict, experts=experts)


def mixture_row(name: str, experts: Sequence[str], weights_of, subsets: Sequence[str] | None = None) -> Row:
    """A control that mixes logits by `weights_of(frames) -> [B, E]`, one line of weights per frame."""
    experts = tuple(experts)

    def predict(outputs: Outputs, batch) -> Prediction:
        expert_logits, stride = outputs.together(experts)
        weights = torch.as_tensor(np.asarray(weights_of(batch.frames), dtype=np.float32))
        weights = weights.to(expert_logits.device)[:, :, None, None, None]  # [B, E, 1, 1, 1]
        return Prediction((weights * expert_logits).sum(dim=1), stride, weights)

    return Row(name, "control", predict, experts=experts, subsets=None if subsets is None else tuple(subsets))


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
