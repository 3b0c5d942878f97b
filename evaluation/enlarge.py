"""From the grid of logits to the pixels of a label: one linear map, applied to a band of rows at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMNS = 64  # columns that are made by one product
BAND_BYTES = 2**20  # of logits in a band: what stays in the cache of a core
BAND_BYTES_GPU = 2**28


@dataclass(frozen=True)
class Strip:
    """Neighbouring outputs [start, stop) of an axis, the inputs [low, high) they are made of, and how."""

    start: int
    stop: int
    low: int
    high: int
    matrix: Tensor | None  # [stop - start, high - low]; None: the inputs themselves


def rows_in_cache(tensor: Tensor) -> int:
    """As many rows of a tensor [..., h, w] as make up a band."""
    limit = BAND_BYTES if tensor.device.type == "cpu" else BAND_BYTES_GPU
    row_bytes = tensor[..., 0, :].numel() * tensor.element_size()
    return max(1, limit // row_bytes)


class Axis:
    """A linear map along one axis, matrix [outputs, inputs] with its entries near the diagonal."""

    def __init__(self, matrix: Tensor, device: torch.device):
        self.length = len(matrix)
        self.identity = torch.equal(matrix, torch.eye(matrix.shape[1], dtype=matrix.dtype)[: self.length])
        self._matrix, self._device = matrix, device
        self._strips: dict[int, list[Strip]] = {}

    def strips(self, length: int) -> list[Strip]:
        """The whole axis in pieces of `length` outputs."""
        if length not in self._strips:
            starts = range(0, self.length, length)
            self._strips[length] = [self._strip(start, min(start + length, self.length)) for start in starts]
        return self._strips[length]

    def _strip(self, start: int, stop: int) -> Strip:
        if self.identity:
            return Strip(start, stop, start, stop, None)
        used = self._matrix[start:stop].any(dim=0).nonzero().flatten().tolist()
        low, high = used[0], used[-1] + 1
        return Strip(start, stop, low, high, self._matrix[start:stop, low:high].float().to(self._device))


@dataclass(frozen=True)
class Enlargement:
    """Logits [B, C, h, w] -> [B, C, H, W], rows and columns each by themselves."""

    rows: Axis
    columns: Axis

    def bands(self, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(rows, logits [B, C, rows, W] stored channels last) from top to bottom."""
        wide = self._widened(logits.permute(0, 2, 3, 1))  # [B, h, W, C]
        for strip in self.rows.strips(rows_in_cache(wide.permute(0, 3, 1, 2))):
            band = wide[:, strip.low : strip.high].contiguous()
            if strip.matrix is not None:
                band = (strip.matrix @ band.flatten(2)).view(len(band), -1, *band.shape[2:])
            yield slice(strip.start, strip.stop), band.permute(0, 3, 1, 2)

    def whole(self, logits: Tensor) -> Tensor:
        """All bands in one, [B, C, H, W] stored channels last."""
        return torch.cat([band for _, band in self.bands(logits)], dim=2)

    def _widened(self, logits: Tensor) -> Tensor:
        """[B, h, w, C] -> [B, h, W, C]."""
        if self.columns.identity:
            return logits[:, :, : self.columns.length]
        wide = logits.new_empty(*logits.shape[:2], self.columns.length, logits.shape[-1])
        for strip in self.columns.strips(COLUMNS):
            wide[:, :, strip.start : strip.stop] = strip.matrix @ logits[:, :, strip.low : strip.high]
        return wide


class Enlargements:
    """The maps from the grids of networks to inputs and labels; frames of one size share theirs.

    `upsample(logits, size, stride)` is the networks' own way from the grid to the input: linear, and each axis by
    itself. From there a frame's part of the input is cut out and brought to the size of its label, bilinear. Both
    are one map here, so that logits at the input's size are never made; up to rounding the result is the same.
    """

    def __init__(self, upsample: Callable[[Tensor, tuple[int, int], int], Tensor], device: torch.device):
        self._upsample, self._device = upsample, device
        self._axes: dict[tuple, Axis] = {}

    def to_input(self, logits: Tensor, stride: int | None, size: tuple[int, int]) -> Enlargement:
        """For logits [B, C, h, w] on a network's grid, or at the input's `size` already (stride None)."""
        return self.to_label(logits, stride, size, (0, 0, *size), size)

    def to_label(
        self,
        logits: Tensor,
        stride: int | None,
        size: tuple[int, int],
        window: tuple[int, int, int, int],
        label_size: tuple[int, int],
    ) -> Enlargement:
        """To a label that covers the window (top, left, height, width) of the input."""
        top, left, height, width = window
        rows, columns = logits.shape[-2:]
        return Enlargement(
            self._axis(rows, stride, size[0], top, height, label_size[0]),
            self._axis(columns, stride, size[1], left, width, label_size[1]),
        )

    def _axis(self, *about: int | None) -> Axis:
        if about not in self._axes:
            self._axes[about] = Axis(self._matrix(*about), self._device)
        return self._axes[about]

    def _matrix(
        self, inputs: int, stride: int | None, size: int, start: int, length: int, outputs: int
    ) -> Tensor:
        """What becomes of the unit vectors, [outputs, inputs] in float64."""
        units = torch.eye(inputs, dtype=torch.float64)[None, :, :, None]
        if stride is not None:
            units = self._upsample(units, (size, 1), stride)
        units = units[:, :, start : start + length]
        if outputs != length:
            units = F.interpolate(units, size=(outputs, 1), mode="bilinear", align_corners=False)
        return units[0, :, :, 0].T.contiguous()
