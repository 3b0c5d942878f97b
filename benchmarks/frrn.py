"""FRRN-A forward and training step: our network against the paper's wording in float32 and NCHW, same weights.

    python -m benchmarks.frrn [--size 480 640] [--batch 1] [--width 1] [--weights runs/RUN]

The rival keeps the residual stream at full resolution, where every unit pools it f x f and adds to it; so
does the published code. Peak memory is that of one training step, each in a process of its own (Linux).
"""

import argparse
import copy
import multiprocessing
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.timing import medians, report, side_by_side
from engine.config import UserError, load
from networks.frrn import FRRN, Convolution, FullResolutionUnit, ResidualUnit
from networks.resize import pad_to
from pipelines.models import load_network
from pipelines.segmentation import evaluation_batches

NUM_CLASSES = 38
PLAIN, OURS_EXACT = "the paper's wording, float32, NCHW", "ours, float32, NCHW"
OURS, OURS_LEAN = "ours, bfloat16, channels_last", "ours, bfloat16, channels_last, checkpointing"


def plain_forward(network: FRRN, images: torch.Tensor) -> torch.Tensor:
    """images [B, 3, H, W] in [0, 1] -> logits [B, C, H, W] as the paper puts it, with the network's weights."""
    encoder, decoder = network.encoder, network.decoder
    pooling = F.relu(normalised(encoder.stem, pad_to(network.normalize(images), network.stride)))
    for unit in encoder.units:
        pooling = residual_unit(unit, pooling)
    residual = normalised(encoder.split, pooling)
    factor = 1
    for level in encoder.levels:
        pooling, factor = F.max_pool2d(pooling, 2), factor * 2
        for unit in level:
            pooling, residual = full_resolution_unit(unit, pooling, residual, factor)
    for level in decoder.levels:
        pooling, factor = unpooled(pooling), factor // 2
        for unit in level:
            pooling, residual = full_resolution_unit(unit, pooling, residual, factor)
    pooling = torch.cat([unpooled(pooling), residual], dim=1)
    for unit in (decoder.join.unit, *decoder.units):
        pooling = residual_unit(unit, pooling)
    return decoder.classifier(pooling)[..., : images.shape[-2], : images.shape[-1]]


def normalised(layer: Convolution, features: torch.Tensor) -> torch.Tensor:
    return layer.norm(layer.conv(features))


def residual_unit(unit: ResidualUnit, features: torch.Tensor) -> torch.Tensor:
    return unit.skip(features) + normalised(unit.second, F.relu(normalised(unit.first, features)))


def full_resolution_unit(
    unit: FullResolutionUnit, pooling: torch.Tensor, residual: torch.Tensor, factor: int
) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.cat([pooling, F.max_pool2d(residual, factor)], dim=1)
    pooling = F.relu(normalised(unit.second, F.relu(normalised(unit.first, both))))
    return pooling, residual + F.interpolate(unit.residual(pooling), scale_factor=factor, mode="nearest")


def unpooled(pooling: torch.Tensor) -> torch.Tensor:
    return F.interpolate(pooling, scale_factor=2, mode="bilinear", align_corners=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), help="height and width, %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="images of a training step (%(default)s)")
    parser.add_argument("--width", type=float, default=1.0, help="width of the network (%(default)s)")
    parser.add_argument(
        "--weights", help="run folder of a trained FRRN, to compare decisions on its test frames"
    )
    parser.add_argument("--frames", type=int, default=16, help="how many of these (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, the median counts (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the figures to this file as JSON as well")
    options = parser.parse_args()

    agreement = ""
    if options.weights:
        try:
            share, count = trained_agreement(options.weights, options.frames)
        except UserError as error:
            parser.error(str(error))
        agreement = (
            f" Trained network of {options.weights}: decisions of ours in bfloat16 and of the paper's wording in "
            f"float32 agree on {share:.2%} of the pixels of {count} test frames."
        )
        print(agreement.strip())
    size = (options.batch, *options.size)
    forward = {name: evaluation(way, options.width, (1, *options.size)) for name, way in WAYS.items()}
    del forward[OURS_LEAN]  # without gradients there is nothing to keep
    check_that_they_agree(forward)
    forwards = medians(side_by_side(forward, options.repeats))
    steps = medians(
        side_by_side(
            {name: training_step(way, options.width, size) for name, way in WAYS.items()}, options.repeats
        )
    )
    rows = []
    for name, seconds in steps.items():
        evaluated = (
            (f"{forwards[name]:.2f}", f"{forwards[PLAIN] / forwards[name]:.1f}")
            if name in forwards
            else ("", "")
        )
        memory = f"{peak_memory(name, options.width, size):,.0f}"
        rows.append((name, *evaluated, f"{seconds:.2f}", f"{steps[PLAIN] / seconds:.1f}", memory))
    report(
        f"FRRN-A, width {options.width:g}, {options.size[0]}x{options.size[1]}, untrained",
        ("way", "forward s", "forward gain", "training step s", "step gain", "peak MiB of a step"),
        rows,
        f"Forward: 1 image, evaluation mode; step: batch of {options.batch}, forward, cross-entropy, backward, AdamW; "
        f"median of {options.repeats} interleaved rounds, {torch.get_num_threads()} threads.{agreement}",
        options.out,
    )


