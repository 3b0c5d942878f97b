"""One training step of a gate on two experts: our frozen experts against experts that take gradients.

    python -m benchmarks.gate_step [--backbone resnet101] [--size 480 640] [--batch 2] [--gate classwise]

In the public way the weights of the experts take gradients, and all is computed in float32 and NCHW. It is
measured on our network, which runs ASPP once (the public one: twice), with BatchNorm in evaluation mode and
without an update of the experts: all in its favour.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.timing import medians, report, side_by_side
from networks.deeplab import DeepLabV3Plus
from networks.gates import ClasswiseGate, SimpleGate
from networks.moe import MixtureOfExperts

GATES = {"simple": SimpleGate, "classwise": ClasswiseGate}
NUM_CLASSES = 38


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50", help="encoder of both experts (%(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=(240, 320), help="height and width %(default)s")
    parser.add_argument("--batch", type=int, default=2, help="images a step (%(default)s)")
    parser.add_argument("--gate", choices=GATES, default="simple")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, the median counts (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the figures to this file as JSON as well")
    options = parser.parse_args()

    torch.manual_seed(0)
    images = torch.rand(options.batch, 3, *options.size)
    labels = torch.randint(NUM_CLASSES, (options.batch, *options.size))
    frozen = mixture(options.backbone, GATES[options.gate])
    ours = copy.deepcopy(frozen).to(memory_format=torch.channels_last)
    public = copy.deepcopy(frozen)
    public.experts.requires_grad_(True)
    ways = {
        "experts take gradients, float32, NCHW": step(public, images, labels),
        "frozen, float32, NCHW": step(frozen, images, labels),
        "frozen, bfloat16, channels_last (ours)": step(
            ours, images.to(memory_format=torch.channels_last), labels, torch.bfloat16
        ),
    }
    difference, agreement = compare(frozen, ours, images)
    seconds = medians(side_by_side(ways, options.repeats))
    slowest = next(iter(seconds.values()))
    height, width = options.size
    report(
        f"Gate training step: {options.gate} gate, two DeepLabv3+ {options.backbone}, "
        f"{options.batch} images {height}x{width}",
        ("way", "seconds", "speed-up"),
        [(name, f"{value:.2f}", f"{slowest / value:.1f}") for name, value in seconds.items()],
        "Forward, cross-entropy, backward, SGD step of the gate; "
        f"median of {options.repeats} interleaved rounds, {torch.get_num_threads()} threads. "
        f"Expert logits in bfloat16: {difference:.1%} of their deviation off float32 (root mean square); "
        f"decisions of the mixture agree on {agreement:.1%} of the pixels.",
        options.out,
    )


def mixture(backbone: str, gate: type) -> MixtureOfExperts:
    """Two experts of different weights, their BatchNorm statistics from noise so that signals don't fade."""
    experts = {
        name: DeepLabV3Plus(NUM_CLASSES, backbone=backbone, pretrained="none")
        for name in ("highway", "urban")
    }
    with torch.no_grad():
        for expert in experts.values():
            for _ in range(3):
                expert(torch.rand(4, 3, 64, 64))
    return MixtureOfExperts(experts, gate(512, 2, NUM_CLASSES), NUM_CLASSES)


def step(model: MixtureOfExperts, images, labels, precision: torch.dtype | None = None) -> Callable[[], None]:
    """One training step as a call without arguments."""
    model.train()
    optimizer = torch.optim.SGD(model.gate.parameters(), lr=0.01, momentum=0.9)

    def run() -> None:
        with torch.autocast("cpu", precision, enabled=precision is not None):
            logits = model(images)
        model.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()

    return run


@torch.no_grad()
def compare(exact: MixtureOfExperts, ours: MixtureOfExperts, images: torch.Tensor) -> tuple[float, float]:
    """(difference of the experts' logits in their deviations, share of pixels that the mixtures agree on)."""
    expected = exact.inspect(images)
    with torch.autocast("cpu", torch.bfloat16):
        got = ours.inspect(images.to(memory_format=torch.channels_last))
    difference = (
        got.expert_logits - expected.expert_logits
    ).square().mean().sqrt() / expected.expert_logits.std()
    if difference > 0.1:
        raise SystemExit(
            f"the two ways compute different logits, apart by {difference:.0%} of their deviation"
        )
    agreement = (got.logits.argmax(1) == expected.logits.argmax(1)).float().mean()
    return difference.item(), agreement.item()


if __name__ == "__main__":
    main()
