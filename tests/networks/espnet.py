"""ESPNet (Mehta et al. 2018, arXiv 1803.06815) for the published CamVid weights: a network of others, for tests.

    network: {name: external, file: tests/networks/espnet.py, args: {weights: FILE}}

Written from the paper and the shapes of the tensors, whose names it has. In these weights the last concatenation takes
the 19 channels of `b1`, and the 12 classes are the ids of the CamVid folder, the last of them "unlabelled": it is
left out, so that the logits are those of the 11 classes.
"""

import os
from pathlib import Path

import torch
from torch import nn

MEAN = (111.2, 109.0, 105.6)  # of BGR in 0..255, as stated with the weights
STD = (78.3, 79.6, 78.6)
CLASSES = 12
DEAD = 1e-30  # weights below are dead channels that weight decay went on shrinking
RATES = (1, 2, 4, 8, 16)


class Norm(nn.Module):
    """BatchNorm and PReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(channels, eps=1e-3), nn.PReLU(channels)

    def forward(self, features):
        return self.act(self.bn(features))


class Conv(nn.Module):
    """A convolution without bias, on request with BatchNorm and PReLU behind it."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, rate: int = 1, norm: bool = False
    ):
        super().__init__()
        padding = (kernel - 1) // 2 * rate
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation=rate, bias=False)
        if norm:
            self.bn, self.act = nn.BatchNorm2d(outputs, eps=1e-3), nn.PReLU(outputs)

    def forward(self, features):
        features = self.conv(features)
        return self.act(self.bn(features)) if hasattr(self, "bn") else features


class ESP(nn.Module):
    """Reduce, split into dilated convolutions, add them up one after the other, join, and add the input."""

    def __init__(self, inputs: int, outputs: int, *, down: bool = False, residual: bool = True):
        super().__init__()
        part = outputs // 5
        first = outputs - 4 * part
        self.c1 = Conv(inputs, part, 3 if down else 1, stride=2 if down else 1)
        for rate in RATES:
            setattr(self, f"d{rate}", Conv(part, first if rate == 1 else part, 3, rate=rate))
        if down:
            self.bn, self.act = nn.BatchNorm2d(outputs, eps=1e-3), nn.PReLU(outputs)
        else:
            self.bn = Norm(outputs)
        self.residual = residual and not down

    def forward(self, features):
        reduced = self.c1(features)
        first, *others = (getattr(self, f"d{rate}")(reduced) for rate in RATES)
        sums = [others[0]]
        for other in others[1:]:
            sums.append(sums[-1] + other)
        joined = torch.cat([first, *sums], dim=1)
        joined = self.bn(features + joined if self.residual else joined)
        return self.act(joined) if hasattr(self, "act") else joined


class Encoder(nn.Module):
    """Strides 2, 4 and 8, with the image, averaged, beside the first two."""

    def __init__(self, p: int, q: int):
        super().__init__()
        self.level1, self.b1 = Conv(3, 16, 3, stride=2, norm=True), Norm(19)
        self.level2_0 = ESP(19, 64, down=True)
        self.level2 = nn.ModuleList(ESP(64, 64) for _ in range(p))
        self.b2 = Norm(131)
        self.level3_0 = ESP(131, 128, down=True)
        self.level3 = nn.ModuleList(ESP(128, 128) for _ in range(q))
        self.b3 = Norm(256)
        self.classifier = Conv(256, CLASSES, 1)
        self.halve = nn.AvgPool2d(3, stride=2, padding=1)

    def forward(self, images):
        half = self.halve(images)
        low = self.b1(torch.cat([self.level1(images), half], dim=1))
        middle = first = self.level2_0(low)
        for block in self.level2:
            middle = block(middle)
        middle = self.b2(torch.cat([middle, first, self.halve(half)], dim=1))
        high = first = self.level3_0(middle)
        for block in self.level3:
            high = block(high)
        return low, middle, self.classifier(self.b3(torch.cat([first, high], dim=1)))


class ESPNet(nn.Module):
    """RGB images [B, 3, H, W] in [0, 1], H and W multiples of 8, -> logits [B, 11, H, W]."""

    def __init__(self, p: int = 2, q: int = 8):
        super().__init__()
        self.encoder = Encoder(p, q)
        self.level3_C = Conv(131, CLASSES, 1)
        self.br = nn.BatchNorm2d(CLASSES, eps=1e-3)
        self.up_l3 = nn.Sequential(doubled())
        self.combine_l2_l3 = nn.Sequential(Norm(2 * CLASSES), ESP(2 * CLASSES, CLASSES, residual=False))
        self.up_l2 = nn.Sequential(doubled(), Norm(CLASSES))
        self.conv = Conv(19 + CLASSES, CLASSES, 3, norm=True)
        self.classifier = doubled()
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images):
        bgr = (255 * images.flip(1) - self.mean) / self.std / 255
        low, middle, high = self.encoder(bgr)
        deep = self.up_l3(self.br(high))
        deep = self.up_l2(self.combine_l2_l3(torch.cat([self.level3_C(middle), deep], dim=1)))
        return self.classifier(self.conv(torch.cat([deep, low], dim=1)))[:, : CLASSES - 1]


def doubled() -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(CLASSES, CLASSES, 2, stride=2, bias=False)


def build(weights: str = "") -> ESPNet:
    """With the published weights; where they lie without `weights`: $MOE_DATA/weights/espnet. Dead ones are exact
    zeros here: logits and gradients are the same bit for bit, and passes without denormal numbers take a third of
    the time on some processors."""
    file = Path(weights or Path(os.environ["MOE_DATA"]) / "weights/espnet/espnet_p_2_q_8_camvid.pth")
    network = ESPNet()
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    for tensor in tensors.values():
        tensor[tensor.abs() < DEAD] = 0
    network.load_state_dict(tensors)
    return network.eval()
