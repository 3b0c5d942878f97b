"""The classification pipeline: a config's images, network and method, handed to the engine."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dataloaders.command import listed
from dataloaders.image_batches import EvalBatches, ImageBatch, TrainBatches, images_of
from dataloaders.image_set import ImageSet, ImageSplit
from engine.arithmetic import layout_of
from engine.checkpoints import differing, load_metadata, load_weights
from engine.config import Classification, RouterTraining, UserError
from engine.devices import pick_device
from engine.errors import blaming
from engine.learner import Learner, Result
from engine.loop import fit, optimizer_steps
from engine.pathways import Inputs, RouterPhase, adversary_of, balanced, classified
from engine.randomness import random_state, seed_everything
from engine.runs import RunFolder, check_run_folder, refuse_cache_inside
from engine.steps import Phase, evaluating
from networks.complexity import parameters
from pipelines.classifier_costs import describe_costs, without_pruned
from pipelines.classifier_validation import metric_names, validated
from pipelines.models import weights_file
from pipelines.seen_images import refuse_seen, trainings_of

BALANCED_ON = 512  # images that the router's first biases are set from


def train(config: Classification, options) -> list[Result] | None:
    """Train the classifier that the config describes; its run folder is filled."""
    device = pick_device(options.device)
    flags = {"resume": options.resume, "overwrite": options.overwrite}
    refuse_cache_inside(config.data.cache_dir, folder_of(config))
    if not options.dry_run:
        check_run_folder(folder_of(config), config.resolved(), **flags)
    images = config.data.build(config.data.cache_dir)
    model = build(config, images)
    refuse_small_images(config, model, images)
    settings, data = config.train, config.data
    batches = TrainBatches(images.split("train"), settings.batch_size, settings.seed, data.pad, data.flip)
    phases = phases_of(config, model, optimizer_steps(batches, settings))
    refuse_idle_experts(config, images)
    about_it = [*describe_costs(model, images.size), *describe_start(config, model)]
    if options.dry_run:
        title = f"{config.name}: {config.network.name} {config.network.args['arch']}"
        print("\n".join([title, *about_it, images.describe()]))
        return None
    folder = RunFolder(folder_of(config), config.resolved(), **flags, device=device)
    folder.log(f"{config.name}: {images.describe()}, {device}")
    for line in about_it:
        folder.log(line)
    fresh = not (settings.start_from or folder.last.exists())
    if settings.balanced_start and fresh and hasattr(model, "router"):
        balance(model, images.split("train"))
    model.to(device, memory_format=layout_of(settings))
    clusters = clusters_of(config, images)
    about = description(config, images, model)
    learner = Learner(
        model,
        phases,
        folder,
        weights=lambda model: (model.state_dict(), about),
        identity={"data": about["data"]},
        random=random_state(),
    )
    held_out = attacked_part(images.split("val"), settings.val_images)

    def validate(models: Sequence[nn.Module]) -> list[dict[str, float]]:
        return [
            validated(one, EvalBatches(held_out, settings.batch_size), settings, device, config.name)
            for one in models
        ]

    def prepare(batch: ImageBatch, device: torch.device, layout: torch.memory_format) -> Inputs:
        wanted = None if clusters is None else clusters[torch.from_numpy(batch.rows)].to(device)
        return Inputs(images_of(batch, device, layout), wanted)

    names = metric_names(model, settings)
    return fit([learner], batches, validate, settings, device, metrics=names, prepare=prepare)


def build(config: Classification, images: ImageSet) -> nn.Module:
    """The untrained network, or with the weights of train.start_from."""
    seed_everything(config.train.seed, config.train.deterministic)
    model = config.network.build(images.num_classes)
    if config.train.start_from:
        start(model, config, images)
    return model


def start(model: nn.Module, config: Classification, images: ImageSet) -> None:
    """Weights of another run, or of an export; with train.start_head: fresh all but those of the last layer. UserError
    where they are of another network, or of one that normalises otherwise, where the last layer is of other classes,
    and where they were trained on images of val, which would choose the epoch by what the weights know."""
    source, fresh = weights_file(config.train.start_from), config.train.start_head == "fresh"
    with blaming("train.start_from"):
        tensors, metadata = load_weights(source)
    own, head = model.state_dict(), last_layer(model)
    wrong = [name for name in differing(own, tensors) if not (fresh and name in head)]
    if wrong:
        way_out = "; train.start_head: fresh trains a new last layer" if set(wrong) == set(head) else ""
        raise UserError(
            f"train.start_from: {source} is of another network, {len(wrong)} tensors differ "
            f"({', '.join(wrong[:3])}){way_out}"
        )
    for key in ("mean", "std"):
        here, there = (one[f"entry.normalize.{key}"].flatten().tolist() for one in (own, tensors))
        if here != there:
            here, there = ([round(value, 6) for value in values] for values in (here, there))
            raise UserError(
                f"network.{key}: {here} is not that of train.start_from: {source} was trained with {there}; take "
                "the same"
            )
    if not fresh and metadata["classes"] != list(images.classes):
        raise UserError(
            f"train.start_from: {source} was trained on other classes ({listed(metadata['classes'])}) than those of "
            f"{images.name} ({listed(images.classes)}); train.start_head: fresh trains a new last layer"
        )
    refuse_seen(source, metadata, "train.start_from", config.data, images, "val")
    model.load_state_dict({**tensors, **{name: own[name] for name in head if fresh}})


def last_layer(model: nn.Module) -> list[str]:
    """Names of the tensors of a classifier's last linear layer."""
    *_, (name, _) = (one for one in model.body.named_modules(prefix="body") if isinstance(one[1], nn.Linear))
    return [f"{name}.weight", f"{name}.bias"]


