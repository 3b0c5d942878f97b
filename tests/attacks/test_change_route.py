"""Attacks on the router alone: exact on a linear router, whose routes can be changed or not by a formula."""

import pytest
import torch
from torch import nn

from attacks.change_route import change_route
from attacks.threat import Threat, is_inside
from engine.config import UserError
from networks.cnn_moe.model import CNNMoE

EPS = 8 / 255


class Linear(nn.Module):
    """A routed model whose gate logits are linear; its answer is its expert's number, whatever the image."""

    num_experts, routing = 3, "hard"

    def __init__(self, gap):
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.Parameter(torch.randn(3, 3 * 16) / 16)
        self.bias = nn.Parameter(gap * torch.tensor([1.0, 0.0, -1.0]))

    def gate_logits(self, images):
        return ((images - 0.5).flatten(1) @ self.weights.T + self.bias)[None, :, :, None, None, None]


def images(count=40):
    return 0.2 + 0.6 * torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def threat(count, eps=EPS, norm="linf"):
    return Threat(eps, norm, None, tuple(range(count)))


@pytest.mark.parametrize("gap", [0.05, 0.2, 0.4])
def test_it_changes_just_the_routes_that_can_be_changed(gap):
    model, given = Linear(gap).requires_grad_(False), images()
    found = change_route(model, given, torch.zeros(40).long(), threat(40))
    scores = model.gate_logits(given)[0, :, :, 0, 0, 0]
    best = scores.argmax(dim=1)
    lead = scores.gather(1, best[:, None]) - scores  # [B, E]
    reach = EPS * (model.weights[best][:, None] - model.weights[None]).abs().sum(dim=2)
    movable = ((lead < reach) & (lead > 0)).any(dim=1)
    assert torch.equal(found.correct == 0, movable)
    assert 0 < movable.sum() < 40 or gap == 0.05
    assert is_inside(found.images, given, threat(40)).all()
    after = model.gate_logits(found.images)[0, :, :, 0, 0, 0].argmax(dim=1)
    assert torch.equal(after != best, movable)


def test_eps_0_changes_nothing_and_costs_are_counted():
    model, given = Linear(0.2).requires_grad_(False), images(4)
    found = change_route(model, given, torch.zeros(4).long(), threat(4, 0.0), steps=5, restarts=2)
    assert torch.equal(found.images, given) and (found.correct == 1).all()
    assert (found.forwards, found.backwards) == (1 + 2 * 6, 10)


def test_all_sites_of_a_mixture_count():
    torch.manual_seed(0)
    model = CNNMoE(10, arch="resnet18", ratio=0.05, num_experts=2, granularity="stage").eval()
    given = torch.rand(3, 3, 16, 16)
    model.router.balance([model.entry(given)])
    model.requires_grad_(False)
    found = change_route(model, given, torch.zeros(3).long(), threat(3, 1e-6))
    sites = model.gate_logits(given).shape[0]
    assert sites > 1 and (found.correct <= sites).all() and found.correct.max() > 1


def test_a_network_without_a_router_is_refused():
    with pytest.raises(UserError, match="no gate_logits"):
        change_route(nn.Identity(), images(1), torch.zeros(1).long(), threat(1))
