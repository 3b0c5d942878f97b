"""CNNs for classification by name: one constructor rule for all, (num_classes, ratio, num_experts, stem)."""

from typing import Literal

Architecture = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wrn_28_4", "wrn_28_10", "wrn_34_10", "vgg16",
    "vgg16_bn", "densenet",
]  # fmt: skip

ARCHITECTURES = {
    "resnet18": "networks.cnn_moe.resnet:resnet18",
    "resnet34": "networks.cnn_moe.resnet:resnet34",
    "resnet50": "networks.cnn_moe.resnet:resnet50",
    "resnet101": "networks.cnn_moe.resnet:resnet101",
    "resnet152": "networks.cnn_moe.resnet:resnet152",
    "wrn_28_4": "networks.cnn_moe.wide_resnet:wrn_28_4",
    "wrn_28_10": "networks.cnn_moe.wide_resnet:wrn_28_10",
    "wrn_34_10": "networks.cnn_moe.wide_resnet:wrn_34_10",
    "vgg16": "networks.cnn_moe.vgg:vgg16",
    "vgg16_bn": "networks.cnn_moe.vgg:vgg16_bn",
    "densenet": "networks.cnn_moe.densenet:densenet",
}
