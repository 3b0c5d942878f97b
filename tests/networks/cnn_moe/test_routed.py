"""Pathways cost one expert and say what computing all experts and masking says: outputs, gradients, statistics."""

import copy
import io
import subprocess
import sys
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save

from engine.config import ConfigError, UserError, component
from networks.cnn_moe import ARCHITECTURES, Architecture
from networks.cnn_moe.model import CNN, CNNMoE
from networks.cnn_moe.moe_conv import ExpertConv
from networks.cnn_moe.router import Router
from networks.cnn_moe.routes import routes_of

GRANULARITIES = ("model", "stage", "layer")


def images(count=6, size=16, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def mixture(arch="resnet18", experts=3, **keys):
    torch.manual_seed(1)
    return CNNMoE(10, arch=arch, ratio=keys.pop("ratio", 0.125), num_experts=experts, **keys)


def weights_for(model, chosen):
    """One-hot weights from experts [S, B] that take a gradient."""
    weights = F.one_hot(torch.as_tensor(chosen), model.num_experts).float()[..., None, None, None]
    return weights.requires_grad_()


def some_routes(model, count=6, seed=3):
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.num_experts, (model.router.sites, count), generator=dice)


class Masked(torch.nn.Module):
    """The published way: all experts for all images, then a mask. Shares the parameters of an ExpertConv."""

    def __init__(self, conv, weights):
        super().__init__()
        self.conv, self.weights = conv, weights  # [S, B, E]

    def forward(self, x, routes=None):
        every = self.conv.convolve(x, self.conv.weight, self.conv.bias)
        every = every.unflatten(1, (self.conv.num_experts, -1))  # [B, E, C, H, W]
        mask = self.weights[self.conv.site]
        return (every * mask[:, :, None, None, None]).sum(dim=1)


def masked_copy(model, weights):
    """The same network computing everything, in the order of the images."""
    other = copy.deepcopy(model)
    for parent in list(other.body.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ExpertConv) and child.num_experts > 1:
                setattr(parent, name, Masked(child, weights))
    return other


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "wrn_28_4", "vgg16", "vgg16_bn", "densenet"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_one_pathway_each_is_all_experts_masked(arch, granularity, training):
    model = mixture(arch, granularity=granularity).double().train()
    model(images(12, seed=8).double())  # statistics for the evaluation that are no zeros and ones
    model.train(training)
    chosen = some_routes(model)
    ours, theirs = weights_for(model, chosen).double(), weights_for(model, chosen).double()
    ours, theirs = ours.detach().requires_grad_(), theirs.detach().requires_grad_()
    other = masked_copy(model, theirs.flatten(2))
    x, y = images().double().requires_grad_(), torch.arange(6)
    found = model.forward_given(x, ours)
    expected = other.body(other.entry(x), None)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    (grad_x,) = torch.autograd.grad(F.cross_entropy(found, y), x, retain_graph=True)
    (expected_x,) = torch.autograd.grad(F.cross_entropy(expected, y), x, retain_graph=True)
    assert torch.allclose(grad_x, expected_x, rtol=1e-6, atol=1e-12)
    F.cross_entropy(found, y).backward()
    F.cross_entropy(expected, y).backward()
    own = dict(model.body.named_parameters())
    for name, parameter in other.body.named_parameters():
        mine = own[
            name if name in own else name.replace(".conv.weight", ".weight").replace(".conv.bias", ".bias")
        ]
        assert torch.allclose(mine.grad, parameter.grad, rtol=1e-6, atol=1e-12), name
    # of the gradient to the weights what belongs to the experts taken; the others' answers were never computed
    taken = ours.detach().bool()
    assert torch.allclose(ours.grad[taken], theirs.grad[taken], rtol=1e-6, atol=1e-12)
    assert (ours.grad[~taken] == 0).all()
    for (name, mine), (_, theirs_) in zip(
        model.body.named_buffers(), other.body.named_buffers(), strict=True
    ):
        assert torch.allclose(mine.double(), theirs_.double(), rtol=1e-9), name


