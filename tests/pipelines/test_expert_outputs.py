"""What gates get from the cache is what the experts say, bit for bit where it is called exact."""

import re
from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from engine.checkpoints import load_weights
from engine.config import UserError
from engine.loop import images_of
from engine.optimizers import sgd
from networks.moe import Frozen
from pipelines import expert_outputs
from pipelines.expert_outputs import open_source
from pipelines.gates import gate_loss
from pipelines.models import build_mixture
from pipelines.segmentation import evaluation_batches, load_experts, train_loader

CPU = torch.device("cpu")
FLIPS = {"scale": [1.0, 1.0], "flip": 0.5, "color": 0.0, "blur": 0.0}
LAYOUT = torch.channels_last
PROBS = {"mix": "probs", "loss_at": "logits"}


class Training:
    """A gate's training up to its batches, and the source of the experts' outputs for them."""

    def __init__(self, workshop, folder, cache, augment="none", overrides=(), **gate):
        plain = workshop.gate("cached", **gate)
        plain["data"] |= {"augment": augment, "cache_dir": str(folder)}
        self.config = workshop.load({**plain, "cache": cache}, *overrides)
        data = self.config.data
        index = data.build()
        self.experts = load_experts(self.config, index)
        torch.manual_seed(0)
        self.mixture = build_mixture(self.experts, self.config.gate)
        self.batches = train_loader(
            index,
            index.select("gate", data.subsets)[:10],
            image_size=data.image_size,
            resize=data.resize,
            augment=data.augment,
            cache_dir=data.cache_dir,
            batch_size=4,
            seed=304,
            workers=0,
        )
        held_out = index.select("val", data.subsets)[:6]
        self.validation = evaluation_batches(data, index, held_out, 4, "network")
        self.told = []

    def open(self):
        self.told.clear()
        return open_source(
            self.config,
            [self.mixture],
            self.experts,
            self.batches,
            self.validation,
            CPU,
            self.told.append,
        )

    def recomputed(self, batch):
        with torch.no_grad():
            return self.mixture.run_experts(images_of(batch, CPU, LAYOUT))

    def pairs(self, source, epochs=2):
        """(from the source, from the experts) for every batch of training, then of validation."""
        for epoch in range(epochs):
            for batch in self.batches.epoch(epoch):
                yield source.training(batch, CPU, LAYOUT), self.recomputed(batch)
        for batch in self.validation:
            yield source.validation(batch, CPU, LAYOUT), self.recomputed(batch)


@pytest.fixture
def passes(monkeypatch):
    """How many images the experts have seen, by pass."""
    seen, forward = [], Frozen.forward_features
    monkeypatch.setattr(
        Frozen, "forward_features", lambda self, images: seen.append(len(images)) or forward(self, images)
    )
    return seen


def assert_same(found, expected):
    tensors = [(found.logits, expected.logits), *zip(found.features, expected.features, strict=True)]
    for one, other in tensors:
        assert one.dtype == other.dtype and one.stride() == other.stride()
        assert torch.equal(one, other)
    assert found.size == expected.size


@pytest.mark.parametrize(("augment", "size"), [("none", [32, 48]), (FLIPS, [32, 48]), (FLIPS, [30, 45])])
def test_float32_outputs_are_those_of_the_experts_bit_for_bit(workshop, tmp_path, passes, augment, size):
    cache = {"budget": "1GB", "content": "float32"}
    training = Training(workshop, tmp_path, cache, augment, [f"data.image_size={size}"])
    source = training.open()
    assert len(training.told) == 2 and all("float32, exact" in line for line in training.told)
    flipped = 0
    for found, expected in training.pairs(source):
        assert_same(found, expected)
        assert found.images is None
    for batch in training.batches.epoch(0):
        flipped += sum(batch.flipped)
        passes.clear()
        source.training(batch, CPU, LAYOUT)
        assert passes == []
    assert (flipped > 0) == (augment != "none")


def test_an_opened_cache_is_shared_by_later_runs(workshop, tmp_path, passes):
    cache = {"budget": "1GB"}
    Training(workshop, tmp_path, cache).open()
    # a frame to learn the sizes; 10 training frames in full batches of 4, 6 validation frames; two experts
    assert passes == [1] * 2 + [4] * 2 * 3 + [4] * 2 + [2] * 2
    passes.clear()
    other = Training(workshop, tmp_path, cache, type="classwise", conv=True)
    for found, expected in other.pairs(other.open()):
        assert_same(found, expected)
    assert passes[:2] == [1, 1]  # and then those of this test


