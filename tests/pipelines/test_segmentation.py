"""Training and evaluating through the pipeline: what is refused, what stays untouched, what the tables say."""

import json
import shutil

import cv2
import numpy
import pandas
import pytest
import torch

from engine.checkpoints import load_metadata, load_weights, save_weights, tensors_sha256
from engine.config import UserError
from networks import NETWORKS
from pipelines.models import load_gate, load_network


def evaluation_of(workshop, **changes) -> dict:
    config = workshop.expert("evaluation", ["day", "night"])
    shared = {key: config[key] for key in ("name", "output", "data", "evaluate")}
    experts = {name: str(workshop.run(name)) for name in ("day", "night")}
    return {
        **shared,
        "experts": experts,
        "ensembles": ["mean", "max"],
        "gates": {"gate": str(workshop.run("gate"))},
        **changes,
    }


def test_a_gate_is_not_evaluated_beside_other_experts_of_its_experts_names(workshop):
    workshop.train(workshop.expert("other_day", ["day"]), "train.seed=5")
    experts = {"day": str(workshop.run("other_day")), "night": str(workshop.run("night"))}
    with pytest.raises(
        UserError, match="gates.gate: its expert day is .*/day/.*, experts.day is .*/other_day/"
    ):
        workshop.evaluate(evaluation_of(workshop, experts=experts), dry_run=True)
    alone = {"experts": {"night": experts["night"]}, "ensembles": []}
    workshop.evaluate(evaluation_of(workshop, **alone), dry_run=True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("data.image_size=[32, 64]", "32x64 (squash)"),
        ("data.resize=letterbox", "32x48 (letterbox)"),
        ("seed=1", ""),
    ],
)
def test_frames_of_another_size_than_in_training_are_told(workshop, capsys, change, told):
    lines = []
    for run in (workshop.evaluate, workshop.train):
        config = evaluation_of(workshop) if run == workshop.evaluate else workshop.gate("sized")
        run(config, *([] if change == "seed=1" else [change]), dry_run=True)
        lines += [line for line in capsys.readouterr().out.splitlines() if "trained on frames of" in line]
    expected = f"warning: experts.{{}}: trained on frames of 32x48 (squash), here they reach it at {told}"
    assert lines == ([expected.format(name) for name in ("day", "night")] * 2 if told else [])


def test_gate_training_leaves_the_experts_bit_identical(workshop):
    before = {
        name: workshop.run(name).joinpath("checkpoints/best.safetensors").read_bytes()
        for name in ("day", "night")
    }
    workshop.train(workshop.gate("other_gate", type="classwise", conv=True))
    gate, experts = load_gate(str(workshop.run("other_gate")), "gates.other_gate")
    for name, trained in experts.items():
        assert workshop.run(name).joinpath("checkpoints/best.safetensors").read_bytes() == before[name]
        stored, _ = load_weights(workshop.run(name) / "checkpoints/best.safetensors")
        inside = {key.removeprefix("network."): value for key, value in trained.network.state_dict().items()}
        assert tensors_sha256(inside) == tensors_sha256(stored)
    names = set(load_weights(gate.file)[0])
    assert names and not [name for name in names if name.startswith("experts")]


def test_trained_gate_in_memory_still_holds_the_stored_experts(workshop, monkeypatch):
    """The model that was trained, not a copy loaded later: BatchNorm buffers included."""
    from pipelines import segmentation

    seen = {}
    build = segmentation.build_mixture

    def keep(experts, gate):
        seen["model"] = build(experts, gate)
        return seen["model"]

    monkeypatch.setattr(segmentation, "build_mixture", keep)
    workshop.train(workshop.gate("kept_gate"))
    for name, expert in zip(seen["model"].expert_names, seen["model"].experts, strict=True):
        inside = {key.removeprefix("network."): value for key, value in expert.state_dict().items()}
        assert (
            tensors_sha256(inside)
            == load_metadata(workshop.run(name) / "checkpoints/best.safetensors")["tensors_sha256"]
        )


