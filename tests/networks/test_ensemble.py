import math

import numpy as np
import pytest
import torch

from engine.config import UserError
from networks import ensemble
from networks.ensemble import Ensemble


def brute_force(expert_logits, kind):
    """Pixel by pixel in float64."""
    logits = expert_logits.double().numpy()
    batch, experts, classes, height, width = logits.shape
    result = np.empty((batch, classes, height, width))
    for b, y, x in np.ndindex(batch, height, width):
        pixel = logits[b, :, :, y, x]  # [E, C]
        probs = np.exp(pixel) / np.exp(pixel).sum(axis=1, keepdims=True)
        if kind == "vote":
            votes = np.zeros(classes)
            for row in pixel:
                votes[row.argmax()] += 1
            tied = np.flatnonzero(votes == votes.max())
            result[b, :, y, x] = 0
            result[b, max(tied, key=lambda c: probs[:, c].mean()), y, x] = 1
        else:
            result[b, :, y, x] = {
                "mean": pixel.mean(axis=0),
                "max": pixel.max(axis=0),
                "mean_probs": np.log(probs.mean(axis=0)),
            }[kind]
    return torch.from_numpy(result)


@pytest.mark.parametrize("experts", [2, 3, 4])
@pytest.mark.parametrize("kind", ["mean", "max", "mean_probs", "vote"])
def test_against_brute_force(kind, experts):
    expert_logits = 2 * torch.randn(2, experts, 5, 7, 6)
    kept = expert_logits.clone()
    combined, expected = getattr(ensemble, kind)(expert_logits), brute_force(expert_logits, kind)
    if kind == "vote":
        assert torch.equal(combined.argmax(1), expected.argmax(1))
    else:
        torch.testing.assert_close(combined.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(expert_logits, kept)


@pytest.mark.parametrize("kind", ["mean_probs", "vote"])
def test_log_probabilities_sum_to_one(kind):
    combined = getattr(ensemble, kind)(10 * torch.randn(2, 3, 5, 7, 6))
    torch.testing.assert_close(combined.exp().sum(1), torch.ones(2, 7, 6))


def test_votes_are_finite_logits_with_a_gradient_whatever_the_gap():
    expert_logits = torch.tensor([[[0.0, -300.0, -1e4], [0.0, -300.0, -2e4]]])[
        ..., None, None
    ].requires_grad_()
    combined = ensemble.vote(expert_logits)
    expected = torch.tensor([0.0, -300 - math.log(5), -1e4 - math.log(10)])
    torch.testing.assert_close(combined.flatten(), expected)
    (slope,) = torch.autograd.grad(combined[0, 2].sum(), expert_logits)
    torch.testing.assert_close(slope[0, :, :, 0, 0], torch.tensor([[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))


def test_majority_beats_one_confident_expert():
    expert_logits = torch.tensor([[[0.0, 0.1], [0.0, 0.1], [50.0, 0.0]]])[..., None, None]
    assert ensemble.vote(expert_logits).argmax(1).item() == 1
    assert ensemble.mean_probs(expert_logits).argmax(1).item() == 0


def test_max_depends_on_offsets_of_logits_and_the_others_do_not():
    expert_logits = torch.randn(2, 3, 5, 32, 32)
    shifted = expert_logits.clone()
    shifted[:, 0] += 3 * torch.randn(2, 1, 32, 32)
    for kind in ("mean", "max", "mean_probs", "vote"):
        combine = getattr(ensemble, kind)
        changed = (combine(expert_logits).argmax(1) != combine(shifted).argmax(1)).float().mean()
        assert changed > 0.1 if kind == "max" else changed < 2e-3, kind


def test_ensemble_combines_the_full_resolution_logits_of_its_frozen_experts(toy_experts):
    experts = toy_experts(3)
    model = Ensemble(experts, ensemble.max).train()
    images = torch.rand(2, 3, 33, 50)
    expected = torch.stack([expert(images) for expert in experts.values()]).amax(0)
    assert torch.equal(model(images), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_experts_with_other_classes_are_refused(toy_expert):
    with pytest.raises(UserError, match=r"experts\.urban: 7 classes"):
        Ensemble({"highway": toy_expert(5), "urban": toy_expert(7)}, ensemble.mean)