def trained(training, source, epochs=2):
    """The gate's tensors after a training from the source."""
    model, loss = training.mixture, training.config.train.loss.build(None, 255)
    optimizer = sgd([one for one in model.parameters() if one.requires_grad], lr=0.1)
    value = gate_loss(loss, training.config.gate)
    for epoch in range(epochs):
        for batch in training.batches.epoch(epoch):
            total, count = value(model, source.training(batch, CPU, LAYOUT), batch.labels.long())
            optimizer.zero_grad()
            (total / count).backward()
            optimizer.step()
    return {name: tensor.clone() for name, tensor in model.trainable_state().items()}


@pytest.mark.parametrize("augment", ["none", FLIPS])
@pytest.mark.parametrize("gate", [{"type": "simple"}, {"type": "classwise", "conv": True}])
def test_a_gate_trained_from_the_cache_is_the_one_trained_without(workshop, tmp_path, gate, augment):
    tensors = []
    for cache in ("none", {"budget": "1GB", "content": "float32"}):
        training = Training(workshop, tmp_path, cache, augment, **gate)
        before = {name: tensor.clone() for name, tensor in training.mixture.trainable_state().items()}
        tensors.append(trained(training, training.open()))
    assert any(not torch.equal(before[name], tensors[0][name]) for name in before)
    for name, tensor in tensors[0].items():
        assert torch.equal(tensors[1][name], tensor)


@pytest.mark.parametrize("augment", ["none", FLIPS])
def test_runs_with_and_without_a_cache_end_alike(workshop, augment, request):
    """Two gates in one pass, on 16 frames, and 8 to validate."""
    found = {}
    for cache in ("none", {"budget": "1GB", "content": "float32"}):
        config = workshop.gate(f"{'plain' if cache == 'none' else 'kept'}_{request.node.callspec.id}")
        del config["gate"]
        small = {"width": 2, "grid": [2, 2], "hidden": 8}
        gates = {"simple": {"type": "simple", **small}, "conv": {"type": "classwise", "conv": True, **small}}
        config["data"]["augment"] = augment
        workshop.train({**config, "gates": gates, "cache": cache})
        folder = workshop.run(config["name"])
        found[str(cache)] = [
            ((folder / name / "metrics.csv").read_bytes(), weights_in(folder / name)) for name in gates
        ]
    for (rows, tensors), (kept_rows, kept_tensors) in zip(*found.values(), strict=True):
        assert rows == kept_rows
        for name, tensor in tensors.items():
            torch.testing.assert_close(kept_tensors[name], tensor, rtol=1e-5, atol=0)


def weights_in(folder):
    return load_weights(folder / "checkpoints" / "best.safetensors")[0]


def test_the_mixture_of_cached_outputs_is_that_of_the_images(workshop, tmp_path):
    training = Training(workshop, tmp_path, {"budget": "1GB"}, FLIPS, type="classwise", conv=True)
    source = training.open()
    batch = next(training.batches.epoch(0))
    with torch.no_grad():
        found, _ = training.mixture.combine(source.training(batch, CPU, LAYOUT))
        expected = training.mixture(images_of(batch, CPU, LAYOUT))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_images_are_there_for_a_gate_that_reads_them(workshop, tmp_path):
    training = Training(workshop, tmp_path, {"budget": "1GB"}, FLIPS, input="image")
    source, batches = training.open(), list(training.batches.epoch(0))
    assert batches
    for batch in batches:
        assert torch.equal(source.training(batch, CPU, LAYOUT).images, images_of(batch, CPU, LAYOUT))


@pytest.mark.parametrize("content", ["bfloat16", "top_k"])
def test_an_approximation_is_called_one_with_its_measured_effect(workshop, tmp_path, content):
    training = Training(workshop, tmp_path, {"budget": "1GB", "content": content})
    source = training.open()
    assert len(training.told) == 2
    for line in training.told:
        start = f"{content}, an approximation (on 4 frames: largest error of a logit "
        figures = line.partition(start)[2]
        largest, mean = re.match(
            r"(\S+), mean (\S+), pixels with another class: day .*%, night .*%", figures
        ).groups()
        assert 0 < float(mean) < float(largest) < 0.01
    for found, expected in training.pairs(source, epochs=1):
        assert found.logits.dtype == torch.float32 and found.features[0].dtype == torch.float32
        for one, other in zip(
            [found.logits, *found.features], [expected.logits, *expected.features], strict=True
        ):
            assert ((one - other).abs() <= 2**-8 * other.abs()).all()
        assert not torch.equal(found.logits, expected.logits)
    first = list(training.told)
    training.open()
    assert training.told == first  # measured once, told every time


