"""Temperatures of networks: by what their logits are to be divided so that held-out labels are most likely."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from engine.config import IGNORE, UserError

PIXELS, SEED = 500, 0  # at most so many pixels of an image are sampled; seed of the sample
COLDEST, HOTTEST = 1e-2, 1e2  # where labels are fitted best beyond, the limit is taken


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T that minimises the mean cross-entropy of softmax(logits / T) (Guo et al. 2017, arXiv 1706.04599).

    logits [N, C], labels [N] in [0, C), N >= 1; in float64. The cross-entropy is convex in 1 / T: Newton's
    method between bounds. The limits are COLDEST (where the largest logit is always right) and HOTTEST (where
    logits say nothing, or the opposite)."""
    logits = logits.double()
    given = logits.gather(1, labels[:, None])[:, 0].mean()

    def slopes(inverse: float) -> tuple[float, float]:
        """First and second derivative of the mean cross-entropy by 1 / T."""
        probabilities = (logits * inverse).softmax(dim=1)
        expected = (probabilities * logits).sum(dim=1, keepdim=True)
        variance = (probabilities * (logits - expected).square()).sum(dim=1)
        return (expected.mean() - given).item(), variance.mean().item()

    low, high = 1 / HOTTEST, 1 / COLDEST
    if slopes(low)[0] >= 0:
        return HOTTEST
    if slopes(high)[0] <= 0:
        return COLDEST
    inverse = 1.0
    while high - low > 1e-12 * low:
        slope, curvature = slopes(inverse)
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        newton = inverse - slope / curvature if curvature > 0 else low
        following = newton if low < newton < high else (low * high) ** 0.5
        if abs(following - inverse) < 1e-12 * inverse:
            break
        inverse = following
    return 1 / inverse


def fit_temperatures(
    batches: Iterable[tuple],
    grid: Callable[[tuple[int, int]], tuple[int, int]],
) -> list[float]:
    """A temperature for each expert, from the same seeded sample of labelled pixels, as many of each image.

    batches of (outputs, labels): outputs.logits [B, E, C, h, w], outputs.size (H, W), labels [B, H, W]; grid
    gives the size that logits are upsampled to before they are cropped to outputs.size. The sample depends on the
    order of images, not on the size of batches.

    Raises UserError where no pixel has a label."""
    samples = list(sample_pixels(batches, grid, pixels=PIXELS, seed=SEED))
    logits, labels = (
        (torch.cat(parts, dim=-1) for parts in zip(*samples, strict=True)) if samples else ((), ())
    )
    if not len(labels):
        raise UserError("gate.calibrate: no pixel of the validation frames has a label; set calibrate: false")
    return [fit_temperature(one.T, labels) for one in logits]


def sample_pixels(
    batches: Iterable[tuple],
    grid: Callable[[tuple[int, int]], tuple[int, int]],
    *,
    pixels: int,
    seed: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each image: logits [E, C, n] of every expert and labels [n] at up to `pixels` labelled pixels."""
    generator = torch.Generator().manual_seed(seed)
    for outputs, labels in batches:
        for logits, truth in zip(outputs.logits, labels.long(), strict=True):
            labelled = (truth != IGNORE).flatten().nonzero()[:, 0]
            chosen = torch.randperm(len(labelled), generator=generator)[:pixels]
            places = labelled[chosen.to(labelled.device)]
            rows, columns = places // truth.shape[1], places % truth.shape[1]
            yield logits_at(logits, rows, columns, grid(outputs.size)).cpu(), truth[rows, columns].cpu()


def logits_at(logits: Tensor, rows: Tensor, columns: Tensor, grid: tuple[int, int]) -> Tensor:
    """Logits [E, C, h, w] as they are at n pixels once upsampled to the grid, bilinear: [E, C, n] in float32."""
    points = torch.stack([(2 * columns + 1) / grid[1] - 1, (2 * rows + 1) / grid[0] - 1], dim=-1)
    points = points.to(torch.float32)[None, None].expand(len(logits), -1, -1, -1)  # [E, 1, n, (x, y)]
    sampled = torch.nn.functional.grid_sample(
        logits.float(), points, mode="bilinear", padding_mode="border", align_corners=False
    )
    return sampled[:, :, 0]
