"""Checks that run networks: each is seen to fire on a fault that was planted, and to be silent on sound models."""

from functools import partial

import pytest
import torch
from torch import nn

from attacks.search import Found
from attacks.threat import Threat
from engine.config import UserError, component
from evaluation import target_checks as checks
from evaluation.findings import INDICATORS
from evaluation.plan import Scene, Setup
from evaluation.stand_ins import CLASSES as MANY
from evaluation.stand_ins import STAND_INS
from evaluation.suites import Member, members
from evaluation.targets import Target, target_of
from evaluation.traps import EPS, Trap

COUNT, SIZE, CLASSES = 3, 12, 4


def network(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, CLASSES, 3, padding=1)
    return nn.Sequential(*layers).eval().requires_grad_(False)


IMAGES = torch.rand(COUNT, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
LABELS = network()(IMAGES).argmax(dim=1)
THREAT = Threat(8 / 255, seeds=tuple(range(COUNT)), class_weights=torch.ones(CLASSES))
QUICK = partial(members, "quick")


def target(model, kind="single", experts=1, name="net"):
    return Target(name, kind, model, experts)


def severities(found):
    return {one.check: one.severity for one in found}


def trap(gate):
    model = Trap("segmentation", gate).eval()
    images, labels = model.samples(COUNT)
    return (
        target_of(f"{gate} trap", model),
        images,
        labels,
        Threat(EPS, ignore_index=None, seeds=tuple(range(COUNT))),
    )


def test_the_first_batch_with_labels_is_checked_at_the_largest_eps(monkeypatch):
    seen = []
    monkeypatch.setattr(checks, "check_targets", lambda *given: seen.append(given) or ["found"])
    names = tuple(f"frame {place}" for place in range(COUNT))
    setup = Setup(tuple("abcd"), (1 / 255, 8 / 255, 2 / 255), norm="l2", ignore_index=7)
    scene, pair = Scene(IMAGES, LABELS, names, names), [target(network())]
    void = Scene(IMAGES.flip(0), torch.full_like(LABELS, 7), names, names)
    given = pair, {"net": ["a member"]}, setup, torch.device("cpu")
    assert checks.check_first([void, scene], *given) == ["found"]
    ((targets, images, labels, threat, own),) = seen
    assert targets is pair and own == {"net": ["a member"]}
    assert torch.equal(images, IMAGES) and torch.equal(labels, LABELS)
    assert (threat.eps, threat.norm, threat.ignore_index) == (8 / 255, "l2", 7)
    assert len(set(threat.seeds)) == COUNT


def test_of_a_batch_those_images_are_checked_that_can_tell_something():
    labels = LABELS.repeat(2, 1, 1)
    labels[:3] = 255  # nothing to say
    threat = Threat(8 / 255, seeds=tuple(range(10, 16)))
    for right, places in (([0] * 6, [3, 4]), ([0, 0, 0, 0, 5, 1], [4, 5]), ([0, 0, 0, 0, 0, 9], [3, 5])):
        images, own, attacked = checks.chosen(torch.tensor(right), IMAGES.repeat(2, 1, 1, 1), labels, threat)
        assert torch.equal(own, labels[places]) and attacked.seeds == tuple(10 + place for place in places)
        assert torch.equal(images, IMAGES.repeat(2, 1, 1, 1)[places])


@pytest.mark.parametrize("spoilt", [range(0), range(2), range(COUNT)], ids=["none", "two", "all"])
def test_images_that_tell_nothing_hide_no_fault(spoilt):
    """A network without any gradient, with images that are void or that it gets wrong."""
    hidden = target(lambda images: network()(images.round()))
    right = network()(IMAGES.round()).argmax(dim=1)
    for instead in (torch.full_like(right, 255), (right + 1) % CLASSES):
        labels = right.clone()
        labels[list(spoilt)] = instead[list(spoilt)]
        images, labels, seeds = IMAGES.repeat(2, 1, 1, 1), labels.repeat(2, 1, 1), tuple(range(2 * COUNT))
        own = {"net": QUICK("single", 1)}
        threat = Threat(8 / 255, seeds=seeds, class_weights=torch.ones(CLASSES))
        found = severities(checks.check_targets([hidden], images, labels, threat, own))
        said = {found["unavailable gradients"], found["unconstrained attack"]}
        assert said == ({"note"} if len(spoilt) == COUNT else {"flag"})
        void = len(spoilt) == COUNT and (labels == 255).all()
        assert found["active test"] == ("note" if void else "flag")


def test_a_sound_network_raises_no_flag_and_every_check_has_spoken():
    pair = [target(network()), target(network(5), name="other")]
    found = checks.check_targets(pair, IMAGES, LABELS, THREAT, {one.name: QUICK("single", 1) for one in pair})
    own = [one for one in found if one.target == "net"]
    assert {one.check for one in own} == {
        "identity at eps 0", "batch invariance", "float32", "active test", *INDICATORS
    } - {"silent success", "incomplete optimisation"}  # these two are of records  # fmt: skip
    assert {one.severity for one in own} == {"ok"}


@pytest.mark.parametrize(
    ("gate", "flags"), [("hard", {"gate gradient"}), ("soft", set()), ("straight-through", set())]
)
def test_the_hard_route_trap_is_flagged_and_its_controls_are_not(gate, flags):
    one, images, labels, threat = trap(gate)
    found = checks.check_targets([one], images, labels, threat, {one.name: QUICK(one.kind, 2)})
    assert {finding.check for finding in found if finding.severity == "flag"} == flags
    notes = {finding.check for finding in found if finding.severity == "note"}
    assert ("gate direction" in notes) == (
        gate == "straight-through"
    )  # its gradient is not that of the function


def test_classifiers_are_checked_too_and_labels_that_count_nowhere_are_no_weakness():
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES)).requires_grad_(False)
    labels = head(IMAGES).argmax(dim=1)
    for ignored, severity in ((None, "ok"), (labels[0].item(), None)):
        threat = Threat(64 / 255, ignore_index=ignored, seeds=tuple(range(COUNT)))
        found = checks.check_targets([target(head)], IMAGES, labels, threat, {"net": QUICK("single", 1)[:3]})
        assert {"identity at eps 0", "active test"} < set(severities(found))
        assert severity is None or severities(found)["active test"] == severity
    void = Threat(64 / 255, ignore_index=0, seeds=tuple(range(COUNT)))
    (one,) = checks.active_test(target(head), IMAGES, torch.zeros_like(labels), void, QUICK("single", 1)[:1])
    assert one.severity == "note" and "nothing is labelled" in one.text


