import copy
import math

import pytest
import torch
from torch import nn

from benchmarks.frrn import plain_forward
from engine.config import ConfigError, UserError, component
from networks.complexity import gmacs, parameters
from networks.frrn import FRRN, Convolution, FullResolutionUnit, ResidualUnit, doubled
from networks.normalize import IMAGENET_MEAN

NARROW = {"width": 0.01, "residual_channels": 4}  # 8 channels everywhere
VARIANTS = ("A", "B")


def with_statistics(network: FRRN, size: tuple[int, int] = (32, 64)) -> FRRN:
    """BatchNorm statistics of a few passes, so that evaluation mode is not the identity."""
    with torch.no_grad():
        for _ in range(3):
            network.train()(torch.rand(2, 3, *size))
    return network


def grown(network: FRRN) -> FRRN:
    """Weights of BatchNorm and biases as training leaves them: not one and not zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return network


@pytest.mark.parametrize(
    "variant, num_classes, expected",
    [
        # The published code has 17 713 238 at 38 classes; its 5x5 convolution has a bias, which BatchNorm makes
        # useless (48 more), its split a bias instead of BatchNorm (32 less), and it squeezes 128 to 48 channels
        # with a 1x1 (6 192) before an RU (41 664), where the paper has an RU on 128 channels with a 1x1 skip
        # (9 128 48 + 9 48 48 + 4 48 + 128 48 = 82 368): - 48 + 32 + 34 512.
        ("A", 38, 17_713_238 - 48 + 32 + 34_512),
        ("A", 19, 17_746_803),
        ("A", 11, 17_746_411),
        # two FRRU384 on 384 channels, and one more pair of FRRU192 on 192
        ("B", 38, 17_747_734 + 2 * 2_778_656 + 725_792 * 2),
    ],
)
def test_full_width_has_the_papers_size(variant, num_classes, expected):
    with torch.device("meta"):
        network = FRRN(num_classes, variant=variant)
    assert parameters(network) == (expected, expected)
    assert network.stride == {"A": 16, "B": 32}[variant]
    assert network.feature_channels == 384


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [True, False])
def test_is_the_papers_network_with_a_residual_stream_at_full_resolution(variant, training):
    """Logits, running statistics and all gradients, at double precision."""
    ours = grown(with_statistics(FRRN(5, variant=variant, **NARROW))).double().train(training)
    plain = copy.deepcopy(ours)
    images, weights = torch.rand(2, 3, 70, 45).double(), torch.randn(2, 5, 70, 45).double()
    results = []
    for network, forward in ((ours, FRRN.forward), (plain, plain_forward)):
        seen = images.clone().requires_grad_()
        logits = forward(network, seen)
        (logits * weights).sum().backward()
        results.append([logits, seen.grad, *(parameter.grad for parameter in network.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
    for got, expected in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant, step", [("A", 1), ("B", 7)])
def test_every_pixel_of_the_residual_stream_reaches_the_pooling_stream_at_every_level(variant, step):
    """A peak of the stream at any pixel of a deepest cell changes what each unit reads and what it gives."""
    network = with_statistics(FRRN(3, variant=variant, **NARROW)).eval()
    side = network.stride
    pixels = range(0, side * side, step)
    peaks = torch.zeros(len(pixels) + 1, 1, side * side)  # the last one has none
    for row, pixel in enumerate(pixels):
        peaks[row, 0, pixel] = 1000.0
    seen = []
    network.encoder.split.register_forward_hook(lambda _, __, out: out + peaks.view(-1, 1, side, side))
    for unit in network.modules():
        if isinstance(unit, FullResolutionUnit):
            unit.register_forward_hook(lambda _, given, out: seen.append((given[1], out[0])))
    with torch.no_grad():
        network(torch.rand(1, 3, side, side).expand(len(peaks), -1, -1, -1))
    assert len(seen) == {"A": 17, "B": 21}[variant]
    for read, given in seen:
        assert ((read[:-1] - read[-1]).amax((1, 2, 3)) > 900).all()
        assert ((given[:-1] - given[-1]).abs().amax((1, 2, 3)) > 0).all()


def test_nothing_follows_the_addition_of_a_residual_unit():
    unit = ResidualUnit(6, 6)
    nn.init.zeros_(unit.second.norm.weight)
    features = torch.randn(2, 6, 5, 7)
    for mode in (True, False):
        assert torch.equal(unit.train(mode)(features), features)


def test_where_the_paper_has_biases_and_normalisation():
    network = FRRN(4)
    biased = {name for name, module in network.named_modules() if getattr(module, "bias", None) is not None}
    convolutions = {name for name in biased if isinstance(network.get_submodule(name), nn.Conv2d)}
    residuals = {name for name in convolutions if name.endswith(".residual")}
    assert len(residuals) == 17 and convolutions - residuals == {"decoder.classifier"}
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert norms == 1 + 3 * 2 + 1 + 17 * 2 + 3 * 2  # stem, RUs, split, FRRUs, RUs
    skip = network.decoder.join.unit.skip
    assert isinstance(skip, nn.Conv2d) and skip.weight.shape == (48, 128, 1, 1)
    residual = network.encode(torch.rand(2, 3, 16, 16)).entered[0]
    assert (residual < 0).float().mean() > 0.2  # normalised, without a ReLU


def test_residuals_go_up_by_the_nearest_pixel():
    assert doubled(torch.tensor([[[[1.0, -2.0]]]])).tolist() == [[[[1, 1, -2, -2], [1, 1, -2, -2]]]]


def test_weights_start_as_he_uniform():
    network = FRRN(4, width=0.5)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            bound = math.sqrt(6 / module.weight[0].numel())
            assert 0.9 * bound < module.weight.abs().max() <= bound
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("variant, height, width", [("A", 48, 32), ("B", 64, 64)])
def test_any_size_is_padded_with_the_mean_colour_and_cropped(variant, height, width):
    network = with_statistics(FRRN(4, variant=variant, **NARROW)).eval()
    images = torch.rand(1, 3, 33, 17 if variant == "A" else 47)
    padded = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1).repeat(1, 1, height, width)
    padded[..., :33, : images.shape[-1]] = images
    with torch.no_grad():
        logits = network(images)
        assert logits.shape == (1, 4, *images.shape[-2:])
        torch.testing.assert_close(logits, network(padded)[..., :33, : images.shape[-1]])
        assert network(torch.rand(1, 3, 1, 1)).shape == (1, 4, 1, 1)


@pytest.mark.parametrize("variant, grid", [("A", (3, 5)), ("B", (4, 6))])
def test_features_are_the_encoders_pooling_stream_at_stride_16(variant, grid):
    network = with_statistics(FRRN(4, variant=variant, width=0.25)).eval()
    outputs = []
    network.encoder.levels[3][-1].register_forward_hook(lambda _, __, out: outputs.append(out[0]))
    images = torch.rand(2, 3, 40, 70)
    with torch.no_grad():
        logits, features = network.forward_features(images)
    assert features is outputs[0] and features.shape == (2, network.feature_channels, *grid)
    assert logits.shape == (2, 4, 16 * grid[0], 16 * grid[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pass_is_an_encoding_and_a_decoding_that_leaves_it_alone(variant):
    network = with_statistics(FRRN(4, variant=variant, **NARROW)).eval()
    with torch.no_grad():
        state = network.encode(images := torch.rand(1, 3, 32, 32))
        before = copy.deepcopy(state)
        logits, features = network.decode(state), state[-1]
        assert torch.equal(network.decode(state), logits)  # a second decoder would find the same state
        expected = network.forward_features(images)
    assert torch.equal(logits, expected[0]) and torch.equal(features, expected[1])
    assert torch.equal(state.pooling, before.pooling)
    for got, kept in ((state.entered, before.entered), (state.added, before.added)):
        assert all(torch.equal(*pair) for pair in zip(got, kept, strict=True))


def trained_twice(network: FRRN, precision: torch.dtype | None) -> int:
    """Two steps' forward and backward passes; bytes that autograd kept for the last one."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for seed in (1, 2):
        kept.clear()
        images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(seed))
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", precision, enabled=precision is not None),
        ):
            loss = network(images).square().mean()
        loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointing_changes_neither_gradients_nor_statistics(variant, precision):
    plain = FRRN(4, variant=variant, width=0.25).train()
    lean = FRRN(4, variant=variant, width=0.25, checkpointing=True).train()
    lean.load_state_dict(plain.state_dict())
    kept, kept_lean = trained_twice(plain, precision), trained_twice(lean, precision)
    assert kept_lean < 0.5 * kept
    for (name, got), expected in zip(lean.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(got.grad, expected.grad), name
    for (name, got), expected in zip(lean.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(got, expected), name
    counts = {int(got) for name, got in lean.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {2}
    assert list(lean.state_dict()) == list(plain.state_dict())


def test_checkpointing_in_evaluation_mode_gives_the_images_gradient_and_moves_nothing():
    plain = with_statistics(FRRN(4, **NARROW)).eval().requires_grad_(False)
    lean = FRRN(4, **NARROW, checkpointing=True).eval().requires_grad_(False)
    lean.load_state_dict(plain.state_dict())
    before = copy.deepcopy(lean.state_dict())
    gradients = []
    for network in (plain, lean):
        images = torch.rand(1, 3, 16, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        network(images).square().mean().backward()
        gradients.append(images.grad)
    assert torch.equal(*gradients) and gradients[0].any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in lean.state_dict().items())


def test_full_width_runs_and_learns_from_a_batch_of_one():
    network = FRRN(11).to(memory_format=torch.channels_last)
    images, labels = torch.rand(1, 3, 32, 48), torch.randint(11, (1, 32, 48))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(network.train()(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())
    with torch.no_grad():
        assert network.eval()(images).isfinite().all()


@pytest.mark.parametrize("variant, least", [("A", 16), ("B", 32)])
def test_one_value_per_channel_is_refused_in_training(variant, least):
    network = FRRN(4, variant=variant, **NARROW).train()
    with pytest.raises(UserError, match=rf"batch_size: .* 1 image of {least} x {least} pixels or less"):
        network(torch.rand(1, 3, least, 9))
    network(torch.rand(2, 3, least, least))
    network(torch.rand(1, 3, least, least + 1))
    with torch.no_grad():
        network.eval()(torch.rand(1, 3, least, least))


def test_width_scales_the_pooling_stream_to_multiples_of_8():
    def channels(network):
        stem = network.encoder.stem.conv.out_channels
        return stem, *(level[0].first.conv.out_channels for level in network.encoder.levels)

    assert channels(FRRN(4)) == (48, 96, 192, 384, 384)
    assert channels(FRRN(4, width=0.25)) == (16, 24, 48, 96, 96)  # 12 is not a multiple of 8
    assert channels(FRRN(4, width=0.01)) == (8, 8, 8, 8, 8)
    narrow = FRRN(4, width=0.25, residual_channels=12)
    assert narrow.feature_channels == 96
    state = narrow.encode(torch.rand(2, 3, 16, 16))
    assert {tensor.shape[1] for tensor in (*state.entered, *state.added)} == {12}


def test_state_has_every_tensor_once():
    network = FRRN(4, variant="B", **NARROW)
    named = list(network.named_parameters(remove_duplicate=False)) + list(
        network.named_buffers(remove_duplicate=False)
    )
    assert len(named) == len(network.state_dict()) == len({id(tensor) for _, tensor in named})
    assert len({tensor.data_ptr() for _, tensor in named}) == len(named)


def test_a_seed_gives_one_network_and_training_is_deterministic():
    gradients = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            torch.manual_seed(3)
            network = FRRN(4, **NARROW).train()
            network(torch.rand(2, 3, 32, 32)).square().sum().backward()
            gradients.append([parameter.grad for parameter in network.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_bfloat16_in_channels_last_stays_close():
    network = with_statistics(FRRN(11, width=0.5)).eval()
    images = torch.rand(1, 3, 64, 80)
    with torch.no_grad():
        exact = network(images)
        fast = copy.deepcopy(network).to(memory_format=torch.channels_last)
        read = []
        for unit in fast.modules():
            if isinstance(unit, Convolution):
                unit.register_forward_pre_hook(lambda _, given: read.append(given[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            got = fast(images.contiguous(memory_format=torch.channels_last))
            state = fast.encode(images)
    assert {tensor.dtype for tensor in (*state.entered, *state.added)} == {torch.float32}
    assert set(read[1:48]) == {torch.bfloat16}  # all after the stem: no map is made larger on its way
    assert got.dtype == torch.float32
    assert (got != got.bfloat16()).float().mean() > 0.9  # and the logits don't tie
    assert (got - exact).square().mean().sqrt() < 0.05 * exact.std()


def test_gradient_reaches_the_image_in_pixel_units():
    network = with_statistics(FRRN(4, **NARROW, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))).eval()
    images = torch.rand(1, 3, 16, 16, requires_grad=True)
    behind = []
    network.normalize.register_forward_hook(lambda _, __, out: (out.retain_grad(), behind.append(out))[0])
    network(images).square().sum().backward()
    expected = behind[0].grad / torch.tensor([0.5, 0.25, 2.0]).view(3, 1, 1)
    torch.testing.assert_close(images.grad, expected)
    assert images.grad.any()


def test_counted_cost_is_that_of_the_paper():
    """Multiply-adds by hand at stride 1: 6 + 6 convolutions 3x3, the split, the skip, the classifier."""
    with torch.device("meta"):
        narrow, other = FRRN(11), FRRN(11, variant="B")
    pixels = 64 * 96 / 1e9
    full = 75 * 48 + 6 * 9 * 48 * 48 + 48 * 32 + 9 * 128 * 48 + 5 * 9 * 48 * 48 + 128 * 48 + 48 * 11
    below = (
        (9 * (80 + 96 + 2 * (128 + 96)) * 96 + 3 * 96 * 32) / 4
        + (9 * (128 + 192 + 3 * (224 + 192)) * 192 + 4 * 192 * 32) / 16
        + (9 * (224 + 384 + 416 + 384) * 384 + 2 * 384 * 32) / 64
        + (9 * 2 * (416 + 384) * 384 + 2 * 384 * 32) / 256
        + (9 * (416 + 192 + 224 + 192) * 192 + 2 * 192 * 32) / 64
        + (9 * 2 * (224 + 192) * 192 + 2 * 192 * 32) / 16
        + (9 * (224 + 96 + 128 + 96) * 96 + 2 * 96 * 32) / 4
    )
    assert gmacs(narrow, (64, 96)) == pytest.approx((full + below) * pixels)
    assert gmacs(other, (64, 96)) > gmacs(narrow, (64, 96))


def test_another_variant_is_refused():
    with pytest.raises(ConfigError, match=r"variant: \"C\" is unknown; allowed: A, B"):
        component("networks:NETWORKS", "frrn", variant="C")
    assert component("networks:NETWORKS", "frrn", variant="B", width=0.1).build(4).stride == 32
