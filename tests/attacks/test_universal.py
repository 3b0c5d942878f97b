"""Universal perturbations: the known optimum of a linear network, choice on val, files, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attacks.search import scores
from attacks.threat import Threat, check_inside, project, sizes
from attacks.universal import (
    Universal,
    load_universal,
    share_right,
    shuffled,
    spread,
    train_universal,
    universal,
)
from engine.checkpoints import atomic_write
from engine.config import UserError, component

SIZE = (4, 6)
EPS = 0.1


def die(seed=0):
    return torch.Generator().manual_seed(seed)


WEIGHTS = torch.randn(3, *SIZE, generator=die(1))


def network(images):
    """Per image two classes, class 0 where WEIGHTS * (images - 0.5) summed is above 0."""
    gap = (WEIGHTS * (images - 0.5)).flatten(1).sum(dim=1)
    return torch.stack([gap, torch.zeros_like(gap)], dim=1)


def lifted(heights):
    """An image per height, whose gap is the height, in units of EPS * |WEIGHTS|_1; away from the box."""
    step = EPS * WEIGHTS.abs().sum() / WEIGHTS.square().sum()
    return 0.5 + step * torch.tensor(heights).view(-1, 1, 1, 1) * WEIGHTS


def batches(heights, batch_size=2):
    images, labels = lifted(heights), torch.zeros(len(heights)).long()
    return [
        (images[start : start + batch_size], labels[start : start + batch_size])
        for start in range(0, len(images), batch_size)
    ]


def trained(threat=None, train=(0.2, 0.3, 0.5), val=(0.3, 0.98), **keys):
    threat = threat or Threat(EPS, ignore_index=None)
    return train_universal(network, lambda epoch: batches(train), batches(val), threat, **keys)


def test_linf_reaches_the_optimum_of_a_linear_network():
    """All images fall by pushing against the signs of the weights, the last one by the whole of eps only."""
    found = trained(epochs=10)
    torch.testing.assert_close(found.delta, -EPS * WEIGHTS.sign())
    assert found.metadata["accuracy"][-1] == 0.0
    assert found.metadata["accuracy"][0] == 1.0


def test_l2_reaches_the_optimum_of_a_linear_network():
    found = trained(Threat(EPS, "l2", ignore_index=None), val=(0.01,), epochs=10)
    assert found.delta.norm().item() <= EPS * (1 + 1e-6)
    direction = torch.nn.functional.cosine_similarity(found.delta.flatten(), -WEIGHTS.flatten(), dim=0)
    assert direction.item() == pytest.approx(1.0, abs=1e-5)


def test_a_tile_goes_against_the_sum_of_what_it_covers():
    found = trained(tile=(2, 3), val=(0.01, 0.001), epochs=5, step_size=EPS)
    folded = WEIGHTS.view(3, 2, 2, 2, 3).sum(dim=(1, 3))
    torch.testing.assert_close(found.delta, -EPS * folded.sign())


def test_a_tile_in_l2_is_as_long_as_the_whole_image_sees_it():
    found = trained(
        Threat(EPS, "l2", ignore_index=None), tile=(2, 3), val=(0.0001,), epochs=10, step_size=EPS
    )
    assert found.delta.norm().item() == pytest.approx(EPS / 2, rel=1e-5)
    assert spread(found.delta, SIZE).norm().item() == pytest.approx(EPS, rel=1e-5)


@given(height=st.integers(1, 9), width=st.integers(1, 9), tall=st.integers(1, 4), wide=st.integers(1, 4))
def test_spread_repeats_a_tile(height, width, tall, wide):
    tile = torch.arange(tall * wide).view(1, tall, wide)
    whole = spread(tile, (height, width))
    assert whole.shape == (1, height, width)
    assert all(
        whole[0, row, column] == tile[0, row % tall, column % wide]
        for row in range(height)
        for column in range(width)
    )


def test_the_epoch_that_is_best_on_val_is_kept():
    """Steps of eps / 10 in an epoch of one batch: two of val's images fall after 4 and after 7 epochs."""
    found = trained(train=(0.5,), val=(0.35, 0.65), epochs=10)
    accuracy = found.metadata["accuracy"]
    assert accuracy == [1.0] * 4 + [0.5] * 3 + [0.0] * 4
    assert found.metadata["chosen_epoch"] == 7
    torch.testing.assert_close(found.delta, -0.7 * EPS * WEIGHTS.sign())


def test_what_helps_on_train_only_is_not_kept():
    """Val's label is the other class: going on makes it better, so the zero before the first epoch stays."""
    val = [(lifted((0.5,)), torch.ones(1).long())]
    found = train_universal(network, lambda epoch: batches((0.2,)), val, Threat(EPS), epochs=8)
    assert found.metadata["chosen_epoch"] == 0
    assert not found.delta.any()