def test_classifiers_are_attacked_without_bounds_on_16_images_and_constant_ones_not_at_all():
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES)).requires_grad_(False)
    images = torch.rand(20, 3, SIZE, SIZE)
    labels = head(images).argmax(dim=1)
    assert labels.unique().numel() > 1
    threat = Threat(8 / 255, ignore_index=None, seeds=tuple(range(20)))

    def found(model):
        every = checks.check_targets([target(model)], images, labels, threat, {"net": QUICK("single", 1)[:1]})
        (one,) = [one for one in every if one.check == "unconstrained attack"]
        return one.severity, one.text

    assert found(head) == ("ok", "PGD of 20 steps at eps = 1 leaves 0.00 % of the answers right (16 images)")
    one_class = torch.tensor([0.0, 9.0, 0.0, 0.0])
    assert found(lambda images: 0 * head(images) + one_class) == ("note", checks.CONSTANT)


def test_images_that_are_not_in_the_box_are_refused():
    for images in (IMAGES * 255, IMAGES - 0.5, IMAGES.double()):
        with pytest.raises(UserError, match=r"float32 in \[0, 1\]"):
            checks.check_targets([target(network())], images, LABELS, THREAT, {"net": []})


class Limited:
    """Routing with a capacity: an expert that is full, by the order of the batch, sends images to the other."""

    def __init__(self):
        self.first, self.second = network(0), network(1)

    def __call__(self, images):
        full = torch.arange(len(images)) >= 1
        return torch.where(full.view(-1, 1, 1, 1), self.second(images), self.first(images))


def test_routing_by_place_in_the_batch_fires_batch_invariance():
    (finding,) = checks.batch_invariance(target(Limited()), IMAGES)
    assert finding.severity == "flag" and "reversed" in finding.text and "alone" in finding.text
    assert "asked twice" not in finding.text
    assert severities(checks.batch_invariance(target(network()), IMAGES)) == {"batch invariance": "ok"}
    assert severities(checks.batch_invariance(target(network()), IMAGES[:1])) == {"batch invariance": "note"}


def test_a_neighbour_that_matters_and_a_network_that_draws_lots_fire_batch_invariance():
    shared = checks.batch_invariance(target(lambda images: network()(images - images.mean(dim=0))), IMAGES)[0]
    assert shared.severity == "flag" and "alone" in shared.text and "reversed" not in shared.text
    sound = network()
    (random,) = checks.batch_invariance(
        target(lambda images: sound(images + 0.01 * torch.randn_like(images))), IMAGES
    )
    assert random.severity == "flag" and "asked twice" in random.text


