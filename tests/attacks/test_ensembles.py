"""Attacks on ensembles: losses of the members by hand, and a rule without a gradient that only they get past."""

import pytest
import torch
import torch.nn.functional as F

from attacks import ATTACKS
from attacks.parts import PartsSearch
from attacks.pgd import pgd
from attacks.search import scores
from attacks.threat import Threat
from engine.config import UserError, component
from networks.ensemble import Ensemble, max, mean, mean_probs, vote
from tests.networks.conftest import ToyExpert

NAMES = [name for name, target in ATTACKS.items() if target.startswith("attacks.ensembles:")]
CLASSES, SIZE = 4, 16


def ensemble(combine=mean, members=3):
    torch.manual_seed(members)
    named = {str(index): ToyExpert(CLASSES) for index in range(members)}
    return Ensemble(named, combine).requires_grad_(False).eval()


def samples(model, count=2):
    torch.manual_seed(5)
    images = 0.1 + 0.8 * torch.rand(count, 3, SIZE, SIZE)
    labels = model(images).argmax(1)
    labels[:, ::5] = torch.randint(CLASSES, labels[:, ::5].shape)
    labels[:, :, :2] = 255
    return images, labels


def threat(count=2, eps=4 / 255, **keys):
    return Threat(eps, seeds=tuple(range(count)), **keys)


def attack(name, model, images, labels, ball, **keys):
    return component("attacks:ATTACKS", name, **keys).build(model, images, labels, ball)


@pytest.mark.parametrize("climber", ["pgd", "apgd"])
@pytest.mark.parametrize("combine", [mean, max, mean_probs, vote])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_returned_is_inside_and_scored_on_the_ensemble(name, combine, climber):
    model = ensemble(combine)
    images, labels = samples(model)
    found = attack(name, model, images, labels, threat(), steps=6, climber=climber)
    assert (found.images - images).abs().amax() <= 4 / 255 + 1e-6
    assert torch.equal(found.correct, scores(model(found.images), labels, 255)[0])
    assert (found.correct < scores(model(images), labels, 255)[0]).all()
    assert not found.bad_gradients.any() and not found.zero_gradients.any()
    still = attack(name, model, images, labels, threat(eps=0.0), steps=6, climber=climber)
    assert torch.equal(still.images, images)


@pytest.mark.parametrize("name", NAMES)
def test_the_cost_is_known_beforehand(name):
    model = ensemble()
    images, labels = samples(model, 1)
    passes = [expert.network.passes for expert in model.experts]
    found = attack(name, model, images, labels, threat(1), steps=6)
    runs = {"each_member": 3, "members_to_one_wrong": 2, "smooth_ensemble": 2}.get(name, 1)
    assert (found.forwards, found.backwards) == (1 + 6 + runs, 6)
    assert [e.network.passes - n for e, n in zip(model.experts, passes, strict=True)] == [found.forwards] * 3


@pytest.mark.parametrize("name", NAMES)
def test_a_network_without_members_is_refused(name, segmenter):
    images = torch.rand(1, 3, 8, 8)
    with pytest.raises(UserError, match="it is for ensembles, and the network has no expert_logits"):
        attack(name, segmenter(), images, torch.zeros(1, 8, 8).long(), threat(1))


class Line:
    """Members whose logits are given functions of the mean value of the image; their rule has no gradient."""

    num_experts = 3

    def expert_logits(self, images):
        place = 30 * (images.mean((1, 2, 3)) - 0.5)
        one = torch.stack([1 - place, place - 1], 1)
        other = torch.stack([1 + place, -1 - place], 1)  # the opposite way
        return torch.stack([one, one, other], 1)

    def combine(self, expert_logits):
        votes = F.one_hot(expert_logits.argmax(2), 2).sum(1)
        return votes.to(expert_logits) + 0 * expert_logits.sum(1)

    def __call__(self, images):
        return self.combine(self.expert_logits(images))


def test_a_vote_without_a_gradient_falls_to_those_who_know_the_members():
    """Two of three members turn where the mean value rises by 1/30; the third wants it to fall."""
    images, labels = torch.full((2, 3, 2, 2), 0.5), torch.tensor([0, 0])
    ball = threat(2, 0.04, ignore_index=None)
    plain = pgd(Line(), images, labels, ball, steps=30, random_start=False)
    assert plain.correct.tolist() == [1, 1] and plain.zero_gradients.tolist() == [30, 30]
    for name in NAMES:
        assert attack(name, Line(), images, labels, ball, steps=30).correct.tolist() == [0, 0], name


