import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from networks.complexity import parameters
from networks.gates import ClasswiseGate, SimpleGate, UniformGate, pool_to_grid


def features_of(*sizes, images=2, channels=4):
    """Like ReLU features: some positive, some zero."""
    return [torch.randn(images, channels, *size).relu() for size in sizes]


def test_published_parameter_counts():
    published = {"width": 1, "grid": (57, 57)}
    assert parameters(SimpleGate(512, 2, 38, **published)) == (420_867, 420_867)
    assert parameters(ClasswiseGate(512, 2, 38, **published))[0] == 15_992_946


def test_classwise_gate_is_one_simple_gate_per_class():
    """The vectorised gate against separate gates, run one after another with slices of its weights."""
    gate = ClasswiseGate(8, 3, 5, width=2, grid=(3, 4), hidden=7)
    features = features_of((6, 9), (6, 9))
    together = gate(features)
    for k in range(5):
        channels = slice(2 * k, 2 * k + 2)
        x = F.relu(
            F.conv2d(torch.cat(features, 1), gate.conv.weight[channels], gate.conv.bias[channels], padding=1)
        )
        x = F.adaptive_avg_pool2d(x, (3, 4)).flatten(1)
        x = F.relu(F.linear(x, gate.hidden_weight[k].T, gate.hidden_bias[k]))
        alone = F.linear(x, gate.expert_weight[k].T, gate.expert_bias[k])
        torch.testing.assert_close(together[:, :, k, 0, 0], alone)


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.tuples(st.integers(1, 12), st.integers(1, 12)))
def test_pooling_is_adaptive_average_pooling(size, grid):
    features = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(
        pool_to_grid(features, grid), F.adaptive_avg_pool2d(features, grid), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("kind", [SimpleGate, ClasswiseGate])
def test_starts_near_equal_weights_with_a_gradient_everywhere(kind):
    gate = kind(8, 3, 5)
    weights = gate(features_of((7, 5), (7, 5))).softmax(dim=1)
    assert (weights - 1 / 3).abs().mean() < 0.1
    assert len(weights[:, 0].unique()) > 1  # but it looks at the image
    weights[:, 0].sum().backward()
    for name, parameter in gate.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_no_published_gate_is_dead_at_the_start():
    """Features that are the same all over the image are the worst case: one number decides."""
    features = [feature.expand(-1, -1, 4, 5) / 2 for feature in features_of((1, 1), (1, 1), channels=256)]
    for seed in range(5):
        torch.manual_seed(seed)
        assert SimpleGate(512, 2, 38, width=1).dead_share(features).sum() == 0


def test_dead_share_counts_gates_whose_channels_are_all_zero():
    features = features_of((4, 4), (4, 4), images=3)
    gate = ClasswiseGate(8, 2, 4, width=2)
    gate.conv.bias.data[:] = torch.tensor([1e3, 1e3, -1e3, 1e3, -1e3, -1e3, -1e3, -1e3])  # 2 of 4 dead
    assert gate.dead_share(features).tolist() == [0.5] * 3
    dead = gate(features)[:, :, 2:]
    assert torch.equal(dead[0], dead[1])  # a dead gate doesn't see the image
    alive = gate(features)[:, :, 1]
    assert not torch.equal(alive[0], alive[1])


def test_dead_share_is_by_image():
    gate = SimpleGate(8, 2, 4, width=1)
    gate.conv.weight.data.fill_(-1.0)
    gate.conv.bias.data.fill_(0.5)
    features = [torch.stack([torch.zeros(4, 3, 3), torch.ones(4, 3, 3)]) for _ in range(2)]
    assert gate.dead_share(features).tolist() == [0.0, 1.0]


def test_uniform_gate_has_nothing_to_learn_and_equal_weights():
    gate = UniformGate(8, 4, 5)
    assert parameters(gate) == (0, 0)
    features = features_of((4, 4), (4, 4))
    assert torch.equal(gate(features).softmax(dim=1), torch.full((2, 4, 1, 1, 1), 0.25))
    assert gate.dead_share(features).tolist() == [0.0, 0.0]


def test_gate_logits_are_float32_under_bf16_autocast():
    gate = SimpleGate(8, 2, 5)
    with torch.no_grad():
        gate.hidden_weight.zero_()
        gate.hidden_bias.fill_(1)
        gate.expert_weight.fill_((1 + 2**-12) / 128)  # bfloat16 would lose the last digits
    with torch.autocast("cpu", torch.bfloat16):
        logits = gate(features_of((4, 4), (4, 4)))
    assert logits.dtype == torch.float32
    assert torch.equal(logits, torch.full_like(logits, 1 + 2**-12))
