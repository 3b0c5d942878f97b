"""Whom gates and ensembles follow, on logits made to tie; which frames share a view; what distances are counted."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from evaluation import answers
from evaluation.answers import views_of
from evaluation.evaluate import evaluate
from evaluation.results import Protocol
from evaluation.rows import ensemble_row, gate_row, network_row
from metrics.detection import bin_of, jensen_shannon
from metrics.disagreement import CASES, CONTRADICTED, FOLLOWED, TIED, count_cases
from networks import ensemble
from networks.gates import ClasswiseGate, SimpleGate
from networks.moe import ExpertOutputs, MixtureOfExperts
from networks.resize import upsample

K, HEIGHT, WIDTH, FRAMES = 4, 32, 48, 3
EXPERTS = ("highway", "urban")
PROTOCOL = Protocol("toy", "test", tuple("abcd"), EXPERTS, (HEIGHT, WIDTH))


class Stepped(nn.Module):
    """Logits in steps on a grid of stride 2; the first `rivals` classes are ahead of the others. With two rivals
    and large steps many pixels between the places of the grid tie exactly, in both experts."""

    num_classes, feature_channels, stride = K, 2, 16

    def __init__(self, seed, step, rivals=K):
        super().__init__()
        self.seed, self.step, self.rivals = seed, step, rivals

    def forward_features(self, images):
        generator = torch.Generator().manual_seed(self.seed)
        logits = torch.randn(FRAMES, K, HEIGHT // 2, WIDTH // 2, generator=generator)
        logits = (2 * logits / self.step).round() * self.step
        logits[:, self.rivals :] -= 20
        return logits[: len(images)], torch.rand(FRAMES, 2, 2, 3, generator=generator)[: len(images)]


def data(native=None):
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, K, (FRAMES, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)
    labels[:, 4] = 255
    frames = [SimpleNamespace(name=f"f{i}", subset=EXPERTS[i % 2], block=f"b{i}") for i in range(FRAMES)]
    images = torch.randint(0, 256, (FRAMES, 3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)
    natives = native and [label.repeat_interleave(native, 0).repeat_interleave(native, 1) for label in labels]
    return [SimpleNamespace(images=images, labels=labels, native_labels=natives, frames=frames)]


def gate_over(networks, kind, **keys):
    """A row of a gate whose weights are far apart: the less one expert counts, the more rounding decides."""
    torch.manual_seed(0)
    mixture = MixtureOfExperts(networks, kind(4, 2, K, width=4, grid=(2, 2), hidden=8), K, **keys).eval()
    nn.init.normal_(mixture.gate.expert_weight, std=10.0)
    if keys.get("conv"):
        nn.init.normal_(mixture.conv.weight, std=0.3)
    full_size = mixture.conv_at == "full"

    def mix(logits, features, images, size):
        outputs = ExpertOutputs(logits, features, images, size)
        return mixture.combine(outputs) if full_size else mixture.mix(outputs)

    return gate_row("moe", EXPERTS, mix, full_size=full_size), mixture


def run(row, networks, batches):
    rows = [network_row(name, "expert", name) for name in EXPERTS]
    return evaluate(
        batches, networks, [*rows, row], PROTOCOL,
        upsample=upsample, window=lambda size: (0, 0, HEIGHT, WIDTH), device=torch.device("cpu"),
    )  # fmt: skip


def counts(results, case):
    return int(results.cases["moe"][:, :, case, 0].sum())


@pytest.mark.parametrize("native", [None, 3])
@pytest.mark.parametrize(("step", "ties"), [(2.0, True), (1e-6, False)])
def test_a_simple_gate_without_convolution_never_contradicts_experts_that_agree(
    native, step, ties, monkeypatch
):
    found = 0
    for seed in range(7):
        networks = {name: Stepped(10 * seed + index, step, rivals=2) for index, name in enumerate(EXPERTS)}
        row, _ = gate_over(networks, SimpleGate)
        results = run(row, networks, data(native))
        assert counts(results, CONTRADICTED) == 0 and counts(results, FOLLOWED) > 1000
        found += counts(results, TIED)
        monkeypatch.setattr(answers, "ROUNDING", -1.0)  # a tie is then like any other answer
        strict = run(row, networks, data(native))
        assert counts(strict, CONTRADICTED) == counts(results, TIED)
        monkeypatch.undo()
    assert (found > 0) == ties  # so the checks above have something to find


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (ClasswiseGate, {}),
        (SimpleGate, {"conv": True}),
        (SimpleGate, {"conv": True, "conv_at": "full"}),
        (ClasswiseGate, {"conv": True}),
    ],
)
def test_other_gates_do(kind, keys):
    networks = {name: Stepped(index, 1.0) for index, name in enumerate(EXPERTS)}
    row, mixture = gate_over(networks, kind, **keys)
    results = run(row, networks, data())
    assert counts(results, CONTRADICTED) > 10
    with torch.no_grad():  # what is counted is what the model itself says
        said = mixture(data()[0].images / 255).argmax(1)
    labels = data()[0].labels
    right = ((said == labels) & (labels != 255)).sum(dim=(1, 2))
    assert abs(results.cases["moe"][:, :, : len(CASES), 1].sum((1, 2)) - right.numpy()).max() <= 2  # ties


@pytest.mark.parametrize("rule", [ensemble.mean, ensemble.max, ensemble.mean_probs, ensemble.vote])
def test_no_ensemble_contradicts_experts_that_agree_at_the_networks_resolution(rule):
    for seed in range(4):
        networks = {name: Stepped(10 * seed + index, 1.0) for index, name in enumerate(EXPERTS)}
        results = run(ensemble_row("moe", EXPERTS, rule), networks, data())
        assert counts(results, CONTRADICTED) == 0 and counts(results, FOLLOWED) > 100


@pytest.mark.parametrize("view_pixels", [1, 500, 2**18])
def test_cases_and_scores_are_those_of_the_answers_frame_by_frame(view_pixels, monkeypatch):
    monkeypatch.setattr(answers, "VIEW_PIXELS", view_pixels)  # frames alone or together, counted in pieces
    networks = {name: Stepped(index, 0.01) for index, name in enumerate(EXPERTS)}
    row, mixture = gate_over(networks, ClasswiseGate)
    results = run(row, networks, data())
    batch = data()[0]
    with torch.no_grad():
        images = batch.images / 255
        logits = [networks[name].forward_features(images)[0] for name in EXPERTS]
        said = torch.stack([upsample(one, (HEIGHT, WIDTH), 16).argmax(1) for one in logits])
        moe = mixture(images).argmax(1)
        distance = upsample(jensen_shannon(torch.stack(logits, dim=1))[:, None], (HEIGHT, WIDTH), 16)[:, 0]
    untied = torch.zeros_like(moe, dtype=torch.bool)[None]
    assert np.array_equal(results.cases["moe"], count_cases(moe[None], said, batch.labels, untied, K)[0])
    for index, label in enumerate(batch.labels):
        known = label != 255
        for wrong in (0, 1):
            there = known & ((moe[index] != label) == bool(wrong))
            expected = torch.bincount(bin_of(distance[index][there]), minlength=256)
            assert (results.scores["moe"][index, wrong] - expected.numpy()).sum() == 0
            assert abs(results.scores["moe"][index, wrong] - expected.numpy()).sum() <= 2  # a bin's edge
    assert results.cases["moe"][:, :, : len(CASES), 0].sum() == (batch.labels != 255).sum()


def test_neighbours_of_one_size_share_a_view_as_long_as_they_are_few_pixels(monkeypatch):
    sizes = [(4, 6), (4, 6), (4, 6), (8, 6), (4, 6), (4, 6)]
    labels = torch.zeros(len(sizes), 4, 6, dtype=torch.uint8)
    natives = [torch.full(size, index, dtype=torch.uint8) for index, size in enumerate(sizes)]
    batch = SimpleNamespace(native_labels=natives)
    monkeypatch.setattr(answers, "VIEW_PIXELS", 2 * 4 * 6)
    views = views_of(batch, labels, lambda size: (1, 2, *size))
    assert [(view.frames.start, view.frames.stop) for view in views] == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert [view.window for view in views] == [(1, 2, *view.labels.shape[1:]) for view in views]
    assert torch.equal(torch.cat([view.labels[:, 0, 0] for view in views]), torch.arange(6))
    monkeypatch.setattr(answers, "VIEW_PIXELS", 1)  # a frame that is too large is a view by itself
    whole = views_of(SimpleNamespace(native_labels=None), labels, None)
    assert len(whole) == 6 and whole[5].window == (0, 0, 4, 6)
