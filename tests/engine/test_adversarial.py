"""Adversarial training: what is crafted, what that leaves alone, and laws of the steps taken on it."""

import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toy import Batches, Net, train

from attacks.pixel_losses import image_loss
from attacks.threat import Threat, is_inside, random_point
from engine import progress
from engine.adversarial import Adversary, Attacked, attacked_numbers, craft, divergence
from engine.config import Adversarial, Interrupted
from engine.loop import supervised
from engine.losses import cross_entropy
from engine.randomness import random_state
from engine.steps import Phase, compute_gradients

CROSS_ENTROPY = cross_entropy(None, 255)
EPS = 8 / 255
NONE_ATTACKED = 1 - 1e-9  # clean_fraction of a control: 1 is refused in a config


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """progress.png takes longer than the toy's epochs."""
    monkeypatch.setattr(progress, "draw", lambda *arguments: None)


def section(**keys) -> Adversarial:
    return Adversarial.model_validate({"attack": "pgd", "eps": EPS, "steps": 3, **keys})


def adversary(base=CROSS_ENTROPY, seed=304, **keys) -> Adversary:
    return Adversary(section(**keys), supervised(base), 255, seed)


def plain_net() -> nn.Module:
    """Without BatchNorm and dropout: a batch is the sum of its images."""
    torch.manual_seed(304)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, toy.CLASSES, 1))


def batch_of(count=4):
    (batch,) = Batches(1, count).epoch(0)
    return batch.images.float() / 255, batch.labels.long()


def threat(count=4, norm="linf", eps=EPS) -> Threat:
    return Threat(eps, norm, 255, tuple(range(count)))


# ------------------------------------------------------------------------------------------------- crafting


