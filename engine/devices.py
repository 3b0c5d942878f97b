"""Which device a command computes on."""

import os
import re

import torch

from engine.config import DEVICE_NAMES, UserError


def pick_device(name: str) -> torch.device:
    """auto takes a GPU where there is one. UserError for a device that isn't there, or is none."""
    if not re.fullmatch(DEVICE_NAMES, name):
        raise UserError(f"--device {name}: is wrong; allowed: auto, cpu, cuda, cuda:N")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise UserError(
            f"--device {name}: there is no such GPU ({torch.cuda.device_count()} found); use cpu or auto"
        )
    return device


def own_gpu(device: torch.device) -> torch.device:
    """Of several processes on a machine (torchrun) each takes a GPU of its own, unless one is named."""
    local = os.environ.get("LOCAL_RANK")
    alone = device.type != "cuda" or device.index is not None or local is None
    return device if alone else torch.device("cuda", int(local))