def test_the_gradient_is_that_of_the_whole_batch():
    """Of two images one pushes harder: with the cross-entropy the one that is nearer to the boundary."""
    opposite = torch.tensor([0, 1])
    images = lifted((0.05, -1.5))
    both = [(images, opposite)]
    val = [(lifted((0.01,)), torch.zeros(1).long())]
    found = train_universal(network, lambda epoch: both, val, Threat(EPS), epochs=1, step_size=EPS)
    torch.testing.assert_close(found.delta, -EPS * WEIGHTS.sign())
    other = train_universal(
        network, lambda epoch: [(lifted((1.5, -0.05)), opposite)], val, Threat(EPS), epochs=1, step_size=EPS
    )
    assert not other.delta.any(), "it pushed the other way, which does not help on val"


def test_inner_steps_epochs_and_images_are_counted():
    """The public repository's coordinates: eps .05, step .01, 10 steps on each batch, a uniform start."""
    threat, told = Threat(0.05, ignore_index=None), []
    found = trained(
        threat,
        train=(0.2, 0.3, 0.5),
        epochs=3,
        inner_steps=10,
        step_size=0.01,
        random_start=True,
        seed=4,
        source={"sha": "abc"},
        data={"name": "toy"},
        on_epoch=lambda epoch, accuracy: told.append((epoch, accuracy)),
    )
    about = found.metadata
    assert about.pop("accuracy") == [accuracy for _, accuracy in told]
    assert [epoch for epoch, _ in told] == [0, 1, 2, 3]
    assert about.pop("chosen_epoch") in range(4)
    assert about == {
        "norm": "linf",
        "eps": 0.05,
        "size": [4, 6],
        "tiled": False,
        "loss": "ce",
        "epochs": 3,
        "inner_steps": 10,
        "step_size": 0.01,
        "seed": 4,
        "steps": 2 * 10 * 3,
        "bad_steps": 0,
        "images": 3,
        "source": {"sha": "abc"},
        "data": {"name": "toy"},
    }


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_random_start_follows_from_the_seed(norm):
    threat = Threat(EPS, norm, ignore_index=None)
    val = [(lifted((1e-6,)), torch.zeros(1).long())]  # falls for most of them

    def start(seed):
        return train_universal(
            network, lambda epoch: [], val, threat, epochs=1, random_start=True, seed=seed
        ).delta

    starts = [start(seed) for seed in range(8)]
    assert torch.equal(starts[0], start(0))
    moved = [delta for delta in starts if delta.any()]
    assert len(moved) > 1 and not torch.equal(moved[0], moved[1])
    for delta in moved:
        assert sizes(delta[None], torch.zeros_like(delta[None]))[norm == "l2"].item() <= EPS * (1 + 1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steps_without_a_finite_gradient_are_counted_and_not_made(norm):
    """The first two of ten gradients are NaN."""
    asked = []

    def broken(images):
        asked.append(images.requires_grad)
        return network(images) * (torch.nan if images.requires_grad and sum(asked) <= 2 else 1)

    height = 0.75 if norm == "linf" else 0.75 * WEIGHTS.norm().item() / WEIGHTS.abs().sum().item()
    threat = Threat(EPS, norm)
    found = train_universal(
        broken, lambda epoch: batches((0.2,)), batches((height,)), threat, epochs=10, step_size=EPS / 10
    )
    assert (found.metadata["bad_steps"], found.metadata["steps"]) == (2, 10)
    direction = WEIGHTS.sign() if norm == "linf" else WEIGHTS / WEIGHTS.norm()
    torch.testing.assert_close(found.delta, -0.8 * EPS * direction)


def test_label_maps_and_ignored_pixels():
    """A network per pixel; ignored pixels give no gradient and are counted nowhere."""
    images = torch.full((1, 2, 2, 2), 0.5)
    labels = torch.tensor([[[0, 0], [1, 255]]])
    threat = Threat(EPS)
    val = [(images, labels)]
    per_pixel = lambda points: points + torch.tensor([0.01, 0.0]).view(1, 2, 1, 1)  # noqa: E731
    assert share_right(per_pixel, val, torch.zeros(2, 2, 2), threat) == pytest.approx(2 / 3)
    found = train_universal(per_pixel, lambda epoch: val, val, threat, epochs=4)
    assert found.metadata["accuracy"][-1] == 0.0
    assert found.delta[:, 0].sign().tolist() == [[-1, -1], [1, 1]]
    assert not found.delta[:, 1, 1].any()


def test_val_without_pixels_is_refused():
    once = (batch for batch in batches((0.2,)))
    with pytest.raises(
        UserError, match="no labelled pixel; give batches that can be gone through many times"
    ):
        train_universal(network, lambda epoch: batches((0.2,)), once, Threat(EPS), epochs=2)


def test_shuffled_batches_hold_every_sample_once():
    samples = [(torch.full((1, 1, 1), float(number)), torch.tensor(number)) for number in range(7)]
    draw = shuffled(samples, 3, seed=5)
    orders = [[labels.tolist() for _, labels in draw(epoch)] for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert [len(labels) for labels in orders[0]] == [3, 3, 1]
    assert all(sorted(sum(order, [])) == list(range(7)) for order in orders)
    assert [labels.tolist() for _, labels in shuffled(samples, 3, seed=6)(0)] != orders[0]
    for images, labels in draw(2):
        assert torch.equal(images.flatten(), labels.float())


@pytest.fixture
def saved(tmp_path):
    found = trained(epochs=10, source={"tensors": "f00"}, data={"split": "train"})
    path = tmp_path / "folder" / "delta.safetensors"
    atomic_write(path, found.to_bytes())
    return path, found


def test_a_file_gives_the_same_bits_again(saved):
    path, found = saved
    again = load_universal(path)
    assert torch.equal(again.delta, found.delta) and again.metadata == found.metadata
    assert again.sha256 == found.sha256 and again.to_bytes() == found.to_bytes() == path.read_bytes()


def test_it_is_applied_again_by_one_key(saved):
    path, found = saved
    images, labels = lifted((0.3, 0.9, 2.0)), torch.zeros(3).long()
    threat = Threat(EPS, ignore_index=None, seeds=(1, 2, 3))
    attack = component("attacks:ATTACKS", "universal", file=str(path))
    applied = attack.build(network, images, labels, threat)
    expected = project(images + found.delta, images, threat)
    assert torch.equal(applied.images, expected) and torch.equal(applied.balanced, expected)
    assert applied.correct.tolist() == scores(network(expected), labels, None)[0].tolist() == [0, 0, 1]
    assert (applied.forwards, applied.backwards) == (1, 0)


def test_a_smaller_ball_scales_it_and_a_larger_one_does_not(saved):
    path, found = saved
    images, labels = torch.rand(3, 3, *SIZE, generator=die(2)), torch.zeros(3).long()
    for eps, share in ((EPS / 4, 0.25), (EPS, 1.0), (2 * EPS, 1.0), (0.0, 0.0)):
        threat = Threat(eps, seeds=(1, 2, 3))
        points = universal(network, images, labels, threat, file=str(path)).images
        check_inside(points, images, threat)
        torch.testing.assert_close(points, (images + share * found.delta).clamp(0, 1))
    assert torch.equal(points, images), "eps 0"


def test_a_tile_fits_any_size_and_a_whole_one_its_own():
    images = torch.rand(2, 3, 7, 5, generator=die(3))
    tile = trained(tile=(2, 3), val=(0.01, 0.001), epochs=5, step_size=EPS)
    points = tile.apply(images, Threat(EPS))
    torch.testing.assert_close(points, (images + tile.delta.repeat(1, 4, 2)[:, :7, :5]).clamp(0, 1))
    with pytest.raises(UserError, match=r"\[3, 4, 6\], these are \[3, 7, 5\]; it is not resized"):
        trained(epochs=1).apply(images, Threat(EPS))
    with pytest.raises(UserError, match=r"these are \[1, 7, 5\]"):
        tile.apply(images[:, :1], Threat(EPS))


def test_another_norm_is_refused(saved):
    with pytest.raises(UserError, match="made for norm linf, not l2"):
        saved[1].apply(lifted((0.3,)), Threat(EPS, "l2"))


def test_files_that_are_none_are_refused(saved, tmp_path):
    path, found = saved
    with pytest.raises(UserError, match="no universal perturbation here"):
        load_universal(tmp_path / "missing.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="delta.safetensors: damaged .*SHA-256"):
        load_universal(path)
    changed = Universal(found.delta, {**found.metadata, "eps": 0.5}).to_bytes()
    assert changed != found.to_bytes()
    path.write_bytes(changed.replace(b'\\"eps\\": 0.5', b'\\"eps\\": 0.1'))
    with pytest.raises(UserError, match="damaged"):
        load_universal(path)
    for content in (b"", b"text", found.to_bytes()[:-10]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged, or no universal perturbation"):
            load_universal(path)


def test_other_safetensors_are_refused(tmp_path):
    from engine.checkpoints import save_weights

    path = tmp_path / "best.safetensors"
    save_weights(path, {"weight": torch.zeros(2)}, {"name": "a network"})
    with pytest.raises(UserError, match="no universal perturbation"):
        load_universal(path)
