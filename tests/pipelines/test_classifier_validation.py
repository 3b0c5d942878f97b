"""Validation in training on a mixture whose figures under each attack are known."""

import torch
from torch import nn

from dataloaders.image_batches import ImageBatch, Named
from engine.config import ClassifierTrain
from networks.routing import top1
from pipelines.classifier_validation import validated


class Switch(nn.Module):
    """Two pixels, two classes, two experts: the first pixel decides the route at 0.5. Expert 0 is always right about
    class 0 (by a margin that falls with the first pixel), expert 1 where both pixels are bright."""

    num_experts = 2

    def gate_logits(self, images):
        scores = 8 * (images[:, 0, 0, 0] - 0.5)
        return torch.stack([-scores / 2, scores / 2], dim=1)[None, :, :, None, None, None]

    def route(self, gate_logits):
        return top1(gate_logits, straight_through=True)

    def forward_given(self, images, weights):
        first, second = images[:, 0, 0].unbind(dim=1)
        margins = torch.stack([1 + first, 20 * (first - 0.5) + 30 * (second - 0.9)], dim=1)
        margin = (margins * weights[0, :, :, 0, 0, 0]).sum(dim=1)
        return torch.stack([margin, torch.zeros_like(margin)], dim=1)

    def forward(self, images):
        return self.forward_given(images, self.route(self.gate_logits(images)))


def figures_of(*pixels):
    """Of images of class 0, each of two pixels, under changes of up to 0.1."""
    images = (torch.tensor(pixels) * 255).round().byte().view(-1, 1, 1, 2)
    frames = tuple(Named(f"image_{place}") for place in range(len(images)))
    batch = ImageBatch(images, torch.zeros(len(images), dtype=torch.int64), frames, None)
    train = {"method": "advmoe", "epochs": 1, "eps": 0.1, "val_steps": 20}
    return validated(Switch(), [batch], ClassifierTrain.model_validate(train), torch.device("cpu"))


def test_an_attack_through_the_router_is_not_the_one_that_keeps_the_clean_route():
    """Another route is what breaks it: expert 0, which the image takes, is right whatever is changed."""
    found = figures_of((0.45, 0.5))
    assert (found["top1"], found["attacked_top1"], found["flips"]) == (1, 0, 1)
    assert (found["frozen_top1"], found["robust_top1"]) == (1, 0)


def test_images_of_the_attack_that_keeps_the_route_are_shown_to_the_model_as_it_is():
    """Expert 1, which the image takes, is wrong about the attacked one, but that is routed to expert 0."""
    found = figures_of((0.55, 0.9))
    assert (found["top1"], found["load_1"], found["frozen_top1"]) == (1, 1, 1)


def test_figures_are_means_over_all_images():
    found = figures_of((0.45, 0.5), (0.55, 0.9), (0.55, 0.2), (0.3, 0.2))
    assert (found["top1"], found["load_0"], found["load_1"]) == (0.75, 0.5, 0.5)
    assert (found["top1_of_0"], found["top1_of_1"]) == (1, 0.25)
