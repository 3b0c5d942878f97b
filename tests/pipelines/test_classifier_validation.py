"""Validation in training: what is measured of mixtures under each attack, and logits that are no answers."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dataloaders.digits import digits
from dataloaders.image_batches import EvalBatches, ImageBatch, Named
from engine.config import ClassifierTrain, UserError, from_dict
from networks.cnn_moe.model import CNN, CNNMoE
from networks.routing import top1
from pipelines.classifier_validation import metric_names, validated

CPU = torch.device("cpu")


def settings(**keys):
    network = {"name": "cnn", "arch": "resnet18"}
    own = {"method": "standard", "epochs": 1, **keys}
    return from_dict({"name": "x", "data": {"name": "digits"}, "network": network, "train": own}).train


def batches():
    return EvalBatches(digits("").split("val").take(np.arange(12)), 5)


def mixture(**keys):
    torch.manual_seed(2)
    keys = {"arch": "resnet18", "ratio": 0.05, "num_experts": 3, "router_width": 0.25, **keys}
    model = CNNMoE(10, **keys).eval()
    model.router.balance(
        [model.entry(torch.from_numpy(batch.images.numpy()).float() / 255) for batch in batches()]
    )
    return model


def effective(loads):
    """Mean over the sites of exp(entropy) of loads [S, E]."""
    return np.mean([math.exp(-sum(p * math.log(p) for p in site if p)) for site in loads.tolist()])


def test_loads_of_a_mixture_of_the_k_best_are_shares_of_its_weights():
    """The first of the k alone would be another figure; no image takes one expert, so that none is scored alone."""
    model = mixture(top_k=2, granularity="stage")
    figures = validated(model, batches(), settings(), CPU)
    images = torch.from_numpy(digits("").split("val").images[:12]).float() / 255
    with torch.no_grad():
        weights = model.route(model.gate_logits(images)).flatten(2)
    loads = weights.mean(dim=(0, 1))
    assert [figures[f"load_{e}"] for e in range(3)] == pytest.approx(loads.tolist(), abs=1e-5)
    first = torch.nn.functional.one_hot(weights.argmax(dim=2), 3).float().mean(dim=(0, 1))
    assert (loads - first).abs().max() > 0.05
    names = {"top1", "load_0", "load_1", "load_2", "effective_experts"}
    assert set(figures) == set(metric_names(model, settings())) == names
    assert figures["effective_experts"] == pytest.approx(effective(weights.mean(dim=1)), abs=1e-4)


def test_loads_of_one_choice_are_shares_of_images_and_sites():
    model = mixture(granularity="stage")
    figures = validated(model, batches(), settings(), CPU)
    images = torch.from_numpy(digits("").split("val").images[:12]).float() / 255
    with torch.no_grad():
        routes = model.inspect(images).routes
    loads = [(routes == e).float().mean().item() for e in range(3)]
    assert [figures[f"load_{e}"] for e in range(3)] == pytest.approx(loads)
    by_site = torch.nn.functional.one_hot(routes, 3).double().mean(dim=1)  # routes [S, B]
    assert figures["effective_experts"] == pytest.approx(effective(by_site))
    assert {f"top1_of_{e}" for e in range(3)} <= set(figures)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("keys", [{}, {"val_eps": 0.1, "val_steps": 1}])
def test_logits_that_are_not_finite_end_a_training(bad, keys):
    model = CNN(10, arch="resnet18", ratio=0.03).eval()
    with torch.no_grad():
        model.body.head.bias[3] = bad
    with pytest.raises(UserError, match=r"^my_run: NaN or inf among its logits of validation images \(top1"):
        validated(model, batches(), settings(**keys), CPU, "my_run")


def test_it_is_float32_without_tf32():
    seen, model = set(), CNN(10, arch="resnet18", ratio=0.03).eval()
    model.register_forward_hook(lambda *_: seen.add(torch.backends.cudnn.conv.fp32_precision))
    validated(model, batches(), settings(val_eps=0.1, val_steps=1), CPU)
    assert seen == {"ieee"} and torch.backends.cudnn.conv.fp32_precision != "ieee"


class Switch(nn.Module):
    """Two pixels, two classes, two experts: the first pixel decides the route at 0.5. Expert 0 is always right about
    class 0 (by a margin that falls with the first pixel), expert 1 where both pixels are bright."""

    num_experts, routing = 2, "hard"

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
