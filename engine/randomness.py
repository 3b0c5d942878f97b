"""Seeds and states of every random generator that a training draws from."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seeds Python, numpy and torch on every device; call it before the network is built.

    deterministic: on a GPU, choose exact kernels (slower) and warn of operations that have none."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not deterministic  # batches have one size, so the search pays


def random_state() -> dict[str, Any]:
    """The state of all generators as tensors and plain types."""
    kind, keys, *rest = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, keys.tolist(), *rest],
        "python": [version, list(words), gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts all generators back to what random_state returned (on as many GPUs as there are now)."""
    torch.set_rng_state(state["torch"])
    for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, device)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


@contextmanager
def untouched_torch() -> Iterator[None]:
    """Leaves torch's CPU generator as it was. A DataLoader draws from it at each start, also on resume."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
