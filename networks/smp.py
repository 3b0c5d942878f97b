"""Any architecture of segmentation_models_pytorch on any of its encoders: any input size, images in [0, 1]."""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import segmentation_models_pytorch
import torch
from torch import nn

from engine.config import UserError, first_line
from networks.dilation import quick_dilation
from networks.encoders import check_backbone, input_statistics, load_encoder
from networks.normalize import Normalize
from networks.resize import pad_to, upsample

ARCHITECTURES = segmentation_models_pytorch.MODEL_ARCHITECTURES_MAPPING  # lower-case name -> class
FEATURE_STRIDE = 16


class Encoded(NamedTuple):
    """What the decoder is made of, on the padded grid."""

    maps: tuple[torch.Tensor, ...]  # of the encoder, from the image to the deepest
    features: torch.Tensor  # the deepest of them whose stride is at most 16


class SMP(nn.Module):
    """An architecture of segmentation_models_pytorch; the gate feature is its encoder's map at stride 16.

    Of an encoder that ends sooner it is the last map. Logits are upsampled with align_corners False, like those of
    the other networks here, and not as the library does. PAN needs 128 x 128 pixels or more. DPT, whose encoders give
    more than maps, is not among them.

    Args:
        num_classes: number of classes.
        architecture: Unet, UnetPlusPlus, MAnet, Linknet, FPN, PSPNet, DeepLabV3, DeepLabV3Plus, PAN, UPerNet or
            Segformer.
        backbone: encoder of segmentation_models_pytorch, or a timm network with the prefix "tu-".
        pretrained: "imagenet" (downloaded once), "none", or a .safetensors or .pth file of the encoder, with
            names as in segmentation_models_pytorch or, for a "tu-" backbone, as in timm.
        options: further arguments of the architecture by their names there, such as {decoder_channels: 128}.
        mean: of the input normalisation, in units of [0, 1]; null: what the pretrained encoder was trained
            with, ImageNet's without pretraining.
        std: like mean.

    Raises UserError for an unknown or unsuitable architecture, backbone or option, and for weights that can't be
    had, read or fitted.
    """

    decoder_parts = (
        "network.decoder",
        "network.segmentation_head",
    )  # of `decode`; the others are the encoder's

    def __init__(
        self,
        num_classes: int,
        *,
        architecture: str = "Unet",
        backbone: str = "resnet34",
        pretrained: str = "imagenet",
        options: dict | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ):
        super().__init__()
        self.num_classes = num_classes
        check_architecture(architecture)
        check_backbone(backbone)
        self.network = build(architecture, backbone, pretrained, num_classes, options or {})
        self.network.segmentation_head[1] = nn.Identity()  # `upsample` does it
        encoder = self.network.encoder
        if pretrained not in ("imagenet", "none"):
            load_encoder(encoder, Path(pretrained), backbone)
        quick_dilation(self.network)
        encoder_mean, encoder_std = input_statistics(backbone, pretrained)
        self.normalize = Normalize(mean or encoder_mean, std or encoder_std)
        self.stride = max(FEATURE_STRIDE, encoder.output_stride)  # inputs are padded to multiples of it
        strides = [min(2**level, encoder.output_stride) for level in range(len(encoder.out_channels))]
        self.feature_level = max(level for level, stride in enumerate(strides) if stride <= FEATURE_STRIDE)
        self.feature_channels = encoder.out_channels[self.feature_level]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, H, W] in [0, 1] -> logits [B, num_classes, H, W]."""
        return upsample(self.forward_features(images)[0], images.shape[-2:], self.stride)

    def forward_features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass: logits [B, num_classes, h / s, w / s], s as the architecture has it, and the encoder's map
        [B, F, h / 16, w / 16]; h and w are the padded height and width.

        Raises UserError for a batch of one in training where BatchNorm would fail."""
        encoded = self.encode(images)
        return self.decode(encoded), encoded.features

    def encode(self, images: torch.Tensor) -> Encoded:
        """The maps of the encoder. Raises UserError as `forward_features`."""
        with self.told_of_one_image():
            maps = self.network.encoder(pad_to(self.normalize(images), self.stride))
        return Encoded(tuple(maps), maps[self.feature_level])

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """Logits [B, num_classes, h / s, w / s] of what `encode` gave. Raises UserError as `forward_features`."""
        with self.told_of_one_image():
            return self.network.segmentation_head(self.network.decoder(list(encoded.maps)))

    @contextmanager
    def told_of_one_image(self) -> Iterator[None]:
        """Turns what BatchNorm says about a single value in training into a UserError."""
        try:
            yield
        except ValueError as error:
            if not self.training or "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"train.batch_size: {type(self.network).__name__} can't be trained on a batch of 1 image: a "
                "BatchNorm of pooled features needs at least 2 values per channel"
            ) from error


def check_architecture(name: str) -> None:
    """UserError for what is no architecture that `SMP` can take."""
    known = {key: kind.__name__ for key, kind in ARCHITECTURES.items() if key != "dpt"}
    if name.lower() in known:
        return
    near = get_close_matches(name.lower(), known, n=1)
    raise UserError(
        f"network.architecture: '{name}' is unknown; allowed: {', '.join(known.values())}"
        + (f"; did you mean '{known[near[0]]}'?" if near else "")
    )


def build(architecture: str, backbone: str, pretrained: str, num_classes: int, options: dict) -> nn.Module:
    """The library's network. UserError where it refuses the arguments or has no weights."""
    weights = None
    if pretrained == "imagenet":
        weights = True if backbone.startswith("tu-") else "imagenet"
    try:
        return ARCHITECTURES[architecture.lower()](
            backbone, encoder_weights=weights, classes=num_classes, **options
        )
    except Exception as error:  # the library, timm and the hub raise many kinds
        hint = "; without a connection use `pretrained: none` or `pretrained: FILE`" if weights else ""
        raise UserError(
            f"network: {architecture} can't be built on '{backbone}' with options {options}: "
            f"{type(error).__name__}: {first_line(error)}{hint}"
        ) from error
