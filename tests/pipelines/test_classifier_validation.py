"""Validation in training: what is measured of mixtures, and logits that are no answers."""

import math

import numpy as np
import pytest
import torch

from dataloaders.digits import digits
from dataloaders.image_batches import EvalBatches
from engine.config import UserError, from_dict
from networks.cnn_moe.model import CNN, CNNMoE
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
    assert set(figures) == set(metric_names(model, settings())) == {"top1", "load_0", "load_1", "load_2"}


def test_loads_of_one_choice_are_shares_of_images_and_sites():
    model = mixture(granularity="stage")
    figures = validated(model, batches(), settings(), CPU)
    images = torch.from_numpy(digits("").split("val").images[:12]).float() / 255
    with torch.no_grad():
        routes = model.inspect(images).routes
    loads = [(routes == e).float().mean().item() for e in range(3)]
    assert [figures[f"load_{e}"] for e in range(3)] == pytest.approx(loads)
    assert {f"top1_of_{e}" for e in range(3)} <= set(figures)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("keys", [{}, {"val_eps": 0.1, "val_steps": 1}])
def test_logits_that_are_not_finite_end_a_training(bad, keys):
    model = CNN(10, arch="resnet18", ratio=0.03).eval()
    with torch.no_grad():
        model.body.head.bias[3] = bad
    with pytest.raises(UserError, match=r"^my_run: NaN or inf among its logits of validation images \(top1"):
        validated(model, batches(), settings(**keys), CPU, "my_run")