class Low:
    """The same network, partly in another precision; its logits are float32 all the same."""

    def __init__(self, kind, backward=False):
        self.network, self.kind, self.backward = network(), kind, backward

    def __call__(self, images):
        if self.kind is None:
            with torch.autocast("cpu", torch.bfloat16):
                return self.network(images).float()
        return self.network(images.to(self.kind).float())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, None])
def test_a_network_that_rounds_to_half_precision_inside_fires_float32(kind):
    (finding,) = checks.float32_throughout(target(Low(kind)), IMAGES, LABELS, THREAT)
    assert finding.severity == "flag"
    assert str(kind or torch.bfloat16).removeprefix("torch.") in finding.text
    double = target(lambda images: network().double()(images.double()).float())
    for sound in (target(network()), double):
        assert severities(checks.float32_throughout(sound, IMAGES, LABELS, THREAT)) == {"float32": "ok"}


class Backward(torch.autograd.Function):
    """The identity, with another gradient."""

    @staticmethod
    def forward(context, images, change):
        context.change = change
        return images.clone()

    @staticmethod
    def backward(context, gradient):
        return context.change(gradient), None


def test_half_precision_in_the_backward_pass_alone_fires_float32():
    rounding = target(
        lambda images: network()(Backward.apply(images, lambda gradient: gradient.bfloat16().float()))
    )
    (finding,) = checks.float32_throughout(rounding, IMAGES, LABELS, THREAT)
    assert finding.severity == "flag" and "bfloat16" in finding.text


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (lambda images: network()(images.detach()), "no gradient"),
        (lambda images: network()((images * 255).round() / 255), "vanishes"),
        (lambda images: 1e-30 * network()(images), "vanishes"),
        (lambda images: 1e30 * network()(images), "vanishes"),
        (
            lambda images: network()(Backward.apply(images, lambda gradient: gradient * torch.nan)),
            "not finite",
        ),
    ],
)
def test_gradients_that_lead_nowhere_fire_their_indicator(model, text):
    (finding,) = checks.unavailable_gradients(target(model), IMAGES, LABELS, THREAT)
    assert finding.severity == "flag" and text in finding.text and finding.indicator == 1


def test_gradients_of_images_that_are_wrong_anyway_are_not_asked_for():
    wrong = (LABELS + 1) % CLASSES
    (finding,) = checks.unavailable_gradients(
        target(lambda images: 1e30 * network()(images)), IMAGES, wrong, THREAT
    )
    assert finding.severity == "note" and "no image has a right pixel" in finding.text


def test_answers_that_noise_changes_fire_unstable_predictions():
    shaky = target(
        lambda images: (
            network()(images)
            + 5 * torch.sin(1e5 * images[:, :1]) * torch.tensor([1, -1, 1, -1.0]).view(-1, 1, 1)
        )
    )
    (finding,) = checks.unstable_predictions(shaky, IMAGES, THREAT)
    assert finding.severity == "flag" and finding.eps == THREAT.eps and finding.indicator == 2
    asked = []
    counted = target(lambda images: asked.append(1) or network()(images))
    assert severities(checks.unstable_predictions(counted, IMAGES, THREAT, count=4)) == {
        "unstable predictions": "ok"
    }
    assert len(asked) == 5


def test_a_network_that_hides_its_gradient_fires_the_unconstrained_attack():
    blind = target(lambda images: network()((images * 255).round() / 255))
    (finding,) = checks.unconstrained_attack(blind, IMAGES, LABELS, THREAT)
    assert finding.severity == "flag" and finding.indicator == 6
    (sound,) = checks.unconstrained_attack(target(network()), IMAGES, LABELS, THREAT)
    assert sound.severity == "ok"


def test_images_made_for_another_network_that_do_more_harm_fire_transfer_failure():
    blind = target(lambda images: network()((images * 255).round() / 255), name="blind")
    pair = [target(network()), blind]
    found = checks.transfer_failure(pair, IMAGES, LABELS, THREAT)
    assert {one.target: one.severity for one in found} == {"net": "ok", "blind": "flag"}
    assert "made for net" in found[1].text and found[1].indicator == 5
    assert severities(checks.transfer_failure(pair[:1], IMAGES, LABELS, THREAT)) == {
        "transfer failure": "note"
    }


def leaking(model, images, labels, threat):
    """An attack that moves at eps 0: it brings what it has normalised into [0, 1]."""
    moved = (images * 255).round() / 255 * (1 - 1e-7)
    return Found(moved, images, *[torch.zeros(len(images))] * 2, 1, 0, *[torch.zeros(len(images))] * 3)


