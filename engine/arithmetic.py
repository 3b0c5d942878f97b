"""How a pass through a network computes: memory layout and precision, as the config says."""

from typing import Any

import torch


def layout_of(settings: Any) -> torch.memory_format:
    """Of images and weights, as `channels_last` of a train section says."""
    return torch.channels_last if settings.channels_last else torch.preserve_format


def autocast_of(precision: str, device: torch.device | str) -> torch.autocast:
    """The context of a forward pass in fp32 or bf16."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