def describe_start(config: Classification, model: nn.Module) -> list[str]:
    """For people: where the first weights are from, and whether the last layer is a new one."""
    if not config.train.start_from:
        return []
    if config.train.start_head != "fresh":
        return [f"starts from {config.train.start_from}"]
    there = len(load_metadata(weights_file(config.train.start_from))["classes"])
    layer = last_layer(model)[0].removesuffix(".weight")
    return [
        f"starts from {config.train.start_from} ({there} classes) but for {layer}, which is new, "
        f"for {model.num_classes}"
    ]


def refuse_small_images(config: Classification, model: nn.Module, images: ImageSet) -> None:
    """UserError where nothing is left of an image on its way through the network, or where one image is a batch and a
    BatchNorm would see a single value of each channel."""
    (channels, height, width), args = images.size, config.network.args
    maps = norm_maps(model, images.size)
    if maps is None:
        enough = next(
            (n for n in range(2, 65) if norm_maps(model, (channels, n * height, n * width)) is not None), None
        )
        way_out = f"; network.enlarge: {enough * args['enlarge']} is enough" if enough else ""
        raise UserError(
            f"network.arch: images of {height} x {width} are too small for {args['arch']} with stem: {args['stem']} "
            f"and enlarge: {args['enlarge']}{way_out}"
        )
    if config.train.batch_size == 1 and 1 in maps:
        raise UserError(
            f"train.batch_size: 1 is wrong for images of {height} x {width}: a BatchNorm of {args['arch']} would see a "
            "single value of each channel; take 2 or more"
        )


def norm_maps(model: nn.Module, size: tuple[int, int, int]) -> list[int] | None:
    """Places of the map that each BatchNorm gets of an image of this size; None where a map is left without any.
    UserError where the router has nothing to normalise."""
    found = []

    def note(module: nn.Module, inputs: tuple[Tensor]) -> None:
        found.append(inputs[0][0, 0].numel())

    norms = [one for one in model.modules() if isinstance(one, nn.BatchNorm2d)]
    hooks = [one.register_forward_pre_hook(note) for one in norms]
    try:
        with torch.no_grad(), evaluating(model):
            model(torch.zeros(1, *size))
    except RuntimeError as error:
        if "too small" not in str(error):
            raise
        return None
    except ValueError as error:  # of a GroupNorm, which only a router has
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"network.router_pixels: {model.router.pixels} leaves a channel of the router a single value of images of "
            f"{size[1]} x {size[2]}; take more, or a larger network.router_width"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return found


def refuse_idle_experts(config: Classification, images: ImageSet) -> None:
    """UserError where the router's target leaves experts out."""
    router = config.train.router or RouterTraining()
    experts = config.network.args.get("num_experts", 1)
    if config.train.method == "advmoe" and router.target == "label_mod" and experts > images.num_classes:
        raise UserError(
            f"train.router.target: label_mod sends {images.num_classes} classes to as many experts, and "
            f"network.num_experts is {experts}: the others would get nothing; take fewer, or target: cluster"
        )
    count = len(images.split("train"))
    if config.train.method == "advmoe" and router.target == "cluster" and experts > count:
        raise UserError(
            f"train.router.target: cluster makes network.num_experts, {experts}, clusters of {count} training images; "
            "take fewer"
        )