def test_an_attack_that_moves_at_eps_0_is_named(monkeypatch):
    suite = QUICK("single", 1)
    (fine,) = checks.identity_at_zero(target(network()), IMAGES, LABELS, THREAT, suite)
    assert fine.severity == "ok" and fine.text.startswith("3 attacks")
    monkeypatch.setattr("attacks.clean.clean", leaking)
    bad = Member("leaking", component("attacks:ATTACKS", "clean"), "common", 1, 0, 1)
    (finding,) = checks.identity_at_zero(target(network()), IMAGES, LABELS, THREAT, [*suite, bad])
    assert finding.severity == "flag" and finding.attack == "leaking"


@pytest.mark.parametrize(("kind", "experts"), [("single", 1), ("ensemble", 2), ("soft", 2), ("hard", 5)])
@pytest.mark.parametrize("suite", ["standard", "sea"])
def test_shortened_attacks_still_have_a_step_for_each_run(suite, kind, experts):
    rows = (MANY, 2)  # a row of pixels for each class
    labels = torch.arange(MANY)[None, :, None].expand(1, *rows)
    images, threat = (
        torch.full((1, 3, *rows), 0.5),
        Threat(0.0, seeds=(0,), class_weights=torch.ones(MANY)),
    )
    for member in members(suite, kind, experts):
        attack = checks.shortened(member.attack, experts)
        found = attack.build(STAND_INS[kind](experts, MANY), images, labels, threat)
        assert torch.equal(found.images, images)
        assert found.forwards <= 10 + 8 * experts


class Gate:
    """The trap's mixture with another gate in front."""

    def __init__(self, gate, change):
        self.trap, self.change = Trap("segmentation", gate), change
        self.routing, self.num_experts = self.trap.routing, 2

    def gate_and_mix(self, images):
        gate_logits, mix = self.trap.gate_and_mix(images)
        return self.change(gate_logits), mix

    def gate_logits(self, images):
        return self.gate_and_mix(images)[0]

    def forward_given(self, images, weights):
        return self.gate_and_mix(images)[1](weights)

    def route(self, gate_logits):
        return self.trap.route(gate_logits)

    def __call__(self, images):
        return self.forward_given(images, self.route(self.gate_logits(images)))


def direction(gate, change):
    one, images, labels, threat = trap(gate)
    (finding,) = checks.gate_direction(target(Gate(gate, change), one.kind, 2), images, labels, threat)
    return finding


def test_a_gate_whose_gradient_is_not_its_own_fires_gate_direction():
    assert direction("soft", lambda logits: logits).severity == "ok"
    twice = direction("soft", lambda logits: Backward.apply(logits, lambda gradient: 2 * gradient))
    assert twice.severity == "flag" and "0 of 3" in twice.text
    assert direction("soft", lambda logits: logits.detach()).severity == "flag"
    assert "no gradient" in direction("hard", lambda logits: logits.detach()).text
    constant = direction("soft", lambda logits: torch.zeros_like(logits))
    assert constant.severity == "note" and "same of all images" in constant.text


def test_a_gradient_that_reaches_only_the_winner_fires_gate_gradient():
    one, images, labels, threat = trap("soft")
    model = Gate("soft", lambda logits: logits)
    model.route = lambda logits: torch.cat([logits[:, :, :1], logits[:, :, 1:].detach()], dim=2).softmax(
        dim=2
    )
    (finding,) = checks.gate_gradient(target(model, "soft", 2), images, labels, threat)
    assert finding.severity == "flag" and "1 of 2 experts" in finding.text


@pytest.mark.parametrize("blind", [False, True])
def test_of_a_mixture_of_the_k_best_only_those_are_asked_for_a_gate_gradient(blind):
    """The third expert is never among the two best: no gradient by its logit is no sign of a hidden gate."""
    _, images, labels, threat = trap("soft")
    model = Gate("soft", lambda logits: torch.cat([logits, logits[:, :, :1] - 50], dim=2))
    model.num_experts, model.top_k = 3, 2
    before = model.gate_and_mix

    def gate_and_mix(images):
        gate_logits, mix = before(images)
        return gate_logits, lambda weights: mix(weights[:, :, :2])

    def route(logits):
        best = logits.topk(2, dim=2)
        weights = torch.zeros_like(logits).scatter(2, best.indices, best.values.softmax(dim=2))
        return weights.detach() if blind else weights

    model.route, model.gate_and_mix = route, gate_and_mix
    (finding,) = checks.gate_gradient(target(model, "soft", 3), images, labels, threat)
    assert finding.severity == ("flag" if blind else "ok")
    assert f"gate logits of {0 if blind else 2} of 2 experts" in finding.text
