"""Cross-entropy of bilinearly upsampled logits, band by band: the full-size logits never lie in memory."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

BAND = 2**19  # numbers in a band [rows, C, W], which is to stay in a core's cache while it is worked on
COLUMNS = 64  # output columns that one small dense matrix interpolates


def upsample(logits: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
    """Logits [B, C, h, w] -> [B, C, *size]: bilinear to `grid` (align_corners False), then cropped."""
    if tuple(logits.shape[-2:]) != tuple(grid):
        logits = F.interpolate(logits, size=tuple(grid), mode="bilinear", align_corners=False)
    return logits[..., : size[0], : size[1]]


def upsampled_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    grid: Sequence[int],
    ignore_index: int,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Sum over the pixels of the softmax cross-entropy of `upsample(logits, grid, size of the labels)`.

    The way for CPUs: several times quicker than the plain one, and equal to it up to rounding. The gradient is
    made in the forward pass, at about the cost of the loss.

    logits: [B, C, h, w], finite, taken at least in float32. labels: integers [B, H, W], H and W at most those
    of the grid; ignore_index is not counted. class_weights: factors of the classes [C].
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return _CrossEntropy.apply(logits, labels, grid, ignore_index, class_weights)


class _CrossEntropy(torch.autograd.Function):
    """Products with `out` and in place: autocast leaves those in the precision that they are given."""

    @staticmethod
    def forward(ctx, logits, labels, grid, ignore_index, class_weights):
        total, gradient = _sweep(logits, labels, grid, ignore_index, class_weights)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0], None, None, None, None


def _sweep(
    logits: Tensor, labels: Tensor, grid: Sequence[int], ignore_index: int, class_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(summed loss, its gradient [B, C, h, w]); each image's rows in bands, from logits to gradient in one go."""
    batch, classes, height, width = logits.shape
    full_height, full_width = labels.shape[1:]
    bands = _pieces(height, grid[0], full_height, max(1, BAND // (classes * full_width)), logits)
    columns = _pieces(width, grid[1], full_width, COLUMNS, logits)
    totals, gradient = logits.new_empty(batch), torch.empty_like(logits)
    numbers = iter(range(batch))

    @torch.no_grad()
    def take_images() -> None:
        # Rows before classes: the rows that a band is made of lie together, as [rows, C * W] for one product.
        image, image_gradient = logits.new_empty(2, height, classes, width)
        wide_buffer = logits.new_empty(max(len(matrix.T) for *_, matrix in bands), classes, full_width)
        band_buffer = logits.new_empty(max(len(matrix) for *_, matrix in bands), classes, full_width)
        losses = logits.new_empty(full_height, full_width)
        for number in numbers:
            # in powers of two: exp2 takes a quarter of the time of exp
            image.copy_(logits[number].transpose(0, 1)).mul_(1 / math.log(2))
            image_gradient.zero_()
            for rows, source, matrix in bands:
                band, wide = band_buffer[: len(matrix)], wide_buffer[: len(matrix.T)]
                for outputs, inputs, weights in columns:
                    torch.mm(_lines(image[source])[:, inputs], weights.T, out=_lines(wide)[:, outputs])
                torch.mm(matrix, wide.flatten(1), out=band.flatten(1))
                truth = labels[number, rows, None].long()  # [rows, 1, W]
                counted = truth != ignore_index
                truth = truth.where(counted, 0)
                factors = counted.to(logits)
                if class_weights is not None:
                    factors *= class_weights.to(logits)[truth]
                band -= band.amax(1, keepdim=True)
                true_logits = band.gather(1, truth)
                sums = band.exp2_().sum(1, keepdim=True)
                torch.mul(sums.log2() - true_logits, factors, out=losses[rows, None])
                band *= factors / sums
                band.scatter_add_(1, truth, -factors)  # factor * (softmax - one-hot), the gradient
                torch.mm(matrix.T, band.flatten(1), out=wide.flatten(1))
                for outputs, inputs, weights in columns:
                    _lines(image_gradient[source])[:, inputs].addmm_(_lines(wide)[:, outputs], weights)
            gradient[number] = image_gradient.transpose(0, 1)
            totals[number] = losses.sum()

    _in_threads(take_images, batch)
    return totals.sum() * math.log(2), gradient


def _in_threads(work: Callable[[], None], most: int) -> None:
    """Runs the work in as many threads as torch uses, at most `most`, each with operations of its own.

    Operations as small as these lose more by the threads' waiting for each other after each one than they win,
    and on a busy machine lose everything. This way results are the same for any number of threads, too."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for done in [pool.submit(work) for _ in range(min(threads, most))]:
                done.result()
    finally:
        torch.set_num_threads(threads)  # else threads that torch meets later would have one as well


def _lines(tensor: Tensor) -> Tensor:
    """[rows, C, W] -> [rows * C, W], without a copy."""
    return tensor.view(-1, tensor.shape[-1])


def _pieces(
    size: int, full_size: int, kept: int, step: int, like: Tensor
) -> list[tuple[slice, slice, Tensor]]:
    """Linear interpolation from size to the first `kept` of full_size points, `step` of them at a time.

    (outputs, inputs that they depend on, matrix [outputs, inputs]) of each piece."""
    points = torch.eye(size, dtype=like.dtype, device=like.device)[None]
    matrix = F.interpolate(points, size=full_size, mode="linear", align_corners=False)[0].T[:kept]
    pieces = []
    for start in range(0, kept, step):
        part = matrix[start : start + step]
        used = part.any(0).nonzero()
        inputs = slice(used[0].item(), used[-1].item() + 1)
        pieces.append((slice(start, start + len(part)), inputs, part[:, inputs].contiguous()))
    return pieces
