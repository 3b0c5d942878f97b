"""Classifiers as they are trained: every method, what is logged and kept, and what is refused."""

import csv

import pytest
import torch

from dataloaders.image_batches import EvalBatches
from engine.checkpoints import load_metadata, load_weights, save_weights
from engine.config import ConfigError, UserError, from_dict
from engine.pathways import RouterPhase
from networks.cnn_moe.model import CNN
from networks.cnn_moe.sparse import SparseCNN
from pipelines.classification import attacked_part, build, clusters_of, norm_maps, phases_of, train
from pipelines.classifier_validation import validated
from pipelines.cli import Options, main
from pipelines.export import export
from pipelines.models import load_classifier

ROUTED = {"name": "cnn_moe", "arch": "resnet18", "ratio": 0.03, "num_experts": 3}
PLAIN = {"name": "cnn", "arch": "resnet18", "ratio": 0.03}
SPARSE = {"name": "sparse_cnn", "arch": "densenet", "ratio": 0.25}


def config(tmp_path, network=ROUTED, name="run", data=None, **keys):
    own = {"method": "advmoe", "epochs": 1, "batch_size": 256, "eps": 0.1, "val_images": 20, "val_steps": 2,
           "tensorboard": False, "optimizer": {"name": "sgd", "lr": 0.05}, **keys}  # fmt: skip
    data = {"name": "digits", "test_images": 1200, "val_images": 50, "pad": 1, "flip": False, **(data or {})}
    plain = {"name": name, "output": str(tmp_path), "data": data, "network": network}
    return from_dict({**plain, "train": {key: value for key, value in own.items() if value is not None}})


def run(tmp_path, network=ROUTED, options=None, **keys):
    one = config(tmp_path, network, **keys)
    result = train(one, options or Options(device="cpu"))
    folder = tmp_path / one.name
    with open(folder / "metrics.csv", newline="") as file:
        return folder, list(csv.DictReader(file)), result, one


@pytest.mark.parametrize("method", ["advmoe", "at_moe", "trades", "pgd_at", "standard"])
@pytest.mark.parametrize("network", [ROUTED, PLAIN, SPARSE], ids=["moe", "cnn", "sparse"])
def test_every_method_trains_and_keeps_what_it_learned(tmp_path, method, network):
    if network is not ROUTED and method in ("advmoe", "at_moe"):
        with pytest.raises(
            ConfigError, match=f"train.method: .* trains a router, and a {network['name']} has none"
        ):
            config(tmp_path, network, method=method)
        return
    eps, steps = (None, None) if method == "standard" else (0.1, 2)
    folder, rows, (result,), one = run(tmp_path, network, method=method, eps=eps, val_steps=steps)
    assert result.steps == 3 and result.epochs == 1
    attacked = {"attacked_top1", "robust_top1"}
    if network is ROUTED:
        attacked |= {"frozen_top1", "flips"}
        assert sum(float(rows[0][f"load_{e}"]) for e in range(3)) == pytest.approx(1)
        assert {f"top1_of_{e}" for e in range(3)} <= set(rows[0])
    if eps is None:  # nothing is told of attacks where none was made
        assert not attacked & set(rows[0])
    else:
        assert attacked <= set(rows[0])
        lower = ("attacked_top1", "frozen_top1") if network is ROUTED else ("attacked_top1",)
        assert float(rows[0]["robust_top1"]) == min(float(rows[0][name]) for name in lower)
    losses = ["pathways_loss", "router_loss"] if method == "advmoe" else ["loss"]
    assert all(0 < float(rows[0][name]) < 100 for name in losses)
    tensors, metadata = load_weights(folder / "checkpoints" / "best.safetensors")
    model = one.network.build(10)
    model.load_state_dict(tensors)
    assert metadata["network"] == one.network.plain()
    assert metadata["monitor"] == ("top1" if eps is None else "robust_top1")
    assert metadata["image_size"] == [1, 8, 8]
    assert "GMACs per image of 1 x 8 x 8" in (folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("method", "granularity", "keys"),
    [("advmoe", "model", {}), ("advmoe", "stage", {"router": {"target": "task"}}), ("at_moe", "layer", {})],
)
def test_bf16_trains_all_phases_and_leaves_weights_in_float32(tmp_path, method, granularity, keys):
    losses = []
    for precision in ("bf16", "fp32"):
        network = {**ROUTED, "granularity": granularity}
        folder, rows, _, _ = run(
            tmp_path,
            network,
            name=precision,
            method=method,
            precision=precision,
            steps=1,
            val_steps=1,
            **keys,
        )
        losses.append([float(value) for name, value in rows[0].items() if "loss" in name])
        tensors, _ = load_weights(folder / "checkpoints" / "best.safetensors")
        for one in tensors.values():
            assert one.isfinite().all() and one.dtype != torch.bfloat16
    assert losses[0] == pytest.approx(losses[1], rel=0.2) and losses[0] != losses[1]


