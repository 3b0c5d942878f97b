"""Exponential moving average of a network's tensors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """The moving average of live tensors: it follows their values and, on demand, takes their place.

    After optimiser step n (from 1) it is d a + (1 - d) t with d = min(decay, (1 + n) / (10 + n)), so that the
    initial weights fade early in a short training too. Counters (integer tensors) are taken as they are."""

    def __init__(self, tensors: Mapping[str, Tensor], decay: float):
        self.live, self.decay = dict(tensors), decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in self.live.items()}
        self.averaged = [name for name, tensor in self.live.items() if tensor.is_floating_point()]
        self.counters = [name for name in self.live if name not in self.averaged]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the values after optimiser step `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [self.tensors[name] for name in self.averaged]
        torch._foreach_lerp_(averages, [self.live[name] for name in self.averaged], 1 - decay)
        for name in self.counters:
            self.tensors[name].copy_(self.live[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the network has the averaged values."""
        values = {name: tensor.detach().clone() for name, tensor in self.live.items()}
        self._set(self.tensors)
        try:
            yield
        finally:
            self._set(values)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, tensor in self.live.items():
            tensor.copy_(values[name])
