"""Which images a classifier was trained on: none of them may be among those that it is evaluated on, or that choose
the epoch of a training that starts from it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dataloaders.image_set import ImageSet, ImageSplit
from engine.checkpoints import load_metadata
from engine.config import ImageData, UserError, component
from pipelines.models import weights_file

CHUNK = 1024  # images that are compared at once


def trainings_of(metadata: Mapping) -> list[dict]:
    """Those that a checkpoint's weights come from, its own first, then those of the run that it started from: {data:
    section of the config, manifest: of its train split}, or {path} of a run that is gone. Nothing where none is told,
    as in files that no training of ours wrote."""
    origin = metadata.get("exported_from", {})
    config = metadata.get("config") or origin.get("config")
    if not config or "data" not in metadata:
        return []
    path = config.get("train", {}).get("start_from")
    start = metadata.get("start_from") or origin.get("start_from") or (path and {"path": path})
    return [{"data": config["data"], "manifest": metadata["data"]}, *(before(start) if start else [])]


def before(start: Mapping) -> list[dict]:
    """The trainings of a run that another one started from: as it noted them, else by the run's own file."""
    if "trainings" in start:
        return start["trainings"]
    file = weights_file(start["path"])
    metadata = load_metadata(file) if file.exists() else {}
    same = "sha256" not in start or start["sha256"] == metadata.get("tensors_sha256")
    return trainings_of(metadata) if metadata and same else [{"path": start["path"]}]


def refuse_seen(
    file: Path, metadata: Mapping, key: str, data: ImageData, images: ImageSet, split: str
) -> None:
    """UserError where images of the split are among those that the weights of a file (with its metadata) were trained
    on or, of test, that chose their epoch; also where that can't be told. Trainings on other data sets (data.name) are
    not looked at.

    Where the train split is that of these images, their val and test are others: nothing is compared."""
    here = images.manifest("train")
    for one in trainings_of(metadata):
        if "path" in one:
            raise UserError(
                f"{key}: {file} started from {one['path']}, which is gone or another run now; whether that saw "
                f"images of {split} can't be told: put it back"
            )
        if one["manifest"] == here or one["data"]["name"] != data.name:
            continue
        found = images_of(one, data)
        differing = told_apart(one["data"], data)
        if found is None:
            raise UserError(
                f"{key}: {file} was trained on other images of {data.name} than data has now{differing}, and "
                f"they are not to be had; whether some of {split} are among them can't be told: take the data section "
                "and the files of its training"
            )
        own = images.split(split)
        counts = {"trained it": common(found.split("train"), own)}
        if split == "test":
            counts["chose its epoch, as val"] = common(found.split("val"), own)
        told = [f"{count} {what}" for what, count in counts.items() if count]
        if told:
            raise UserError(
                f"{key}: {file} knows images of {split}: of {len(own)}, {' and '.join(told)}{differing}; take "
                "the data section of its training"
            )


def images_of(training: Mapping, data: ImageData) -> ImageSet | None:
    """The image set of a training, from the files of this data section or, where they give another train split, from
    its own; None where neither gives it."""
    args = {key: value for key, value in training["data"].items() if key not in arguments_apart()}
    roots = (
        [{"root": one} for one in dict.fromkeys((data.args["root"], args["root"]))]
        if "root" in args
        else [{}]
    )
    for root in roots:
        try:
            found = component("dataloaders:IMAGE_SETS", data.name, **{**args, **root}).build(data.cache_dir)
        except UserError:
            continue
        if found.manifest("train") == training["manifest"]:
            return found
    return None


def arguments_apart() -> set[str]:
    """Keys of a data section that choose no images."""
    return {"name", *ImageData.fixed_keys()}


def told_apart(trained_on: Mapping, data: ImageData) -> str:
    """In brackets the keys of a training's data section that differ here."""
    here = data.plain()
    differing = [
        f"data.{key} was {value}, is {here.get(key)}"
        for key, value in trained_on.items()
        if key not in arguments_apart() and value != here.get(key)
    ]
    return f" ({'; '.join(differing)})" if differing else ""


def common(seen: ImageSplit, asked: ImageSplit) -> int:
    """Images of the same name and the same pixels; of another size by their names alone."""
    places = {name: row for row, name in enumerate(seen.names)}
    pairs = [(places[name], row) for row, name in enumerate(asked.names) if name in places]
    if seen.images.shape[1:] != asked.images.shape[1:]:
        return len(pairs)
    count = 0
    for start in range(0, len(pairs), CHUNK):
        theirs, ours = np.array(pairs[start : start + CHUNK]).T
        count += int((seen.images[theirs] == asked.images[ours]).all(axis=(1, 2, 3)).sum())
    return count
