"""Passes in channels_last stay in it: operations on mixed layouts take several times as long."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from networks.cnn_moe.model import CNN, CNNMoE
from networks.cnn_moe.moe_conv import Chunks
from networks.cnn_moe.routes import routes_of

LAST = torch.channels_last
ARCHITECTURES = ("resnet18", "resnet50", "wrn_28_4", "vgg16_bn")
COSTLY = ("add", "cat", "threshold_backward", "native_batch_norm", "native_group_norm", "convolution")


class Layouts(TorchDispatchMode):
    """`mixed`: costly operations on maps of more than 3 channels that are not all in channels_last."""

    def __init__(self):
        super().__init__()
        self.mixed = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [one for value in args for one in (value if isinstance(value, list | tuple) else [value])]
        maps = [one for one in given if isinstance(one, torch.Tensor) and one.dim() == 4 and one.shape[1] > 3]
        maps = [one for one in maps if min(one.shape[2:]) > 1 and one.shape[2:] != (3, 3)]  # 3x3: weights
        costly = function.__name__.startswith(COSTLY)
        if costly and any(not one.is_contiguous(memory_format=LAST) for one in maps):
            self.mixed[str(function), tuple(one.stride() for one in maps)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("experts", [1, 2])
def test_a_pass_with_gradients_stays_in_channels_last(arch, training, experts):
    torch.manual_seed(0)
    keys = {"arch": arch, "ratio": 0.25}
    model = CNN(10, **keys) if experts == 1 else CNNMoE(10, **keys, num_experts=experts)
    model.to(memory_format=LAST).train(training)
    images = torch.rand(6, 3, 32, 32).contiguous(memory_format=LAST).requires_grad_()
    if experts > 1:
        model.router.balance([model.entry(images)])
    with Layouts() as layouts:
        loss = F.cross_entropy(model(images), torch.arange(6))
        gradients = torch.autograd.grad(loss, [images, *model.parameters()])
    assert not layouts.mixed
    for weight, gradient in zip(model.parameters(), gradients[1:], strict=True):
        assert gradient.stride() == weight.stride() or min(weight.shape) == 1


def test_the_gradient_of_chunks_is_that_of_chunk():
    torch.manual_seed(0)
    weight = torch.randn(12, 5, 3, 3).to(memory_format=LAST).requires_grad_()
    slopes = torch.randn(3, 4, 5, 3, 3)

    def gradient(chunks):
        return torch.autograd.grad([chunks[0], chunks[2]], weight, [slopes[0], slopes[2]])[
            0
        ]  # nobody asked 1

    found = gradient(Chunks.apply(weight, 3))
    assert torch.equal(found, gradient(weight.chunk(3))) and found.is_contiguous(memory_format=LAST)
    assert not found[4:8].any() and found[:4].any()


def test_the_gradient_of_sorting_is_that_of_indexing():
    torch.manual_seed(0)
    (route,) = routes_of(F.one_hot(torch.tensor([2, 0, 1, 0, 2]), 3)[None].float())
    batch = torch.randn(5, 4, 3, 3).contiguous(memory_format=LAST).requires_grad_()
    slope = torch.randn(5, 4, 3, 3)
    for found, expected in (
        (route.sort(batch), batch[route.order]),
        (route.unsort(batch), batch[route.back]),
    ):
        assert torch.equal(found, expected)
        own, other = (torch.autograd.grad(one, batch, slope)[0] for one in (found, expected))
        assert torch.equal(own, other)
    assert torch.equal(route.unsort(route.sort(batch)), batch)