def untrained(width: float, checkpointing: bool = False) -> FRRN:
    """The same weights at every call; BatchNorm statistics from noise so that signals don't fade."""
    torch.manual_seed(0)
    network = FRRN(NUM_CLASSES, width=width, checkpointing=checkpointing).train()
    with torch.no_grad():
        for _ in range(10):
            network(torch.rand(2, 3, 64, 64))
    return network


# name -> (forward, checkpointing, memory format, precision)
WAYS = {
    PLAIN: (plain_forward, False, torch.contiguous_format, torch.float32),
    OURS_EXACT: (FRRN.forward, False, torch.contiguous_format, torch.float32),
    OURS: (FRRN.forward, False, torch.channels_last, torch.bfloat16),
    OURS_LEAN: (FRRN.forward, True, torch.channels_last, torch.bfloat16),
}


def evaluation(way: tuple, width: float, size: tuple[int, int, int]) -> Callable[[], torch.Tensor]:
    """A forward pass in evaluation mode as a call without arguments; size: (batch, height, width)."""
    forward, checkpointing, layout, precision = way
    network = untrained(width, checkpointing).eval().to(memory_format=layout)
    images = torch.rand(size[0], 3, *size[1:]).contiguous(memory_format=layout)

    def run() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            return forward(network, images)

    return run


def training_step(way: tuple, width: float, size: tuple[int, int, int]) -> Callable[[], None]:
    """A training step as a call without arguments; size: (batch, height, width)."""
    forward, checkpointing, layout, precision = way
    network = untrained(width, checkpointing).to(memory_format=layout)
    images = torch.rand(size[0], 3, *size[1:]).contiguous(memory_format=layout)
    labels = torch.randint(NUM_CLASSES, size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            logits = forward(network, images)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()

    return run


def check_that_they_agree(ways: dict[str, Callable[[], torch.Tensor]]) -> None:
    logits = {name: way() for name, way in ways.items()}
    for name, got in logits.items():
        difference = (got - logits[PLAIN]).square().mean().sqrt() / logits[PLAIN].std()
        if difference > (1e-4 if name == OURS_EXACT else 0.1):
            raise SystemExit(f"{name}: the logits are off by {difference:.1%} of their deviation")


def peak_memory(name: str, width: float, size: tuple[int, int, int]) -> float:
    """MiB that one training step needs beyond what a fresh process holds before it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_memory, (name, width, size, torch.get_num_threads()))


def measure_memory(name: str, width: float, size: tuple[int, int, int], threads: int) -> float:
    torch.set_num_threads(threads)
    run = training_step(WAYS[name], width, size)
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MiB of this process now (VmRSS) or at most (VmHWM). The peak of getrusage would be the parent's, too."""
    kibibytes = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kibibytes[1]) / 1024


@torch.no_grad()
def trained_agreement(run: str, most: int) -> tuple[float, int]:
    """(share of pixels where our bfloat16 decides as the paper's wording in float32, number of test frames)."""
    exact = load_network(run, "--weights").network.network
    ours = copy.deepcopy(exact).to(memory_format=torch.channels_last)
    agreeing = [
        (plain_forward(exact, images).argmax(1) == fast_logits(ours, images).argmax(1)).float().mean()
        for images in test_images(run, most)
    ]
    return torch.stack(agreeing).mean().item(), len(agreeing)


def fast_logits(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return network(images.contiguous(memory_format=torch.channels_last))


def test_images(run: str, most: int) -> Iterator[torch.Tensor]:
    """Test frames of the run's own data, [1, 3, H, W] in [0, 1], spread over its subsets."""
    data = load(Path(run) / "config.yaml").data
    index = data.build()
    frames = index.select("test", data.subsets)
    frames = frames[:: max(1, len(frames) // most)][:most]
    for batch in evaluation_batches(data, index, frames, 1, "network"):
        yield batch.images.float() / 255


if __name__ == "__main__":
    main()
