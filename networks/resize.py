"""Any input size: pad up to a network's multiple, bring logits back to the size that came in."""

import torch
import torch.nn.functional as F


def padded(size: int, multiple: int) -> int:
    """The smallest multiple that holds size pixels."""
    return -(-size // multiple) * multiple


def pad_to(images: torch.Tensor, multiple: int) -> torch.Tensor:
    """images [B, C, H, W] with zeros below and to the right, up to multiples of `multiple`.

    After normalisation zero is the mean colour.
    """
    height, width = images.shape[-2:]
    return F.pad(images, (0, padded(width, multiple) - width, 0, padded(height, multiple) - height))


def upsample(logits: torch.Tensor, size: tuple[int, int], multiple: int) -> torch.Tensor:
    """Logits [B, C, h, w] on the padded grid -> [B, C, *size]: bilinear (align_corners False), then cropped.

    At least in float32, since interpolated bfloat16 logits tie.
    """
    height, width = size
    logits = full_precision(logits)
    grid = (padded(height, multiple), padded(width, multiple))
    if tuple(logits.shape[-2:]) != grid:
        logits = F.interpolate(logits, size=grid, mode="bilinear", align_corners=False)
    return logits[..., :height, :width]


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or as it is where it is finer."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