def test_the_same_config_gives_the_same_bytes_and_another_seed_others(tmp_path):
    first, again, other = (
        run(tmp_path, name=name, seed=seed)[0] for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    weights = [(folder / "checkpoints" / "best.safetensors").read_bytes() for folder in (first, again, other)]
    assert weights[0] == weights[1] != weights[2]
    assert (first / "metrics.csv").read_bytes() == (again / "metrics.csv").read_bytes()


@pytest.mark.parametrize("router", [{"target": "label_mod"}, {"target": "cluster", "attack": "joint"},
                                    {"target": "none", "balance": 1.0}])  # fmt: skip
def test_the_router_learns_what_it_is_told(tmp_path, router):
    _, rows, _, one = run(tmp_path, router=router)
    assert float(rows[0]["router_loss"]) > 0
    clusters = clusters_of(one, one.data.build(one.data.cache_dir))
    assert (clusters is None) == (router["target"] != "cluster")
    if clusters is not None:
        assert set(clusters.tolist()) == {0, 1, 2}


def test_every_image_comes_with_its_own_cluster(tmp_path, monkeypatch):
    given, whole = [], RouterPhase.loss

    def loss(phase, model, inputs, labels):
        given.extend(zip(inputs.clean.images, inputs.clean.clusters.tolist(), strict=True))
        return whole(phase, model, inputs, labels)

    monkeypatch.setattr(RouterPhase, "loss", loss)
    one = config(tmp_path, router={"target": "cluster"}, data={"pad": 0})
    train(one, Options(device="cpu"))
    images = one.data.build(one.data.cache_dir)
    pixels, clusters = images.split("train").images, clusters_of(one, images).tolist()
    own = {image.tobytes(): cluster for image, cluster in zip(pixels, clusters, strict=True)}
    assert len(given) == len(pixels) and len(set(clusters)) == 3
    assert all(own[(image * 255).round().byte().numpy().tobytes()] == cluster for image, cluster in given)


def test_a_balanced_start_gives_every_expert_images(tmp_path):
    """Of this seed one expert has them all without it."""
    loads = {}
    for start in (True, False):
        _, rows, _, _ = run(tmp_path, name=f"start_{start}", balanced_start=start, method="trades", seed=0,
                            optimizer={"name": "sgd", "lr": 1e-9})  # fmt: skip
        loads[start] = max(float(rows[0][f"load_{e}"]) for e in range(3))
    assert loads[True] < 0.95 < loads[False]


def test_training_starts_from_another_run_of_an_equal_network(tmp_path):
    folder, _, _, one = run(tmp_path, name="first", method="trades")
    again = config(tmp_path, name="second", method="trades", start_from=str(folder))
    model = build(again, again.data.build(again.data.cache_dir))
    tensors, _ = load_weights(folder / "checkpoints" / "best.safetensors")
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    smaller = config(
        tmp_path, {**ROUTED, "num_experts": 2}, name="third", method="trades", start_from=str(folder)
    )
    with pytest.raises(UserError, match="is of another network"):
        build(smaller, smaller.data.build(smaller.data.cache_dir))


@pytest.mark.parametrize("method", ["at_moe", "trades", "pgd_at", "standard"])
def test_balance_is_for_all_methods(tmp_path, method):
    loads = {}
    for weight in (0.0, 1.0):
        keys = {"eps": None, "val_eps": 0.1} if method == "standard" else {}
        _, rows, _, _ = run(tmp_path, name=f"balance_{weight}", balanced_start=False, method=method, **keys,
                            router={"balance": weight}, optimizer={"name": "sgd", "lr": 0.01})  # fmt: skip
        loads[weight] = max(float(rows[-1][f"load_{e}"]) for e in range(3))
    assert loads[1.0] < loads[0.0]


def test_balance_needs_a_router(tmp_path):
    with pytest.raises(ConfigError, match="train.router: has no effect: a cnn has none"):
        config(tmp_path, {"name": "cnn", "arch": "resnet18", "ratio": 0.125, "stem": "cifar"}, method="trades",
               router={"balance": 0.1})  # fmt: skip


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("network", "told"),
    [
        ({"arch": "vgg16"}, "vgg16 with stem: cifar and enlarge: 1; network.enlarge: 2 is enough"),
        (
            {"arch": "vgg16_bn", "stem": "imagenet", "enlarge": 2},
            "vgg16_bn with stem: imagenet and enlarge: 2; network.enlarge: 4 is enough",
        ),
        (
            {"arch": "densenet", "stem": "imagenet", "num_experts": 2},
            "densenet with stem: imagenet and enlarge: 1; network.enlarge: 2 is enough",
        ),
    ],
)
def test_images_that_are_too_small_for_a_network_are_refused(tmp_path, network, told, dry):
    kind = "cnn_moe" if "num_experts" in network else "cnn"
    one = config(tmp_path, {"name": kind, "ratio": 0.03, **network}, method="trades")
    with pytest.raises(UserError) as error:
        train(one, Options(device="cpu", dry_run=dry))
    assert str(error.value) == f"network.arch: images of 8 x 8 are too small for {told}"
    assert not (tmp_path / "run").exists()
    fits = {"name": kind, "ratio": 0.03, **network, "enlarge": int(told.split()[-3])}
    train(config(tmp_path, fits, method="trades"), Options(device="cpu", dry_run=True))


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("network", [ROUTED, {**PLAIN, "stem": "imagenet"}, {**SPARSE, "arch": "resnet18"}])
def test_one_image_a_batch_is_refused_where_batchnorm_would_see_one_value(tmp_path, network, dry):
    one = config(tmp_path, network, method="trades", batch_size=1)
    with pytest.raises(
        UserError, match=r"^train.batch_size: 1 is wrong for images of 8 x 8: .*; take 2 or more$"
    ):
        train(one, Options(device="cpu", dry_run=dry))
    assert not (tmp_path / "run").exists()
    for keys in ({"batch_size": 2}, {"network": {**network, "enlarge": 8}, "batch_size": 1}):
        fits = config(tmp_path, **{"network": network, "method": "trades", **keys})
        train(fits, Options(device="cpu", dry_run=True))


