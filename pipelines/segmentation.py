"""The training pipeline: a config's data, network and loss, handed to the engine."""

import copy
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from dataloaders.check import check_lists, missing_files
from dataloaders.frames import Frame, FrameIndex
from dataloaders.image_batches import steps_of
from dataloaders.loader import eval_loader, refuse_large_batch, train_loader
from engine.adversarial import Adversary
from engine.arithmetic import autocast_of, layout_of
from engine.checkpoints import load_metadata
from engine.config import IGNORE, Component, Data, Run, UserError
from engine.devices import pick_device
from engine.errors import blaming, collected
from engine.learner import Learner, Result
from engine.loop import fit, images_of, optimizer_steps, supervised
from engine.randomness import random_state, seed_everything
from engine.runs import RunFolder, check_run_folder, refuse_cache_inside
from engine.steps import Phase
from metrics import METRICS
from metrics.confusion import confusion
from metrics.gate import gate_statistics
from metrics.gate_alarm import collapse_warning
from networks.complexity import gmacs, parameters
from networks.mixture import ExpertOutputs, Mixture
from pipelines import shared_encoder
from pipelines.expert_outputs import open_source, refuse_too_little
from pipelines.gates import calibrate, gate_loss, loss_of_images, runs_in
from pipelines.models import (
    Trained,
    build_mixture,
    load_network,
    normalisation,
    require_classes,
    require_home,
    require_network,
    start_from,
    tell_other_frames,
    weights_file,
    without_pretrained,
)
from pipelines.robust_validation import attacked_confusion


def train(config: Run, options) -> list[Result] | None:
    """Train the network, or the gates over frozen experts, that the config describes; run folders are filled."""
    device = pick_device(options.device)
    flags = {"resume": options.resume, "overwrite": options.overwrite}
    runs = runs_in(config)
    for run in runs:
        refuse_cache_inside(config.data.cache_dir, folder_of(run))
        if not options.dry_run:
            check_run_folder(folder_of(run), run.resolved(), **flags)
    index = config.data.build()
    frames = index.select(training_split(config), config.data.subsets)
    held_out = index.select("val", config.data.subsets)
    refuse_overlap(frames, held_out)
    refuse_too_little(config)
    experts = load_experts(config, index)
    models, states = zip(*(build(run, experts, index) for run in runs), strict=True)
    refuse_bad_recipe(config, runs, models, len(frames))
    for run, model in zip(runs, models, strict=True):
        if not run.gate:  # a mixture's logits are brought to the size of its images by itself
            shapes_of(run, model, index.num_classes)
    if options.dry_run:
        for run, model in zip(runs, models, strict=True):
            print(describe(run, index, model, frames, held_out))
        refuse_bad_data(index)
        return None

    tell_bad_data(index)
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
    held_out_batches = evaluation_batches(data, index, held_out, settings.batch_size, "network")
    # After all frames have been read once: frames that are refused leave no run folder behind.
    folders = [RunFolder(folder_of(run), run.resolved(), **flags, device=device) for run in runs]
    folders[0].log(f"{config.name}: {len(frames)} frames to train, {len(held_out)} to validate, {device}")
    prepare = looking = images_of
    if config.shared_encoder and config.shared_encoder.training == "separate":
        prepare = shared_encoder.own_images(models[0])
    if experts:
        source = open_source(config, models, experts, batches, held_out_batches, device, folders[0].log)
        prepare, looking = source.training, source.validation
        calibrate(models, held_out_batches, looking, settings, device)
        if settings.adversarial != "none":
            prepare = images_of  # each gate attacks its own mixture, so experts run in its loss
    loss = settings.loss.build(torch.from_numpy(batches.cache.class_pixels()), index.ignore_index)
    learners = []
    for run, folder, model, random in zip(runs, folders, models, states, strict=True):
        model.to(device, memory_format=layout_of(settings))
        about = description(run, index, model, frames, experts)
        steps = optimizer_steps(batches, settings)
        about["class_pixels"] = batches.cache.class_pixels().tolist()  # weights of class-balanced attacks
        learners.append(
            Learner(
                model,
                phases_of(run, model, loss, steps, index.ignore_index),
                folder,
                weights=lambda model, about=about: (live_tensors(model), about),
                state=live_tensors,
                identity={
                    "data": about["data"],
                    **{f"experts.{name}": one.sha256 for name, one in experts.items()},
                    **{role: one["sha256"] for role, one in about.get("start_from", {}).items()},
                },
                random=random,
            )
        )
    names = {model: (run, folder) for model, run, folder in zip(models, runs, folders, strict=True)}

    def alarm(mixture: Mixture, weights: numpy.ndarray) -> None:
        run, folder = names[mixture]
        found = collapse_warning(run.name, gate_statistics(weights), mixture.expert_names, index.classes)
        if found and run.gate.name != "uniform":
            folder.log(f"warning: {found}")

    return fit(
        learners,
        batches,
        validator(config, index, held_out_batches, device, looking, alarm),
        settings,
        device,
        metrics=[*METRICS, *([] if settings.adversarial == "none" else ["robust_miou"])],
        prepare=prepare,
    )


