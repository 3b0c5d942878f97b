"""Filters that scores have pruned say nothing, come back, and cost nothing once they are gone."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.components import description
from engine.config import UserError, component, signature_of
from networks.cnn_moe import ARCHITECTURES
from networks.cnn_moe.model import CNN
from networks.cnn_moe.resnet import resnet18
from networks.cnn_moe.sparse import SparseCNN, mask, wiring

KINDS = ("resnet18", "resnet50", "wrn_28_4", "vgg16", "vgg16_bn", "densenet")
SMALL = pytest.mark.parametrize("arch", KINDS)


def images(count=3, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def sparse(arch="resnet18", ratio=0.3, **keys):
    """With scores of either sign, and norms that a training has left their marks on."""
    torch.manual_seed(1)
    network = SparseCNN(10, arch=arch, ratio=ratio, **keys)
    for scores in network.scores:
        nn.init.normal_(scores)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network


def test_the_largest_scores_stay_whatever_their_sign_and_the_first_of_equals():
    assert mask(torch.tensor([0.1, -3.0, 2.0, -0.2, 0.0]), 0.4).tolist() == [0, 1, 1, 0, 0]
    assert mask(torch.tensor([1.0, -1.0, 1.0, 1.0]), 0.5).tolist() == [1, 1, 0, 0]
    assert mask(torch.tensor([1.0, 2.0, 3.0]), 0.01).tolist() == [0, 0, 1]  # one filter at least
    assert mask(torch.rand(10), 1.0).tolist() == [1] * 10
    assert [int(mask(torch.rand(10), ratio).sum()) for ratio in (0.24, 0.26, 0.74)] == [2, 3, 7]


def test_the_straight_through_gradient_is_that_of_the_sizes():
    scores = torch.tensor([0.5, -2.0, -0.1], requires_grad=True)
    pull = torch.tensor([3.0, 4.0, 5.0])
    (mask(scores, 0.34) * pull).sum().backward()
    assert scores.grad.tolist() == [3.0, -4.0, -5.0]


def stopped(network):
    """The body with masks on what is passed on, as leaves that collect the gradient: inputs of the convolutions that
    read filters, and norms (or convolutions) whose output is added. Written anew, block by block."""
    body = copy.deepcopy(network.body)
    masks = [one.detach().requires_grad_() for one in network.masks()]
    of = dict(zip(body.expert_convs(), masks, strict=True))

    def before(module, kept):
        module.register_forward_pre_hook(
            lambda module, inputs: (
                inputs[0] * kept.view(1, -1, *[1] * (inputs[0].dim() - 2)), *inputs[1:]
            )
        )  # fmt: skip

    def behind(module, kept):
        module.register_forward_hook(lambda module, inputs, output: output * kept[None, :, None, None])

    blocks = [block for stage in body.stages for block in stage]
    kind = type(blocks[0]).__name__
    if kind in ("Basic", "Bottleneck", "PreActivation"):
        for block in blocks:
            convs = [getattr(block, f"conv{i}") for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
            for first, second in zip(convs, convs[1:], strict=False):
                before(second, of[first])
            last = convs[-1] if kind == "PreActivation" else getattr(block, f"bn{len(convs)}")
            behind(last, of[convs[-1]])
            if kind == "PreActivation" and block.shortcut is not None:
                behind(block.shortcut, of[block.shortcut])
            elif kind != "PreActivation" and block.shortcut.conv is not None:
                behind(block.shortcut.bn, of[block.shortcut.conv])
    elif kind == "Layer":
        for first, second in zip(blocks, blocks[1:], strict=False):
            before(second.conv, of[first.conv])
        before(body.head[0], of[blocks[-1].conv].repeat_interleave(4))
    else:
        seen = [masks[0].new_ones(body.stem.conv.out_channels)]
        for block in blocks:
            if hasattr(block, "conv"):
                before(block.conv, torch.cat(seen))
                seen = [of[block.conv]]
            else:
                before(block.conv1, torch.cat(seen))
                before(block.conv2, of[block.conv1])
                seen.append(of[block.conv2])
        before(body.head, torch.cat(seen))
    return body, masks


@SMALL
def test_logits_and_gradients_are_those_of_filters_that_are_stopped_where_they_are_read(arch):
    network = sparse(arch).double().train()
    body, masks = stopped(network)
    x, labels = images().double(), torch.arange(3)
    found, expected = network(x), body(network.entry(x))
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    F.cross_entropy(found, labels).backward()
    F.cross_entropy(expected, labels).backward()
    for scores, kept in zip(network.scores, masks, strict=True):
        assert torch.allclose(scores.grad, kept.grad * scores.sign(), rtol=1e-6, atol=1e-10)
    theirs = dict(body.named_parameters())
    for name, own in network.body.named_parameters():
        assert torch.allclose(own.grad, theirs[name].grad, rtol=1e-6, atol=1e-10), name


@SMALL
@pytest.mark.parametrize("training", [False, True])
def test_whatever_a_pruned_filter_holds_changes_no_logit(arch, training):
    """Its weights, its bias, and the norm behind it."""
    network = sparse(arch).train(training)
    whole, masks = copy.deepcopy(network)(images()), network.masks()
    other = copy.deepcopy(network)
    for number, kept in enumerate(masks):
        assert 0 < kept.sum() < len(kept)
        disturb(other, number, kept == 0)
    assert torch.equal(other(images()), whole)
    for number in (0, len(masks) // 2, len(masks) - 1):
        other = copy.deepcopy(network)
        disturb(other, number, masks[number] == 1)
        assert not torch.equal(other(images()), whole), number


def disturb(network, number, filters):
    for own in own_tensors(network, number):
        own.data[filters] += 10 * torch.randn_like(own)[filters]


def own_tensors(network, number):
    """Weights and bias of a convolution and of the norm that it alone feeds, if there is one."""
    conv = network.body.expert_convs()[number]
    name = next(name for name, module in network.body.named_modules() if module is conv)
    owner, _, last = name.rpartition(".")
    block = network.body.get_submodule(owner)
    follower = {
        "PreActivation": {"conv1": "bn2"},
        "Dense": {"conv1": "bn2"},
        "Transition": {},
    }.get(type(block).__name__, {"conv": "bn", "conv1": "bn1", "conv2": "bn2", "conv3": "bn3"})
    norm = getattr(block, follower.get(last, ""), None) or nn.Identity()
    return [*conv.parameters(), *norm.parameters()]


@SMALL
def test_scores_of_pruned_filters_learn_so_that_these_may_come_back(arch):
    network = sparse(arch).train()
    F.cross_entropy(network(images(8)), torch.arange(8)).backward()
    for scores, kept in zip(network.scores, network.masks(), strict=True):
        assert (scores.grad[kept == 0] != 0).any() and (scores.grad[kept == 1] != 0).any()
    for conv, kept in zip(network.body.expert_convs(), network.masks(), strict=True):
        assert (conv.weight.grad[kept == 0] == 0).all() and (conv.weight.grad[kept == 1] != 0).any()


@pytest.mark.parametrize(("arch", "norm"), [("resnet18", "bn1"), ("vgg16_bn", "bn")])
def test_norms_of_pruned_filters_go_on_counting(arch, norm):
    means = []
    for ratio in (0.1, 1.0):
        network = sparse(arch, ratio).train()
        network(images())
        means.append(getattr(network.body.stages[0][0], norm).running_mean)
    assert torch.equal(*means)


@SMALL
def test_keeping_everything_is_the_plain_cnn(arch):
    network = sparse(arch, ratio=1.0)
    plain = CNN(10, arch=arch)
    plain.body.load_state_dict(network.body.state_dict())
    assert torch.equal(network.eval()(images()), plain.eval()(images()))


@SMALL
@pytest.mark.parametrize("training", [False, True])
def test_zeros_in_the_weights_of_a_plain_cnn_say_the_same(arch, training):
    network = sparse(arch).train(training)
    folded = network.folded()
    plain = CNN(10, arch=arch).train(training)
    plain.load_state_dict(folded.state_dict())  # strict
    expected = copy.deepcopy(network)(images())
    assert torch.equal(plain(images()), expected) and torch.equal(folded(images()), expected)
    for conv, kept in zip(plain.body.expert_convs(), network.masks(), strict=True):
        assert (conv.weight.flatten(1).abs().sum(dim=1) == 0).tolist() == (kept == 0).tolist()
    assert all((scores != 0).all() for scores in network.scores)  # the network itself is as it was
    assert all((conv.weight != 0).any(dim=(1, 2, 3)).all() for conv in network.body.expert_convs())


@SMALL
@pytest.mark.parametrize("ratio", [0.01, 0.3, 1.0])
def test_what_is_kept_says_the_same_without_the_rest(arch, ratio):
    network = sparse(arch, ratio).eval()
    kept = network.kept()
    found, expected = kept(images()), network(images())
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    for conv, one in zip(kept.body.expert_convs(), network.masks(), strict=True):
        assert conv.out_channels == len(conv.weight) == one.sum()
        assert conv.in_channels == conv.weight.shape[1]
    assert (kept.body.num_experts, kept.num_classes) == (1, 10)
    copy.deepcopy(kept).train()(images()).sum().backward()


def test_kept_parameters_are_those_of_a_count_by_hand():
    network, plain = sparse("resnet18", 0.5), resnet18(10)
    kept = sum(parameter.numel() for parameter in network.kept().parameters())
    expected = 64 * 27 + 2 * 64 + 512 * 10 + 10  # stem with norm, head
    before = 64
    for width in (64, 128, 256, 512):
        half = width // 2
        for place in range(2):
            expected += 9 * before * half + 2 * half  # reads a sum of all channels
            expected += 9 * half * half + 2 * half
            if before != width and not place:
                expected += before * half + 2 * half  # shortcut
            before = width
    assert kept == expected < 0.4 * sum(parameter.numel() for parameter in plain.parameters())
    chain = sum(parameter.numel() for parameter in sparse("vgg16", 0.5).kept().body.stages.parameters())
    widths = [64, 32, 64, 64, *[128] * 3, *[256] * 6]  # the stem keeps its 64
    assert chain == sum(9 * a * b + b for a, b in zip(widths, widths[1:], strict=False))


def test_first_scores_are_l1_norms_of_mean_1():
    network = SparseCNN(10, arch="vgg16", ratio=0.5)
    for conv, scores in zip(network.body.expert_convs(), network.scores, strict=True):
        norms = conv.weight.abs().sum(dim=(1, 2, 3))
        assert torch.allclose(scores, norms / norms.mean()) and scores.mean().item() == pytest.approx(1)
        assert isinstance(scores, nn.Parameter) and scores.requires_grad


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_every_architecture_is_wired_through(arch, stem):
    with torch.device("meta"):
        body = CNN(7, arch=arch, stem=stem).body
    plan, numbers = wiring(body), range(len(body.expert_convs()))
    shapes = {name: tensor.shape for name, tensor in body.state_dict().items()}
    gated = {conv for cut in plan.cuts if cut.gate for conv, _ in cut.channels}
    assert gated - {None} == set(numbers)  # each is stopped somewhere
    for cut in plan.cuts:
        assert shapes[cut.tensor][cut.dim] == cut.places * sum(count for _, count in cut.channels)
    assert sum(cut.dim == 0 and cut.tensor.endswith("weight") for cut in plan.cuts) >= len(numbers)


def test_it_is_a_classifier_of_the_table_whose_state_is_its_own():
    made = partial(component, "networks:CLASSIFIERS", "sparse_cnn")
    network = made(arch="densenet", ratio=0.25, mean=[0.4, 0.4, 0.4]).build(5)
    assert (network.num_classes, network.ratio) == (5, 0.25)
    again = made(arch="densenet", ratio=0.25, mean=[0.4, 0.4, 0.4]).build(5)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(images()), network.eval()(images()))
    assert sum(name.startswith("scores.") for name in network.state_dict()) == len(network.scores) == 38
    signature = signature_of("networks.cnn_moe.sparse:SparseCNN")
    assert all(description(signature.docstring, key) for key in signature.types)
    assert set(signature.types) == set(signature_of("networks.cnn_moe.model:CNN").types)


@pytest.mark.parametrize("ratio", [0.0, 1.5])
def test_ratios_that_keep_nothing_or_too_much_are_refused(ratio):
    with pytest.raises(UserError, match=f"network.ratio: {ratio} is wrong; expected above 0, at most 1"):
        SparseCNN(10, arch="resnet18", ratio=ratio)


def test_an_unknown_block_is_told_not_left_out():
    body = CNN(10, arch="resnet18").body
    body.stages[1][0] = nn.Identity()
    with pytest.raises(TypeError, match="Identity: unknown to networks.cnn_moe.sparse"):
        wiring(body)