def test_label_probs_give_the_loss_and_gradient_of_the_experts_themselves(workshop, tmp_path):
    training = Training(workshop, tmp_path, {"budget": "1GB", "content": "label_probs"}, FLIPS, **PROBS)
    source, model = training.open(), training.mixture
    assert ["label_probs" in training.told[0], "float32" in training.told[1]] == [True, True]
    value = gate_loss(training.config.train.loss.build(None, 255), training.config.gate)
    parameters = list(model.gate.parameters())
    for batch in training.batches.epoch(0):
        labels, results = batch.labels.long(), []
        for outputs in (source.training(batch, CPU, LAYOUT), training.recomputed(batch)):
            total, count = value(model, outputs, labels)
            results.append([total, count, *torch.autograd.grad(total, parameters)])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for batch in training.validation:
        assert_same(source.validation(batch, CPU, LAYOUT), training.recomputed(batch))


@pytest.mark.parametrize(
    ("gate", "overrides", "message"),
    [
        ({}, (), "gate with mix: logits, loss_at: full"),
        ({**PROBS, "conv": True}, (), "with conv: True"),
        ({**PROBS, "calibrate": True}, (), "with calibrate: True"),
        ({**PROBS, "type": "classwise"}, (), "with type: classwise"),
        ({**PROBS, "input": "logits"}, (), "with input: logits"),
        (PROBS, ["train.loss={name: cross_entropy, label_smoothing: 0.1}"], "train.loss cross_entropy"),
        (PROBS, ["train.loss={name: dice}"], "train.loss dice"),
    ],
)
def test_label_probs_are_refused_where_they_are_not_enough(workshop, tmp_path, gate, overrides, message):
    cache = {"budget": "1GB", "content": "label_probs"}
    training = Training(workshop, tmp_path, cache, overrides=overrides, **gate)
    with pytest.raises(UserError, match=message):
        training.open()


# ------------------------------------------------------------------------------------------- room for it


def sizes(training):
    """Bytes of the 16 rows of training and validation in float32."""
    outputs = training.recomputed(next(training.batches.epoch(0)))
    return 16 * sum(one[0].nbytes for one in (outputs.logits, *outputs.features))


@pytest.mark.parametrize(
    ("share", "content"), [(1.01, "float32"), (0.99, "bfloat16"), (0.51, "bfloat16"), (0.49, None)]
)
def test_auto_takes_what_fits_the_budget(workshop, tmp_path, passes, share, content):
    whole = sizes(Training(workshop, tmp_path, "none"))
    training = Training(workshop, tmp_path, {"budget": f"{share * whole / 1000:.3f}KB"})
    source = training.open()
    if content:
        assert len(training.told) == 2 and all(f": {content}, " in line for line in training.told)
        return
    (line,) = training.told
    assert "the experts run for every batch: cache.budget: " in line
    assert "is less than the" in line and "bfloat16 of 10 train images and bfloat16 of 6 val images" in line
    for found, expected in training.pairs(source, epochs=1):
        assert_same(found, expected)


def test_the_mirror_images_count(workshop, tmp_path):
    whole = sizes(Training(workshop, tmp_path, "none"))
    budget = {"budget": f"{1.3 * whole / 1000:.3f}KB", "content": "float32"}
    assert "exact" in told_by(Training(workshop, tmp_path, budget))
    assert "float32 of 20 train images" in told_by(Training(workshop, tmp_path, budget, FLIPS))


def told_by(training):
    training.open()
    return "\n".join(training.told)