@pytest.mark.parametrize("loss", ["ce", "segpgd"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", EPS), ("l2", 0.5)])
def test_crafted_images_lie_in_the_ball_and_raise_the_loss(norm, eps, loss):
    net, (images, labels), ball = plain_net(), batch_of(), threat(norm=norm, eps=eps)
    net[2].weight.data *= 5
    found = craft(net, images, labels, ball, loss, 5)
    assert not found.requires_grad and is_inside(found, images, ball).all()

    def value(points):
        return image_loss("ce", net(points), labels, ball)

    assert (value(found) > value(images) + 0.01).all()
    assert (value(found) > value(random_point(images, ball, "training"))).all()
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_last_of_the_steps_by_hand():
    """Sign steps of 2.5 eps / steps from the random point, each brought back into ball and box."""
    net, (images, labels), ball = plain_net(), batch_of(), threat()
    points = random_point(images, ball, "training")
    for _ in range(3):
        points = points.clone().requires_grad_()
        nn.functional.cross_entropy(net(points), labels, ignore_index=255).backward()
        moved = points.detach() + 2.5 * EPS / 3 * points.grad.sign()
        points = torch.minimum(torch.maximum(moved, images - EPS), images + EPS).clamp(0, 1)
    assert torch.allclose(craft(net, images, labels, ball, "ce", 3), points, atol=1e-6)
    assert torch.equal(
        craft(net, images, labels, ball, "ce", 3, 2.5 * EPS / 3), craft(net, images, labels, ball, "ce", 3)
    )


def test_a_gradient_that_is_not_finite_spoils_the_loss_and_never_passes_as_no_step():
    """The sign of NaN is 0: a network whose gradients are NaN would be trained on clean images."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(context, values):
            return values.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * torch.tensor([torch.nan, 1.0, 1.0, 1.0])[:, None, None, None]

    net, (images, labels) = plain_net(), batch_of()
    found = craft(lambda points: net(Broken.apply(points)), images, labels, threat(), "ce", 2)
    assert found[0].isnan().all() and found[1:].isfinite().all()
    assert CROSS_ENTROPY(net(found), labels)[0].isnan()


def test_the_loss_is_told_how_far_the_attack_is():
    net, (images, labels) = plain_net(), batch_of()
    told = []

    def loss(logits, labels, threat, share):
        told.append(share)
        return logits[:, 0]

    craft(net, images, labels, threat(), loss, 4)
    assert told == [0, 0.25, 0.5, 0.75]


def test_pixels_without_a_label_attract_nothing():
    """A network that looks at one pixel at a time: elsewhere the points stay where they began."""
    images, labels = batch_of()
    assert (labels == 255).any() and (labels != 255).any()
    found = craft(nn.Conv2d(3, 3, 1), images, labels, threat(), "ce", 3)
    ignored = (labels == 255)[:, None].expand_as(images)
    stayed = found == random_point(images, threat(), "training")
    assert stayed[ignored].all() and not stayed[~ignored].all()


def test_segpgd_begins_with_the_pixels_that_are_right():
    images, labels = batch_of()
    net = nn.Conv2d(3, toy.CLASSES, 1)
    nn.init.zeros_(net.weight)
    net.bias.data = torch.tensor([0.0, 0.0, 5.0])  # class 2 everywhere, whatever the image
    net.weight.data[:2] = 0.01
    found = craft(net, images, labels, threat(), "segpgd", 1)
    stayed = (found == random_point(images, threat(), "training")).all(dim=1)
    assert stayed[labels != 2].all() and not stayed[labels == 2].all()


# --------------------------------------------------------------------------------- which images, which dice


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(0, 20).map(lambda part: part / 20))
def test_the_attacked_share_is_kept_up_to_every_image(first, count, clean_fraction):
    numbers = attacked_numbers(first, count, clean_fraction)
    assert set(numbers) <= set(range(first, first + count))
    assert abs(len(numbers) - count * (1 - clean_fraction)) < 1 + 1e-6
    cut = count // 2
    halves = (
        attacked_numbers(first, cut, clean_fraction),
        attacked_numbers(first + cut, count - cut, clean_fraction),
    )
    assert numbers == [*halves[0], *halves[1]]


@pytest.mark.parametrize("clean", range(21))
def test_of_the_first_images_as_many_as_the_share_says_are_attacked(clean):
    for count in range(1, 200):
        assert len(attacked_numbers(0, count, clean / 20)) == count * (20 - clean) // 20


def test_half_of_every_batch_of_segpgd_training_stays_clean_bit_for_bit():
    images, labels = batch_of(8)
    for first in (0, 8, 80):
        attacked = adversary(attack="segpgd").attack(plain_net(), images, labels, first)
        changed = (attacked.adversarial != images).flatten(1).any(dim=1)
        assert changed.sum() == 4 and torch.equal(changed.nonzero().flatten(), attacked.rows)
        assert attacked.clean is images
        assert is_inside(attacked.adversarial, images, threat(8)).all()


def test_an_image_is_attacked_alike_in_every_batch():
    net, (images, labels) = plain_net(), batch_of(8)
    one = adversary(clean_fraction=0.25)
    whole = one.attack(net, images, labels, 40).adversarial
    parts = [
        one.attack(net, images[at : at + 2], labels[at : at + 2], 40 + at).adversarial for at in (0, 2, 4, 6)
    ]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)
    assert not torch.allclose(whole, one.attack(net, images, labels, 48).adversarial, atol=1e-3)
    other = adversary(clean_fraction=0.25, seed=305)
    assert not torch.allclose(whole, other.attack(net, images, labels, 40).adversarial, atol=1e-3)


def test_crafting_leaves_the_network_and_the_dice_alone():
    torch.manual_seed(0)
    net, (images, labels) = Net().train(), batch_of()
    net[1].eval()  # a part may be in another mode
    modes = [module.training for module in net.modules()]
    before, random = {name: tensor.clone() for name, tensor in net.state_dict().items()}, random_state()
    seen = []
    net[0].register_forward_hook(lambda module, inputs, output: seen.append((module.training, output.dtype)))
    adversary(clean_fraction=0.0).attack(net, images, labels, 0)
    assert seen == [(False, torch.float32)] * 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(random_state()["torch"], random["torch"])
    assert all(parameter.grad is None for parameter in net.parameters())


def test_bf16_is_for_the_step_and_not_for_the_attack():
    net, (images, labels) = plain_net(), batch_of()
    one = adversary(clean_fraction=0.0)
    phase = Phase(
        "net", one.loss, list(net.parameters()), torch.optim.SGD(net.parameters()), None, one.attack
    )
    seen = []
    net.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    compute_gradients(phase, net, [(images, labels)], precision="bf16")
    assert seen == [torch.float32] * 3 + [torch.bfloat16]


# -------------------------------------------------------------------------------------------------- losses


def test_ce_is_the_loss_of_the_images_as_attacked():
    net, (images, labels) = plain_net(), batch_of()
    one = adversary()
    attacked = one.attack(net, images, labels, 0)
    found, expected = one.loss(net, attacked, labels), CROSS_ENTROPY(net(attacked.adversarial), labels)
    assert found[0] == expected[0] and found[1] == expected[1] == (labels != 255).sum()


@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_trades_is_its_formula(weights):
    """CE + beta KL(p(clean) || p(adversarial)) over the labelled pixels, the second of the attacked images only."""
    net, (images, labels) = plain_net(), batch_of()
    loss = cross_entropy(torch.tensor([1, 2, 3]), 255, class_weights=weights)
    rows = torch.tensor([1, 3])
    other = images.clone()
    other[rows] = (images[rows] + 0.1).clamp(0, 1)
    inputs = Attacked(images, other, rows)
    total, count = adversary(loss, loss="trades", beta=2.5).loss(net, inputs, labels)
    p, q = net(images).softmax(1), net(other).softmax(1)
    expected, pixels = 0.0, 0
    for image in range(4):
        for row, column in (labels[image] != 255).nonzero().tolist():
            pixels += 1
            if image in (1, 3):
                one, two = p[image, :, row, column], q[image, :, row, column]
                expected = expected + (one * (one / two).log()).sum()
    plain, number = loss(net(images), labels)
    mean = plain / number + 2.5 * expected / pixels
    assert expected > 0 and pixels == (labels != 255).sum() and count == number
    assert (total / count).item() == pytest.approx(mean.item(), rel=1e-4)
    parameters = list(net.parameters())
    gradients = [torch.autograd.grad(value, parameters) for value in (total / count, mean)]
    for one, two in zip(*gradients, strict=True):  # through clean and adversarial predictions alike
        assert torch.allclose(one, two, atol=1e-5)


def test_trades_raises_the_divergence_that_it_lowers():
    net, (images, labels) = plain_net(), batch_of()

    def gap(**keys):
        found = adversary(clean_fraction=0.0, steps=10, **keys).attack(net, images, labels, 0).adversarial
        return divergence(net(images), net(found)).sum().item()

    assert gap(loss="trades") > 1.02 * gap(loss="ce") > 0
    assert gap(loss="trades", attack="segpgd") == gap(loss="ce", attack="segpgd")


def test_the_divergence_is_that_of_the_distributions():
    torch.manual_seed(0)
    one, two = torch.randn(2, 2, 5, 3)
    expected = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=logits.movedim(1, -1)) for logits in (one, two))
    )
    assert torch.allclose(divergence(one, two), expected, atol=1e-6)
    assert torch.equal(divergence(one, one), torch.zeros(2, 3))
    assert divergence(one * 1e4, two * 1e4).isfinite().all()


@pytest.mark.parametrize("loss", ["ce", "trades"])
def test_images_without_labels_move_nothing(loss):
    net, (images, labels) = plain_net(), batch_of()
    one = adversary(loss=loss)
    nothing = torch.full_like(labels, 255)
    total, count = one.loss(net, one.attack(net, images, nothing, 0), nothing)
    assert total == 0 and count == 0


# ------------------------------------------------------------------------------------------------ training


def phases_with(**keys):
    def phases(model, steps):
        phase = toy.phase_of(model, steps)
        one = adversary(**keys)
        phase.loss, phase.attack = one.loss, one.attack
        return [phase]

    return phases


def outcome(folder) -> tuple[bytes, bytes]:
    return (folder / "checkpoints/best.safetensors").read_bytes(), (folder / "metrics.csv").read_bytes()


def flat(model) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


@pytest.mark.parametrize("loss", ["ce", "trades"])
def test_training_with_nothing_but_clean_images_is_plain_training(tmp_path, loss):
    train(tmp_path / "plain", ema=0.9, accumulate=2)
    train(
        tmp_path / "attacked",
        phases=phases_with(clean_fraction=NONE_ATTACKED, loss=loss),
        ema=0.9,
        accumulate=2,
    )
    assert outcome(tmp_path / "plain") == outcome(tmp_path / "attacked")


def test_with_a_tiny_eps_training_is_plain_training_up_to_rounding(tmp_path):
    """With BatchNorm and dropout: the attack draws none of their numbers and moves no statistics."""
    _, _, plain = train(tmp_path / "plain", epochs=1)
    _, _, near = train(tmp_path / "near", phases=phases_with(clean_fraction=0.0, eps=1e-7), epochs=1)
    _, _, far = train(tmp_path / "far", phases=phases_with(clean_fraction=0.0, eps=0.1), epochs=1)
    assert torch.allclose(flat(plain), flat(near), atol=1e-3)
    assert not torch.allclose(flat(plain), flat(far), atol=1e-2)


@pytest.mark.parametrize("keys", [{}, {"attack": "segpgd", "clean_fraction": 0.25}])
def test_accumulated_batches_are_one_large_batch(tmp_path, keys):
    one = dict(net=plain_net, phases=phases_with(**keys), epochs=2)
    _, _, small = train(tmp_path / "a", batches=Batches(6, 2), accumulate=3, **one)
    _, _, large = train(tmp_path / "b", batches=Batches(2, 6), **one)
    assert torch.allclose(flat(small), flat(large), atol=1e-5)


@pytest.mark.parametrize(
    ("stop", "keys"), [((0, 3), {}), ((1, 0), {"loss": "trades"}), ((2, 5), {"norm": "l2"})]
)
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, stop, keys):
    settings = dict(phases=phases_with(**keys), ema=0.9, accumulate=2, save_steps=1)
    train(tmp_path / "whole", **settings)

    def interrupt(epoch, index):
        if (epoch, index) == stop:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(tmp_path / "cut", batches=Batches(hook=interrupt), **settings)
    train(tmp_path / "cut", resume=True, **settings)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_the_number_of_the_first_image_reaches_the_attack(tmp_path):
    firsts = []

    def phases(model, steps):
        phase = toy.phase_of(model, steps)
        phase.attack = lambda model, inputs, labels, first: firsts.append(first) or inputs
        return [phase]

    train(tmp_path / "a", batches=Batches(5, 3), phases=phases, accumulate=2, epochs=2)
    assert firsts == list(range(0, 30, 3))


def test_training_on_attacked_images_lowers_the_attacked_loss():
    """Two features tell the class: one that is wrong in a tenth of the pixels and out of an attacker's reach, and
    one without errors that an attacker turns round. Plain training leans on the second, adversarial on the first."""
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (64, 6, 6))
    sign = 2.0 * labels - 1
    sure = torch.where(torch.rand(64, 6, 6) < 0.9, sign, -sign) * 0.3  # right in 90 % of the pixels
    images = torch.stack([0.5 + sure, 0.5 + 0.05 * sign, torch.full_like(sure, 0.5)], dim=1)

    def trained(**keys):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 2, 1))
        optimizer = torch.optim.Adam(net.parameters(), lr=2.0)
        one = adversary(eps=0.1, **keys)
        phase = Phase("net", one.loss, list(net.parameters()), optimizer, None, one.attack)
        for step in range(100):
            compute_gradients(phase, net, [(images, labels)], first=64 * step)
            optimizer.step()
        ball = threat(64, eps=0.1)
        found = craft(net, images, labels, ball, "ce", 10)
        return [image_loss("ce", net(points), labels, ball).mean().item() for points in (images, found)]

    plain, robust = trained(clean_fraction=NONE_ATTACKED), trained(clean_fraction=0.0)
    trades = trained(clean_fraction=0.0, loss="trades")
    assert plain[0] < 0.15 and plain[1] > 1.5
    for clean, attacked in (robust, trades):
        assert 0.25 < clean < 0.35 and attacked < 0.55  # the price: the feature without errors is not used
