"""DeepLabv3+ on segmentation_models_pytorch: any of its encoders, any input size, images in [0, 1]."""

from pathlib import Path
from typing import Literal, NamedTuple

import segmentation_models_pytorch as smp
import torch
from torch import nn

from engine.config import Probability, UserError, first_line
from networks.dilation import quick_dilation
from networks.encoders import check_backbone, imagenet_encoder, input_statistics, load_encoder
from networks.normalize import Normalize
from networks.resize import pad_to, upsample

ATROUS_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}


class Encoded(NamedTuple):
    """What the decoder is made of, on the padded grid."""

    low_level: torch.Tensor  # [B, F', h / 4, w / 4]
    features: torch.Tensor  # [B, 256, h / 16, w / 16] (h / 8, w / 8 at output stride 8): ASPP output


class DeepLabV3Plus(nn.Module):
    """DeepLabv3+ (Chen et al. 2018, arXiv 1802.02611) with the ASPP output as gate feature.

    Set like the published experts: plain convolutions in ASPP, rates 6/12/18 (12/24/36 at output stride 8),
    dropout 0.1, logits upsampled with align_corners False. What segmentation_models_pytorch has no switch for
    stays as it is there: a separable 3x3 after ASPP, one separable instead of one full 3x3 in the decoder,
    align_corners True between the two.

    Args:
        num_classes: number of classes.
        backbone: encoder of segmentation_models_pytorch, or a timm network with the prefix "tu-".
        output_stride: input pixels per pixel of the encoder's last feature map.
        pretrained: "imagenet" (downloaded once), "none", or a .safetensors or .pth file of the encoder, with
            names as in segmentation_models_pytorch or, for a "tu-" backbone, as in timm.
        dropout: of the ASPP output.
        aspp_separable: depthwise separable convolutions in ASPP.
        mean: of the input normalisation, in units of [0, 1]; null: what the pretrained encoder was trained
            with, ImageNet's without pretraining.
        std: like mean.

    Raises UserError for an unknown or unsuitable backbone, and for weights that can't be had, read or fitted.
    """

    stride = 16  # inputs are padded to multiples of it
    feature_channels = 256
    decoder_parts = (  # the modules of `decode`; all others are the encoder's
        "network.decoder.aspp.1",
        "network.decoder.aspp.2",
        "network.decoder.aspp.3",
        "network.decoder.up",
        "network.decoder.block1",
        "network.decoder.block2",
        "network.segmentation_head",
    )

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = "resnet101",
        output_stride: Literal[8, 16] = 16,
        pretrained: str = "imagenet",
        dropout: Probability = 0.1,
        aspp_separable: bool = False,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ):
        super().__init__()
        self.num_classes = num_classes
        check_backbone(backbone)
        try:
            self.network = smp.DeepLabV3Plus(
                backbone,
                encoder_weights=None,
                encoder_output_stride=output_stride,
                decoder_channels=self.feature_channels,
                decoder_atrous_rates=ATROUS_RATES[output_stride],
                decoder_aspp_separable=aspp_separable,
                decoder_aspp_dropout=dropout,
                classes=num_classes,
                upsampling=1,  # `upsample` does it
            )
        except Exception as error:  # encoders that can't be dilated or lack a feature map fail in many ways
            raise UserError(
                f"network.backbone: '{backbone}' has no output stride {output_stride}: {first_line(error)}"
            ) from error
        self.aspp.convs[-1][0] = GlobalMean()
        if pretrained == "imagenet":
            self.network.encoder = imagenet_encoder(backbone, output_stride)
        elif pretrained != "none":
            load_encoder(self.network.encoder, Path(pretrained), backbone)
        quick_dilation(self.network)
        encoder_mean, encoder_std = input_statistics(backbone, pretrained)
        self.normalize = Normalize(mean or encoder_mean, std or encoder_std)

    @property
    def aspp(self) -> nn.Module:
        return self.network.decoder.aspp[0]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, H, W] in [0, 1] -> logits [B, num_classes, H, W]."""
        return upsample(self.forward_features(images)[0], images.shape[-2:], self.stride)

    def forward_features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass: logits [B, num_classes, h / 4, w / 4] and ASPP output [B, 256, h / 16, w / 16].

        h and w are the padded height and width; at output stride 8 the ASPP output has h / 8 and w / 8.
        Raises UserError for a batch of one in training.
        """
        encoded = self.encode(images)
        return self.decode(encoded), encoded.features

    def encode(self, images: torch.Tensor) -> Encoded:
        """All up to the ASPP output, the gate's feature. Raises UserError for a batch of one in training."""
        if self.training and len(images) == 1:
            raise UserError(
                "train.batch_size: DeepLabv3+ can't be trained on a batch of 1 image: BatchNorm of ASPP's "
                "pooled branch needs at least 2 values per channel"
            )
        maps = self.network.encoder(pad_to(self.normalize(images), self.stride))
        return Encoded(maps[2], self.aspp(maps[-1]))

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """Logits [B, num_classes, h / 4, w / 4] of what `encode` gave; a single image will do."""
        decoder = self.network.decoder
        high_level = decoder.up(decoder.aspp[1:](encoded.features))
        decoded = decoder.block2(torch.cat([high_level, decoder.block1(encoded.low_level)], dim=1))
        return self.network.segmentation_head(decoded)


class GlobalMean(nn.Module):
    """AdaptiveAvgPool2d(1), whose backward pass has no deterministic form on CUDA."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.mean((2, 3), keepdim=True)