def test_one_hot_weights_multiply_by_exactly_one():
    model = mixture().eval()
    x, weights = images(), weights_for(mixture(), [[0, 1, 2, 2, 1, 0]])
    assert torch.equal(model.forward_given(x, weights), model.forward_given(x, weights.detach()))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_forward_is_forward_given_its_own_route(granularity):
    model = mixture(granularity=granularity).eval()
    model.router.balance([model.entry(images(32, seed=5))])
    x = images(12)
    gate_logits = model.gate_logits(x)
    route = model.route(gate_logits)
    assert gate_logits.shape == (model.router.sites, 12, 3, 1, 1, 1) and model.routing == "hard"
    assert torch.equal(route.sum(dim=2), torch.ones_like(route[:, :, 0]))
    assert set(route.unique().tolist()) == {0.0, 1.0}
    seen = model.inspect(x)
    assert torch.equal(seen.logits, model(x)) and torch.equal(model(x), model.forward_given(x, route))
    assert torch.equal(seen.scores, gate_logits.flatten(2)) and torch.equal(
        seen.routes, route.flatten(2).argmax(2)
    )
    again, mix = model.gate_and_mix(x)
    assert torch.equal(again, gate_logits) and torch.equal(mix(route), seen.logits)


def test_the_straight_through_gradient_is_that_of_softmax():
    model = mixture()
    scores = torch.randn(2, 4, 3, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(2, 4, 3, 1, 1, 1, dtype=torch.float64)
    (found,) = torch.autograd.grad((model.route(scores) * pull).sum(), scores)
    (expected,) = torch.autograd.grad((scores.softmax(dim=2) * pull).sum(), scores)
    assert torch.allclose(found, expected)
    tied = torch.zeros(1, 1, 3, 1, 1, 1)
    assert model.route(tied).flatten().tolist() == [1, 0, 0]  # the lowest index of equals


def test_the_task_reaches_the_router_and_every_expert_that_is_taken():
    model = mixture(experts=2).train()
    weights = model.route(model.gate_logits(images()))
    model.forward_given(images(), weights).square().sum().backward()
    assert model.router.head.weight.grad.abs().sum() > 0
    taken = weights.detach().sum(dim=(0, 1)).flatten() > 0
    for conv in model.body.expert_convs():
        grads = conv.weight.grad.chunk(2)
        assert [bool(grad.abs().sum() > 0) for grad in grads] == taken.tolist()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_weighted_routes_mix_the_answers_of_the_convolutions(granularity):
    model = mixture(granularity=granularity, top_k=2).double().eval()
    x = images().double()
    weights = model.route(model.gate_logits(x))
    assert model.routing == "soft" and ((weights > 0).sum(dim=2) == 2).all()
    assert torch.allclose(weights.sum(dim=2), torch.ones_like(weights[:, :, 0]))
    other = masked_copy(model, weights.flatten(2))
    assert torch.allclose(model(x), other.body(other.entry(x), None), rtol=1e-9)
    nearly = weights_for(model, some_routes(model)).detach().double()
    exact = model.forward_given(x, nearly)
    assert torch.allclose(model.forward_given(x, nearly * (1 - 1e-12)), exact, rtol=1e-6)


@pytest.mark.parametrize("arch", ["resnet18", "vgg16", "densenet"])
def test_a_pathway_is_a_plain_cnn_with_the_same_logits(arch):
    model = mixture(arch, granularity="layer").eval()
    x = images()
    for expert in range(3):
        forced = torch.zeros(model.router.sites, 6, 3, 1, 1, 1)
        forced[:, :, expert] = 1
        plain = model.pathway(expert)
        assert torch.equal(plain(x), model.forward_given(x, forced))
        assert sum(p.numel() for p in plain.parameters()) < sum(p.numel() for p in model.body.parameters())
        other = CNN(10, arch=arch, ratio=0.125)
        other.load_state_dict(plain.state_dict())  # strict
        assert torch.equal(other.eval()(x), plain(x))
    assert model.body.num_experts == 3  # the model itself is as it was
    with pytest.raises(UserError, match="pathway: 3 is wrong"):
        model.pathway(3)


def test_nothing_is_kept_between_calls_and_nothing_is_stored_twice():
    model = mixture().train()
    model(images()).sum().backward()
    twin = copy.deepcopy(model)
    assert torch.equal(twin.eval()(images()), model.eval()(images()))
    state = model.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values() if tensor.numel()}) == sum(
        tensor.numel() > 0 for tensor in state.values()
    )
    assert sum(name.startswith("router.") for name in state) == len(model.router.state_dict())
    assert len(list(model.modules())) == len(list(twin.modules())) < 150
    again = mixture()
    again.load_state_dict(load(save(state)))
    assert torch.equal(again.eval()(images()), model(images()))
    torch.save(model, io.BytesIO())


