"""What classifiers say of clean images: every figure against a plain loop over images."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from engine.config import UserError
from evaluation.classifiers import (
    Answers,
    accuracies,
    answers,
    balance,
    labels_by_expert,
    load_answers,
    loads,
    loads_by_site,
    save_answers,
)
from metrics.gate import mean_effective_experts
from networks.cnn_moe.model import CNN, CNNMoE

CPU = torch.device("cpu")
COUNT, CLASSES, EXPERTS = 24, 7, 3


def mixture(granularity="model", top_k=1):
    torch.manual_seed(2)
    keys = {"arch": "resnet18", "ratio": 0.05, "num_experts": EXPERTS, "router_width": 0.25}
    model = CNNMoE(CLASSES, granularity=granularity, top_k=top_k, **keys)
    model.router.balance([model.entry(shown())])
    return model.eval()


def shown():
    return torch.rand(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def batches(size):
    return [(shown()[start : start + size], start) for start in range(0, COUNT, size)]


def labels():
    return np.random.default_rng(0).integers(0, CLASSES, COUNT)


@torch.no_grad()
def told_one_by_one(model, routes):
    """The answer to each image on routes [N, S], each image alone."""
    found = []
    for image, own in zip(shown(), routes, strict=True):
        weights = torch.zeros_like(model.gate_logits(image[None]))
        for site, expert in enumerate(own):
            weights[site, 0, expert] = 1.0
        found.append(model.forward_given(image[None], weights)[0].argmax().item())
    return found


@pytest.mark.parametrize("granularity", ["model", "stage"])
def test_answers_are_those_of_each_image_by_itself(granularity):
    model = mixture(granularity)
    found = answers(model, batches(5), CPU, seed=4)
    sites = len(found.routes[0])
    assert sites == {"model": 1, "stage": 4}[granularity] and found.ranked.shape == (COUNT, 5)
    with torch.no_grad():
        for place, image in enumerate(shown()):
            seen = model.inspect(image[None])
            assert found.said[place] == seen.logits.argmax()
            assert found.ranked[place].tolist() == seen.logits[0].sort(descending=True).indices[:5].tolist()
            assert found.routes[place].tolist() == seen.routes[:, 0].tolist()
    for expert in range(EXPERTS):
        alone = told_one_by_one(model, np.full((COUNT, sites), expert))
        assert found.alone[:, expert].tolist() == alone
    if granularity == "model":
        plain = [model.pathway(expert)(shown()).argmax(dim=1).tolist() for expert in range(EXPERTS)]
        assert found.alone.T.tolist() == plain
    assert told_one_by_one(model, found.routes) == found.said.tolist()
    assert len(set(found.routes.ravel().tolist())) == EXPERTS
    drawn = [np.random.default_rng([4, place]).integers(0, EXPERTS, sites) for place in range(COUNT)]
    assert found.by_chance.tolist() == told_one_by_one(model, drawn)


def test_nothing_depends_on_the_batches_and_chance_on_its_seed():
    model = mixture("stage")
    whole = answers(model, batches(COUNT), CPU)
    for size in (1, 7):
        parts = answers(model, batches(size), CPU)
        for key, value in vars(whole).items():
            assert np.array_equal(getattr(parts, key), value), (size, key)
    other = answers(model, batches(COUNT), CPU, seed=1)
    assert (other.by_chance != whole.by_chance).any() and (other.alone == whole.alone).all()


def test_every_figure_against_a_plain_loop():
    model, truth = mixture("stage"), labels()
    found = answers(model, batches(8), CPU)
    figures = accuracies(found, truth, CLASSES)

    def rate(name):
        counted, right = figures[name]
        return int(counted.sum()), int((right & counted).sum())

    hits = dict.fromkeys(["top1", "top5", "oracle_route", "worst_route", "random_route"], 0)
    for place in range(COUNT):
        alone = [found.alone[place, expert] == truth[place] for expert in range(EXPERTS)]
        hits["top1"] += found.ranked[place, 0] == truth[place]
        hits["top5"] += truth[place] in found.ranked[place]
        hits["oracle_route"] += any(alone)
        hits["worst_route"] += all(alone)
        hits["random_route"] += found.by_chance[place] == truth[place]
    assert {name: rate(name) for name in hits} == {name: (COUNT, count) for name, count in hits.items()}
    table = np.zeros((CLASSES, EXPERTS), int)
    for expert in range(EXPERTS):
        right = sum(found.alone[place, expert] == truth[place] for place in range(COUNT))
        assert rate(f"constant_{expert}") == (COUNT, right)
        own = []
        for place in range(COUNT):
            counts = [list(found.routes[place]).count(one) for one in range(EXPERTS)]
            if counts.index(max(counts)) == expert:
                own.append(place)
                table[truth[place], expert] += 1
        assert rate(f"route_{expert}") == (len(own), sum(found.said[p] == truth[p] for p in own))
        assert loads(found)[expert] == pytest.approx((found.routes == expert).mean())
    assert (labels_by_expert(found, truth, CLASSES) == table).all()
    sites = [np.bincount(site, minlength=EXPERTS) / COUNT for site in found.routes.T]
    assert loads(found) == pytest.approx(np.mean(sites, axis=0))
    entropies = [-sum(p * math.log(p) for p in site if p) for site in sites]
    assert balance(found) == pytest.approx(np.mean(np.exp(entropies)))
    assert loads_by_site(found) == pytest.approx(np.stack(sites))
    assert hits["worst_route"] < hits["oracle_route"]
    assert list(accuracies(found, truth, 5)) == [name for name in figures if name != "top5"]


def test_a_plain_network_has_answers_alone():
    torch.manual_seed(0)
    found = answers(CNN(CLASSES, arch="resnet18", ratio=0.05).eval(), batches(7), CPU)
    assert found.routes is None and found.alone is None and found.by_chance is None
    assert set(accuracies(found, labels(), CLASSES)) == {"top1", "top5"}


class Spatial(nn.Module):
    """A routed model with a weight for each class: class k of expert e is e + 1 where the weight is, else 0."""

    num_experts, routing = 2, "hard"

    def gate_logits(self, images):
        lead = torch.tensor(
            [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
        )  # [E, K]: expert 0 has class 0, expert 1 the others
        return lead[None, None, :, :, None, None].expand(1, len(images), 2, 3, 1, 1)

    def forward_given(self, images, weights):
        own = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
        return (weights[0, ..., 0, 0] * own).sum(dim=1)

    def forward(self, images):
        return self.forward_given(images, self.gate_logits(images))


def test_a_site_for_each_class_where_weights_have_them():
    found = answers(Spatial(), batches(10), CPU)
    assert found.routes.tolist() == [[0, 1, 1]] * COUNT
    assert found.alone.tolist() == [[0, 1]] * COUNT and found.said.tolist() == [1] * COUNT
    assert balance(found) == 1  # each site has its expert, whatever the image
    assert found.taken.tolist() == [1] * COUNT and loads(found).tolist() == pytest.approx([1 / 3, 2 / 3])


@pytest.mark.parametrize("granularity", ["model", "stage"])
def test_a_mixture_of_the_k_best_takes_no_route_and_its_loads_are_its_weights(granularity):
    model, truth = mixture(granularity, top_k=2), labels()
    found = answers(model, batches(5), CPU)
    assert found.routed and found.experts == EXPERTS
    assert (found.routes, found.alone, found.by_chance) == (None, None, None)
    whole = np.zeros((model.router.sites, EXPERTS))
    with torch.no_grad():
        for place, image in enumerate(shown()):
            assert found.said[place] == model(image[None]).argmax()
            for site, scores in enumerate(model.inspect(image[None]).scores[:, 0]):
                own, best = np.zeros(EXPERTS), scores.sort(descending=True).indices[:2]
                own[best.numpy()] = scores[best].softmax(dim=0).numpy()
                np.testing.assert_allclose(found.weights[place, site], own, atol=1e-5)
                whole[site] += own / COUNT
    np.testing.assert_allclose(loads_by_site(found), whole, atol=1e-5)
    np.testing.assert_allclose(loads(found), whole.mean(axis=0), atol=1e-5)
    assert balance(found) == pytest.approx(mean_effective_experts(whole), abs=1e-4)
    assert (loads(found) > 0.05).all() and 1 < balance(found) < EXPERTS + 1e-9
    assert set(accuracies(found, truth, CLASSES)) == {"top1", "top5"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_no_answers(bad):
    class Broken(nn.Module):
        def forward(self, images):
            logits = images.flatten(1)[:, :CLASSES].clone()
            logits[images[:, 0, 0, 0] == shown()[9, 0, 0, 0], 3] = bad
            return logits

    with pytest.raises(UserError, match=r"^models.x: NaN or inf among its logits of .*, first of image 9: "):
        answers(Broken(), batches(5), CPU, name="models.x")


def test_of_equal_logits_the_lowest_class_is_first():
    class Undecided(nn.Module):
        def forward(self, images):
            return torch.zeros(len(images), 1000).index_fill(1, torch.tensor([999]), 1.0)

    found = answers(Undecided(), batches(COUNT), CPU)
    assert found.ranked.tolist() == [[999, 0, 1, 2, 3]] * COUNT


def test_saved_answers_come_back(tmp_path):
    model, names = mixture(), np.array([f"image {place}" for place in range(COUNT)])
    given = {"moe": answers(model, batches(8), CPU), "a/plain": Answers(np.zeros((COUNT, 5), int))}
    given["some/a/ranked"] = given["some/a"] = next(
        iter(given.values())
    )  # names of rows may be like those of keys
    save_answers(tmp_path / "per_image.npz", names, labels(), given)
    kept, truth, found = load_answers(tmp_path / "per_image.npz")
    assert kept.tolist() == names.tolist() and (truth == labels()).all() and list(found) == list(given)
    for model, own in given.items():
        for key, value in vars(own).items():
            again = getattr(found[model], key)
            assert (again is None) == (value is None) and (value is None or (again == value).all())
