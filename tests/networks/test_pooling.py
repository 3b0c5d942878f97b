"""The same as mean and slices, with gradients in the layout of the features."""

import pytest
import torch

from networks.pooling import every, global_mean

PAIRS = {
    "mean": (global_mean, lambda x: x.mean(dim=(2, 3))),
    "every": (lambda x: every(x, 2), lambda x: x[:, :, ::2, ::2]),
    "every third": (lambda x: every(x, 3), lambda x: x[:, :, ::3, ::3]),
    "each": (lambda x: every(x, 1), lambda x: x),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(7, 7), (8, 5), (1, 2)])
def test_values_and_gradients(pair, layout, size):
    torch.manual_seed(0)
    features = torch.randn(2, 6, *size).contiguous(memory_format=layout).requires_grad_()
    found, expected = (function(features) for function in pair)
    assert torch.allclose(found, expected, atol=1e-6)
    slope = torch.randn_like(expected)
    (own,) = torch.autograd.grad(found, features, slope)
    (other,) = torch.autograd.grad(expected, features, slope)
    assert torch.allclose(own, other, atol=1e-6)
    assert own.is_contiguous(memory_format=layout)