def test_channels_last_changes_nothing_but_rounding():
    model = mixture().eval()
    x, weights = images(), weights_for(model, [[0, 1, 2, 0, 1, 2]]).detach()
    expected = model.forward_given(x, weights)
    fast = copy.deepcopy(model).to(memory_format=torch.channels_last)
    found = fast.forward_given(x.contiguous(memory_format=torch.channels_last), weights)
    assert torch.allclose(found, expected, atol=1e-5)


def test_an_expert_nobody_takes_costs_nothing_and_gets_a_gradient_of_zero():
    model = mixture().train()
    ran = []
    for conv in model.body.expert_convs():
        whole = conv.convolve
        conv.convolve = lambda x, *rest, whole=whole: ran.append(len(x)) or whole(x, *rest)
    model.forward_given(images(), weights_for(model, [[1] * 6])).sum().backward()
    assert ran == [6] * len(model.body.expert_convs())
    for conv in model.body.expert_convs():
        first, second, third = conv.weight.grad.chunk(3)
        assert (first == 0).all() and (third == 0).all() and second.abs().sum() > 0


def test_routes_tell_rows_and_order():
    weights = weights_for(mixture(), [[2, 0, 2, 0, 0, 1]]).flatten(2)
    (route,) = routes_of(weights)
    assert (
        route.one_hot
        and route.order.tolist() == [1, 3, 4, 5, 0, 2]
        and route.back.tolist() == [4, 0, 5, 1, 2, 3]
    )
    assert [(share.expert, share.rows) for share in route.shares] == [
        (0, slice(0, 3)), (1, slice(3, 4)), (2, slice(4, 6)),
    ]  # fmt: skip
    assert route.sorted().order is None and torch.equal(
        route.unsort(route.sort(torch.arange(6))), torch.arange(6)
    )
    halves = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]])
    (route,) = routes_of(halves)
    assert not route.one_hot
    assert [(share.expert, share.rows.tolist(), share.weight.tolist()) for share in route.shares] == [
        (0, [0, 1], [0.5, 1.0]), (1, [0], [0.5]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"arch": "resnet19"}, "network.arch: 'resnet19' is unknown"),
        ({"ratio": 0.0}, "network.ratio: 0.0 is wrong"),
        ({"num_experts": 1}, "network.num_experts: 1 is wrong"),
        ({"top_k": 3}, "network.top_k: 3 is wrong"),
        ({"granularity": "block"}, "network.granularity: 'block' is unknown; allowed: model, stage, layer"),
        ({"stem": "tiny"}, "stem: 'tiny' is unknown; allowed: cifar, imagenet"),
    ],
)
def test_numbers_that_make_no_network_are_refused(change, told):
    with pytest.raises(UserError, match=told):
        CNNMoE(**{"arch": "resnet18", "num_classes": 10, **change})


