import pytest
import torch
import torch.nn.functional as F

from networks.resize import pad_to, upsample


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (1, 16), (97, 131)])
def test_padding_adds_zeros_below_and_to_the_right_only(size):
    images = torch.rand(2, 3, *size)
    padded = pad_to(images, 16)
    assert all(
        edge % 16 == 0 and edge - inner < 16 for edge, inner in zip(padded.shape[-2:], size, strict=True)
    )
    assert torch.equal(padded[..., : size[0], : size[1]], images)
    assert padded.sum() == pytest.approx(images.sum())


def test_upsampled_logits_are_those_of_the_padded_grid_with_half_pixel_centres():
    logits = torch.rand(1, 4, 8, 8)  # of a 32x32 padded input
    full = F.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False)
    assert torch.equal(upsample(logits, (17, 30), 16), full[..., :17, :30])


def test_a_plane_is_upsampled_without_a_shift():
    """Logits that grow linearly stay linear: pixel x of the image lies at (x + 0.5) / 4 - 0.5 on its grid."""
    logits = torch.arange(8.0).expand(1, 1, 8, 8)
    row = upsample(logits, (32, 32), 16)[0, 0, 0]
    assert torch.allclose(row[2:-2], (torch.arange(32.0)[2:-2] + 0.5) / 4 - 0.5)


def test_logits_leave_in_float32_or_finer():
    assert upsample(torch.rand(1, 2, 4, 4).bfloat16(), (16, 16), 16).dtype == torch.float32
    assert upsample(torch.rand(1, 2, 4, 4).double(), (16, 16), 16).dtype == torch.float64