def test_label_probs_leave_out_validation_where_that_does_not_fit(workshop, tmp_path):
    training = Training(workshop, tmp_path, "none")
    features = sum(one[0].nbytes for one in training.recomputed(next(training.batches.epoch(0))).features)
    budget = {
        "budget": f"{(10 * features + 10 * 2 * 8 * 12 * 4 + 100) / 1000:.3f}KB",
        "content": "label_probs",
    }
    training = Training(workshop, tmp_path, budget, **PROBS)
    source = training.open()
    assert len(training.told) == 1 and "on train: label_probs" in training.told[0]
    for batch in training.validation:
        assert_same(source.validation(batch, CPU, LAYOUT), training.recomputed(batch))


@pytest.mark.parametrize(
    "augment", [{**FLIPS, "scale": [0.9, 1.1]}, {**FLIPS, "color": 0.1}, {**FLIPS, "blur": 0.1}]
)
def test_no_cache_of_frames_that_change_otherwise(workshop, tmp_path, augment):
    training = Training(workshop, tmp_path, {"budget": "1GB"}, augment)
    source = training.open()
    assert len(training.told) == 1 and "data.augment changes frames in more ways" in training.told[0]
    for found, expected in training.pairs(source, epochs=1):
        assert_same(found, expected)


def test_a_full_disk_is_a_reason_too(workshop, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    training = Training(workshop, tmp_path, {"budget": "1GB", "content": "top_k"})
    monkeypatch.setattr(expert_outputs.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    assert "1.00 kB are free, and top_k of 10 train images" in told_by(training)
    assert not (tmp_path / "experts").exists()


def test_a_folder_that_cannot_be_written_is_a_reason_too(workshop, tmp_path):
    training = Training(workshop, tmp_path, {"budget": "1GB"})
    (tmp_path / "experts").write_text("a file")
    assert "the experts run for every batch: " in told_by(training) and "experts" in training.told[0]


# -------------------------------------------------------------------------------------------- what it holds


def stores(folder):
    return {path.name for path in (folder / "experts").iterdir() if path.is_dir()}


def test_whatever_changes_the_outputs_has_a_store_of_its_own(workshop, tmp_path):
    cache = {"budget": "1GB", "content": "bfloat16"}
    count = 0
    for changes in (
        {},
        {"augment": FLIPS},  # train with mirror images; val is shared
        {"cache": {**cache, "content": "float32"}},
        {"overrides": ["train.precision=bf16"]},
        {"overrides": ["data.image_size=[32, 64]"]},
    ):
        Training(workshop, tmp_path, **{"cache": cache, **changes}).open()
        count += 1 if "augment" in changes else 2
        assert len(stores(tmp_path)) == count
    training = Training(workshop, tmp_path, cache, type="classwise", conv=True, mix="probs")
    training.open()  # another gate on the same experts
    assert len(stores(tmp_path)) == count


@pytest.mark.parametrize("other", ["weights", "stride", "order"])
def test_other_experts_have_a_store_of_their_own(workshop, tmp_path, other):
    training = Training(workshop, tmp_path, {"budget": "1GB"})
    training.open()
    before = stores(tmp_path)
    night = training.experts["night"]
    if other == "weights":
        training.experts["night"] = replace(night, sha256="0" * 64)
    elif other == "stride":
        network = {**night.metadata["network"], "output_stride": 8}  # the same tensors
        training.experts["night"] = replace(night, metadata={**night.metadata, "network": network})
    else:
        training.experts = dict(reversed(training.experts.items()))
    training.open()
    assert len(stores(tmp_path) - before) == 2


def test_bf16_training_keeps_what_it_computes_in_half_the_bytes(workshop, tmp_path):
    training = Training(workshop, tmp_path, {"budget": "1GB"}, overrides=["train.precision=bf16"])
    source = training.open()
    assert all("bfloat16" in line and "largest error of a logit 0," in line for line in training.told)
    for batch in training.batches.epoch(0):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = training.mixture.run_experts(images_of(batch, CPU, LAYOUT))
        assert expected.features[0].dtype == torch.bfloat16
        assert_same(source.training(batch, CPU, LAYOUT), expected)


def test_a_damaged_cache_is_made_again(workshop, tmp_path):
    training = Training(workshop, tmp_path, {"budget": "1GB"})
    training.open()
    for file in (tmp_path / "experts").glob("*/logits.bin"):
        data = bytearray(file.read_bytes())
        data[100] ^= 1
        file.write_bytes(data)
    source = training.open()
    assert sum("making it again" in line for line in training.told) == 2
    for found, expected in training.pairs(source, epochs=1):
        assert_same(found, expected)