def build(run: Run, experts: dict[str, Trained], index: FrameIndex) -> tuple[nn.Module, dict]:
    """(untrained network or mixture, the generators' state after it), the same whatever was built before."""
    seed = run.train.seed
    if run.gate and run.gate.seed is not None:
        seed = run.gate.seed
    seed_everything(seed, run.train.deterministic)
    network = without_pretrained(run.network) if run.starts and run.network else run.network
    if run.shared_encoder:
        model = shared_encoder.build(network, run.gate, index.num_classes, run.data.subsets)
    else:
        model = build_mixture(experts, run.gate) if run.gate else network.build(index.num_classes)
    if run.starts:
        start_from(run, model, live_tensors(model), tuple(index.classes))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"{run.name}: a uniform gate without conv has nothing to train; set conv: true")
    return model, random_state()


def phases_of(
    run: Run, model: nn.Module, loss: Callable, steps: int, ignore_index: int = IGNORE
) -> list[Phase]:
    """What is trained in a step: a network, a gate, or what a shared encoder's training asks for."""
    settings = run.train
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = [("network", supervised(loss), trained)]
    if run.shared_encoder:
        parts = shared_encoder.phases(model, run.shared_encoder.training, loss, gate_loss(loss, run.gate))
    elif run.gate:
        mixed = gate_loss(loss, run.gate)
        parts = [("gate", mixed if settings.adversarial == "none" else loss_of_images(mixed), trained)]
    phases = []
    for name, value, own in parts:
        own_recipe = run.gate.optimizer if name == "gate" else None
        with blaming("gate.optimizer" if own_recipe else "train.optimizer"):
            optimizer = (own_recipe or settings.optimizer).build(own)
        with blaming("train.schedule"):
            schedule = settings.schedule.build(optimizer, steps)
        phase = Phase(name, value, own, optimizer, schedule)
        if settings.adversarial != "none":
            adversary = Adversary(settings.adversarial, value, ignore_index, settings.seed)
            phase.loss, phase.attack = adversary.loss, adversary.attack
        phases.append(phase)
    return phases


def folder_of(run: Run) -> Path:
    return Path(run.output) / run.name


def training_split(config: Run) -> str:
    """A network trains on train, a gate on what data.gate_data says."""
    return config.data.gate_data if config.experts else "train"


def refuse_overlap(training: Sequence[Frame], held_out: Sequence[Frame]) -> None:
    both = {frame.image for frame in training} & {frame.image for frame in held_out}
    if both:
        raise UserError(
            f"data: {len(both)} frames are to train and to validate, e.g. {sorted(both)[0]}; "
            "python -m dataloaders.check CONFIG lists them"
        )


def refuse_bad_recipe(config: Run, runs: Sequence[Run], models: Sequence[nn.Module], frames: int) -> None:
    """UserError for what batches, optimizers or schedules refuse, before anything is written."""
    settings = config.train
    refuse_large_batch(frames, settings.batch_size)
    steps = optimizer_steps(range(steps_of(frames, settings.batch_size)), settings)
    if config.shared_encoder and config.shared_encoder.training == "separate":
        shared_encoder.refuse_lone_images(models[0], config.network.name, config.data.image_size)
    for run, model in zip(runs, models, strict=True):
        phases_of(run, model, settings.loss.build, steps)  # no loss is called here
        if (
            settings.batch_size == 1
        ):  # some networks can't be trained so; a copy, as BatchNorm would remember it
            with torch.no_grad():
                copy.deepcopy(model).train()(torch.zeros(1, 3, *config.data.image_size))


def refuse_bad_data(index: FrameIndex) -> None:
    """What --dry-run says of the data: warnings are printed, problems are a UserError with a line for each."""
    report = check_lists(index)
    problems = report.problems + missing_files(index)
    for note in index.notes:
        print(f"data: {note}")
    for warning in report.warnings:
        print(f"warning: {warning}")
    if problems:
        raise UserError("\n".join(f"data: {problem}" for problem in problems))
    print("data: lists and files are in order; python -m dataloaders.check CONFIG reads every frame")


def tell_bad_data(index: FrameIndex) -> None:
    """Prints what is wrong with the lists of the data. A run goes on: official splits may share recordings."""
    for problem in check_lists(index).problems:
        print(f"warning: data: {problem}")


