"""Frozen dilated depthwise convolutions against nn.Conv2d: passes forward, and with a gradient of the image.

    python -m benchmarks.dilation [--repeats 5] [--threads 1]

Separable ASPP has them, and encoders whose last stage keeps its grid. DeepLabv3+ on MobileNetV2 as in the demo, on
EfficientNet-Lite0 at 288x384, and on ResNet-101 at 480x640; weights random, float32.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.timing import medians, report, side_by_side
from networks.deeplab import DeepLabV3Plus
from networks.dilation import DilatedDepthwise

NETWORKS = (  # backbone, images, size
    ("mobilenet_v2", 4, (64, 96)),
    ("tu-tf_efficientnet_lite0", 4, (288, 384)),
    ("resnet101", 1, (480, 640)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="rounds, the median counts (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the figures to this file as JSON as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for backbone, count, size in NETWORKS:
        torch.manual_seed(0)
        quick, plain = (network(backbone, own) for own in (True, False))
        plain.load_state_dict(quick.state_dict())
        for layout in (torch.contiguous_format, torch.channels_last):
            images = torch.rand(count, 3, *size).contiguous(memory_format=layout)
            ways = {}
            for name, model in (("ours", quick), ("plain", plain)):
                model = model.to(memory_format=layout)
                ways[name, "forward"] = forward(model, images)
                ways[name, "with gradient"] = with_gradient(model, images)
            seconds = medians(side_by_side(ways, options.repeats))
            for kind in ("forward", "with gradient"):
                ours, rival = seconds["ours", kind], seconds["plain", kind]
                about = f"{backbone}, {count} x {size[0]}x{size[1]}, {str(layout).split('.')[1]}, {kind}"
                rows.append((about, f"{1000 * rival:.0f}", f"{1000 * ours:.0f}", f"{rival / ours:.2f}"))
    report(
        f"DeepLabv3+ with separable ASPP, {options.threads} threads, float32",
        ("pass", "nn.Conv2d, ms", "ours, ms", "gain"),
        rows,
        f"Evaluation mode, weights frozen; median of {options.repeats} interleaved rounds.",
        options.out,
    )


def network(backbone: str, quick: bool) -> nn.Module:
    """Of 19 classes; not quick: with nn.Conv2d throughout."""
    model = DeepLabV3Plus(19, backbone=backbone, pretrained="none", aspp_separable=True)
    for module in model.modules():
        if type(module) is DilatedDepthwise and not quick:
            module.__class__ = nn.Conv2d
    return model.eval().requires_grad_(False)


def forward(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    @torch.no_grad()
    def run() -> Tensor:
        return model(images)

    return run


def with_gradient(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        leaf = images.clone().requires_grad_()
        return torch.autograd.grad(model(leaf).logsumexp(dim=1).sum(), leaf)[0]

    return run


if __name__ == "__main__":
    main()