def test_looking_at_the_maps_leaves_a_network_as_it_is():
    torch.manual_seed(0)
    model = CNN(10, arch="resnet18", ratio=0.03).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert min(norm_maps(model, (1, 16, 16))) == 4 and model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(one._forward_pre_hooks for one in model.modules())


def test_robust_top1_is_no_monitor_where_nothing_attacks_the_validation(tmp_path):
    with pytest.raises(
        ConfigError, match="train.monitor: robust_top1 is unknown as nothing attacks .*val_eps"
    ):
        config(tmp_path, PLAIN, method="standard", eps=None, monitor="robust_top1")
    config(tmp_path, PLAIN, method="standard", eps=None, val_eps=0.1, monitor="robust_top1")
    config(tmp_path, PLAIN, method="trades", monitor="robust_top1")


def test_a_router_that_was_trained_is_not_balanced_anew(tmp_path):
    folder, _, _, _ = run(tmp_path, name="first", method="at_moe")
    still = {"method": "at_moe", "start_from": str(folder), "optimizer": {"name": "sgd", "lr": 1e-12}}
    again, _, _, _ = run(tmp_path, name="second", **still)
    before, after = (load_weights(one / "checkpoints" / "best.safetensors")[0] for one in (folder, again))
    for name in ("router.head.bias", "router.head.weight"):
        torch.testing.assert_close(after[name], before[name])