def phases_of(config: Classification, model: nn.Module, steps: int) -> list[Phase]:
    """One phase for everything; for advmoe one for the pathways, one for the router."""
    train = config.train

    def phase(name: str, part: nn.Module, loss, attack=None, own=None, clip_norm=None) -> Phase:
        """own: the router's section, whose recipes go before those of train."""

        def build(key: str, *args):
            recipe = getattr(own, key, None)
            with blaming(f"train.router.{key}" if recipe else f"train.{key}"):
                return (recipe or getattr(train, key)).build(*args)

        optimizer = build("optimizer", groups_of(part))
        schedule = build("schedule", optimizer, steps)
        return Phase(name, loss, list(part.parameters()), optimizer, schedule, attack, clip_norm)

    router = train.router or RouterTraining()
    adversary = None if train.method == "standard" else adversary_of(train)
    if train.method != "advmoe":
        loss, attack = (adversary.loss, adversary.attack) if adversary else (classified(), None)
        return [phase("network", model, balanced(loss, router.balance) if router.balance else loss, attack)]
    routing = RouterPhase(train, router)
    return [
        phase("pathways", model.body, adversary.loss, adversary.attack),
        phase("router", model.router, routing.loss, routing.attack, router, router.clip_norm),
    ]


def groups_of(module: nn.Module) -> list[dict]:
    """What an optimizer takes: all parameters; those of norms, biases and a sparse network's scores, which shift, scale
    or rank and have one dimension, without decay."""
    one, more = [], []
    for parameter in module.parameters():
        (more if parameter.ndim > 1 else one).append(parameter)
    return [{"params": more}, {"params": one, "weight_decay": 0.0}]


def balance(model: nn.Module, split: ImageSplit) -> None:
    """The router's first biases, from images of the training split."""
    rows = np.linspace(0, len(split) - 1, min(BALANCED_ON, len(split))).astype(int)
    images = torch.from_numpy(np.ascontiguousarray(split.images[rows])).float() / 255
    with torch.no_grad():
        model.router.balance(model.entry(images).split(128))


def clusters_of(config: Classification, images: ImageSet) -> Tensor | None:
    """For router.target: cluster, of each training image the k-means cluster of its 8 x 8 thumbnail, int64 [N]."""
    router = config.train.router or RouterTraining()
    if config.train.method != "advmoe" or router.target != "cluster":
        return None
    from sklearn.cluster import KMeans

    split = images.split("train")
    thumbnails = []
    for start in range(0, len(split), 1024):
        rows = np.arange(start, min(start + 1024, len(split)))
        part = torch.from_numpy(np.ascontiguousarray(split.images[rows])).float() / 255
        thumbnails.append(nn.functional.adaptive_avg_pool2d(part, 8).flatten(1))
    means = KMeans(config.network.args["num_experts"], random_state=config.train.seed, n_init=4)
    found = means.fit_predict(torch.cat(thumbnails).numpy())
    return torch.from_numpy(found.astype(np.int64))


def attacked_part(split: ImageSplit, count: int) -> ImageSplit:
    """Evenly picked images of a split."""
    if count >= len(split):
        return split
    return split.take(np.linspace(0, len(split) - 1, count).round().astype(int))


def folder_of(config: Classification) -> Path:
    return Path(config.output) / config.name


def description(config: Classification, images: ImageSet, model: nn.Module) -> dict:
    """Metadata of the checkpoint: what it takes to build the network again and to know how it was trained."""
    recipe = config.resolved()
    for key in ("name", "output"):
        recipe.pop(key)
    recipe["data"].pop("cache_dir")
    total, _ = parameters(without_pruned(model))
    about = {
        "config": recipe,
        "classes": list(images.classes),
        "image_size": list(images.size),
        "network": config.network.plain(),
        "data": images.manifest("train"),
        "parameters": total,
    }
    if config.train.start_from:
        path = config.train.start_from
        first = load_metadata(weights_file(path))
        about["start_from"] = {
            "path": path,
            "sha256": first["tensors_sha256"],
            "trainings": trainings_of(first),
        }
    return about
