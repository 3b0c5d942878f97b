"""Encoders of segmentation_models_pytorch: names, ImageNet weights, weights from a file, input statistics."""

import pickle
from difflib import get_close_matches
from pathlib import Path

import segmentation_models_pytorch as smp
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from engine.config import UserError, first_line
from networks.normalize import IMAGENET_MEAN, IMAGENET_STD

# what an ImageNet classifier has above its last feature map, in torchvision's, timm's and smp's names
HEADS = {"_fc", "bn2", "classifier", "conv_head", "fc", "head", "last_linear", "linear", "norm", "norm_head"}


def check_backbone(backbone: str) -> None:
    """UserError for what is no encoder of segmentation_models_pytorch and no "tu-" with a timm network."""
    names = smp.encoders.get_encoder_names()
    if backbone in names or (backbone.startswith("tu-") and timm.is_model(backbone[3:])):
        return
    near = get_close_matches(backbone, names + [f"tu-{name}" for name in timm.list_models()])
    raise UserError(
        f"network.backbone: no encoder '{backbone}' in segmentation_models_pytorch, nor 'tu-NAME' in timm"
        + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")
    )


def imagenet_encoder(backbone: str, output_stride: int) -> nn.Module:
    """The encoder with ImageNet weights, downloaded once. UserError where they can't be had."""
    weights = True if backbone.startswith("tu-") else "imagenet"
    try:
        return smp.encoders.get_encoder(backbone, weights=weights, output_stride=output_stride)
    except Exception as error:  # the hub, timm and smp raise many kinds
        raise UserError(
            f"network.pretrained: no ImageNet weights to be had for '{backbone}' ({first_line(error)}); "
            "without a connection use `pretrained: none` or `pretrained: FILE`"
        ) from error


def input_statistics(backbone: str, pretrained: str) -> tuple[tuple, tuple]:
    """(mean, std), in the units of [0, 1], of the images that the pretrained encoder was trained on.

    ImageNet's without pretraining, and for a file where no statistics are known.
    """
    timm_config = timm.models.get_pretrained_cfg(backbone[3:]) if backbone.startswith("tu-") else None
    if pretrained != "none" and timm_config is not None:
        return timm_config.mean, timm_config.std
    if pretrained != "imagenet" or backbone.startswith("tu-"):
        return IMAGENET_MEAN, IMAGENET_STD
    settings = smp.encoders.get_preprocessing_params(backbone)  # a file that came with the weights
    top = settings["input_range"][1]
    return tuple(value / top for value in settings["mean"]), tuple(value / top for value in settings["std"])


def load_encoder(encoder: nn.Module, file: Path, backbone: str) -> None:
    """Fills the encoder from a file, with smp's names or, for "tu-" encoders, timm's.

    Only a classifier head may be left over. UserError for a file that can't be read or doesn't fit.
    """
    expected = encoder.state_dict()
    heads = HEADS - {root(name) for name in expected}
    stored = {name: tensor for name, tensor in read_tensors(file).items() if root(name) not in heads}
    if backbone.startswith("tu-"):
        stored = {encoder_name(name, expected): tensor for name, tensor in stored.items()}
    problems = {
        # counted by BatchNorm but never used, and not in old files
        "missing": [n for n in expected if n not in stored and not n.endswith(".num_batches_tracked")],
        "not part of it": [n for n in stored if n not in expected],
        "of another shape": [n for n in stored if n in expected and stored[n].shape != expected[n].shape],
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in problems.items() if names
        )
        raise UserError(f"network.pretrained: {file} doesn't hold the weights of '{backbone}': {listed}")
    nn.Module.load_state_dict(encoder, stored, strict=False)


def root(name: str) -> str:
    return name.removeprefix("model.").split(".")[0]


def encoder_name(name: str, expected: dict) -> str:
    """The name in a "tu-" encoder of timm's tensor `name`: "model." before it, "stages_0" for "stages.0"."""
    name = "model." + name.removeprefix("model.")
    flat = name.replace(".", "_", 2).replace("_", ".", 1)
    return flat if flat in expected else name


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or .pth file by name; UserError for anything else in it."""
    if not file.is_file():
        raise UserError(
            f"network.pretrained: no file {file}; allowed: imagenet, none, or a .safetensors or .pth file"
        )
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"network.pretrained: {file} is damaged or holds no weights: {first_line(error)}"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in tensors.values()
    ):
        raise UserError(f"network.pretrained: {file} is no mapping of names to tensors (a state_dict)")
    return tensors