def test_training_does_not_start_from_a_network_that_has_more(tmp_path):
    torch.manual_seed(0)
    file, keys = tmp_path / "sparse.safetensors", {"arch": "densenet", "ratio": 0.5}
    save_weights(file, SparseCNN(10, **keys).state_dict(), {"classes": list("0123456789")})
    one = config(
        tmp_path,
        {"name": "cnn", "arch": "densenet"},
        method="trades",
        start_from=str(file),
        start_head="fresh",
    )
    told = r"sparse.safetensors is of another network, 38 tensors differ \(scores.0, scores.1, scores.10\)$"
    with pytest.raises(UserError, match=told):
        build(one, one.data.build(one.data.cache_dir))


def test_training_goes_on_from_an_exported_pathway(tmp_path):
    """Before the first step the network is right as often as the mixture was with all images on that pathway."""
    folder, rows, _, one = run(tmp_path, name="mixture", method="trades", epochs=2)
    told = export(str(folder), tmp_path / "out", pathway=1)
    epoch = load_metadata(tmp_path / "out" / "best.safetensors")["epoch"]
    keys = {"name": "tuned", "method": "trades", "start_from": str(tmp_path / "out")}
    tuned = config(tmp_path, PLAIN, **keys)
    images = tuned.data.build(tuned.data.cache_dir)
    model, settings = build(tuned, images), tuned.train
    held_out = EvalBatches(attacked_part(images.split("val"), settings.val_images), 256)
    figures = validated(model, held_out, settings, torch.device("cpu"))
    assert figures["top1"] == float(rows[epoch - 1]["top1_of_1"]) > 0
    expected = load_classifier(str(folder), "RUN").network.pathway(1)
    assert torch.equal(model.eval()(torch.ones(2, 1, 8, 8)), expected(torch.ones(2, 1, 8, 8)))
    folder, rows, (result,), _ = run(tmp_path, PLAIN, **keys)
    assert result.steps == 3 and 0 < float(rows[0]["loss"]) < 100 and len(told) == 1
    about = load_metadata(folder / "checkpoints" / "best.safetensors")["start_from"]
    source = load_metadata(tmp_path / "out" / "best.safetensors")
    saw = [{"data": source["exported_from"]["config"]["data"], "manifest": images.manifest("train")}]
    assert about == {
        "path": str(tmp_path / "out"), "sha256": source["tensors_sha256"], "trainings": saw,
    }  # fmt: skip
    assert "which is new" not in (folder / "log.txt").read_text()