def test_gate_refuses_other_experts_and_shows_both_hashes(workshop, tmp_path):
    tensors, metadata = load_weights(workshop.run("day") / "checkpoints/best.safetensors")
    first = next(iter(tensors))
    changed = {**tensors, first: tensors[first] + 1}
    save_weights(tmp_path / "day.safetensors", changed, metadata)
    gate, about = load_weights(workshop.run("gate") / "checkpoints/best.safetensors")
    about["experts"][0]["path"] = str(tmp_path / "day.safetensors")
    save_weights(tmp_path / "gate.safetensors", gate, about)
    with pytest.raises(UserError) as error:
        load_gate(str(tmp_path / "gate.safetensors"), "gates.gate")
    assert metadata["tensors_sha256"][:16] in str(error.value)
    assert tensors_sha256(changed)[:16] in str(error.value)


def test_a_damaged_gate_is_told_with_key_and_file(workshop, tmp_path):
    tensors, about = load_weights(workshop.run("gate") / "checkpoints/best.safetensors")
    name = next(iter(tensors))
    save_weights(tmp_path / "cut.safetensors", {key: tensors[key] for key in tensors if key != name}, about)
    told = f"gates.gate: .*cut.safetensors: of another network: 1 tensors don't fit, the first is {name}"
    with pytest.raises(UserError, match=told):
        load_gate(str(tmp_path / "cut.safetensors"), "gates.gate")


def test_expert_of_another_class_list_is_refused(workshop, tmp_path):
    tensors, metadata = load_weights(workshop.run("day") / "checkpoints/best.safetensors")
    save_weights(
        tmp_path / "day.safetensors", tensors, {**metadata, "classes": ["ground", "left", "elsewhere"]}
    )
    config = workshop.gate("refused")
    config["experts"]["day"] = str(tmp_path / "day.safetensors")
    with pytest.raises(UserError, match=r"experts.day: .*another class list.*elsewhere / right"):
        workshop.train(config)
    assert not workshop.run("refused").exists()


RESNET = {"name": "deeplabv3plus", "backbone": "resnet18", "aspp_separable": True, "pretrained": "none"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"experts": {"day": "gone", "night": "gone"}},
            r"experts.day: no checkpoint at gone.*train that network first",
        ),
        ({"network": RESNET}, r"experts.day: .*network.backbone: mobilenet_v2"),
    ],
)
def test_wrong_experts_are_refused_before_anything_is_written(workshop, change, message):
    with pytest.raises(UserError, match=message):
        workshop.train({**workshop.gate("refused"), **change})
    assert not workshop.run("refused").exists()


def test_an_expert_has_the_name_of_a_subset_that_it_was_trained_on(workshop):
    """True-subset routing would send each one the frames of the other."""
    swapped = {"day": str(workshop.run("night")), "night": str(workshop.run("day"))}
    message = r"experts.day: .*night.*was trained on night, and day is another subset of data folder"
    for told in (
        lambda: workshop.train({**workshop.gate("swapped"), "experts": swapped}, dry_run=True),
        lambda: workshop.evaluate(evaluation_of(workshop, name="swapped", experts=swapped, gates={})),
    ):
        with pytest.raises(UserError, match=message):
            told()
    assert not workshop.run("swapped").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 1000}, "train.batch_size: 1000 is more than the 8 frames"),
        ({"batch_size": 1}, "train.batch_size: DeepLabv3. can't be trained on a batch of 1 image"),
        ({"schedule": {"name": "poly", "warmup_steps": 1000}}, "warmup_steps: 1000 is wrong"),
        (
            {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0, "nesterov": True}},
            "needs momentum above 0",
        ),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_before_anything_is_written(workshop, change, message):
    recipe = workshop.expert("refused", ["day"])
    for dry in (True, False):
        with pytest.raises(UserError, match=message):
            workshop.train({**recipe, "train": {**recipe["train"], **change}}, dry_run=dry)
        assert not workshop.run("refused").exists()


def test_what_a_training_took_is_counted_not_planned(workshop):
    """A learning rate of nearly 0 improves nothing: early stop ends after the first epoch without a gain."""
    recipe = workshop.expert("early", ["day"])
    still = {"epochs": 50, "early_stop": 1, "optimizer": {"name": "sgd", "lr": 1e-12, "momentum": 0}}
    (result,) = workshop.train({**recipe, "train": {**recipe["train"], **still}})
    assert result.epochs < 50
    about = load_metadata(workshop.run("early") / "checkpoints/best.safetensors")
    assert about["budget"] == {"steps": 2 * result.epochs, "images": 8 * result.epochs}
    assert about["epoch"] <= result.epochs


def test_gate_checkpoint_is_no_expert(workshop):
    with pytest.raises(UserError, match="holds a gate, not a network"):
        load_network(str(workshop.run("gate")), "experts.day")


