"""What a network costs: parameters and multiply-adds."""

from collections.abc import Callable

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from networks.external import External


def parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters; buffers are not counted."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, _ in counts), sum(count for count, trained in counts if trained)


def gmacs(model: nn.Module, size: tuple[int, int]) -> float:
    """Billions of multiply-adds of one forward pass in evaluation mode, for one image of (height, width).

    Convolutions and matrix products count (2 FLOPs are 1 multiply-add); normalisation, activations, pooling,
    interpolation and softmax do not. Nothing is computed: the pass runs on the meta device, but for networks of
    others, whose code may need numbers.
    """
    state, device = {}, next(model.buffers(), torch.empty(0)).device
    if not any(isinstance(module, External) for module in model.modules()):
        device = torch.device("meta")
        state = {
            name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
    image = torch.zeros(1, 3, *size, device=device)
    return counted(model, image, lambda image: functional_call(model, state, (image,)))


def counted(model: nn.Module, inputs: torch.Tensor, run: Callable | None = None) -> float:
    """Billions of multiply-adds of model(inputs), or run(inputs), with every module in evaluation mode meanwhile."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            (run or model)(inputs)
    finally:
        for module in training:
            module.training = True
    return counter.get_total_flops() / 2e9