def load_experts(config: Run, index: FrameIndex) -> dict[str, Trained]:
    """The frozen experts of a gate. UserError where one has other classes or another architecture than told."""

    def expert(name: str, source: str | Component) -> Trained:
        trained = load_network(source, f"experts.{name}", index.classes)
        require_classes(trained, index.classes, f"experts.{name}", f"of data {index.name}")
        require_home(trained, name, index)
        tell_other_frames(trained, f"experts.{name}", config.data)
        if config.network:
            require_network(trained, config.network, f"experts.{name}")
        return trained

    return collected({name: partial(expert, name, source) for name, source in config.experts.items()})


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
    if config.cache == "none" or config.cache.content == "float32":  # exact: nothing is different
        recipe.pop("cache")
    for key in ("adversarial", "start_from"):
        if recipe["train"][key] in ("none", None):
            recipe["train"].pop(key)
    total, trained = parameters(model)
    about = {
        "config": recipe,
        "classes": list(index.classes),
        "subsets": list(dict.fromkeys(frame.subset for frame in frames)),
        "data": index.manifest(frames),
        "parameters": total,
        "trained_parameters": trained,
    }
    if config.starts:
        about["start_from"] = {
            role: {"path": path, "sha256": load_metadata(weights_file(path))["tensors_sha256"]}
            for role, path in config.starts.items()
        }
    if config.shared_encoder:
        return {**about, **shared_encoder.description(config, model)}
    if not config.gate:
        return {**about, **normalisation(model), "network": config.network.plain()}
    sources = config.resolved()["experts"]
    chosen = [
        {"name": name, "path": sources[name], "sha256": expert.sha256} for name, expert in experts.items()
    ]
    return {**about, "gate": config.gate.plain(), "experts": chosen}


def validator(
    config: Run,
    index: FrameIndex,
    batches,
    device: torch.device,
    prepare: Callable = images_of,
    alarm: Callable[[nn.Module, numpy.ndarray], None] = lambda model, weights: None,
) -> Callable:
    """validate(models) -> every metric of each on the validation frames at the network's resolution; in
    adversarial training also robust_miou, see pipelines.robust_validation.

    Absent classes count as evaluate.absent says. alarm gets each mixture with its weights [N, E, K] of all
    frames."""
    layout = layout_of(config.train)
    shape = (index.num_classes, index.num_classes)

    def validate(models: Sequence[nn.Module]) -> list[dict[str, float]]:
        counts = [torch.zeros(shape, dtype=torch.int64, device=device) for _ in models]
        routes: list[list[Tensor]] = [[] for _ in models]
        with (
            torch.inference_mode(),
            autocast_of(config.train.precision, device),
        ):
            for batch in batches:
                inputs, labels = prepare(batch, device, layout), batch.labels.to(device)
                for model, count, route in zip(models, counts, routes, strict=True):
                    logits, weights = answer(model, inputs)
                    count += confusion(logits.argmax(1), labels, index.num_classes, index.ignore_index).sum(0)
                    route += [] if weights is None else [weights.float().mean((-2, -1))]
        for model, route in zip(models, routes, strict=True):
            if route:
                alarm(model, torch.cat(route).cpu().numpy())
        found = [figures(count.cpu().numpy(), config.evaluate.absent) for count in counts]
        if config.train.adversarial != "none":
            attacked = attacked_confusion(models, index, batches, config.train, device)
            for one, matrix in zip(found, attacked, strict=True):
                one["robust_miou"] = figures(matrix, config.evaluate.absent)["miou"]
        return found

    return validate


def answer(model: nn.Module, inputs: Tensor | ExpertOutputs) -> tuple[Tensor, Tensor | None]:
    """(logits [B, C, H, W], gate weights or None) for images, or from what a mixture's experts said about them."""
    if isinstance(inputs, ExpertOutputs):
        return model.combine(inputs)
    if isinstance(model, Mixture):
        inspection = model.inspect(inputs)
        return inspection.logits, inspection.weights
    return model(inputs), None


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
    title = f"gate {config.gate.name}" if config.gate else config.network.name
    if config.shared_encoder:
        title += f" on {len(model.decoders)} decoders of one {config.network.name} encoder"
    features, logits = shapes_of(config, model, index.num_classes)
    lines = [
        f"{config.name}: {title}",
        f"parameters: {total:,} ({trained:,} trained)",
        f"GMACs per image at {size[0]}x{size[1]}: {gmacs(model, size):.2f}",
        f"features: {', '.join(shape_text(one) for one in features)}",
        f"logits: {shape_text(logits)}",
        f"classes: {index.num_classes}",
        f"frames: {index.describe()}",
        f"trains on {len(frames)} ({training_split(config)}), validates on {len(held_out)}",
    ]
    return "\n".join(lines)


def shapes_of(config: Run, model: nn.Module, num_classes: int) -> tuple[list[Tensor], Tensor]:
    """Features and logits of an image, without their values. UserError for logits that are not of its size."""
    shadow = deepcopy(model).to("meta").eval()
    images = torch.empty(1, 3, *config.data.image_size, device="meta")
    if config.gate:
        inspection = shadow.inspect(images)
        return inspection.features, inspection.logits
    features, logits = [shadow.forward_features(images)[1]], shadow(images)
    expected = (1, num_classes, *config.data.image_size)
    if tuple(logits.shape) != expected:
        raise UserError(
            f"network.name: {config.network.name} gives logits {shape_text(logits)} for one image, expected "
            f"{'x'.join(map(str, expected))}, a channel for each class in the size of the image"
        )
    return features, logits


def shape_text(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))