def test_a_start_that_would_change_what_the_config_says_is_refused(tmp_path):
    file = tmp_path / "other.safetensors"
    model = CNN(10, **{key: value for key, value in PLAIN.items() if key != "name"})
    images = config(tmp_path, PLAIN, method="trades").data.build(str(tmp_path / "cache"))
    save_weights(file, model.state_dict(), {"classes": list(images.classes), "network": PLAIN})
    for key, value in (("mean", [0.1]), ("std", [0.5])):
        other = config(tmp_path, {**PLAIN, key: value * 3}, method="trades", start_from=str(file))
        told = rf"network.{key}: \[{value[0]}.* is not that of train.start_from: .* trained with \[0.*; take the same"
        with pytest.raises(UserError, match=told):
            build(other, images)
    save_weights(file, model.state_dict(), {"classes": list("abcdefghij"), "network": PLAIN})
    kept = config(tmp_path, PLAIN, method="trades", start_from=str(file))
    told = r"other classes \(a, b, c, d, e and 5 more\) than those of digits \(0, 1, .*start_head: fresh"
    with pytest.raises(UserError, match=told):
        build(kept, images)
    build(config(tmp_path, PLAIN, method="trades", start_from=str(file), start_head="fresh"), images)


@pytest.mark.parametrize("arch", ["resnet18", "vgg16"])
def test_other_classes_need_a_fresh_last_layer_that_the_config_asks_for(tmp_path, arch):
    network = {**PLAIN, "arch": arch, "enlarge": 2}
    torch.manual_seed(5)
    file = tmp_path / "seven.safetensors"
    seven = CNN(7, **{key: value for key, value in network.items() if key != "name"})
    save_weights(file, seven.state_dict(), {"classes": list("abcdefg"), "network": network})
    keys = {"method": "trades", "start_from": str(file)}
    kept = config(tmp_path, network, **keys)
    images = kept.data.build(kept.data.cache_dir)
    told = r"seven.safetensors is of another network, 2 tensors differ \(body.head.*; train.start_head: fresh"
    with pytest.raises(UserError, match=told):
        build(kept, images)
    fresh = config(tmp_path, network, **keys, start_head="fresh")
    model = build(fresh, images)
    theirs = seven.state_dict()
    new = [name for name, own in model.state_dict().items() if not equal(own, theirs[name])]
    layer = "body.head.4" if arch == "vgg16" else "body.head"
    assert new == [f"{layer}.weight", f"{layer}.bias"] and model.state_dict()[new[0]].shape[0] == 10
    other = config(tmp_path, {**network, "ratio": 0.06}, **keys, start_head="fresh")
    with pytest.raises(UserError, match="is of another network, [0-9]+ tensors differ \\(body.stem[^;]*$"):
        build(other, images)
    folder, _, (result,), _ = run(tmp_path, network, **keys, start_head="fresh")
    line = f"starts from {file} (7 classes) but for {layer}, which is new, for 10"
    assert (folder / "log.txt").read_text().count(line) == 1 and result.steps == 3


def equal(tensor, other):
    return tensor.shape == other.shape and torch.equal(tensor, other)


def test_a_fresh_last_layer_is_new_even_for_as_many_classes(tmp_path):
    folder, _, _, _ = run(tmp_path, PLAIN, name="first", method="trades")
    keys = {"name": "second", "method": "trades", "start_from": str(folder), "start_head": "fresh"}
    one = config(tmp_path, PLAIN, **keys)
    model = build(one, one.data.build(one.data.cache_dir)).state_dict()
    tensors, _ = load_weights(folder / "checkpoints" / "best.safetensors")
    differ = [name for name, value in model.items() if not torch.equal(value, tensors[name])]
    assert differ == ["body.head.weight", "body.head.bias"]


