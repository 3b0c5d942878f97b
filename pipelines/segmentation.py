"""The training pipeline: a config's data, network and loss, handed to the engine."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from importlib import import_module
from pathlib import Path

import numpy
import torch
from torch import nn

from dataloaders.check import check_lists, missing_files
from dataloaders.frames import Frame, FrameIndex
from dataloaders.loader import eval_loader, train_loader
from engine.config import Data, Run, UserError
from engine.loop import Phase, Result, fit, optimizer_steps, supervised
from engine.randomness import seed_everything
from engine.runs import RunFolder, check_run_folder
from metrics import METRICS
from metrics.confusion import confusion
from networks.complexity import gmacs, parameters
from pipelines.models import Trained, build_mixture, load_network, require_classes


def train(config: Run, options) -> Result | None:
    """Train the network, or the gate over frozen experts, that the config describes; its run folder is filled."""
    device = pick_device(options.device)
    folder, plain = Path(config.output) / config.name, config.resolved()
    flags = {"resume": options.resume, "overwrite": options.overwrite}
    if not options.dry_run:
        check_run_folder(folder, plain, **flags)
    index = config.data.build()
    frames = index.select(training_split(config), config.data.subsets)
    held_out = index.select("val", config.data.subsets)
    refuse_overlap(frames, held_out)
    seed_everything(config.train.seed, config.train.deterministic)
    experts = load_experts(config, index)
    model = build_mixture(experts, config.gate) if config.gate else config.network.build(index.num_classes)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise UserError("gate: a uniform gate without conv has nothing to train; set conv: true")
    if options.dry_run:
        print(describe(config, index, model, frames, held_out))
        refuse_bad_data(index)
        return None

    run = RunFolder(folder, plain, **flags, device=device)
    run.log(f"{config.name}: {len(frames)} frames to train, {len(held_out)} to validate, {device}")
    settings, data = config.train, config.data
    batches = train_loader(
        index,
        frames,
        image_size=data.image_size,
        resize=data.resize,
        augment=data.augment,
        cache_dir=data.cache_dir,
        batch_size=settings.batch_size,
        seed=settings.seed,
        workers=data.workers,
    )
    loss = settings.loss.build(torch.from_numpy(batches.cache.class_pixels()), index.ignore_index)
    model.to(device, memory_format=torch.channels_last if settings.channels_last else torch.preserve_format)
    optimizer = settings.optimizer.build(trained)
    steps = optimizer_steps(batches, settings)
    scheduler = settings.schedule.build(optimizer, steps)
    phase = Phase("gate" if config.gate else "network", supervised(loss), trained, optimizer, scheduler)
    about = description(config, index, model, frames, experts)
    about["budget"] = {"steps": steps, "images": settings.epochs * settings.batch_size * len(batches)}
    return fit(
        model,
        [phase],
        batches,
        validator(config, index, held_out, device),
        run,
        settings,
        device,
        weights=lambda model: (live_tensors(model), about),
        metrics=tuple(METRICS),
        state=live_tensors,
        identity={"data": about["data"], **{f"experts.{name}": one.sha256 for name, one in experts.items()}},
    )


def training_split(config: Run) -> str:
    """A network trains on train, a gate on what data.gate_data says."""
    return config.data.gate_data if config.gate else "train"


def refuse_overlap(training: Sequence[Frame], held_out: Sequence[Frame]) -> None:
    both = {frame.image for frame in training} & {frame.image for frame in held_out}
    if both:
        raise UserError(
            f"data: {len(both)} frames are to train and to validate, e.g. {sorted(both)[0]}; "
            "python -m dataloaders.check CONFIG lists them"
        )


def refuse_bad_data(index: FrameIndex) -> None:
    """What --dry-run says of the data: warnings are printed, problems are a UserError with a line for each."""
    report = check_lists(index)
    problems = report.problems + missing_files(index)
    for warning in report.warnings:
        print(f"warning: {warning}")
    if problems:
        raise UserError("\n".join(f"data: {problem}" for problem in problems))
    print("data: lists and files are in order; python -m dataloaders.check CONFIG reads every frame")


def load_experts(config: Run, index: FrameIndex) -> dict[str, Trained]:
    """The frozen experts of a gate. UserError where one has other classes or another architecture than told."""
    experts = {name: load_network(path, f"experts.{name}") for name, path in config.experts.items()}
    for name, expert in experts.items():
        require_classes(expert, index.classes, f"experts.{name}", f"of data {index.name}")
        wanted = config.network.plain() if config.network else expert.metadata["network"]
        other = {
            key: (value, wanted.get(key))
            for key, value in expert.metadata["network"].items()
            if key != "pretrained" and value != wanted.get(key)
        }
        if other:
            key, (stored, asked) = next(iter(other.items()))
            raise UserError(
                f"experts.{name}: {expert.file} was built with network.{key}: {stored}, the config says {asked}"
            )
    return experts


def live_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: all of a network, gate and convolution of a mixture."""
    return model.trainable_state() if hasattr(model, "trainable_state") else model.state_dict()


