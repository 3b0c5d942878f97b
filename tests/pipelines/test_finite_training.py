"""AdvMoE stays finite: 20 seeds of 200 steps at the published learning rate, ResNet-18 at 32x32. Hours: -m slow."""

import pytest
import torch

from dataloaders.digits import digits
from dataloaders.image_batches import TrainBatches, images_of
from engine.config import component, from_dict
from engine.pathways import Inputs
from engine.steps import compute_gradients
from pipelines.classification import phases_of

STEPS, BATCH = 200, 32


@pytest.mark.slow
@pytest.mark.parametrize("experts", [2, 5])
@pytest.mark.parametrize("target", ["task", "label_mod"])
@pytest.mark.parametrize("seed", range(20))
def test_no_value_is_ever_infinite_or_nan(experts, target, seed):
    stays_finite(0.25, 4, experts, target, seed, STEPS)


@pytest.mark.parametrize("target", ["task", "label_mod"])
def test_a_few_steps_of_a_small_one_are_finite(target):
    stays_finite(0.05, 1, 2, target, 0, 6)


def stays_finite(ratio, enlarge, experts, target, seed, steps):
    """Digits enlarged inside the network; losses, gradients, weights and scores are finite after every step."""
    keys = {"arch": "resnet18", "ratio": ratio, "num_experts": experts, "enlarge": enlarge}
    network = component("networks:CLASSIFIERS", "cnn_moe", **keys)
    torch.manual_seed(seed)
    model = network.build(10)
    train = {
        "method": "advmoe", "epochs": 1, "eps": 8 / 255, "steps": 2, "step_size": 5 / 255, "seed": seed,
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
        "router": {"target": target},
    }  # fmt: skip
    config = from_dict(
        {"name": "one", "data": {"name": "digits"}, "network": network.plain(), "train": train}
    )
    phases = phases_of(config, model, steps)
    split, done = digits("").split("train"), 0
    for epoch in range(steps):
        for batch in TrainBatches(split, BATCH, seed, pad=1).epoch(epoch):
            images = images_of(batch, torch.device("cpu"), torch.channels_last)
            for phase in phases:
                model.train()
                values = compute_gradients(phase, model, [(Inputs(images), batch.labels)], first=done * BATCH)
                assert torch.isfinite(values).all(), (done, phase.name)
                if phase.clip_norm:
                    torch.nn.utils.clip_grad_norm_(phase.parameters, phase.clip_norm)
                phase.optimizer.step()
                phase.scheduler.step()
            assert all(torch.isfinite(one).all() for one in model.state_dict().values()), done
            with torch.no_grad():
                scores = model.gate_logits(images)
            assert torch.isfinite(scores).all() and scores.abs().max() <= model.router.bound, done
            done += 1
            if done == steps:
                return
