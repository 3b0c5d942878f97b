"""Toy experts that offer what an expert offers, small enough for many tests."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from networks.resize import pad_to, upsample


class ToyExpert(nn.Module):
    """Stride-4 logits, stride-16 features, BatchNorm and dropout that training would move; counts passes."""

    stride = 16

    def __init__(self, num_classes: int, feature_channels: int = 6):
        super().__init__()
        self.num_classes, self.feature_channels = num_classes, feature_channels
        self.passes = 0
        patches = nn.Conv2d(3, 8, 4, stride=4)
        self.stem = nn.Sequential(patches, nn.BatchNorm2d(8), nn.Tanh(), nn.Dropout(0.3))
        self.head = nn.Conv2d(8, num_classes, 1)
        self.features = nn.Conv2d(8, feature_channels, 1)

    def forward(self, images):
        return upsample(self.forward_features(images)[0], images.shape[-2:], self.stride)

    def forward_features(self, images):
        self.passes += 1
        low = self.stem(pad_to(images, self.stride))
        return self.head(low), F.relu(F.avg_pool2d(self.features(low), 4))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def toy_expert():
    return ToyExpert


@pytest.fixture
def toy_experts():
    """toy_experts(number, num_classes=5) -> dict of named experts."""
    return lambda number, num_classes=5: {f"expert{index}": ToyExpert(num_classes) for index in range(number)}


def assert_gradient_is_that_of_finite_differences(model, images, probe):
    """Of sum(logits * probe) by the images, all the way through experts and gate; all in float64."""
    direction = torch.rand(images.shape, dtype=torch.float64)

    def slope(weights_of):
        leaf = images.clone().requires_grad_()
        outputs = model.run_experts(leaf)
        logits, _ = model.combine(outputs, weights_of(model.mix(outputs)[1]))
        (gradient,) = torch.autograd.grad((logits * probe).sum(), leaf)
        return (gradient * direction).sum().item()

    step = 1e-6
    with torch.no_grad():
        ahead, behind = model(images + step * direction), model(images - step * direction)
    difference = (((ahead - behind) * probe).sum() / (2 * step)).item()
    assert slope(lambda weights: weights) == pytest.approx(difference, rel=1e-5)
    assert slope(torch.detach) != pytest.approx(difference, rel=1e-3)  # so part of it came through the gate