def losses_of(name, model, images, labels, **keys):
    """Losses at the start of each run of an attack."""
    found = attack(name, model, images, labels, threat(len(images), eps=0.0), steps=len(RUNS[name]), **keys)
    return found.losses


RUNS = {
    "member_sum": [0],
    "mean_of_probabilities": [0],
    "each_member": [0, 1, 2],
    "members_to_one_wrong": [0, 1],
    "smooth_ensemble": [1.0, 0.3],
}


@pytest.mark.parametrize("name", NAMES)
def test_losses_by_the_formula(name):
    """At eps 0 every run stays at the image, whose loss is computed here another way."""
    model = ensemble(vote)
    images, labels = samples(model)
    labels[labels == 255] = 0
    expert_logits = model.expert_logits(images).double()
    p = expert_logits.softmax(2)

    def entropy(probabilities):
        return -probabilities.log().gather(1, labels[:, None]).mean((1, 2, 3))

    gaps = expert_logits.sort(dim=2).values
    unit = (gaps[:, :, -1] - gaps[:, :, -2]).mean((1, 2, 3)).view(-1, 1, 1, 1, 1)
    wrong = p.log().mean(1).scatter(1, labels[:, None], -torch.inf).argsort(dim=1, descending=True)
    expected = {
        "member_sum": [torch.stack([entropy(one) for one in p.unbind(1)]).mean(0)],
        "mean_of_probabilities": [entropy(p.mean(1))],
        "each_member": [entropy(one) for one in p.unbind(1)],
        "members_to_one_wrong": [
            p.log().mean(1).gather(1, goal[:, None]).mean((1, 2, 3)) for goal in (wrong[:, 0], wrong[:, 1])
        ],
        "smooth_ensemble": [entropy((expert_logits / (t * unit)).softmax(2).mean(1)) for t in (1.0, 0.3)],
    }[name]
    found = losses_of(name, model, images, labels)
    torch.testing.assert_close(found, torch.stack(expected).float(), rtol=1e-4, atol=1e-5)


def test_the_smooth_maximum_by_the_formula_and_its_limit():
    model = ensemble(max)
    images, labels = samples(model)
    labels[labels == 255] = 0
    expert_logits = model.expert_logits(images).double()
    gaps = expert_logits.sort(dim=2).values
    unit = (gaps[:, :, -1] - gaps[:, :, -2]).mean((1, 2, 3)).view(-1, 1, 1, 1)
    found = losses_of("smooth_ensemble", model, images, labels, rule="max", temperatures=(1.0, 1e-4))
    smooth = unit * (expert_logits / unit[:, None]).logsumexp(1)
    expected = [
        F.cross_entropy(z, labels, reduction="none").mean((1, 2)) for z in (smooth, expert_logits.amax(1))
    ]
    torch.testing.assert_close(found, torch.stack(expected).float(), rtol=1e-3, atol=1e-4)


def test_the_mask_is_that_of_the_ensemble_and_not_of_the_member():
    """One pixel that the ensemble has wrong already gets no gradient, though a member has it right."""
    model, (images, labels) = ensemble(mean), (torch.rand(1, 3, SIZE, SIZE), None)
    expert_logits = model.expert_logits(images)
    answer, first = expert_logits.mean(1).argmax(1), expert_logits[:, 0].argmax(1)
    differ = answer != first
    assert differ.any()
    labels = torch.where(differ, first, answer)
    masked = attack("each_member", model, images, labels, threat(1, eps=0.0), steps=3, loss="masked_ce")
    plain = attack("each_member", model, images, labels, threat(1, eps=0.0), steps=3, loss="ce")
    assert torch.equal(masked.losses, plain.losses)  # steps are judged without the mask
    search = PartsSearch(model, images, labels, threat(1), "masked_ce")
    leaf = expert_logits[:, 0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(search.trial(leaf, expert_logits.mean(1)).loss.sum(), leaf)
    assert (gradient.abs().sum(1) > 0).eq(~differ).all()