# parameters of networks for 10 classes, robust_moe_cnn.md section 2.6 (the router not counted)
PUBLISHED = {
    ("resnet18", 1.0, 1): 11_173_962, ("resnet18", 0.5, 1): 2_797_610, ("resnet18", 0.2, 1): 444_218,
    ("resnet18", 0.8, 1): 7_122_360, ("resnet50", 1.0, 1): 23_520_842,
    ("wrn_28_10", 1.0, 1): 36_479_194, ("wrn_28_10", 0.5, 1): 9_126_002, ("wrn_28_10", 0.5, 2): 18_239_602,
    ("wrn_28_10", 0.5, 5): 45_580_402, ("wrn_28_4", 1.0, 1): 5_849_050, ("wrn_28_4", 0.5, 2): 2_924_530,
    ("wrn_34_10", 1.0, 1): 46_160_474, ("wrn_34_10", 0.5, 2): 23_080_242,
    ("vgg16_bn", 1.0, 1): 15_311_818, ("vgg16_bn", 0.5, 1): 4_013_034, ("vgg16_bn", 0.5, 2): 7_690_218,
    ("vgg16_bn", 0.5, 5): 18_721_770,
    ("densenet", 1.0, 1): 176_122, ("densenet", 0.5, 1): 45_802, ("densenet", 0.2, 1): 5_882,
    # there the stem keeps 64 channels (928 more) with a plain shortcut behind it (2,112), an expert's first convolution
    # reads all of these (9,216 each), and projections are shared: 43,008 for each further expert here
    ("resnet18", 0.5, 2): 5_565_450 - 928 - 2_112 - 2 * 9_216 + 43_008,
    ("resnet18", 0.5, 5): 13_832_202 - 928 - 2_112 - 5 * 9_216 + 4 * 43_008,
}  # fmt: skip


@pytest.mark.parametrize(("arch", "ratio", "experts"), PUBLISHED)
def test_parameters_are_those_published(arch, ratio, experts):
    with torch.device("meta"):
        network = (
            CNNMoE(10, arch=arch, ratio=ratio, num_experts=experts).body
            if experts > 1
            else CNN(10, arch=arch, ratio=ratio).body
        )
    assert sum(parameter.numel() for parameter in network.parameters()) == PUBLISHED[arch, ratio, experts]


def test_the_names_that_a_yaml_may_give_are_those_of_the_table():
    assert list(get_args(Architecture)) == list(ARCHITECTURES)
    for name in ("cnn", "cnn_moe"):
        with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
            component("networks:CLASSIFIERS", name, arch="resnet_18")
    built = component("networks:CLASSIFIERS", "cnn_moe", arch="vgg16", ratio=0.1, num_experts=3).build(5)
    assert (built.num_classes, built.num_experts) == (5, 3)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("experts", [1, 2, 5])
def test_every_architecture_has_widths_above_zero_and_takes_a_step(arch, experts):
    torch.manual_seed(0)
    network = (
        CNN(7, arch=arch, ratio=0.02)
        if experts == 1
        else CNNMoE(7, arch=arch, ratio=0.02, num_experts=experts)
    )
    assert all(min(p.shape) > 0 for p in network.parameters())
    loss = F.cross_entropy(network(images(4, 32)), torch.arange(4))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in network.parameters())
    again = (
        CNN(7, arch=arch, ratio=0.02)
        if experts == 1
        else CNNMoE(7, arch=arch, ratio=0.02, num_experts=experts)
    )
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(images(2, 32)), network.eval()(images(2, 32)))


def test_experts_are_initialised_each_for_itself():
    torch.manual_seed(0)
    conv = ExpertConv(32, 64, 3, num_experts=5)
    stds = [chunk.std().item() for chunk in conv.weight.chunk(5)]
    assert stds == pytest.approx([(2 / (64 * 9)) ** 0.5] * 5, rel=0.02)
    assert conv.weight.chunk(5)[0].flatten()[0] != conv.weight.chunk(5)[1].flatten()[0]


def test_small_and_grey_images_are_enlarged_inside_and_keep_their_own_pixels():
    torch.manual_seed(0)
    network = CNN(10, arch="resnet18", ratio=0.125, enlarge=4).eval()
    digits = torch.rand(3, 1, 8, 8, requires_grad=True)
    entered = network.entry(digits)
    assert entered.shape == (3, 3, 32, 32)
    network(digits).sum().backward()
    assert digits.grad.shape == (3, 1, 8, 8) and digits.grad.abs().sum() > 0