def description(
    config: Run, index: FrameIndex, model: nn.Module, frames: Sequence[Frame], experts: dict
) -> dict:
    """Metadata of the checkpoint: what it takes to build the network again and to know how it was trained.

    The config goes without where the run lies and how fast it reads: equal training gives equal bytes."""
    recipe = config.resolved()
    for key in ("name", "output", "evaluate"):
        recipe.pop(key)
    for key in ("cache_dir", "workers"):
        recipe["data"].pop(key)
    total, trained = parameters(model)
    about = {
        "config": recipe,
        "classes": list(index.classes),
        "subsets": list(dict.fromkeys(frame.subset for frame in frames)),
        "data": index.manifest(frames),
        "parameters": total,
        "trained_parameters": trained,
    }
    if not config.gate:
        normalize = model.normalize
        about["normalisation"] = {
            "mean": normalize.mean.flatten().tolist(),
            "std": normalize.std.flatten().tolist(),
        }
        return {**about, "network": config.network.plain()}
    chosen = [
        {"name": name, "path": config.experts[name], "sha256": expert.sha256}
        for name, expert in experts.items()
    ]
    return {**about, "gate": config.gate.plain(), "experts": chosen}


def validator(config: Run, index: FrameIndex, frames: Sequence[Frame], device: torch.device) -> Callable:
    """validate(model) -> every metric on the validation frames at the network's resolution.

    Absent classes count as evaluate.absent says."""
    batches = evaluation_batches(config.data, index, frames, config.train.batch_size, "network")
    layout = torch.channels_last if config.train.channels_last else torch.preserve_format

    def validate(model: nn.Module) -> dict[str, float]:
        counts = torch.zeros(index.num_classes, index.num_classes, dtype=torch.int64, device=device)
        with (
            torch.inference_mode(),
            torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"),
        ):
            for batch in batches:
                images = batch.images.to(device).contiguous(memory_format=layout).float() / 255
                predictions = model(images).argmax(1)
                counts += confusion(
                    predictions, batch.labels.to(device), index.num_classes, index.ignore_index
                ).sum(0)
        return figures(counts.cpu().numpy(), config.evaluate.absent)

    return validate


def evaluation_batches(
    data: Data, index: FrameIndex, frames: Sequence[Frame], batch_size: int, resolution: str
):
    """The frames in their order, as the config's data section says they reach a network."""
    return eval_loader(
        index,
        frames,
        image_size=data.image_size,
        resize=data.resize,
        cache_dir=data.cache_dir,
        batch_size=batch_size,
        workers=data.workers,
        resolution=resolution,
    )


def figures(matrix: numpy.ndarray, absent: str) -> dict[str, float]:
    """Every metric of the table from one confusion matrix, in [0, 1]."""
    found = {}
    for name, place in METRICS.items():
        module, function = place.split(":")
        options = {"absent": absent} if name == "miou" else {}
        found[name] = float(getattr(import_module(module), function)(matrix, **options))
    return found


def describe(
    config: Run, index: FrameIndex, model: nn.Module, frames: Sequence[Frame], held_out: Sequence[Frame]
) -> str:
    """What --dry-run tells: sizes, shapes and frames."""
    size = config.data.image_size
    total, trained = parameters(model)
    shadow, images = deepcopy(model).to("meta").eval(), torch.empty(1, 3, *size, device="meta")
    if config.gate:
        inspection = shadow.inspect(images)
        features, logits = inspection.features, inspection.logits
    else:
        features, logits = [shadow.forward_features(images)[1]], shadow(images)
    lines = [
        f"{config.name}: {'gate ' + config.gate.name if config.gate else config.network.name}",
        f"parameters: {total:,} ({trained:,} trained)",
        f"GMACs per image at {size[0]}x{size[1]}: {gmacs(model, size):.2f}",
        f"features: {', '.join(shape_text(one) for one in features)}",
        f"logits: {shape_text(logits)}",
        f"classes: {index.num_classes}",
        f"frames: {index.describe()}",
        f"trains on {len(frames)} ({training_split(config)}), validates on {len(held_out)}",
    ]
    return "\n".join(lines)


def shape_text(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def pick_device(name: str) -> torch.device:
    """auto takes a GPU where there is one. UserError for a device that isn't there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise UserError(
            f"--device {name}: there is no such GPU ({torch.cuda.device_count()} found); use cpu or auto"
        )
    return device
