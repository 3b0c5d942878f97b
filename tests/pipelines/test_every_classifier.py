"""Every architecture, dense, slim and as mixtures: built, trained for a step, saved, loaded strictly, evaluated."""

import math

import pytest
import torch

from engine.checkpoints import save_weights
from engine.config import component, from_dict
from engine.pathways import Inputs
from engine.steps import compute_gradients
from evaluation.classifiers import accuracies, answers
from networks.cnn_moe import ARCHITECTURES
from pipelines.classification import phases_of
from pipelines.models import load_classifier

KINDS = {
    "dense": {"name": "cnn", "ratio": 1.0},
    "slim": {"name": "cnn", "ratio": 0.5},
    "E 2": {"name": "cnn_moe", "ratio": 0.5, "num_experts": 2},
    "E 5": {"name": "cnn_moe", "ratio": 0.5, "num_experts": 5},
}
CLASSES, IMAGES = 10, 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "size",
    [32, pytest.param(64, marks=pytest.mark.slow), pytest.param(224, marks=pytest.mark.slow)],
)
def test_it_is_built_trained_saved_loaded_and_evaluated(tmp_path, arch, kind, size):
    keys = dict(KINDS[kind])
    name, stem = keys.pop("name"), "imagenet" if size == 224 else "cifar"
    network = component("networks:CLASSIFIERS", name, arch=arch, stem=stem, **keys)
    torch.manual_seed(0)
    model = network.build(CLASSES)
    images, labels = torch.rand(IMAGES, 3, size, size), torch.arange(IMAGES)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.train()
    for phase in phases_of(config(network, name == "cnn_moe"), model, 10):
        total, count, norm = compute_gradients(phase, model, [(Inputs(images), labels)]).tolist()
        assert math.isfinite(total) and count == IMAGES and norm > 0
        phase.optimizer.step()
    moved = [not torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True)]
    assert sum(moved) > len(moved) / 2 and all(torch.isfinite(one).all() for one in model.parameters())
    file = tmp_path / "best.safetensors"
    about = {"network": network.plain(), "classes": [str(one) for one in range(CLASSES)], "config": {}}
    save_weights(file, model.state_dict(), about)
    again = load_classifier(str(file), "models.again").network
    file.unlink()
    own, other = (answers(one.eval(), [(images, 0)], torch.device("cpu")) for one in (model, again))
    assert (own.ranked == other.ranked).all()
    figures = accuracies(other, labels.numpy(), CLASSES)
    assert {"top1", "top5"} <= set(figures) and ("oracle_route" in figures) == (name == "cnn_moe")


def config(network, routed):
    method = "advmoe" if routed else "trades"
    train = {"method": method, "epochs": 1, "eps": 0.03, "steps": 2, "optimizer": {"name": "sgd", "lr": 0.01}}
    return from_dict({"name": "one", "data": {"name": "digits"}, "network": network.plain(), "train": train})