def test_the_router_costs_the_same_at_all_sizes_and_is_small():
    from torch.utils.flop_counter import FlopCounterMode

    def macs(module, *args):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(*args)
        return counter.get_total_flops() / 2

    router = Router(2).eval()
    assert macs(router, torch.rand(1, 3, 32, 32)) == pytest.approx(0.0406e9, rel=0.01)
    assert macs(router, torch.rand(1, 3, 224, 224)) == macs(router, torch.rand(1, 3, 32, 32))
    assert sum(p.numel() for p in router.parameters()) == pytest.approx(269_202, rel=0.001)
    with torch.device("meta"):
        pathway = CNN(1000, arch="resnet18", ratio=0.5, stem="imagenet").eval()
        cost = macs(pathway, torch.rand(1, 3, 224, 224))
    assert cost == pytest.approx(0.4831e9, rel=0.001)
    assert macs(router, torch.rand(1, 3, 224, 224)) < 0.1 * cost


def test_a_router_of_fewer_pixels_sees_the_averaged_image():
    keys = {"arch": "resnet18", "ratio": 0.05, "stem": "imagenet", "router_width": 0.25}
    torch.manual_seed(0)
    whole = CNNMoE(3, **keys).eval()
    small = CNNMoE(3, **keys, router_pixels=14).eval()
    small.load_state_dict(whole.state_dict())
    x = images(4, 28)
    averaged = F.avg_pool2d(x, 2)
    torch.testing.assert_close(small.gate_logits(x), whole.gate_logits(averaged), atol=1e-4, rtol=1e-4)
    assert (small.gate_logits(x) - whole.gate_logits(x)).abs().max() > 0.01
    assert torch.equal(small.gate_logits(averaged), whole.gate_logits(averaged))  # 14 px are seen whole


def test_a_balanced_router_sends_images_to_all_experts_and_scores_are_bounded():
    shares = []
    for seed in range(8):
        torch.manual_seed(seed)
        router = Router(4, sites=2).eval()
        batches = [images(64, 32, seed=10 * seed + place) - 0.5 for place in range(2)]
        router.balance(batches)
        routes = router(torch.cat(batches)).argmax(dim=2)
        shares.append(F.one_hot(routes, 4).float().mean(dim=1).amax().item())
        assert not router.training
    assert max(shares) < 0.8
    huge = router.requires_grad_(False)
    huge.head.weight.mul_(1e6)
    assert huge(images(8, 32)).abs().max() <= 15 and torch.isfinite(huge(images(8, 32))).all()


@pytest.mark.parametrize("kernel, stride", [(1, 1), (1, 2), (1, 3), (3, 1), (3, 2)])
@pytest.mark.parametrize("size", [7, 8])
def test_a_convolution_is_pytorchs(kernel, stride, size):
    conv = ExpertConv(5, 4, kernel, stride, bias=True).double()
    x = images(2, size).repeat(1, 2, 1, 1)[:, :5].double()
    mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    answer = conv(mine)
    expected = F.conv2d(its, conv.weight, conv.bias, stride, kernel // 2)
    torch.testing.assert_close(answer, expected)
    slope = torch.rand_like(expected)
    found = torch.autograd.grad(answer, [mine, conv.weight, conv.bias], slope)
    torch.testing.assert_close(found, torch.autograd.grad(expected, [its, conv.weight, conv.bias], slope))


STRIDED = """
import torch
from networks.cnn_moe.moe_conv import ExpertConv
torch.set_num_threads(2)
dice = torch.Generator().manual_seed(0)
conv = ExpertConv(8, 16, 1, 2).to(memory_format=torch.channels_last)
for _ in range(600):
    x = torch.rand(int(torch.randint(1, 33, (1,), generator=dice)), 8, 16, 16)
    conv(x.contiguous(memory_format=torch.channels_last)).sum().backward()
print("whole")
"""


def test_narrow_strided_shortcuts_do_not_damage_memory():
    """oneDNN's own strided 1x1 dies here within some hundred steps, where its AVX-512 kernel runs."""
    ran = subprocess.run([sys.executable, "-c", STRIDED], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, "whole"), ran.stderr[-500:]
