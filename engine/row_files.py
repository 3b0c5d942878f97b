"""Tensors as rows of plain files: how they are laid out, written, memory-mapped and checked."""

import mmap
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.disk import Log, progress


@dataclass(frozen=True)
class Layout:
    """How a row of a tensor is stored: with its dimensions in the order in which they lie in memory, so that
    what is read has the strides of what was written."""

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]  # of the dimensions, outermost first

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout":
        """That of the rows of a tensor [B, ...]."""
        strides = tensor.stride()[1:]
        order = sorted(range(len(strides)), key=lambda dimension: -strides[dimension])
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape[1:]), tuple(order))

    @classmethod
    def from_plain(cls, values: dict) -> "Layout":
        """What `asdict` and JSON made of one."""
        return cls(values["dtype"], tuple(values["shape"]), tuple(values["order"]))

    def plain(self) -> dict:
        return asdict(self)

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return prod(self.shape) * getattr(torch, self.dtype).itemsize

    def to_bytes(self, tensor: Tensor) -> np.ndarray:
        """A tensor [B, ...] -> uint8 [B, nbytes]."""
        stored = tensor.detach().permute(0, *(1 + dimension for dimension in self.order)).cpu().contiguous()
        return stored.view(len(tensor), -1).view(torch.uint8).numpy()


class RowFile:
    """A finished file of rows, memory-mapped. Raises ValueError where it has another size."""

    def __init__(self, path: Path, layout: Layout, count: int):
        self.layout = layout
        if path.stat().st_size < count * layout.nbytes:
            raise ValueError(f"{path.stat().st_size} bytes instead of {count * layout.nbytes}")
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.rows = np.frombuffer(self.map, np.uint8, count * layout.nbytes).reshape(count, layout.nbytes)

    def intact(self, sums: Sequence[int], title: str, log: Log) -> int:
        """How many of the first rows have these checksums."""
        with ThreadPoolExecutor() as threads:
            found = progress(threads.map(zlib.crc32, self.rows), len(sums), title, log)
            equal = [crc32 == written for crc32, written in zip(found, sums, strict=False)]
        return next((row for row, same in enumerate(equal) if not same), len(equal))

    def ask_for(self, rows: Sequence[int]) -> None:
        """Lets the disk begin to read what is to be gathered."""
        if hasattr(mmap, "MADV_WILLNEED"):
            for row in rows:
                start = row * self.layout.nbytes
                page = start // mmap.PAGESIZE * mmap.PAGESIZE
                self.map.madvise(mmap.MADV_WILLNEED, page, start + self.layout.nbytes - page)

    def gather(self, rows: Sequence[int], pin: bool = False) -> Tensor:
        """A tensor [len(rows), ...] on the CPU: one copy, into pinned memory if asked."""
        layout = self.layout
        shape = [layout.shape[dimension] for dimension in layout.order]
        tensor = torch.empty(len(rows), *shape, dtype=getattr(torch, layout.dtype), pin_memory=pin)
        target = tensor.view(len(rows), -1).view(torch.uint8).numpy()
        for place, row in enumerate(rows):
            target[place] = self.rows[row]
        places = sorted(range(len(layout.order)), key=lambda place: layout.order[place])
        return tensor.permute(0, *(1 + place for place in places))
