"""The nine rows of the paper's table in one pass, against the three networks evaluated by themselves.

    python -m benchmarks.evaluation_rows [--family deeplabv3plus|frrn] [--size 480 640] [--precision fp32|bf16]

Rows: baseline, two experts, ensembles mean and max, four gates. In the plain way each network is run, upsampled,
argmaxed and counted by itself; the whole table takes it 15 forward passes (--each-by-itself measures that).
Networks have random weights, data are made of noise: neither has an influence on the time.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import medians, report, side_by_side
from engine.config import component
from evaluation.evaluate import evaluate
from evaluation.results import Protocol, Results
from evaluation.rows import Row
from metrics.confusion import confusion
from networks import ensemble
from networks.moe import Frozen, MixtureOfExperts, gate_channels
from networks.resize import upsample
from pipelines.matrix import Zoo
from pipelines.models import Trained

NUM_CLASSES = 38
NETWORKS = ("baseline", "highway", "urban")
EXPERTS = NETWORKS[1:]
GATES = {
    "moe_simple": ("simple", False),
    "moe_simple_w_conv": ("simple", True),
    "moe_classwise": ("classwise", False),
    "moe_classwise_w_conv": ("classwise", True),
}
PLAIN = "three networks, plain (NCHW)"
PLAIN_LAST = "three networks, plain (channels_last)"
THREE, NINE = "three networks, our pass", "nine rows, our pass"
APART = "nine rows, each by itself, plain (NCHW)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=("deeplabv3plus", "frrn"), default="deeplabv3plus")
    parser.add_argument("--backbone", default="resnet101", help="of deeplabv3plus (%(default)s)")
    parser.add_argument("--width", type=float, default=1.0, help="of frrn, relative (%(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), help="height and width %(default)s")
    parser.add_argument("--native", type=int, nargs=2, help="size of the labels, if it is another one")
    parser.add_argument("--frames", type=int, default=2, help="images of a round (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images of a batch (%(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--each-by-itself", action="store_true", help="measure all rows the plain way, too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, the median counts (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the figures to this file as JSON as well")
    options = parser.parse_args()

    torch.manual_seed(0)
    device, precision = torch.device(options.device), options.precision
    keys = {"variant": "A", "width": options.width}
    if options.family == "deeplabv3plus":
        keys = {"backbone": options.backbone, "pretrained": "none"}
    batches = frames(options)
    zoo, plain = zoo_of(options.family, keys, device), zoo_of(options.family, keys, device)
    for trained in zoo.networks.values():
        trained.network.to(memory_format=torch.channels_last)
    nine = zoo.rows(controls=False)
    models = {name: trained.network for name, trained in plain.networks.items()}
    last = {name: trained.network for name, trained in zoo.networks.items()}
    ways: dict[str, Callable] = {
        PLAIN: lambda: by_itself(models, batches, device, precision),
        PLAIN_LAST: lambda: by_itself(last, batches, device, precision),
        THREE: lambda: in_one_pass(zoo, nine[: len(NETWORKS)], batches, device, precision),
        NINE: lambda: in_one_pass(zoo, nine, batches, device, precision),
    }
    if options.each_by_itself:
        ways[APART] = lambda: by_itself(models | combined(plain), batches, device, precision)
    differing = compare(ways[NINE](), by_itself(last | combined(zoo), batches, device, precision))
    seconds = medians(side_by_side(ways, options.repeats))
    network = f"DeepLabv3+ {options.backbone}" if options.family == "deeplabv3plus" else "FRRN-A"
    height, width = options.size
    labels = " x ".join(map(str, options.native or options.size))
    report(
        f"Evaluation: {network} {height}x{width}, labels {labels}, {precision}, {options.frames} images",
        ("way", "seconds", f"x {PLAIN}", f"x {THREE}"),
        [
            (name, f"{value:.2f}", f"{value / seconds[PLAIN]:.2f}", f"{value / seconds[THREE]:.2f}")
            for name, value in seconds.items()
        ],
        "Forward, upsampling, argmax and confusion matrices per image; our pass also counts whom each row follows "
        f"where the experts differ. Median of {options.repeats} interleaved rounds, {torch.get_num_threads()} "
        f"threads, batches of {options.batch}. Counts of our nine rows and of nine models by themselves differ in "
        f"{differing:.4%} of the pixels.",
        options.out,
    )


def frames(options: argparse.Namespace) -> list[SimpleNamespace]:
    """Batches of noise as the loader makes them."""
    random, batches = np.random.default_rng(0), []
    for start in range(0, options.frames, options.batch):
        numbers = range(start, min(start + options.batch, options.frames))
        images = random.integers(0, 256, (len(numbers), *options.size, 3), np.uint8)
        shape = (len(numbers), *(options.native or options.size))
        labels = torch.from_numpy(random.integers(0, NUM_CLASSES, shape, np.uint8))
        batches.append(
            SimpleNamespace(
                images=torch.from_numpy(images).permute(0, 3, 1, 2),
                labels=torch.zeros(len(numbers), *options.size, dtype=torch.uint8)
                if options.native
                else labels,
                native_labels=list(labels) if options.native else None,
                frames=[SimpleNamespace(name=f"{n}", subset=EXPERTS[n % 2], block="") for n in numbers],
            )
        )
    return batches


def zoo_of(family: str, keys: dict, device: torch.device) -> Zoo:
    """Networks and gates of the table, untrained: the same weights at each call."""
    torch.manual_seed(0)

    def trained(network: nn.Module, **about) -> Trained:
        return Trained(Path(), network.eval().to(device), {"subsets": [], **about}, "")

    networks = {
        name: trained(Frozen(component("networks:NETWORKS", family, **keys).build(NUM_CLASSES)))
        for name in NETWORKS
    }
    experts = {name: networks[name].network for name in EXPERTS}
    channels = gate_channels(experts, NUM_CLASSES, "features")
    gates = {}
    for name, (kind, conv) in GATES.items():
        gate = component("networks:GATES", kind).build(channels, len(EXPERTS), NUM_CLASSES)
        mixture = MixtureOfExperts(experts, gate, NUM_CLASSES, conv=conv).requires_grad_(False)
        gates[name] = trained(mixture, gate={"type": kind, "conv": conv}), EXPERTS
    rules = {"mean": ensemble.mean, "max": ensemble.max}
    return Zoo(networks, NETWORKS[:1], EXPERTS, rules, gates)


def combined(zoo: Zoo) -> dict[str, nn.Module]:
    """The ensembles and mixtures as models that run their experts."""
    experts = {name: zoo.networks[name].network for name in EXPERTS}
    rules = {f"ensemble {name}": ensemble.Ensemble(experts, rule) for name, rule in zoo.ensembles.items()}
    return rules | {name: trained.network for name, (trained, _) in zoo.gates.items()}


@torch.inference_mode()
def by_itself(models: dict[str, nn.Module], batches: Sequence, device, precision: str) -> dict[str, Tensor]:
    """Confusion matrices [N, K, K] of each model, one model after the other."""
    counts = {}
    for name, model in models.items():
        counts[name] = []
        for batch in batches:
            images = batch.images.to(device).float() / 255
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(images)
            for one, label in zip(logits, batch.native_labels or batch.labels, strict=True):
                one, label = one[None].float(), label[None].to(device)
                if one.shape[-2:] != label.shape[-2:]:
                    one = F.interpolate(one, label.shape[-2:], mode="bilinear", align_corners=False)
                counts[name].append(confusion(one.argmax(1), label, NUM_CLASSES).cpu())
    return {name: torch.cat(parts) for name, parts in counts.items()}


def in_one_pass(zoo: Zoo, rows: Sequence[Row], batches: Sequence, device, precision: str) -> Results:
    size = tuple(batches[0].images.shape[-2:])
    classes = tuple(map(str, range(NUM_CLASSES)))
    return evaluate(
        batches,
        {name: trained.network for name, trained in zoo.networks.items()},
        rows,
        Protocol("noise", "test", classes, EXPERTS, size, precision=precision),
        upsample=upsample,
        window=lambda native: (0, 0, *size),
        device=device,
    )


def compare(results: Results, counts: dict[str, Tensor]) -> float:
    """Largest share of pixels, over the rows, that the two ways count in different cells."""
    shares = []
    for name, expected in counts.items():
        got = torch.from_numpy(np.ascontiguousarray(results.matrices[results.by_name[name]]))
        shares.append(((got - expected).abs().sum() / 2 / expected.sum()).item())
    if max(shares) > 0.01:
        raise SystemExit(f"the two ways count different answers, {max(shares):.1%} of the pixels differ")
    return max(shares)


if __name__ == "__main__":
    main()
