"""Gate-aware attacks: the laws of mixtures, the worst vertex by trying all, gradients through image, features, gate."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attacks import ATTACKS, routed
from attacks.parts import agreement, wrong_classes
from attacks.pgd import climb, pgd
from attacks.search import Search, scores
from attacks.threat import Threat
from engine.config import UserError, component
from networks.gates import ClasswiseGate, SimpleGate, UniformGate
from networks.moe import MixtureOfExperts
from networks.spatial_gate import SpatialGate
from tests.networks.conftest import ToyExpert

NAMES = [name for name, target in ATTACKS.items() if target.startswith("attacks.routed:")]
GATES = {
    "simple": SimpleGate,
    "classwise": ClasswiseGate,
    "spatial": SpatialGate,
    "spatial, per class": lambda *shape: SpatialGate(*shape, per_class=True),
    "uniform": UniformGate,
}
CLASSES, SIZE, EPS = 4, 16, 4 / 255


def mixture(gate="simple", routing="top1", experts=2, same=False, **keys):
    torch.manual_seed(experts)
    networks = [ToyExpert(CLASSES) for _ in range(experts)]
    for network in networks[1:] if same else ():
        network.load_state_dict(networks[0].state_dict())
    gate = GATES[gate](6 * experts, experts, CLASSES)
    for name, parameter in gate.named_parameters():
        if name.startswith("expert_"):
            nn.init.normal_(parameter)
    named = {str(index): network for index, network in enumerate(networks)}
    return MixtureOfExperts(named, gate, CLASSES, routing=routing, **keys).requires_grad_(False).eval()


def samples(model, count=3, centred=True):
    """(images, labels that the model mostly gives, with void). centred: the gate is near to deciding otherwise."""
    torch.manual_seed(7)
    images = 0.1 + 0.8 * torch.rand(count, 3, SIZE, SIZE)
    if centred and hasattr(model.gate, "expert_bias"):
        model.gate.expert_bias -= model.gate_logits(images)[0, :, :, :, 0, 0].mean(0).T
    labels = model(images).argmax(1)
    labels[:, ::5] = torch.randint(CLASSES, labels[:, ::5].shape)
    labels[:, :, :2] = 255
    return images, labels


def threat(count=3, eps=EPS, **keys):
    return Threat(eps, seeds=tuple(range(count)), **keys)


def attack(name, model, images, labels, ball, **keys):
    return component("attacks:ATTACKS", name, **keys).build(model, images, labels, ball)


def right_pixels(model, images, labels):
    with torch.no_grad():
        return scores(model(images), labels, 255)[0]


# --- every attack


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_returned_is_inside_and_scored_on_the_unmodified_model(name, norm):
    model = mixture()
    images, labels = samples(model)
    ball = threat(norm=norm, eps=EPS if norm == "linf" else 0.3)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = attack(name, model, images, labels, ball, steps=6)
    change = (found.images - images).flatten(1)
    used = change.abs().amax(1) if norm == "linf" else torch.linalg.vector_norm(change, dim=1)
    assert (used <= ball.eps + 1e-6).all() and found.images.amin() >= 0 and found.images.amax() <= 1
    assert torch.equal(found.correct, right_pixels(model, found.images, labels))
    assert (found.correct <= right_pixels(model, images, labels)).all()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not found.bad_gradients.any() and not found.zero_gradients.any()


@pytest.mark.parametrize("climber", ["pgd", "apgd"])
@pytest.mark.parametrize("name", NAMES)
def test_eps_0_gives_the_images_themselves(name, climber):
    model = mixture("classwise", "soft")
    images, labels = samples(model)
    found = attack(name, model, images, labels, threat(eps=0.0), steps=6, climber=climber)
    assert torch.equal(found.images, images) and torch.equal(found.balanced, images)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("routing", ["soft", "top1"])
@pytest.mark.parametrize("name", NAMES)
def test_the_cost_is_known_beforehand(name, routing, gate):
    """One pass for the clean gate, the gradient steps, and a look at the end of each run."""
    model = mixture(gate, routing, experts=3, same=gate == "uniform")
    images, labels = samples(model, count=1)
    found = attack(name, model, images, labels, threat(1, eps=0.01 / 255), steps=9)
    classwise = gate in ("classwise", "spatial, per class")
    runs = {"soft_gate": 3, "joint": 3, "route_first": 1 if classwise else 3, "weakest_expert": 4}
    runs |= {"all_to_one_wrong": 2, "each_path": 3}
    assert (found.forwards, found.backwards) == (1 + 9 + runs.get(name, 1), 9)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_has_the_same_attack_in_any_company(name):
    """Up to the last bits of a convolution over another batch."""
    model = mixture("spatial", "soft")
    images, labels = samples(model, centred=False)
    together = attack(name, model, images, labels, threat(), steps=6)
    for index in (2, 0):
        ball = Threat(EPS, seeds=(index,))
        alone = attack(name, model, images[[index]], labels[[index]], ball, steps=6)
        differs = (alone.images[0] - together.images[index]).abs() > 1e-5
        assert differs.double().mean() < 0.02
        assert abs(alone.correct[0] - together.correct[index]) <= 2


@pytest.mark.parametrize("name", NAMES)
def test_a_gate_whose_logits_are_larger_is_no_harder(name):
    """A hard gate answers the same at any scale, and so its attacks do the same, to the last bit."""
    found = []
    for factor in (1, 1024):
        model = mixture("classwise", "top1")
        images, labels = samples(model)
        model.gate.expert_weight *= factor
        model.gate.expert_bias *= factor
        found.append(attack(name, model, images, labels, threat(), steps=6))
    assert torch.equal(found[0].images, found[1].images)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_without_a_gate_is_refused(name, segmenter):
    images = torch.rand(1, 3, 8, 8)
    with pytest.raises(UserError, match="it is for routed models, and the network has no gate_logits"):
        attack(name, segmenter(), images, torch.zeros(1, 8, 8).long(), threat(1))


def test_a_sweep_goes_on_from_the_best_points_and_restarts_begin_anew():
    model = mixture("classwise", "soft")
    images, labels = samples(model)
    search, starts = routed.RoutedSearch(model, images, labels, threat()), []

    def objective(points, progress):
        starts.append(torch.equal(points.detach(), search.best))
        seen = search.inside(points)
        return search.trial(seen.logits, seen.logits)

    search.run("sweep", [objective] * 4, 4, sweep=2)
    assert starts == [False, True, False, True]


def test_too_few_steps_are_refused():
    model = mixture()
    images, labels = samples(model, 1)
    with pytest.raises(UserError, match="soft_gate: 2 steps for 3 runs; give at least 3"):
        attack("soft_gate", model, images, labels, threat(1), steps=2)


def test_a_gate_that_never_changes_is_told_by_zero_gradients():
    model = mixture("uniform", "soft")
    images, labels = samples(model)
    assert attack("gate_only", model, images, labels, threat(), steps=4).zero_gradients.tolist() == [4, 4, 4]


def test_a_model_that_offers_no_mix_is_attacked_through_forward_given():
    model = mixture("classwise", "soft")
    images, labels = samples(model)

    class Plain:
        routing, gate_logits, route, forward_given = (
            "soft",
            model.gate_logits,
            model.route,
            model.forward_given,
        )

        def __call__(self, images):
            return model(images)

    for name in ("joint", "route_first"):
        both = [attack(name, one, images, labels, threat(), steps=6).images for one in (model, Plain())]
        assert torch.equal(*both)


# --- laws of mixtures


@pytest.mark.parametrize("routing", ["soft", "top1"])
@pytest.mark.parametrize("expert", [0, 1])
def test_a_gate_that_gives_all_to_one_expert_is_that_expert_under_attack(routing, expert):
    model = mixture("simple", routing)
    images, labels = samples(model)
    model.gate.expert_bias[:, expert] = 1e4
    alone = model.experts[expert]
    for keys in ({}, {"loss": "masked_ce", "restarts": 2}):
        found = [pgd(one, images, labels, threat(), steps=5, **keys) for one in (model, alone)]
        assert torch.equal(found[0].images, found[1].images)
        assert torch.equal(found[0].losses, found[1].losses)


def test_a_mixture_of_one_expert_is_that_expert_under_attack():
    model = mixture("uniform", "soft", experts=1)
    images, labels = samples(model)
    found = [pgd(one, images, labels, threat(), steps=5).images for one in (model, model.experts[0])]
    assert torch.equal(*found)
    for name in NAMES:  # and those that know the gate have nothing to find
        attack(name, model, images, labels, threat(), steps=6)


@pytest.mark.parametrize("name", ["gate_only", "route_first", "joint", "soft_gate"])
@pytest.mark.parametrize("routing", ["soft", "top1"])
def test_the_gate_of_identical_experts_changes_nothing_of_the_output(name, routing):
    model = mixture("simple", routing, same=True)
    images, labels = samples(model)
    found = attack(name, model, images, labels, threat(eps=8 / 255), steps=12)
    torch.testing.assert_close(model(found.images), model.experts[0](found.images), rtol=0, atol=1e-5)
    assert torch.equal(found.correct, right_pixels(model.experts[0], found.images, labels))


def test_the_route_of_identical_experts_can_be_turned():
    """The gate changes its mind while nothing is lost: the points that gate_only tried."""
    model = mixture("simple", "top1", same=True)
    images, labels = samples(model)
    clean = model.gate_logits(images).argmax(2).flatten()
    objective = objective_of("gate_only", model, images, labels)
    search = Search(model, images, labels, threat(eps=8 / 255))
    last = climb(search, objective, images, 12)
    assert (model.gate_logits(last).argmax(2).flatten() != clean).any()


def test_a_hard_gate_answers_as_the_expert_that_it_routes_to():
    model = mixture("simple", "top1")
    images, labels = samples(model)
    found = attack("joint", model, images, labels, threat(), steps=9)
    routes = model.gate_logits(found.images).argmax(2).flatten()
    alone = torch.stack([expert(found.images) for expert in model.experts], 1)
    assert torch.equal(model(found.images), alone[torch.arange(3), routes])
    right = torch.stack([scores(one, labels, 255)[0] for one in alone.unbind(1)])
    assert (right.amin(0) <= found.correct).all() and (found.correct <= right.amax(0)).all()


# --- parts


def search_of(model, eps=EPS, count=3, **keys):
    images, labels = samples(model, count, **keys)
    return routed.RoutedSearch(model, images, labels, threat(count, eps))


def test_the_gates_loss_and_what_is_missing_by_hand():
    search = search_of(mixture("simple", "top1", experts=3), count=1)
    search.spread = torch.full((1, 1, 1, 1, 1, 1), 2.0)
    search.decision = torch.tensor([1.0, 0, 0]).view(1, 1, 3, 1, 1, 1)
    logits = torch.tensor([4.0, 2.0, 0.0]).view(1, 1, 3, 1, 1, 1)
    assert search.change(logits).item() == pytest.approx(math.log(1 + math.exp(-1) + math.exp(-2)))
    first, second, third = search.vertices()
    assert search.missing(logits, first, 0.5).item() == 0  # leads by 1 spread
    assert search.missing(logits, first, 1.5).item() == pytest.approx(0.5)
    assert search.missing(logits, second, 0.5).item() == pytest.approx(1.5)
    assert search.missing(logits, third, 0.0).item() == pytest.approx(2.0)


def test_what_is_missing_of_a_spatial_gate_is_a_mean_over_places():
    search = search_of(mixture("spatial"), count=1)
    search.spread = torch.ones_like(search.spread)
    logits = torch.tensor([[1.0, 0.0], [0.0, 3.0]]).view(
        1, 1, 2, 1, 1, 2
    )  # experts in rows, places in columns
    assert search.missing(logits, search.vertices()[0], 0.0).item() == pytest.approx((0 + 3) / 2)
    assert search.missing(logits, search.vertices()[1], 0.0).item() == pytest.approx((1 + 0) / 2)


@pytest.mark.parametrize("gate", ["simple", "classwise", "spatial", "spatial, per class"])
def test_vertices_are_the_experts(gate):
    model = mixture(gate, "top1", experts=3)
    search = search_of(model)
    for vertex, expert in zip(search.vertices(), model.experts, strict=True):
        assert torch.equal(model.forward_given(search.images, vertex), expert(search.images))


class OnePixel:
    """Class-wise weights over given expert logits [E, C]."""

    routing = "soft"

    def __init__(self, expert_logits):
        self.expert_logits = expert_logits

    def __call__(self, images):
        gate_logits, mix = self.gate_and_mix(images)
        return mix(self.route(gate_logits))

    def gate_and_mix(self, images):
        shape = self.expert_logits.shape
        return images.new_zeros(1, 1, *shape, 1, 1), lambda weights: (
            weights.reshape(shape) * self.expert_logits
        ).sum(0)[None]

    def route(self, gate_logits):
        return gate_logits.softmax(2)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 3), st.integers(2, 4), st.sampled_from([0.3, 3.0, 30.0]))
def test_the_worst_vertex_of_a_pixel_is_found_as_if_all_were_tried(seed, experts, classes, scale):
    torch.manual_seed(seed)
    expert_logits, label = scale * torch.randn(experts, classes), torch.randint(classes, (1,))

    def lead(choice):
        mixed = expert_logits[list(choice), range(classes)]
        return (mixed[label] - mixed[torch.arange(classes) != label].amax()).item()

    search = routed.RoutedSearch(OnePixel(expert_logits), torch.rand(1, 3, 1, 1), label, threat(1))
    vertex = routed.worst_vertex(search).reshape(experts, classes)
    assert torch.equal(vertex.sum(0), torch.ones(classes)) and ((vertex == 0) | (vertex == 1)).all()
    worst = min(lead(choice) for choice in itertools.product(range(experts), repeat=classes))
    assert lead(vertex.argmax(0).tolist()) == worst
    assert vertex[:, label].argmax() == expert_logits[:, label].argmin()


def test_the_worst_vertex_of_a_map_raises_the_loss_more_than_any_expert_does():
    model = mixture("classwise", "soft", experts=3)
    search = search_of(model)
    loss = lambda weights: routed.image_loss(  # noqa: E731
        routed.soft_margin, search.clean_mix(weights), search.labels, search.threat
    )
    worst = loss(routed.worst_vertex(search))
    assert all((worst >= loss(vertex)).all() for vertex in search.vertices())
    assert any((worst > loss(vertex) + 0.01).any() for vertex in search.vertices())


# --- gradients


@pytest.mark.parametrize("gate", ["simple", "classwise", "spatial"])
@pytest.mark.parametrize("name", ["soft_gate", "joint", "gate_only", "route_first"])
def test_the_attackers_gradient_is_that_of_finite_differences(monkeypatch, name, gate):
    """Through image, features and gate of a real mixture, in float64; where they are smooth."""
    model = mixture(gate, "soft")
    images, labels = samples(model, centred=gate != "spatial")
    objectives = []
    monkeypatch.setattr(
        routed.RoutedSearch,
        "run",
        lambda search, name, given, steps, **keys: objectives.extend([(search, one) for one in given]),
    )
    attack(name, model, images, labels, threat(), steps=9, **({} if name == "gate_only" else {"loss": "ce"}))
    model.double()
    direction = torch.rand(images.shape, dtype=torch.float64)
    step = 1e-6
    for search, objective in objectives:
        for part in ("gate_logits", "weights", "decision", "spread"):
            setattr(search, part, getattr(search, part).double())
        points = (images.double() + 0.01).requires_grad_()
        slope = (torch.autograd.grad(objective(points, 0.9).loss.sum(), points)[0] * direction).sum().item()
        with torch.no_grad():
            ahead, behind = (objective(points + sign * step * direction, 0.9).loss.sum() for sign in (1, -1))
        assert slope == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=1e-4)
        assert abs(slope) > 1e-4


def test_experts_only_and_stay_route_send_no_gradient_through_the_gate():
    model = mixture("simple", "soft")
    images, labels = samples(model, centred=False)  # so that the gate's decision stands
    points = (images + 0.01).requires_grad_()
    with torch.no_grad():
        weights = model.route(model.gate_logits(images))
    kept = labels.masked_fill(labels == 255, -100)
    losses = F.cross_entropy(model.forward_given(points, weights), kept, reduction="none")
    own = losses.flatten(1).sum(1) / (labels != 255).flatten(1).sum(1)
    (expected,) = torch.autograd.grad(own.sum(), points)
    for name in ("experts_only", "stay_route"):
        (gradient,) = torch.autograd.grad(
            objective_of(name, model, images, labels, loss="ce")(points, 0.0).loss.sum(), points
        )
        torch.testing.assert_close(gradient, expected)
    plain = F.cross_entropy(model(points), kept, reduction="none").flatten(1).sum(1) / (
        labels != 255
    ).flatten(1).sum(1)
    (with_gate,) = torch.autograd.grad(plain.sum(), points)
    assert not torch.allclose(with_gate, expected, rtol=1e-2)


def objective_of(name, model, images, labels, **keys):
    """The first objective that an attack climbs."""
    kept = []

    class Kept(Exception):
        pass

    def keep(search, attack_name, objectives, steps, **keys):
        kept.extend(objectives)
        raise Kept

    original, routed.RoutedSearch.run = routed.RoutedSearch.run, keep
    try:
        getattr(routed, name)(model, images, labels, threat(len(images)), **keys)
    except Kept:
        return kept[0]
    finally:
        routed.RoutedSearch.run = original


@pytest.mark.parametrize("routing", ["soft", "top1"])
def test_straight_through_raises_the_models_own_loss(routing):
    model = mixture("simple", routing)
    images, labels = samples(model)
    for straight_through in (True, False):
        objective = objective_of(
            "soft_gate", model, images, labels, loss="ce", straight_through=straight_through
        )
        trial = objective(images.clone().requires_grad_(), 0.0)
        own = routed.image_loss("ce", model(images), labels, threat())
        assert torch.allclose(trial.loss, own) is straight_through
        assert torch.equal(trial.logits, model(images))


# --- where they go


class Line:
    """Three experts that agree, behind a hard gate of the first value of the image: up to 0.01 around 0.5 the first
    answers, above the second, below the third. One pixel is always right; another is always wrong, and its loss rises
    with that value far more steeply than anything of the gate. Notes where it was asked."""

    routing, num_experts = "hard", 3

    def __init__(self):
        self.asked = []

    def __call__(self, images):
        gate_logits, mix = self.gate_and_mix(images)
        return mix(self.route(gate_logits))

    def gate_and_mix(self, images):
        place = images[:, 0, 0, 0] - 0.5
        gate_logits = torch.stack([0 * place + 0.01, place, -place], 1).view(1, -1, 3, 1, 1, 1)
        self.asked.append(gate_logits.argmax(2).flatten().tolist())
        right, wrong = torch.full_like(place, 5.0), -50 - 1000 * place
        logits = torch.stack(
            [torch.stack([right, wrong], 1), 0 * torch.stack([right, wrong], 1)], 1
        )  # [B, 2, 2]
        return gate_logits, lambda weights: weights.reshape(-1, 3, 1, 1).sum(1) * logits

    def route(self, gate_logits):
        return routed.one_hot(gate_logits)


LINE = torch.full((2, 3, 2, 2), 0.5), torch.zeros(2, 2).long()


def routes(name, **keys):
    """The routes at all points that an attack tried on two images, the clean ones first."""
    model = Line()
    attack(name, model, *LINE, threat(2, 0.02, ignore_index=None), **keys)
    return model.asked


def test_route_first_visits_every_expert():
    asked = routes("route_first", loss="ce", steps=60)
    runs = [asked[1 + 21 * run :][:21] for run in range(3)]
    for expert, run in enumerate(runs):  # a fixed step oscillates around the border
        for image in zip(*run[-11:], strict=True):
            assert image.count(expert) >= 5, run
    assert asked[0] == [0, 0]


def test_stay_route_stays_and_experts_only_does_not_care():
    for image in zip(*routes("stay_route", loss="ce", steps=40)[20:], strict=True):
        assert image.count(0) >= 10
    assert routes("experts_only", loss="ce", steps=40)[20:].count([1, 1]) == 22


def test_steering_goes_for_the_gate_first_and_for_both_where_that_failed_by_half_time():
    search = routed.RoutedSearch(Line(), *LINE, threat(2, 0.02, ignore_index=None), loss="ce")
    second = search.vertices()[1]
    there, away = LINE[0].clone(), LINE[0].clone()
    there[:, 0, 0, 0] += 0.015
    gate_logits = Line().gate_and_mix(away)[0]
    missing = search.missing(gate_logits, second, routed.KEEP)
    task = search.trial(Line()(away), Line()(away)).loss
    objective = routed.steer(search, second)
    assert torch.equal(objective(away, 0.2).loss, -missing) and missing.tolist() == pytest.approx([1.05] * 2)
    assert torch.equal(objective(away, 0.7).loss, task - missing)
    assert torch.equal(objective(away, 0.2).tracked, task - missing)
    half = torch.cat([there[:1], away[1:]])
    assert objective(half, 0.2).loss[0] == search.trial(Line()(half), Line()(half)).loss[0]
    assert objective(away, 0.7).loss.tolist() == [
        -missing[0],
        (task - missing)[1],
    ]  # the first has been there


def test_a_restart_steers_as_if_it_were_the_first_run(monkeypatch):
    runs = []
    monkeypatch.setattr(
        routed.RoutedSearch, "run", lambda self, name, objectives, steps: runs.extend(objectives)
    )
    routed.route_first(Line(), *LINE, threat(2, 0.02, ignore_index=None), loss="ce", restarts=2)
    first, again = runs[1], runs[1 + len(runs) // 2]  # to the second expert
    there, away = LINE[0].clone(), LINE[0].clone()
    there[:, 0, 0, 0] += 0.015
    both = first(away, 0.7).loss
    first(there, 0.8)
    assert (first(away, 0.9).loss != both).all()
    assert torch.equal(again(away, 0.7).loss, both)


def test_gate_only_leaves_the_route():
    assert all(0 not in found for found in routes("gate_only", steps=20)[10:])


class Weak(Line):
    """A classifier whose third expert is the one that an attack makes wrong."""

    def gate_and_mix(self, images):
        gate_logits, _ = super().gate_and_mix(images)
        other = images[:, 1].mean((1, 2)) - 0.5
        lead = torch.stack([1 + 0 * other, 1 - other, 1 - 100 * other], 1)
        experts = torch.stack([lead, 0 * lead], 2)
        return gate_logits, lambda weights: (weights.reshape(-1, 3, 1) * experts).sum(1)


def test_weakest_expert_steers_to_the_one_that_lost_most():
    model, images = Weak(), torch.full((2, 3, 2, 2), 0.5)
    ball = threat(2, 0.02, ignore_index=None)
    found = attack("weakest_expert", model, images, torch.tensor([0, 0]), ball, steps=60)
    assert found.correct.tolist() == [0, 0] and model.asked[-1] == [2, 2]
    assert all(1 not in asked for asked in model.asked[-15:])
    assert pgd(Weak(), images, torch.tensor([0, 0]), ball, steps=60, random_start=False).correct.tolist() == [
        1,
        1,
    ]


def test_each_path_has_all_weight_on_one_expert_after_the_other():
    class Told(Weak):
        def gate_and_mix(self, images):
            gate_logits, mix = super().gate_and_mix(images)
            return gate_logits, lambda weights: told.append(weights.detach().reshape(-1, 3)) or mix(weights)

    told: list[torch.Tensor] = []
    images = torch.full((2, 3, 2, 2), 0.5)
    attack("each_path", Told(), images, torch.tensor([0, 0]), threat(2, 1e-6, ignore_index=None), steps=30)
    order = [one[0].argmax().item() for one in told if (one == one[0]).all() and one[0].max() == 1]
    assert all(order.count(expert) >= 10 for expert in (0, 1, 2))


def test_wrong_classes_and_agreement_by_hand():
    expert_logits = torch.tensor([[[3.0, 0, 1], [3.0, 2, 0]], [[0.0, 5, 1], [0.0, 5, 1]]])[
        ..., None
    ]  # [2, 2, 3, 1]
    labels = torch.tensor([[0], [1]])
    first, second = wrong_classes(expert_logits, labels, threat(2), 5)
    assert first.flatten().tolist() == [1, 2] and second.flatten().tolist() == [2, 0]
    assert len(wrong_classes(expert_logits, labels, threat(2), 1)) == 1
    assert wrong_classes(expert_logits, torch.tensor([[255], [1]]), threat(2), 1)[0].flatten().tolist() == [
        255,
        2,
    ]
    expected = (
        expert_logits.log_softmax(2)[:, :, :, 0].gather(2, first[:, None].expand(-1, 2, 1)).mean((1, 2))
    )
    torch.testing.assert_close(agreement(expert_logits, first, threat(2)), expected)


def test_all_to_one_wrong_raises_what_the_experts_agree_on():
    model = mixture("classwise", "soft")
    images, labels = samples(model)
    found = attack("all_to_one_wrong", model, images, labels, threat(eps=8 / 255), steps=20, targets=1)
    search = routed.RoutedSearch(model, images, labels, threat())
    alone = [
        routed.each_expert(model.gate_and_mix(some)[1], search.vertices()) for some in (images, found.images)
    ]
    goal = wrong_classes(alone[0], labels, threat(), 1)[0]
    before, after = (agreement(one, goal, threat()) for one in alone)
    assert (after > before + 0.01).all()


class Masked(nn.Module):
    """A mixture whose gate masks an expert with -inf: the first of dark images, or the last of all."""

    def __init__(self, model, always):
        super().__init__()
        self.model, self.always = model, always
        self.routing, self.num_experts = model.routing, model.num_experts
        self.route, self.forward_given = model.route, model.forward_given

    def gate_logits(self, images):
        gate_logits = self.model.gate_logits(images)
        dark = (images.mean(dim=(1, 2, 3)) < 0.5).view(1, -1, 1, 1, 1, 1)
        place = torch.arange(self.num_experts).view(1, 1, -1, 1, 1, 1)
        mask = place == self.num_experts - 1 if self.always else (place == 0) & dark
        return gate_logits.masked_fill(mask, -torch.inf)

    def forward(self, images):
        return self.forward_given(images, self.route(self.gate_logits(images)))


@pytest.mark.parametrize("climber", ["pgd", "apgd"])
@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("routing", ["soft", "top1"])
@pytest.mark.parametrize("gate", ["simple", "classwise"])
@pytest.mark.parametrize("name", NAMES)
def test_an_expert_masked_with_minus_infinity_leaves_all_finite(name, gate, routing, always, climber):
    model = Masked(mixture(gate, routing, experts=3), always)
    images, labels = samples(model.model)
    images = images - 0.01 * (images.mean(dim=(1, 2, 3), keepdim=True) > 0.5)  # near the edge of the mask
    labels[:, :, 2:] = model(images).argmax(1)[:, :, 2:]
    before = scores(model(images), labels, 255)[0]
    attack = component("attacks:ATTACKS", name, steps=9, climber=climber)
    found = attack.build(model, images, labels, threat(eps=32 / 255))
    assert torch.isfinite(found.losses).all() and not found.bad_gradients.any()
    assert (found.correct <= before).all()
    if name in ("soft_gate", "experts_only"):
        assert (found.correct < before).any()


def test_the_spread_of_a_gate_is_that_of_the_experts_it_does_not_mask():
    plain = mixture(experts=3)
    images, labels = samples(plain)
    model = Masked(plain, always=True)
    search = routed.RoutedSearch(model, images, labels, threat())
    left = plain.gate_logits(images)[:, :, :2]
    expected = (left.amax(dim=2) - left.amin(dim=2)).mean(dim=(0, 2, 3, 4))
    torch.testing.assert_close(search.spread.flatten(), expected)
    seen = model.gate_logits(images)
    assert (search.change(seen) < 2).all()  # cross-entropy of two experts left
    masked = search.vertices()[2]
    assert torch.isfinite(search.missing(seen, masked, 1.0)).all()
    assert (search.missing(seen, masked, 1.0) > 1).all()


@pytest.mark.parametrize("name", ["soft_gate", "joint"])
def test_an_attack_that_raises_nothing_is_refused(name):
    model = mixture()
    images, labels = samples(model)
    nothing = {"soft_gate": "temperatures", "joint": "strengths"}[name]
    with pytest.raises(UserError, match=f"{name}: nothing to raise, .*give at least one value"):
        getattr(routed, name)(model, images, labels, threat(), **{nothing: ()})
