"""AdvMoE's phases: who gets a gradient, whose statistics move, what is attacked; divergences that never underflow."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attacks.threat import Threat, is_inside
from engine.adversarial import Attacked, divergence
from engine.config import ClassifierTrain, RouterTraining
from engine.pathways import (
    Inputs,
    RouterPhase,
    adversary_of,
    balanced,
    classified,
    given_router,
    imbalance,
    score_divergence,
    score_entropy,
)
from networks.cnn_moe.model import CNNMoE

EPS = 8 / 255


def train(**keys) -> ClassifierTrain:
    return ClassifierTrain.model_validate({"method": "advmoe", "epochs": 1, "eps": EPS, "steps": 2, **keys})


def mixture(experts=2):
    torch.manual_seed(4)
    model = CNNMoE(5, arch="resnet18", ratio=0.05, num_experts=experts)
    model.router.balance([model.entry(batch(32)[0].images)])
    return model.train()


def batch(count=6):
    dice = torch.Generator().manual_seed(7)
    images = torch.rand(count, 3, 8, 8, generator=dice)
    return Inputs(images, torch.arange(count) % 2), torch.arange(count) % 5


def statistics(module: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for name, buffer in module.named_buffers() if "running" in name]


def moved(module: nn.Module, before: list[torch.Tensor]) -> bool:
    return any(not torch.equal(one, other) for one, other in zip(statistics(module), before, strict=True))


def router_phase(**keys) -> RouterPhase:
    settings = RouterTraining.model_validate(keys)
    return RouterPhase(train(), settings)


@pytest.mark.parametrize("gap", [50.0, 104.0, 300.0, 1e4])
def test_divergences_and_their_gradients_are_finite_at_any_gap(gap):
    """A target whose softmax underflows made the published router NaN from a gap of 104 on."""
    scores = torch.tensor([gap, 0.0]).view(1, 1, 2, 1, 1, 1).requires_grad_()
    others = torch.tensor([0.0, gap]).view(1, 1, 2, 1, 1, 1).requires_grad_()
    found = score_divergence(scores, others)
    assert found.item() == pytest.approx(gap, rel=1e-4)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(found.sum(), (scores, others)))
    logits, attacked = (one.detach().view(1, 2).requires_grad_() for one in (scores, others))
    found = divergence(logits, attacked)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(found.sum(), (logits, attacked)))
    published = F.kl_div(others.flatten(2).log_softmax(2), scores.flatten(2).softmax(2), reduction="sum")
    (grad,) = torch.autograd.grad(published, scores)
    assert grad.isfinite().all() == (gap < 104)  # why it is written otherwise


def test_score_losses_are_their_formulas():
    scores, others = torch.randn(3, 4, 2, 1, 1, 1), torch.randn(3, 4, 2, 1, 1, 1)
    p, q = scores.flatten(2).softmax(2), others.flatten(2).softmax(2)
    assert torch.allclose(score_divergence(scores, others), (p * (p / q).log()).sum(2).mean(0), atol=1e-6)
    wanted = torch.tensor([0, 1, 1, 0])
    expected = -p[:, torch.arange(4), wanted].log().mean(0)
    assert torch.allclose(score_entropy(scores, wanted), expected, atol=1e-6)
    loads, means = F.one_hot(p.argmax(2), 2).double().mean(1), scores.flatten(2).double().mean(1)
    covariance = [np.cov(load, mean, ddof=0)[0, 1] * 2 for load, mean in zip(loads, means, strict=True)]
    assert imbalance(scores).item() == pytest.approx(np.mean(covariance), abs=1e-6)


def test_balance_pulls_a_router_back_that_sends_everything_to_one_expert():
    even = torch.tensor([[9.0, -9.0], [-9.0, 9.0]]).view(1, 2, 2, 1, 1, 1).requires_grad_()
    assert torch.autograd.grad(imbalance(even), even)[0].abs().max() < 1e-7
    scores = torch.tensor([[15.0, -15.0], [14.0, -15.0]]).view(1, 2, 2, 1, 1, 1).requires_grad_()
    (slope,) = torch.autograd.grad(imbalance(scores), scores)
    assert torch.allclose(slope.flatten(2).sum(1), torch.tensor([[0.5, -0.5]]))  # however sure the router is


def test_balance_adds_the_imbalance_of_the_clean_routes():
    model, (inputs, labels) = mixture().double().eval(), batch()
    inputs = Inputs(inputs.images.double())
    adversary = adversary_of(train(method="at_moe"))
    attacked = adversary.attack(model, inputs, labels, 0)
    plain, count = adversary.loss(model, attacked, labels)
    total, same = balanced(adversary.loss, 0.5)(model, attacked, labels)
    found = (total - plain).item()
    assert found == pytest.approx(0.5 * 6 * imbalance(model.gate_logits(inputs.images)).item(), abs=1e-6)
    assert count == same == 6 and found != 0
    alone = balanced(classified(), 0.5)(model, inputs, labels)[0] - classified()(model, inputs, labels)[0]
    assert alone.item() == pytest.approx(found, abs=1e-6)


def test_the_pathways_are_trained_given_the_router():
    model, (inputs, labels) = mixture(), batch()
    adversary = adversary_of(train())
    before = statistics(model.body)
    attacked = adversary.attack(model, inputs, labels, 0)
    assert not moved(model.body, before) and model.training and model.router.training
    threat_free = (attacked.adversarial.images - inputs.images).abs().flatten(1).amax(1)
    assert (threat_free > 0).all() and (threat_free <= EPS + 1e-6).all()
    total, count = adversary.loss(model, attacked, labels)
    own, routed = list(model.body.parameters()), list(model.router.parameters())
    grads = torch.autograd.grad(total, own, allow_unused=True, retain_graph=True)
    assert sum(grad is not None and bool(grad.abs().sum() > 0) for grad in grads) > len(own) / 2
    assert all(grad is None for grad in torch.autograd.grad(total, routed, allow_unused=True))
    assert moved(model.body, before) and count == 6


def test_the_pathways_images_are_attacked_through_the_router():
    """As those of AT(MoE) are, which trains the whole; a route that is kept gives others."""
    model, (inputs, labels) = mixture().eval(), batch()
    with torch.no_grad():
        model.body.head.weight.mul_(100)
    advmoe, at_moe = (
        adversary_of(train(method=method)).attack(model, inputs, labels, 0) for method in ("advmoe", "at_moe")
    )
    assert torch.equal(advmoe.adversarial.images, at_moe.adversarial.images)
    points = inputs.images.clone().requires_grad_()
    whole = torch.autograd.grad(given_router(model, Inputs(points)).square().sum(), points)[0]
    kept = model.route(model.gate_logits(inputs.images)).detach()
    alone = torch.autograd.grad(model.forward_given(points, kept).square().sum(), points)[0]
    assert (whole.sign() != alone.sign()).float().mean() > 0.1


def test_at_moe_trains_both_at_once():
    model, (inputs, labels) = mixture(), batch()
    adversary = adversary_of(train(method="at_moe"))
    total, _ = adversary.loss(model, adversary.attack(model, inputs, labels, 0), labels)
    (grad,) = torch.autograd.grad(total, [model.router.head.weight])
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("target", ["task", "label_mod", "cluster", "none"])
@pytest.mark.parametrize("attack", ["router", "joint"])
def test_the_router_is_trained_given_the_pathways(target, attack):
    model, (inputs, labels) = mixture(), batch()
    phase = router_phase(target=target, attack=attack)
    body = statistics(model.body)
    attacked = phase.attack(model, inputs, labels, 0)
    assert not moved(model.body, body) and model.training
    change = (attacked.adversarial.images - inputs.images).abs().flatten(1).amax(1)
    assert (change > 0).all() and (change <= EPS + 1e-6).all()
    assert attacked.adversarial.images.min() >= 0 and attacked.adversarial.images.max() <= 1
    total, count = phase.loss(model, attacked, labels)
    assert total.isfinite() and count == 6
    (grad,) = torch.autograd.grad(total, [model.router.head.weight])
    assert grad.isfinite().all() and grad.abs().sum() > 0
    assert not moved(model.body, body)
    assert model.training and model.body.training


def test_the_attack_on_the_router_moves_its_scores_more_than_noise_does():
    model, (inputs, labels) = mixture(), batch()
    phase = router_phase()
    model.eval()
    clean = model.gate_logits(inputs.images)
    attacked = phase.attack(model, inputs, labels, 0).adversarial.images
    dice = torch.Generator().manual_seed(1)
    noise = (inputs.images + EPS * torch.randn(inputs.images.shape, generator=dice).sign()).clamp(0, 1)
    apart = [score_divergence(clean, model.gate_logits(points)).mean() for points in (attacked, noise)]
    assert apart[0] > 3 * apart[1]


@pytest.mark.parametrize("constant", ["scores", "logits"])
def test_a_joint_attack_moves_scores_and_logits(constant):
    """Where one of them is constant it is the other that it moves; what attacks the scores alone moves no logits."""
    model, (inputs, labels) = mixture().eval(), batch()
    with torch.no_grad():
        model.body.head.weight.mul_(100)
        {"scores": model.router.head, "logits": model.body.head}[constant].weight.zero_()
    joint, router = (
        router_phase(attack=attack).attack(model, inputs, labels, 0) for attack in ("joint", "router")
    )
    if constant == "logits":
        assert torch.equal(joint.adversarial.images, router.adversarial.images)
        return
    clean = model(inputs.images)
    apart = [divergence(clean, model(one.adversarial.images)).mean() for one in (joint, router)]
    assert apart[0] > 3 * apart[1]


def test_what_is_attacked_follows_from_the_number_of_the_image():
    model, (inputs, labels) = mixture(), batch()
    model.eval()
    phase = router_phase()
    whole = phase.attack(model, inputs, labels, 10).adversarial.images
    rows = torch.arange(2, 6)
    part = phase.attack(model, inputs[rows], labels[rows], 12).adversarial.images
    assert torch.allclose(part, whole[2:], atol=1e-6)
    assert not torch.allclose(phase.attack(model, inputs, labels, 11).adversarial.images, whole, atol=1e-3)


def test_rows_of_the_inputs_keep_their_own_clusters():
    inputs = Inputs(torch.rand(5, 1, 2, 2), torch.tensor([3, 1, 4, 0, 2]))
    part = inputs[torch.tensor([4, 2])]
    assert torch.equal(part.images, inputs.images[[4, 2]]) and part.clusters.tolist() == [2, 4]
    assert Inputs(inputs.images)[torch.tensor([4])].clusters is None


def test_the_router_s_images_start_from_other_points_than_those_of_the_pathways():
    model, (inputs, labels) = mixture(), batch()
    still = train(step_size=1e-9)  # the attacked images are the random points that they start from
    phases = adversary_of(still), RouterPhase(still, RouterTraining())
    first, second = (phase.attack(model, inputs, labels, 0).adversarial.images for phase in phases)
    assert (first - inputs.images).abs().mean() > 0.3 * EPS and (first - second).abs().mean() > 0.3 * EPS


@pytest.mark.parametrize("target", ["label_mod", "cluster"])
def test_the_loss_of_a_target_that_is_told_is_written_out(target):
    model, (inputs, labels) = mixture(experts=3), batch()
    wanted = {"label_mod": [0, 1, 2, 0, 1, 0], "cluster": [0, 1, 0, 1, 0, 1]}[target]
    phase = router_phase(target=target, beta=2.0, balance=0.5)
    attacked = phase.attack(model, inputs, labels, 0)
    total, _ = phase.loss(model, attacked, labels)
    with torch.no_grad():
        clean, other = (model.gate_logits(one.images) for one in (attacked.clean, attacked.adversarial))
        expected = F.cross_entropy(clean.flatten(2)[0], torch.tensor(wanted), reduction="sum")
        expected += 2.0 * score_divergence(clean, other).sum() + 0.5 * 6 * imbalance(clean)
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)


def rerouted():
    """(mixture, images as they were and others in place of the attacked ones, some on another route, labels)."""
    model, (inputs, labels) = mixture().eval(), batch()
    with torch.no_grad():
        model.body.head.weight.mul_(100)
    others = Inputs(inputs.images.flip(0), inputs.clusters)
    routes = [model.inspect(one.images).routes for one in (inputs, others)]
    assert 0 < (routes[0] != routes[1]).sum() < 6
    return model, Attacked(inputs, others, torch.arange(6)), labels


def test_the_loss_of_the_task_is_written_out():
    model, attacked, labels = rerouted()
    phase = RouterPhase(train(beta=3.0), RouterTraining(target="task", beta=2.0))
    total, _ = phase.loss(model, attacked, labels)
    clean, other = (model.inspect(one.images) for one in (attacked.clean, attacked.adversarial))
    p, q = clean.logits.softmax(1), other.logits.softmax(1)
    trades = F.cross_entropy(clean.logits, labels, reduction="sum") + 3.0 * (p * (p / q).log()).sum()
    r, s = clean.scores.softmax(2), other.scores.softmax(2)
    assert total.item() == pytest.approx((trades + 2.0 * (r * (r / s).log()).sum()).item(), rel=1e-4)


def test_the_task_reaches_the_router_through_the_routes_alone():
    """Its gradient is the slope of the loss along the weights of both passes, times that of the softmax."""
    model, attacked, labels = rerouted()
    own, beta = list(model.router.parameters()), train().beta
    found = torch.autograd.grad(router_phase(target="task", beta=0.0).loss(model, attacked, labels)[0], own)
    pairs = [(one.images, model.gate_logits(one.images)) for one in (attacked.clean, attacked.adversarial)]
    weights = [model.route(scores).detach().requires_grad_() for _, scores in pairs]
    logits, other = (
        model.forward_given(images, given) for (images, _), given in zip(pairs, weights, strict=True)
    )
    total = F.cross_entropy(logits, labels, reduction="sum") + beta * divergence(logits, other).sum()
    slopes = torch.autograd.grad(total, weights)
    expected = torch.autograd.grad([scores.softmax(2) for _, scores in pairs], own, slopes)
    assert all(slope.abs().sum() > 0 for slope in slopes) and expected[0].abs().sum() > 0
    for one, wanted in zip(found, expected, strict=True):
        assert torch.allclose(one, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max().item())


def test_images_stay_inside_the_ball_of_the_threat():
    model, (inputs, labels) = mixture(), batch()
    attacked = adversary_of(train(steps=3)).attack(model, inputs, labels, 0)
    threat = Threat(EPS, "linf", -1, tuple(range(6)))
    assert is_inside(attacked.adversarial.images, inputs.images, threat).all()
