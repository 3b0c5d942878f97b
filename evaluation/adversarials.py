"""Adversarial images on disk, beside the ledger."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from attacks.quantise import LEVELS
from engine.checkpoints import atomic_write
from engine.config import UserError

Kept = Literal["none", "uint8", "float32"]


def save_adversarials(path: Path, found: Mapping[str, Tensor], kept: Kept) -> None:
    """Writes images [B, 3, H, W] in [0, 1] by incumbent, atomically; for uint8 multiples of 1/255."""
    arrays = {name: points.detach().cpu() for name, points in found.items()}
    if kept == "uint8":
        arrays = {name: (points * LEVELS).round().to(torch.uint8) for name, points in arrays.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: points.numpy() for name, points in arrays.items()})
    atomic_write(path, buffer.getvalue())


def load_adversarials(path: Path) -> dict[str, Tensor]:
    """float32 images in [0, 1] by incumbent. UserError for a file that is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no adversarial images here; evaluate.adversarials keeps them") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged ({error})") from None
    return {
        name: points.float() / LEVELS if points.dtype == torch.uint8 else points
        for name, points in arrays.items()
    }
