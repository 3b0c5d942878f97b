"""An epoch of gate training: the experts' outputs from the cache against experts that run for every batch.

    python -m benchmarks.gate_epoch [--frames 64] [--gates simple classwise] [--repeats 3]

Both ways are our own (bfloat16, channels_last, experts without a graph, the loss of upsampled logits in bands).
Beside them: all gates in one pass of the experts, and the plain way, which runs the experts without a graph
too, but in float32 and NCHW, and takes F.cross_entropy of F.interpolate. Needs about 8 MB of disk a frame.
From the cache an epoch is timed whole; where experts run, --running of its frames are, since each costs the same.
"""

import argparse
import copy
import itertools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import medians, report, side_by_side
from dataloaders.frames import Frame, FrameIndex
from dataloaders.loader import Batch, TrainBatches, eval_loader, train_loader
from engine.arithmetic import layout_of
from engine.config import Run, from_dict
from engine.losses import cross_entropy
from engine.steps import Phase, compute_gradients
from networks.deeplab import DeepLabV3Plus
from networks.mixture import ExpertOutputs
from networks.moe import Frozen, MixtureOfExperts
from pipelines.expert_outputs import open_source
from pipelines.gates import runs_in
from pipelines.models import Trained
from pipelines.segmentation import build, phases_of

NUM_CLASSES, IGNORED = 38, 255
GATES = {
    "simple": {"type": "simple"},
    "simple_w_conv": {"type": "simple", "conv": True},
    "classwise": {"type": "classwise"},
    "classwise_w_conv": {"type": "classwise", "conv": True},
}
CPU = torch.device("cpu")

