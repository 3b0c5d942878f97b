"""Small networks without gradients on their weights, and what is exactly true of linear ones."""

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def survives():
    """(weight [K, D], bias [K], images [N, D], labels [N], eps) -> bool [N]: no point of ball (linf) and box changes
    the answer of a linear classifier. Against each other class every input can be moved on its own."""

    def check(weight, bias, images, labels, eps):
        weight, bias, images = weight.double(), bias.double(), images.double()
        lowest, highest = (-images).clamp_min(-eps), (1 - images).clamp_max(eps)
        logits, rows = images @ weight.T + bias, torch.arange(len(images))
        safe = torch.ones(len(images), dtype=torch.bool)
        for rival in range(len(weight)):
            difference = weight[labels] - weight[rival]
            worst = torch.minimum(difference * lowest, difference * highest).sum(dim=1)
            gap = logits[rows, labels] - logits[:, rival] + worst
            safe &= (gap > 0) | (labels == rival)
        return safe

    return check


@pytest.fixture
def linear():
    """(weight, bias) -> classifier of [B, C, H, W]."""

    def build(weight, bias):
        network = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], len(weight)))
        network[1].weight.data, network[1].bias.data = weight.clone(), bias.clone()
        return network.requires_grad_(False)

    return build


@pytest.fixture
def segmenter():
    """seed -> network of [B, 3, H, W] with 4 classes, whose pixels see their neighbours."""

    def build(seed=0):
        torch.manual_seed(seed)
        layers = nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 3, padding=1)
        return nn.Sequential(*layers).requires_grad_(False).eval()

    return build


@pytest.fixture
def classifier():
    """seed -> network of [B, 3, 8, 8] with 5 classes."""

    def build(seed=0):
        torch.manual_seed(seed)
        layers = nn.Conv2d(3, 8, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 16), nn.Tanh()
        return nn.Sequential(*layers, nn.Linear(16, 5)).requires_grad_(False).eval()

    return build


class Recorder:
    """A network that remembers the images it was asked about."""

    def __init__(self, network):
        self.network, self.asked = network, []

    def __call__(self, images):
        self.asked.append(images.detach().clone())
        return self.network(images)


@pytest.fixture
def recorder():
    return Recorder
