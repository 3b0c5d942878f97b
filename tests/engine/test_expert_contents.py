"""What is kept of experts' outputs: exact where it says so, and within stated bounds where not."""

import math

import pytest
import torch
import torch.nn.functional as F

from engine.expert_contents import TOP, difference, pack, unpack
from engine.losses import cross_entropy, ohem

BATCH, EXPERTS, CLASSES, SIZE = 2, 3, 7, (4, 5)


@pytest.fixture
def outputs():
    """(logits, features, labels)"""
    torch.manual_seed(0)
    logits = 5 * torch.randn(BATCH, EXPERTS, CLASSES, *SIZE)
    labels = torch.randint(0, CLASSES, (BATCH, *SIZE)).byte()
    labels[0, 0] = 255
    return logits, [torch.randn(BATCH, 6, 2, 3) for _ in range(EXPERTS)], labels


def there_and_back(content, outputs, feature_type=None):
    logits, features, labels = outputs
    stored = pack(content, logits, features, labels)
    return unpack(content, stored, labels, logits.shape[2], feature_type)


def test_float32_is_exact_and_leaves_the_type_of_features(outputs):
    logits, features, _ = outputs
    features[1] = features[1].bfloat16()
    found, found_features = there_and_back("float32", outputs)
    assert torch.equal(found, logits)
    assert [one.dtype for one in found_features] == [torch.float32, torch.bfloat16, torch.float32]
    assert all(map(torch.equal, found_features, features))


def test_bfloat16_rounds_to_eight_bits(outputs):
    logits, features, _ = outputs
    found, found_features = there_and_back("bfloat16", outputs, torch.float32)
    assert found.dtype == found_features[0].dtype == torch.float32
    for exact, rounded in ((logits, found), (features[0], found_features[0])):
        assert not torch.equal(rounded, exact)
        assert ((rounded - exact).abs() <= exact.abs() * 2**-8).all()


def test_top_k_keeps_the_largest_and_the_mass_of_the_rest(outputs):
    logits, _, _ = outputs
    stored = pack("top_k", *outputs)
    assert {name: tensor.dtype for name, tensor in stored.items() if "features" not in name} == {
        "largest": torch.bfloat16,
        "classes": torch.uint8,
        "rest": torch.bfloat16,
    }
    found, _ = there_and_back("top_k", outputs)
    order = logits.argsort(dim=2, descending=True)
    kept, left = order[:, :, :TOP], order[:, :, TOP:]
    assert (found.gather(2, kept) - logits.gather(2, kept)).abs().max() <= 2**-8 * logits.abs().max()
    rest = found.gather(2, left)
    assert torch.equal(rest, rest[:, :, :1].expand_as(rest))
    mass = logits.gather(2, left).logsumexp(2)
    assert ((rest.logsumexp(2) - mass).abs() <= 2**-8 * mass.abs() + 1e-5).all()


def test_top_k_of_few_classes_keeps_them_all(outputs):
    logits, features, labels = outputs
    few = logits[:, :, :3].bfloat16().float()
    found, _ = there_and_back("top_k", (few, features, labels))
    assert torch.equal(found, few)


@pytest.mark.parametrize("classes", [2, CLASSES])
def test_label_probs_give_each_label_its_probability_and_all_sum_to_one(outputs, classes):
    logits, features, labels = outputs
    labels = torch.where(labels < classes, labels, 255)
    found, found_features = there_and_back("label_probs", (logits[:, :, :classes], features, labels))
    place = labels.long().where(labels < classes, 0)[:, None, None].expand(-1, EXPERTS, 1, -1, -1)
    exact = logits[:, :, :classes].log_softmax(2).gather(2, place)
    torch.testing.assert_close(found.log_softmax(2).gather(2, place), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.logsumexp(2), torch.zeros(BATCH, EXPERTS, *SIZE), rtol=0, atol=1e-6)
    assert all(map(torch.equal, found_features, features))


@pytest.mark.parametrize("loss", [cross_entropy(None, 255), ohem(None, 255, fraction=0.5)])
def test_label_probs_give_the_loss_of_mixed_probabilities_and_its_gradient(outputs, loss):
    logits, _, labels = outputs
    logits[1, :, :, 0] = 0
    logits[1, :, 2, 0] = 200.0  # sure of a class, right or wrong
    found, _ = there_and_back("label_probs", outputs)

    def value(expert_logits):
        scores = torch.tensor([[0.3, -0.2, 0.1], [1.0, 0.0, -1.0]], requires_grad=True)
        log_weights = scores.log_softmax(1)[..., None, None, None]
        total, count = loss((expert_logits.log_softmax(2) + log_weights).logsumexp(1), labels.long())
        total.backward()
        return total.detach(), count, scores.grad

    for expected, got in zip(value(logits), value(found), strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_certain_experts_stay_finite():
    logits = torch.zeros(1, 1, 3, 1, 1)
    logits[:, :, 1] = 1000.0
    for label in (0, 1):
        labels = torch.full((1, 1, 1), label)
        found, _ = unpack("label_probs", pack("label_probs", logits, [], labels), labels, 3)
        assert found.isfinite().all()
        assert F.cross_entropy(found[:, 0], labels).item() == pytest.approx(1000.0 * (label == 0))


def test_difference_against_the_formula():
    exact = torch.tensor([[1.0, 2.0], [3.0, 0.0]]).view(1, 1, 2, 2, 1).repeat(1, 2, 1, 1, 1)
    found = exact.clone()
    found[0, 1, 0, 1, 0] = -0.5  # the second expert's second pixel: from class 0 to class 1
    assert difference(exact, found) == {"largest": 2.5, "mean": 2.5 / 8, "changed": [0.0, 0.5]}
    assert difference(exact, exact) == {"largest": 0.0, "mean": 0.0, "changed": [0.0, 0.0]}


def test_stored_sizes(outputs):
    """Bytes of a pixel and expert: 4 or 2 a class, 3 a kept class and 2 for the rest, 4 for the label."""
    pixels = BATCH * EXPERTS * math.prod(SIZE)
    features = sum(one.nbytes for one in outputs[1])

    def size(content):
        return sum(tensor.nbytes for tensor in pack(content, *outputs).values())

    assert size("float32") == pixels * CLASSES * 4 + features
    assert size("bfloat16") == pixels * CLASSES * 2 + features / 2
    assert size("top_k") == pixels * (TOP * 3 + 2) + features / 2
    assert size("label_probs") == pixels * 4 + features