Trainee = tuple[MixtureOfExperts, Phase]  # whose gate a phase trains
Prepare = Callable[[Batch], ExpertOutputs]


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        experts = {name: random_expert(name, options.backbone) for name in ("highway", "urban")}
        index = frames_on_disk(Path(folder), options.frames, tuple(options.size))
        measure(options, Path(folder), index, experts)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet101", help="encoder of both experts (%(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), help="height and width %(default)s")
    parser.add_argument("--frames", type=int, default=64, help="frames of an epoch (%(default)s)")
    parser.add_argument(
        "--running", type=int, default=64, help="frames timed where experts run (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=8, help="frames a step (%(default)s)")
    parser.add_argument("--gates", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--content", default="float32", help="cache.content (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, the median counts (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where the cache lies while it is measured")
    parser.add_argument("--out", type=Path, help="write the figures to this file as JSON as well")
    return parser.parse_args()


def measure(options: argparse.Namespace, folder: Path, index: FrameIndex, experts: Mapping) -> None:
    configs = {at: config_of(options, folder, at) for at in ("full", "logits")}
    batches, held_out = loaders(configs["full"], index)
    trainees = {at: trainees_of(config, experts, index, len(batches)) for at, config in configs.items()}
    together = list(trainees["full"].values())
    alone = "classwise" if "classwise" in options.gates else options.gates[-1]
    cached = config_of(options, folder, "full", cache={"budget": "1000GB", "content": options.content})
    running, reading, making = sources(configs["full"], cached, together, experts, batches, held_out)
    example = next(iter(batches.epoch(0)))
    plain = plain_step(trainees["full"][alone][0], example)
    check_that_they_agree(trainees["full"][alone], running, reading, plain, example)

    some, whole = options.running // options.batch, len(batches)
    ways = {"together": partial(epoch, batches, running, together, some), "plain": plain}
    grid = together[0][0].grid(options.size)
    ways |= losses_alone(reading(example), example.labels.long(), grid)
    for at, by_gate in trainees.items():
        for name, trainee in by_gate.items():
            ways[at, name, "experts"] = partial(epoch, batches, running, [trainee], some)
            ways[at, name, "cache"] = partial(epoch, batches, reading, [trainee], whole)
    seconds = medians(side_by_side(ways, options.repeats))
    frames = {way: (whole if "cache" in way else some) * options.batch for way in ways}
    ms = {way: 1e3 * seconds[way] / (options.batch if "plain" in way else frames[way]) for way in ways}

    rows = []
    for at, name in itertools.product(trainees, options.gates):
        slow, quick = ms[at, name, "experts"], ms[at, name, "cache"]
        rows.append((name, at, f"{slow:.0f}", f"{quick:.1f}", f"{slow / quick:.1f}"))
    ours = ms["full", alone, "experts"]
    height, width = options.size
    report(
        f"Epoch of a gate, outputs of two DeepLabv3+ {options.backbone} from the cache: {options.frames} frames "
        f"{height}x{width}, {NUM_CLASSES} classes, batches of {options.batch}",
        ("gate", "loss at", "experts run, ms a frame", "from the cache, ms a frame", "gain"),
        rows,
        f"{len(together)} gates in one pass of the experts: {ms['together']:.0f} ms a frame, "
        f"{ms['together'] / ours:.2f} x the time of {alone} alone. The plain way with {alone}: "
        f"{ms['plain']:.0f} ms a frame, {ms['plain'] / ours:.1f} x ours with the experts run. The loss "
        f"at full resolution with its gradient: {seconds['loss']:.3f} s a batch, plain {seconds['plain loss']:.3f} "
        f"s. The cache ({options.content}) took {making:.1f} s to make. Median of {options.repeats} interleaved "
        f"rounds ({options.running} frames where experts run), {torch.get_num_threads()} threads; loading the "
        "batches is in the time, validation is not.",
        options.out,
    )


def config_of(options: argparse.Namespace, folder: Path, loss_at: str, **more) -> Run:
    """A training of the gates, as a config file could ask for it."""
    return from_dict(
        {
            "name": "gate_epoch",
            "data": {
                "name": "folder",
                "root": str(folder),
                "image_size": list(options.size),
                "subsets": ["blocks"],
                "augment": "none",
                "cache_dir": str(folder / "cache"),
            },
            "experts": {"highway": "highway", "urban": "urban"},
            "gates": {name: {**GATES[name], "loss_at": loss_at} for name in options.gates},
            "train": {"epochs": 1, "batch_size": options.batch, "precision": "bf16"},
            **more,
        },
        "run",
    )


def frames_on_disk(folder: Path, count: int, size: tuple[int, int]) -> FrameIndex:
    """Frames of coloured blocks with a class each, and those of the top rows ignored; one more for val."""
    random = np.random.default_rng(0)
    rows, columns = (-(-edge // 20) for edge in size)
    frames = []
    for number in range(count + 1):
        image, label = folder / f"{number}.png", folder / f"{number}_label.png"
        classes = random.integers(0, NUM_CLASSES, (rows, columns), dtype=np.uint8)
        classes[:2] = IGNORED
        for path, blocks in ((image, random.integers(0, 256, (rows, columns, 3))), (label, classes)):
            whole = blocks.astype(np.uint8).repeat(20, 0).repeat(20, 1)
            cv2.imwrite(str(path), whole[: size[0], : size[1]])
        split, name = "gate" if number < count else "val", str(number)
        frames.append(Frame(name, image, label, "blocks", split, scene=name, block=name))
    return FrameIndex(
        name="blocks",
        root=folder,
        classes=tuple(map(str, range(NUM_CLASSES))),
        palette=tuple((number, number, number) for number in range(NUM_CLASSES)),
        frames=tuple(frames),
        read_label=lambda path: (cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), 0),
        unknown_values=lambda path: {},
        label_map="blocks",
    )


def loaders(config: Run, index: FrameIndex):
    data, batch_size = config.data, config.train.batch_size
    common = {
        "image_size": data.image_size,
        "resize": data.resize,
        "cache_dir": data.cache_dir,
        "batch_size": batch_size,
        "workers": data.workers,
    }
    frames, held_out = (index.select(split, data.subsets) for split in ("gate", "val"))
    return (
        train_loader(index, frames, augment=data.augment, seed=config.train.seed, **common),
        eval_loader(index, held_out, resolution="network", **common),
    )


def sources(
    config: Run, cached: Run, trainees: Sequence[Trainee], experts: Mapping, batches, held_out
) -> tuple[Prepare, Prepare, float]:
    """(outputs from the experts, outputs from the cache, seconds that it took to make the cache)."""
    mixtures = [mixture for mixture, _ in trainees]
    running = open_source(config, mixtures, experts, batches, held_out, CPU, print).training
    began = time.perf_counter()
    reading = open_source(cached, mixtures, experts, batches, held_out, CPU, print).training
    return running, reading, time.perf_counter() - began


def random_expert(name: str, backbone: str) -> Trained:
    """An untrained network, its BatchNorm statistics from noise so that signals don't fade."""
    network = DeepLabV3Plus(NUM_CLASSES, backbone=backbone, pretrained="none")
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(4, 3, 64, 64))
    metadata = {"classes": list(map(str, range(NUM_CLASSES))), "network": {"name": "deeplabv3plus"}}
    return Trained(Path(name), Frozen(network), metadata, sha256=name)


def trainees_of(config: Run, experts: Mapping, index: FrameIndex, steps: int) -> dict[str, Trainee]:
    """Each gate of the config with the phase that trains it; all share the experts."""
    loss = config.train.loss.build(None, index.ignore_index)
    found = {}
    for name, run in zip(config.gates, runs_in(config), strict=True):
        mixture, _ = build(run, experts, index)
        mixture.to(CPU, memory_format=layout_of(run.train))
        [phase] = phases_of(run, mixture.train(), loss, steps)
        found[name] = mixture, phase
    return found


def epoch(batches: TrainBatches, prepare: Prepare, trainees: Sequence[Trainee], steps: int) -> None:
    """What fit does in the first steps of an epoch, without its records."""
    for batch in itertools.islice(batches.epoch(0), steps):
        inputs, labels = prepare(batch), batch.labels.long()
        for mixture, phase in trainees:
            compute_gradients(phase, mixture, [(inputs, labels)], precision="bf16")
            phase.optimizer.step()


def plain_step(mixture: MixtureOfExperts, batch: Batch) -> Callable[[], Tensor]:
    """A step on the batch in float32 and NCHW with torch's own loss, which it returns."""
    mixture = copy.deepcopy(mixture).to(memory_format=torch.contiguous_format)
    parameters = [parameter for parameter in mixture.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    images, labels = batch.images.contiguous(), batch.labels.long()

    def run() -> Tensor:
        with torch.no_grad():
            outputs = mixture.run_experts(images.float() / 255)
        loss = plain_loss(mixture.mix(outputs)[0], labels, mixture.grid(outputs.size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def plain_loss(logits: Tensor, labels: Tensor, grid: tuple[int, int]) -> Tensor:
    whole = F.interpolate(logits, size=grid, mode="bilinear")[..., : labels.shape[1], : labels.shape[2]]
    return F.cross_entropy(whole, labels, ignore_index=IGNORED)


def losses_alone(outputs: ExpertOutputs, labels: Tensor, grid: tuple[int, int]) -> dict[str, Callable]:
    """Both losses of an expert's logits at full resolution, with their gradients."""
    logits = outputs.logits[:, 0].contiguous().requires_grad_()
    ours = cross_entropy(None, IGNORED).upsampled
    return {
        "loss": lambda: torch.autograd.grad(ours(logits, labels, grid)[0], logits),
        "plain loss": lambda: torch.autograd.grad(plain_loss(logits, labels, grid), logits),
    }


def check_that_they_agree(
    trainee: Trainee, running: Prepare, reading: Prepare, plain: Callable[[], Tensor], batch: Batch
) -> None:
    """The loss of a batch is the same in all ways, up to the bits of their arithmetic."""
    mixture, phase = trainee
    losses = []
    for prepare in (running, reading):
        total, count, _ = compute_gradients(
            phase, mixture, [(prepare(batch), batch.labels.long())], precision="bf16"
        )
        losses.append((total / count).item())
    losses.append(plain().item())
    if not np.allclose(losses, losses[0], rtol=0.01):
        raise SystemExit(f"the ways disagree on the loss of a batch: {losses}")


if __name__ == "__main__":
    main()
