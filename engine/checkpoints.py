"""Files that survive a crash: atomic writes, training state (last.pt), weights with metadata, hashes."""

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from engine.config import UserError, first_line

STATE_VERSION = 1  # raised when last.pt changes so that older ones can't be resumed
AGAIN = "start again with --overwrite, which removes best.safetensors beside it, too: copy it if you want it"


def atomic_write(path: str | Path, data: bytes | memoryview | str) -> None:
    """Replaces the file by the data, or leaves it as it was: written beside it, flushed to disk, renamed.

    Raises UserError naming the file and the reason (a full disk, a missing right)."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk too
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: can't be written: {reason}; what was there before is unchanged") from error


def save_state(path: str | Path, state: Mapping[str, Any]) -> None:
    """Writes a training state of tensors and plain types. Raises UserError as atomic_write."""
    buffer = io.BytesIO()
    torch.save({"version": STATE_VERSION, **state}, buffer)
    atomic_write(path, buffer.getbuffer())


def load_state(path: str | Path) -> dict[str, Any]:
    """What save_state wrote, on the CPU. Raises UserError if it is missing, damaged or of another version."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no training state here")
    try:
        with zipfile.ZipFile(path) as archive:  # torch doesn't compare the checksums
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{path}: damaged ({first_line(error)}); {AGAIN}") from error
    found = state.get("version") if isinstance(state, dict) else None
    if found != STATE_VERSION:
        raise UserError(f"{path}: state of version {found}, not {STATE_VERSION}; {AGAIN}")
    return state


def save_weights(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes tensors as safetensors with the metadata as one JSON string under the key "metadata".

    The same tensors and metadata always give the same bytes; the SHA-256 of the tensors is added under
    "tensors_sha256". NaN and inf become null. Raises UserError as atomic_write."""
    metadata = _plain({**metadata, "tensors_sha256": tensors_sha256(tensors)})
    text = json.dumps(metadata, sort_keys=True, allow_nan=False)
    # One key: the library writes several in random order. Copies: it refuses tensors that share memory.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    atomic_write(path, safetensors.torch.save(copies, {"metadata": text}))


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and metadata. Raises UserError if it is missing, damaged or without metadata."""
    metadata = load_metadata(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: damaged weights ({first_line(error)})") from error
    if tensors_sha256(tensors) != metadata.get("tensors_sha256"):
        raise UserError(f"{path}: damaged weights (they don't have the SHA-256 that was saved with them)")
    return tensors, metadata


def load_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a weights file without its tensors. Raises UserError as load_weights."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no weights here")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("metadata", "null"))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: damaged, or no safetensors file ({first_line(error)})") from error
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: no metadata in it: it wasn't written by this project's training")
    return metadata


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, whatever the order, the device and the memory format."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def with_contents(value: Any) -> Any:
    """Plain values in which each path of a file is replaced by the SHA-256 of what it holds, at any depth."""
    if isinstance(value, dict):
        return {key: with_contents(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_contents(item) for item in value]
    return {"sha256": file_sha256(value)} if isinstance(value, str) and os.path.isfile(value) else value


def copy_tensors(target: Mapping[str, Tensor], source: Mapping[str, Tensor], origin: object) -> None:
    """Writes source into target's tensors. Raises UserError naming the origin if names or shapes differ."""
    different = sorted(differing(target, source))
    if different:
        raise UserError(
            f"{origin}: of another network: {len(different)} tensors don't fit, the first is {different[0]}"
        )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def differing(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> list[str]:
    """Names that only one of them has, or that have another shape in the other; those of target first."""
    return [
        name
        for name in {**target, **source}
        if name not in target or name not in source or target[name].shape != source[name].shape
    ]


def _plain(value: Any) -> Any:
    """The value as JSON holds it: tuples as lists, NaN and inf as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
