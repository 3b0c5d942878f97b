"""The maps from grids to labels against upsampling, cropping and resizing one after the other."""

import pytest
import torch
import torch.nn.functional as F

from evaluation import enlarge
from evaluation.enlarge import Enlargements
from networks.resize import upsample

CPU = torch.device("cpu")


def one_after_the_other(logits, stride, size, window, label_size):
    top, left, height, width = window
    if stride is not None:
        logits = upsample(logits, size, stride)
    logits = logits[:, :, top : top + height, left : left + width]
    if label_size != (height, width):
        logits = F.interpolate(logits, size=label_size, mode="bilinear", align_corners=False)
    return logits


@pytest.mark.parametrize(
    ("grid", "stride", "size", "window", "label_size"),
    [
        ((12, 16), 16, (48, 64), (0, 0, 48, 64), (48, 64)),  # the network's resolution
        ((12, 16), 16, (41, 59), (0, 0, 41, 59), (41, 59)),  # padded to a multiple of 16
        ((12, 16), 16, (41, 59), (3, 0, 30, 59), (151, 240)),  # letterbox, native size
        ((48, 64), 16, (41, 59), (0, 0, 41, 59), (41, 59)),  # full-size logits on the padded grid: cropped
        ((48, 64), 16, (48, 64), (0, 5, 48, 50), (48, 50)),
        ((41, 59), None, (41, 59), (0, 0, 41, 59), (41, 59)),  # at the input's size already
        ((41, 59), None, (41, 59), (0, 0, 41, 59), (30, 200)),  # one axis smaller, one larger
        ((2, 2), 16, (16, 16), (0, 0, 16, 16), (1, 70)),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("band_bytes", [1, 10_000, 2**30])
def test_it_is_upsampling_cropping_and_resizing(
    monkeypatch, grid, stride, size, window, label_size, layout, band_bytes
):
    monkeypatch.setattr(enlarge, "BAND_BYTES", band_bytes)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, *grid, generator=generator).to(memory_format=layout)
    expected = one_after_the_other(logits.double(), stride, size, window, label_size).float()
    mapping = Enlargements(upsample, CPU).to_label(logits, stride, size, window, label_size)
    bands = list(mapping.bands(logits))
    assert torch.allclose(torch.cat([band for _, band in bands], dim=2), expected, atol=2e-6)
    assert torch.allclose(mapping.whole(logits), expected, atol=2e-6)
    assert [row for rows, _ in bands for row in range(rows.start, rows.stop)] == list(range(label_size[0]))
    assert all(band.is_contiguous(memory_format=torch.channels_last) for _, band in bands)
    assert len(bands) == label_size[0] or band_bytes > 1


def test_a_map_without_resizing_leaves_every_bit_as_it_is():
    logits = torch.randn(1, 3, 32, 48)
    logits[0, 1, 5, 5] = -torch.inf  # would become NaN in a product
    mapping = Enlargements(upsample, CPU).to_label(logits, 16, (30, 48), (1, 0, 20, 40), (20, 40))
    assert not torch.equal(mapping.whole(logits), logits[:, :, :20, :40])  # starts at the second row
    assert torch.equal(
        Enlargements(upsample, CPU).to_input(logits, 16, (30, 40)).whole(logits), logits[:, :, :30, :40]
    )


def test_frames_of_one_size_share_a_map():
    asked = []

    def counting(logits, size, stride):
        asked.append(size)
        return upsample(logits, size, stride)

    logits, maps = torch.randn(1, 3, 12, 16), Enlargements(counting, CPU)
    for _ in range(3):
        maps.to_label(logits, 16, (48, 64), (0, 0, 48, 64), (100, 120))
    assert asked == [(48, 1), (64, 1)]