def test_scores_of_filters_learn_and_do_not_decay(tmp_path):
    one = config(tmp_path, SPARSE, method="trades", optimizer={"name": "adamw", "weight_decay": 0.5})
    model = build(one, one.data.build(one.data.cache_dir))
    (phase,) = phases_of(one, model, 3)
    weights, scores = phase.optimizer.param_groups
    assert (weights["weight_decay"], scores["weight_decay"]) == (0.5, 0.0)
    assert {id(p) for p in model.scores} < {id(p) for p in scores["params"]}
    trained = {id(p) for group in (weights, scores) for p in group["params"]}
    assert trained == {id(p) for p in phase.parameters} == {id(p) for p in model.parameters()}
    first = {name: value.clone() for name, value in model.named_parameters()}
    folder, _, _, _ = run(tmp_path, SPARSE, method="trades")
    last, metadata = load_weights(folder / "checkpoints" / "best.safetensors")
    assert all(not torch.equal(last[name], value) for name, value in first.items() if "scores" in name)
    kept = sum(parameter.numel() for parameter in model.kept().parameters())
    whole = sum(parameter.numel() for parameter in model.body.parameters())
    assert metadata["parameters"] == kept
    text = (folder / "log.txt").read_text()
    assert f"parameters: {kept:,}, what is left of {whole:,} without pruned filters" in text


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"start_head": "fresh"}, "train.start_head: has no effect without start_from"),
        ({"start_head": "new"}, 'train.start_head: "new" is unknown; allowed: kept, fresh'),
        ({"eps": None}, "train.eps: missing; method: advmoe attacks its images"),
        ({"method": "standard"}, "train.eps: has no effect with method: standard"),
        (
            {"method": "trades", "router": {"balance": 0.1, "clip_norm": 2.0}},
            "train.router.clip_norm: has no effect with method: trades, which knows balance alone .* null for none",
        ),
        ({"eps": 8}, "train.eps: 8 lets every pixel become any other.* 8/255 may be meant"),
        ({"val_eps": 1.5}, "train.val_eps: 1.5 lets every pixel"),
        ({"step_size": 5}, "train.step_size: 5 lets every pixel .* 5/255 may be meant"),
        ({"method": "trades", "beta": 0}, "train.beta: 0 leaves the attacked images without weight"),
        ({"beta": 0.0}, "train.beta: 0 leaves the attacked images without weight"),
        ({"method": "pgd_at", "beta": 3}, "train.beta: has no effect with method: pgd_at"),
        (
            {"method": "standard", "eps": None, "steps": 4},
            "train.steps: has no effect with method: standard, or take 2, the default",
        ),
        (
            {"method": "standard", "eps": None, "val_steps": 3},
            "train.val_steps: has no effect .* set val_eps",
        ),
        ({"epochs": "many"}, '^(?!.*train.monitor)(?s:.*)train.epochs: "many"'),
        ({"method": "advmo"}, "train.method: .*did you mean 'advmoe'"),
        ({"router": {"target": "labels"}}, "train.router.target"),
        ({"router": {"beta": 0}}, "train.router.beta: 0 leaves the attack on the router without effect"),
        (
            {"router": {"target": "cluster", "beta": 0, "balance": 1}},
            "train.router.beta: 0 leaves the attack on the router",
        ),
        (
            {"router": {"target": "none", "beta": 0}},
            "train.router.beta: 0 beside target: none .* nothing to learn",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused(tmp_path, keys, told):
    with pytest.raises(ConfigError, match=told):
        config(tmp_path, **keys)


def test_a_start_of_a_router_is_refused_where_there_is_none(tmp_path):
    with pytest.raises(ConfigError, match="train.balanced_start: has no effect: a cnn has no router"):
        config(tmp_path, PLAIN, method="trades", balanced_start=False)


@pytest.mark.parametrize(
    ("network", "keys", "told"),
    [
        (ROUTED, {"schedule": {"name": "cosine", "warmup_steps": 1000}},
         "^train.schedule: warmup_steps: 1000 is wrong"),
        (ROUTED, {"router": {"schedule": {"name": "cosine", "warmup_steps": 1000}}},
         "^train.router.schedule: warmup_steps: 1000 is wrong"),
        (PLAIN, {"method": "trades", "optimizer": {"name": "sgd", "lr": 1, "momentum": 0, "nesterov": True}},
         "^train.optimizer: nesterov: true needs momentum"),
        ({**ROUTED, "num_experts": 12}, {}, "train.router.target: label_mod sends 10 classes .*num_experts is 12"),
        ({**ROUTED, "num_experts": 2000}, {"router": {"target": "cluster"}},
         r"^train.router.target: cluster makes .*2000, clusters of \d+ training images; take fewer$"),
        ({**ROUTED, "router_pixels": 1, "router_width": 0.25}, {},
         "^network.router_pixels: 1 leaves a channel of the router a single value of images of 8 x 8"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_run_is_refused_before_anything_is_written(tmp_path, network, keys, told):
    for dry in (True, False):
        with pytest.raises(UserError, match=told):
            train(config(tmp_path, network, **keys), Options(device="cpu", dry_run=dry))
        assert not (tmp_path / "run").exists()


def test_norms_and_biases_do_not_decay(tmp_path):
    one = config(tmp_path, optimizer={"name": "sgd", "lr": 0.1, "weight_decay": 0.5})
    model = build(one, one.data.build(one.data.cache_dir))
    for phase in phases_of(one, model, 3):
        weights, others = phase.optimizer.param_groups
        assert (weights["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
        assert {p.ndim for p in others["params"]} == {1} and min(p.ndim for p in weights["params"]) == 2
        given = {id(p) for group in (weights, others) for p in group["params"]}
        assert given == {id(p) for p in phase.parameters}


def test_the_router_has_a_recipe_of_its_own(tmp_path):
    """Its optimizer and schedule where they are given, those of the training elsewhere."""
    common = {"schedule": {"name": "step", "milestones": [0.5], "gamma": 0.5}}
    own = {
        "optimizer": {"name": "adamw", "lr": 0.003},
        "schedule": {"name": "step", "milestones": [0.5], "gamma": 0.1},
    }
    expected = {"optimizer": (torch.optim.AdamW, 0.003, 0.5), "schedule": (torch.optim.SGD, 0.05, 0.1)}
    for key, recipe in expected.items():
        one = config(tmp_path, router={key: own[key]}, **common)
        pathways, router = phases_of(one, build(one, one.data.build(one.data.cache_dir)), 4)
        for phase, (kind, lr, factor) in ((pathways, (torch.optim.SGD, 0.05, 0.5)), (router, recipe)):
            assert type(phase.optimizer) is kind and phase.optimizer.param_groups[0]["lr"] == lr
            for _ in range(2):
                phase.optimizer.step()
                phase.scheduler.step()
            assert phase.optimizer.param_groups[0]["lr"] == pytest.approx(factor * lr)


def test_a_dry_run_tells_the_costs_and_writes_nothing(tmp_path, capsys):
    train(config(tmp_path), Options(dry_run=True, device="cpu"))
    printed = capsys.readouterr().out
    assert (
        "run: cnn_moe resnet18" in printed
        and "a pathway" in printed
        and "digits: 547 train, 50 val" in printed
    )
    assert not (tmp_path / "run").exists()


def test_a_classifier_has_its_own_script(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(
        "name: x\ndata: {name: digits}\nnetwork: {name: cnn, arch: vgg16}\ntrain: {method: standard, epochs: 1}\n"
    )
    assert main("", "train", family="deeplab", argv=[str(path)]) == 2
    assert f"this is a classifier; run: python train_cnn_moe.py {path}" in capsys.readouterr().err


def test_the_router_s_gradient_has_a_largest_norm_of_its_own(tmp_path):
    moved = {}
    for clip_norm in (1e-9, 1.0):
        folder, _, _, one = run(tmp_path, name=f"clip_{clip_norm}", router={"clip_norm": clip_norm})
        first = build(one, one.data.build(one.data.cache_dir)).router.conv.weight
        last = load_weights(folder / "checkpoints" / "best.safetensors")[0]["router.conv.weight"]
        moved[clip_norm] = (last - first).abs().max().item()
    assert moved[1e-9] < 1e-4 < 1e-3 < moved[1.0]