def test_damaged_expert_is_refused_by_name(workshop, tmp_path):
    whole = (workshop.run("day") / "checkpoints/best.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut.safetensors"):
        load_network(str(tmp_path / "cut.safetensors"), "experts.day")


def test_nonempty_run_folder_is_refused(workshop):
    with pytest.raises(UserError, match="--resume.*--overwrite"):
        workshop.train(workshop.expert("day", ["day"]))


def test_uniform_gate_without_conv_has_nothing_to_train(workshop):
    config = workshop.gate("nothing")
    config["gate"] = {"type": "uniform"}
    with pytest.raises(UserError, match="conv: true"):
        workshop.train(config)


def test_dry_run_tells_sizes_and_writes_nothing(workshop, capsys):
    workshop.train(workshop.gate("dry", type="classwise"), dry_run=True)
    told = capsys.readouterr().out
    assert "1x256x2x3" in told and "1x3x32x48" in told and "trains on 16 (gate)" in told
    assert not workshop.run("dry").exists()


def test_frames_that_are_refused_leave_no_run_folder(workshop, tmp_path):
    root = shutil.copytree(workshop.data, tmp_path / "data")
    label = root / "labels" / "day_train_0.png"
    cv2.imwrite(str(label), numpy.full((24, 40), 77, numpy.uint8))
    config = workshop.expert("broken_label", ["day"])
    config["data"] = {**config["data"], "root": str(root), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(UserError, match="day_train_0.png: label value 77"):
        workshop.train(config)
    assert not workshop.run("broken_label").exists()


def test_splits_that_share_a_recording_are_refused_by_a_dry_run_and_told_by_a_run(workshop, capsys):
    """Official splits may; here each subset is one recording, of which every split has frames."""
    config = workshop.expert("leaking", ["day"])
    config["data"] = {**config["data"], "sequence_column": "subset"}
    told = "data: train and test share"
    with pytest.raises(UserError, match=f"^{told}"):
        workshop.train(config, dry_run=True)
    capsys.readouterr()
    workshop.train(config)
    lines = [line for line in capsys.readouterr().out.splitlines() if told in line]
    assert len(lines) == 1 and lines[0].startswith(f"warning: {told}")


def test_caches_in_the_folder_of_a_run_are_refused(workshop):
    config = workshop.expert("cached", ["day"])
    inside = workshop.run("cached") / "cache"
    for dry in (True, False):
        with pytest.raises(UserError, match="data.cache_dir: .* lies in the run's own folder .*cached; name"):
            workshop.train({**config, "data": {**config["data"], "cache_dir": str(inside)}}, dry_run=dry)
    assert not workshop.run("cached").exists()


class Bare(torch.nn.Module):
    """What CONTRIBUTING.md asks of a network, and no more. step: pixels of a logit."""

    stride, feature_channels = 1, 4

    def __init__(self, num_classes: int, *, step: int = 1):
        super().__init__()
        self.num_classes, self.step = num_classes, step
        self.body, self.head = torch.nn.Conv2d(3, 4, 3, 1, 1), torch.nn.Conv2d(4, num_classes, 1)

    def forward(self, images):
        return self.forward_features(images)[0]

    def forward_features(self, images):
        features = self.body(images)[..., :: self.step, :: self.step]
        return self.head(features), features


def test_a_network_needs_no_more_than_its_table_says(workshop, monkeypatch):
    monkeypatch.setitem(NETWORKS, "bare", "tests.pipelines.test_segmentation:Bare")
    config = workshop.expert("bare", ["day"], network={"name": "bare"})
    workshop.train(config)
    assert "normalisation" not in load_metadata(workshop.run("bare") / "checkpoints/best.safetensors")
    config["network"]["step"] = 2
    for dry in (True, False):
        with pytest.raises(
            UserError, match="bare gives logits 1x3x16x24 for one image, expected 1x3x32x48, a"
        ):
            workshop.train({**config, "name": "coarse"}, dry_run=dry)
    assert not workshop.run("coarse").exists()


def test_checkpoint_metadata_says_what_it_takes_to_use_it(workshop):
    about = load_metadata(workshop.run("gate") / "checkpoints/best.safetensors")
    assert about["classes"] == ["ground", "left", "right"]
    assert [expert["name"] for expert in about["experts"]] == ["day", "night"]
    assert about["budget"] == {"steps": 8, "images": 32}
    assert "name" not in about["config"] and "miou" in json.dumps(about)


def test_matrix_holds_every_row_and_agrees_with_a_direct_evaluation(workshop):
    results = workshop.evaluate(evaluation_of(workshop), overwrite=True)
    folder = workshop.run("evaluation") / "evaluation" / "test"
    matrix = pandas.read_csv(folder / "matrix.csv").set_index("model")
    expected = {
        "day",
        "night",
        "ensemble mean",
        "ensemble max",
        "gate",
        "true subset",
        "random weights",
        "constant weights",
    }
    assert expected <= set(matrix.index)
    assert matrix.loc["gate", "steps"] == 8 + 4 + 4
    assert matrix.loc["gate", "images_seen"] == 32 + 16 + 16
    assert len(list((folder / "overlays").glob("*.png"))) == 2
    # one expert's counts by hand
    network = load_network(str(workshop.run("day")), "experts.day").network
    config = workshop.load(evaluation_of(workshop))
    index = config.data.build()
    frames = index.select("test", ["night"])
    right = total = 0
    for frame in frames:
        image, label, _ = index.read(frame)
        from dataloaders.transforms import resize_image

        small = torch.from_numpy(resize_image(image, (32, 48), "squash")).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            logits = torch.nn.functional.interpolate(
                network(small), size=label.shape, mode="bilinear", align_corners=False
            )
        right += int((logits.argmax(1)[0].numpy() == label).sum())
        total += label.size
    counted = results.total("day", "night")
    assert counted.sum() == total
    assert counted.trace() == pytest.approx(right, abs=2)  # batches of another size: last bits


def test_true_subset_routing_equals_the_home_expert_on_each_subset(workshop):
    results = workshop.evaluate(evaluation_of(workshop), overwrite=True)
    for subset in ("day", "night"):
        assert (results.total("true subset", subset) == results.total(subset, subset)).all()


def test_ceilings_bound_what_they_claim_to_bound(workshop):
    from metrics.confusion import aacc

    results = workshop.evaluate(evaluation_of(workshop), overwrite=True)
    bound = {name: aacc(results.total(name, "all")) for name in results.names()}
    assert bound["best gate, simple"] >= max(
        bound[name] for name in ("gate", "day", "night", "ensemble mean", "constant weights")
    )
    assert (
        bound["oracle expert per pixel"]
        >= bound["oracle expert per image"]
        >= max(bound["day"], bound["night"])
    )
    assert bound["best gate, class-wise"] >= bound["best gate, simple"]


def test_evaluation_is_not_overwritten_unless_asked(workshop):
    config = {**evaluation_of(workshop), "name": "once"}
    workshop.evaluate(config)
    with pytest.raises(UserError, match="--overwrite"):
        workshop.evaluate(config)


def test_overlays_of_an_earlier_evaluation_go(workshop):
    config = {**evaluation_of(workshop), "name": "shown"}
    workshop.evaluate(config)
    overlays = workshop.run("shown") / "evaluation" / "test" / "overlays"
    assert len(list(overlays.glob("*.png"))) == 2
    config["evaluate"] = {**config["evaluate"], "overlays": 0}
    workshop.evaluate(config, overwrite=True)
    assert not list(overlays.glob("*.png"))


def test_run_configs_evaluate_as_well(workshop):
    assert "gate" in workshop.evaluate(workshop.gate("gate"), overwrite=True).names("gate")
    ensemble = {
        key: value for key, value in workshop.gate("rule").items() if key not in ("gate", "train", "network")
    }
    assert "ensemble vote" in workshop.evaluate({**ensemble, "ensemble": {"type": "vote"}}).names("ensemble")


def test_more_than_two_experts_and_a_single_one_with_a_conv(workshop):
    experts = {"a": "day", "b": "night", "c": "day"}
    three = {
        **workshop.gate("three"),
        "experts": {name: str(workshop.run(run)) for name, run in experts.items()},
    }
    workshop.train(three)
    alone = {
        **workshop.gate("alone"),
        "experts": {"day": str(workshop.run("day"))},
        "gate": {"type": "uniform", "conv": True},
    }
    workshop.train(alone)
    results = workshop.evaluate(
        evaluation_of(
            workshop,
            name="many",
            gates={"three": str(workshop.run("three")), "alone": str(workshop.run("alone"))},
        )
    )
    assert results.row("alone").kind == "control" and results.row("three").kind == "gate"
