"""The pass over the frames: what runs how often, what is counted where, and what every kind of row says."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from engine.config import UserError
from evaluation.ceilings import ceilings_for
from evaluation.evaluate import evaluate, spread_frames
from evaluation.results import FLOOR, Protocol, Results, best_row
from evaluation.rows import (
    constant_row,
    ensemble_row,
    gate_row,
    network_row,
    random_gate_row,
    simplex,
    subset_routing_row,
)
from metrics.confusion import confusion

K, HEIGHT, WIDTH = 3, 4, 6
EXPERTS = ("highway", "urban")
PROTOCOL = Protocol("toy", "test", ("road", "car", "sky"), EXPERTS, (HEIGHT, WIDTH))


class Painter(nn.Module):
    """Logits from colours: channel c of the image votes for class (c + shift) % 3. Counts its passes."""

    stride = 2

    def __init__(self, shift):
        super().__init__()
        self.shift, self.passes = shift, 0

    def forward_features(self, images):
        assert not self.training and images.min() >= 0 and images.max() <= 1
        self.passes += 1
        return images.roll(self.shift, dims=1)[:, :, ::2, ::2] * 4, images.mean(
            (2, 3), keepdim=True
        ) + self.shift


def upsample(logits, size, stride):
    return logits.repeat_interleave(stride, 2).repeat_interleave(stride, 3)[..., : size[0], : size[1]]


def frame(index, subset):
    return SimpleNamespace(name=f"{subset}_{index}", subset=subset, block=f"{subset}{index // 2}")


def batches(native=None, batch_size=2, subsets=("highway", "highway", "urban", "urban", "ambiguous")):
    """Random frames; labels are the colours' classes for highway and shifted by one for urban."""
    generator = torch.Generator().manual_seed(7)
    frames = [frame(index, subset) for index, subset in enumerate(subsets)]
    images = torch.randint(0, 256, (len(frames), 3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)
    images = images[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)
    shift = torch.tensor([one.subset == "urban" for one in frames]).int()[:, None, None]
    labels = ((images.int().argmax(1) + shift) % K).to(torch.uint8)
    labels[:, 0, 0] = 255
    out = []
    for start in range(0, len(frames), batch_size):
        part = slice(start, start + batch_size)
        natives = None if native is None else [native(label) for label in labels[part]]
        out.append(
            SimpleNamespace(
                images=images[part], labels=labels[part], native_labels=natives, frames=frames[part]
            )
        )
    return out


def whole(size):
    return (0, 0, HEIGHT, WIDTH)


def run(rows, data=None, ceilings=None, **changes):
    networks = {"highway": Painter(0), "urban": Painter(1)}
    settings = {"upsample": upsample, "window": whole, "device": torch.device("cpu"), **changes}
    ceilings = ceilings_for(EXPERTS) if ceilings is None else ceilings
    return evaluate(data or batches(), networks, rows, PROTOCOL, ceilings=ceilings, **settings), networks


EXPERT_ROWS = [network_row(name, "expert", name, home=[name]) for name in EXPERTS]


def mean(expert_logits):
    return expert_logits.mean(1)


def vote(expert_logits):
    """Logarithm of the share of votes: -inf without one."""
    said = torch.zeros_like(expert_logits).scatter(2, expert_logits.argmax(2, keepdim=True), 1.0)
    return said.mean(1).log()


RULES = {
    "mean": mean,
    "max": lambda expert_logits: expert_logits.amax(1),
    "mean_probs": lambda expert_logits: expert_logits.softmax(2).mean(1).log(),
    "vote": vote,
}


def test_counts_are_those_of_the_networks_answers():
    rows = [*EXPERT_ROWS, ensemble_row("mean", EXPERTS, mean), constant_row("half", EXPERTS, (0.5, 0.5))]
    results, networks = run(rows)
    position = 0
    for batch in batches():
        for name, network in networks.items():
            logits = network.forward_features(batch.images / 255)[0]
            expected = confusion(upsample(logits, (HEIGHT, WIDTH), 2).argmax(1), batch.labels, K)
            got = results.matrices[results.by_name[name], position : position + len(batch.frames)]
            assert np.array_equal(got, expected)
        position += len(batch.frames)
    assert np.array_equal(results.matrices.sum((2, 3))[0], results.truth.sum(1))
    assert (results.truth.sum(1) == HEIGHT * WIDTH - 1).all()  # one ignored pixel each
    assert np.array_equal(results.matrices[2], results.matrices[3])  # mean of logits = equal weights


def test_each_expert_is_perfect_at_home_and_routing_by_subset_is_perfect_where_it_is_defined():
    results, _ = run([*EXPERT_ROWS, subset_routing_row("true subset", EXPERTS)])
    assert results.figures("highway", "highway")["aacc"] == results.figures("urban", "urban")["aacc"] == 1
    assert results.figures("highway", "urban")["aacc"] < 0.5 > results.figures("urban", "highway")["aacc"]
    assert results.miou("true subset", "all") == 1
    assert not results.defined("true subset", "ambiguous")
    assert np.isnan(results.miou("true subset", "ambiguous"))
    assert results.matrices[2][:4].any() and not results.matrices[2][4].any()
    assert results.miou("oracle expert per image", "all") == 1


def test_a_subset_that_is_partly_without_a_namesake_has_no_routing():
    rows = [*EXPERT_ROWS, subset_routing_row("true subset", ["highway"])]
    results, _ = run(rows)
    assert results.miou("true subset", "highway") == 1
    assert np.isnan(results.miou("true subset", "all"))


def test_all_is_the_union_of_the_training_subsets_and_matrices_add_up():
    results, _ = run(EXPERT_ROWS)
    assert results.subset_names == ["highway", "urban", "all", "ambiguous"]
    for name in results.names():
        if name == FLOOR:
            continue
        parts = results.total(name, "highway") + results.total(name, "urban")
        assert np.array_equal(parts, results.total(name, "all"))
    assert results.mask("all").tolist() == [True, True, True, True, False]
    with pytest.raises(UserError, match="'night' has no image.*highway, urban, all, ambiguous"):
        results.mask("night")
    only, _ = run(EXPERT_ROWS, batches(subsets=("highway", "ambiguous")))
    assert only.subset_names == ["highway", "ambiguous"]
    wider = replace(PROTOCOL, training_subsets=("highway", "urban", "rural"))
    assert "all" not in replace(results, protocol=wider).subset_names  # two thirds of "all" are not "all"


def test_the_floor_is_the_best_of_all_constant_answers():
    results, _ = run(EXPERT_ROWS)
    for subset in results.subset_names:
        truth = results.truth[results.mask(subset)].sum(0)
        floor = results.figures(FLOOR, subset)
        assert floor["aacc"] == pytest.approx(truth.max() / truth.sum())
        assert results.miou(FLOOR, subset) == pytest.approx(truth.max() / truth.sum() / (truth > 0).sum())


def by_feature(expert_logits, features, images, size):
    """A gate whose weights are the shares of the experts' features."""
    weights = torch.stack([feature[:, 0, 0, 0] for feature in features], dim=1)
    weights = (weights / weights.sum(1, keepdim=True))[:, :, None, None, None]
    return (weights * expert_logits).sum(1), weights


def test_everything_comes_from_one_pass_with_each_network_once_per_batch():
    """Baseline, experts, all ensembles, four gates (on both grids), controls and ceilings; three batches."""
    networks = {"baseline": Painter(2), "highway": Painter(0), "urban": Painter(1)}

    def at_full_size(expert_logits, features, images, size):
        logits, weights = by_feature(expert_logits, features, images, size)
        return upsample(logits, size, 2), weights

    rows = [network_row("baseline", "baseline", "baseline"), *EXPERT_ROWS]
    rows += [ensemble_row(name, EXPERTS, rule) for name, rule in RULES.items()]
    rows += [gate_row(f"gate {index}", EXPERTS, by_feature) for index in range(2)]
    rows += [
        gate_row(f"gate at full size {index}", EXPERTS, at_full_size, full_size=True) for index in range(2)
    ]
    rows += [constant_row("half", EXPERTS, (0.5, 0.5)), random_gate_row("random", EXPERTS, 0)]
    rows += [subset_routing_row("true subset", EXPERTS)]
    results = evaluate(
        batches(), networks, rows, PROTOCOL, ceilings=ceilings_for(EXPERTS),
        upsample=upsample, window=whole, device=torch.device("cpu"),
    )  # fmt: skip
    assert [network.passes for network in networks.values()] == [3, 3, 3]
    assert len(results.rows) == 3 + 4 + 4 + 3 + 4 + 1
    by_name = results.matrices[results.by_name["gate 0"]]
    for name in ("gate 1", "gate at full size 0", "gate at full size 1"):
        assert np.array_equal(results.matrices[results.by_name[name]], by_name)
    assert np.array_equal(
        results.matrices[results.by_name["mean"]], results.matrices[results.by_name["half"]]
    )


def test_an_encoder_that_networks_share_runs_once_per_batch():
    class Encoder(nn.Module):
        passes = 0

    class Decoder(Painter):
        """The same as Painter, in two halves."""

        def __init__(self, shift, encoder):
            super().__init__(shift)
            self.encoder = encoder

        def encode(self, images):
            self.encoder.passes += 1
            return SimpleNamespace(images=images, features=images.mean((2, 3), keepdim=True))

        def decode(self, state):
            return state.images.roll(self.shift, dims=1)[:, :, ::2, ::2] * 4

    shared, other = Encoder(), Encoder()
    networks = {"highway": Decoder(0, shared), "other": Decoder(0, other), "urban": Decoder(1, shared)}
    settings = {"upsample": upsample, "window": whole, "device": torch.device("cpu")}
    results = evaluate(batches(), networks, EXPERT_ROWS, PROTOCOL, **settings)
    alone, _ = run(EXPERT_ROWS)
    assert np.array_equal(results.matrices, alone.matrices[:2])
    assert (shared.passes, other.passes) == (3, 3)


def test_gates_deliver_their_weights_per_image_in_order():
    def one_hot(expert_logits, features, images, size):
        weights = torch.tensor([0.0, 1]).expand(len(expert_logits), 2)[:, :, None, None, None]
        return (weights * expert_logits).sum(1), weights

    rows = [*EXPERT_ROWS, gate_row("gate", EXPERTS, by_feature), gate_row("one-hot", EXPERTS, one_hot)]
    results, _ = run(rows)
    assert results.weights["gate"].shape == (5, 2, 1)
    assert (results.weights["gate"][:, 1] > results.weights["gate"][:, 0]).all()  # its feature is larger by 1
    assert np.allclose(results.weights["gate"].sum(1), 1)
    assert np.array_equal(results.matrices[3], results.matrices[1])  # a one-hot gate is that expert
    other, _ = run(rows, batches(batch_size=5))
    assert np.allclose(other.weights["gate"], results.weights["gate"])


def test_random_gate_depends_on_seed_and_name_only():
    rows = [random_gate_row("random", EXPERTS, seed=1), random_gate_row("other", EXPERTS, seed=2)]
    results, _ = run(rows)
    again, _ = run(rows, list(reversed(batches(batch_size=1))))
    weights = results.weights["random"][:, :, 0]
    assert np.array_equal(weights, again.weights["random"][::-1, :, 0])
    assert not np.allclose(weights, results.weights["other"][:, :, 0])
    assert np.allclose(weights.sum(1), 1) and len(np.unique(weights[:, 0])) == 5


def test_constant_weights_one_hot_is_that_expert_and_the_simplex_is_complete():
    results, _ = run([*EXPERT_ROWS, constant_row("first", EXPERTS, (1.0, 0.0))])
    assert np.array_equal(results.matrices[0], results.matrices[2])
    assert list(simplex(2, 4)) == [(1, 0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0, 1)]
    three = list(simplex(3, 10))
    assert len(set(three)) == 66 and np.allclose(np.sum(three, axis=1), 1)


def test_the_best_row_is_the_highest_miou_on_all():
    results, _ = run([*EXPERT_ROWS, ensemble_row("mean", EXPERTS, mean), subset_routing_row("true", EXPERTS)])
    assert best_row(results, ["highway", "mean", "true"]) == "true"
    assert best_row(results, ["highway", "true"], subset="urban") == "true"
    assert best_row(results, ["urban", "highway"], subset="highway") == "highway"


def test_native_labels_see_only_the_valid_window_enlarged():
    """Letterbox: the frame covers the two lower rows; its label is twice as large."""

    def native(label):
        return label[2:].repeat_interleave(2, 0).repeat_interleave(2, 1)

    asked = []

    def window(size):
        asked.append(size)
        return (2, 0, 2, WIDTH)

    cropped, _ = run(EXPERT_ROWS, batches(native), window=window)
    assert set(asked) == {(4, 12)}
    assert cropped.truth[0].sum() == 4 * 12
    # logits in blocks of 2x2, enlarged bilinearly: only where neighbours agree is the answer certain
    full, _ = run(EXPERT_ROWS, batches(native), window=whole)
    assert cropped.figures("highway", "highway")["aacc"] > 0.9
    assert full.figures("highway", "highway")["aacc"] < cropped.figures("highway", "highway")["aacc"]


def test_luma_is_that_of_the_part_that_the_labels_cover():
    def window(size):
        return (2, 0, 2, WIDTH)

    whole_images, _ = run(EXPERT_ROWS)
    parts, _ = run(EXPERT_ROWS, batches(lambda label: label[2:].repeat_interleave(2, 0)), window=window)
    images = torch.cat([batch.images for batch in batches()]).double() / 255
    luma = (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)  # of each pixel
    assert whole_images.luma == pytest.approx(luma.mean((1, 2)).numpy(), abs=1e-6)
    assert parts.luma == pytest.approx(luma[:, 2:].mean((1, 2)).numpy(), abs=1e-6)


def test_experts_of_different_grids_are_combined_at_the_size_of_the_input():
    class Fine(Painter):
        """The same logits on the grid of the input."""

        stride = 1

        def forward_features(self, images):
            return images.roll(self.shift, dims=1) * 4, images.mean((2, 3), keepdim=True)

    rows = [*EXPERT_ROWS, ensemble_row("mean", EXPERTS, mean), ensemble_row("vote", EXPERTS, RULES["vote"])]
    rows += [constant_row("half", EXPERTS, (0.5, 0.5)), subset_routing_row("true", EXPERTS)]
    settings = {"upsample": upsample, "window": whole, "device": torch.device("cpu")}
    settings["ceilings"] = ceilings_for(EXPERTS)
    coarse, _ = run(rows)
    networks = {"highway": Painter(0), "urban": Fine(1)}
    fine = evaluate(batches(), networks, rows, PROTOCOL, **settings)
    assert np.array_equal(coarse.matrices, fine.matrices)  # the images are made of blocks of 2x2
    assert np.array_equal(coarse.scores["mean"], fine.scores["mean"])


def test_a_class_without_a_vote_is_enlarged_without_nan():
    """log 0 = -inf of the other classes; zero times that would be NaN, and NaN the largest of all."""
    one_class = batches(lambda label: label.repeat_interleave(3, 0).repeat_interleave(3, 1))
    for batch in one_class:
        batch.images[:, 1] = 255  # experts: class 1 and class 2
    rows = [ensemble_row("vote", ("highway", "highway"), RULES["vote"])]
    results, _ = run(rows, one_class)
    assert results.matrices[0][:, :, 1].sum() == results.truth.sum()


def test_native_labels_of_the_input_size_change_nothing_and_sizes_may_differ():
    plain, _ = run(EXPERT_ROWS)
    same, _ = run(EXPERT_ROWS, batches(lambda label: label.clone()))
    assert np.array_equal(plain.matrices, same.matrices)
    turn = iter((1, 2, 3, 1, 2))
    mixed, _ = run(EXPERT_ROWS, batches(lambda label: label.repeat_interleave(next(turn), 0)))
    assert mixed.truth.sum(1).tolist() == [23, 46, 69, 23, 46]


def test_samples_of_the_frames_asked_for():
    seen = []
    results, _ = run(EXPERT_ROWS, batch_size := batches(), keep={"urban_3"}, on_sample=seen.append)
    (sample,) = seen
    assert sample.name == "urban_3" and sample.subset == "urban" and not sample.cases
    assert np.array_equal(sample.image, batch_size[1].images[1].permute(1, 2, 0))
    right = sample.predictions["urban"] == sample.label
    assert right.sum() == results.matrices[1, 3].trace() == 23
    assert "best gate, simple" in sample.predictions


def test_samples_tell_whom_gates_and_ensembles_follow():
    seen = []
    rows = [*EXPERT_ROWS, gate_row("gate", EXPERTS, by_feature), ensemble_row("mean", EXPERTS, mean)]
    results, _ = run(rows, keep={"urban_3", "highway_1"}, on_sample=seen.append)
    assert [sample.name for sample in seen] == ["highway_1", "urban_3"]
    for sample in seen:
        assert list(sample.cases) == ["gate", "mean"]
        for name, shown in sample.cases.items():
            index = results.images.index(sample.name)
            counts = results.cases[name][index, :, :, 0].sum(axis=0)
            follows = np.bincount(shown.flatten(), minlength=256)[[0, 1, 3, 4, 2, 255]]
            assert follows.tolist() == [*counts[:2], *counts[5:], counts[3], 1]


def test_frames_for_overlays_are_spread_over_each_subset():
    frames = [frame(index, "highway") for index in range(10)] + [frame(0, "urban")]
    assert spread_frames(frames, 2) == {"highway_2", "highway_7", "urban_0"}
    assert spread_frames(frames, 0) == set()


def test_results_come_back_from_disk_as_they_were_and_the_file_is_the_same_each_time(tmp_path):
    rows = [*EXPERT_ROWS, random_gate_row("random", EXPERTS, 1), subset_routing_row("true", EXPERTS)]
    rows += [gate_row("gate", EXPERTS, by_feature), ensemble_row("max", EXPERTS, RULES["max"])]
    results, _ = run(rows, chosen="x")
    results.save(tmp_path / "a.npz")
    loaded = Results.load(tmp_path / "a.npz")
    assert loaded.protocol == results.protocol and loaded.rows == results.rows and loaded.chosen == "x"
    assert (loaded.images, loaded.subsets, loaded.blocks) == (results.images, results.subsets, results.blocks)
    assert np.array_equal(loaded.matrices, results.matrices) and np.array_equal(loaded.truth, results.truth)
    assert np.array_equal(loaded.luma, results.luma)
    for kind, names in (
        ("weights", ["gate", "random", "true"]),
        ("cases", ["gate", "max"]),
        ("scores", ["gate", "max"]),
    ):
        kept, made = getattr(loaded, kind), getattr(results, kind)
        assert sorted(kept) == names and list(kept) == list(made)
        assert all(np.array_equal(kept[name], made[name]) and made[name].any() for name in names)
    loaded.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_missing_and_damaged_files_and_repeated_names_are_told(tmp_path):
    with pytest.raises(UserError, match="a.npz.*no evaluation here"):
        Results.load(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match="a.npz: damaged"):
        Results.load(tmp_path / "a.npz")
    with pytest.raises(UserError, match="two rows are named 'urban'"):
        run([EXPERT_ROWS[1], EXPERT_ROWS[1]])
    with pytest.raises(UserError, match="two frames are named 'highway_0'"):
        run(EXPERT_ROWS, batches() + batches())
    with pytest.raises(UserError, match="no test frame"):
        run(EXPERT_ROWS, iter(()))


def test_bfloat16_is_autocast_inside_the_networks_only():
    dtypes = []

    class Conv(Painter):
        def __init__(self):
            super().__init__(0)
            self.conv = nn.Conv2d(3, K, 1)

        def forward_features(self, images):
            logits = self.conv(images)
            dtypes.append(logits.dtype)
            return logits, logits

    def combine(expert_logits, features, images, size):
        dtypes.extend([expert_logits.dtype, features[0].dtype])
        return expert_logits[:, 0], torch.ones(len(expert_logits), 1, 1, 1, 1)

    protocol = Protocol("toy", "test", PROTOCOL.classes, EXPERTS, (HEIGHT, WIDTH), precision="bf16")
    evaluate(
        batches(batch_size=5), {"a": Conv()}, [gate_row("g", ["a"], combine)], protocol,
        upsample=upsample, window=whole, device=torch.device("cpu"),
    )  # fmt: skip
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32]
