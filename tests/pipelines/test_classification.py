"""Classifiers as they are trained: every method, what is logged and kept, and what is refused."""

import csv

import pytest
import torch

from engine.checkpoints import load_weights
from engine.config import ConfigError, UserError, from_dict
from pipelines.classification import build, clusters_of, train
from pipelines.cli import Options, main

ROUTED = {"name": "cnn_moe", "arch": "resnet18", "ratio": 0.03, "num_experts": 3}
PLAIN = {"name": "cnn", "arch": "resnet18", "ratio": 0.03}


def config(tmp_path, network=ROUTED, name="run", **keys):
    own = {"method": "advmoe", "epochs": 1, "batch_size": 256, "eps": 0.1, "val_images": 20, "val_steps": 2,
           "tensorboard": False, "optimizer": {"name": "sgd", "lr": 0.05}, **keys}  # fmt: skip
    data = {"name": "digits", "test_images": 1200, "val_images": 50, "pad": 1, "flip": False}
    plain = {"name": name, "output": str(tmp_path), "data": data, "network": network}
    return from_dict({**plain, "train": {key: value for key, value in own.items() if value is not None}})


def run(tmp_path, network=ROUTED, options=None, **keys):
    one = config(tmp_path, network, **keys)
    result = train(one, options or Options(device="cpu"))
    folder = tmp_path / one.name
    with open(folder / "metrics.csv", newline="") as file:
        return folder, list(csv.DictReader(file)), result, one


@pytest.mark.parametrize("method", ["advmoe", "at_moe", "trades", "pgd_at", "standard"])
@pytest.mark.parametrize("network", [ROUTED, PLAIN], ids=["moe", "cnn"])
def test_every_method_trains_and_keeps_what_it_learned(tmp_path, method, network):
    if network is PLAIN and method in ("advmoe", "at_moe"):
        with pytest.raises(ConfigError, match="train.method: .* trains a router, and a cnn has none"):
            config(tmp_path, network, method=method)
        return
    eps = None if method == "standard" else 0.1
    folder, rows, (result,), one = run(tmp_path, network, method=method, eps=eps)
    assert result.steps == 3 and result.epochs == 1
    measured = {"top1", "attacked_top1", "robust_top1"}
    if network is ROUTED:
        measured |= {
            "frozen_top1",
            "flips",
            *(f"load_{e}" for e in range(3)),
            *(f"top1_of_{e}" for e in range(3)),
        }
        assert sum(float(rows[0][f"load_{e}"]) for e in range(3)) == pytest.approx(1)
        assert float(rows[0]["robust_top1"]) == min(
            float(rows[0][name]) for name in ("attacked_top1", "frozen_top1")
        )
    assert measured <= set(rows[0])
    losses = ["pathways_loss", "router_loss"] if method == "advmoe" else ["loss"]
    assert all(0 < float(rows[0][name]) < 100 for name in losses)
    tensors, metadata = load_weights(folder / "checkpoints" / "best.safetensors")
    model = one.network.build(10)
    model.load_state_dict(tensors)
    assert metadata["network"] == one.network.plain() and metadata["monitor"] == "robust_top1"
    assert "GMACs per image of 1 x 8 x 8" in (folder / "log.txt").read_text()


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


def test_a_balanced_start_gives_every_expert_images(tmp_path):
    loads = {}
    for start in (True, False):
        _, rows, _, _ = run(tmp_path, name=f"start_{start}", balanced_start=start, method="trades",
                            optimizer={"name": "sgd", "lr": 1e-9})  # fmt: skip
        loads[start] = max(float(rows[0][f"load_{e}"]) for e in range(3))
    assert loads[True] < 0.95


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


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"eps": None}, "train.eps: missing; method: advmoe attacks its images"),
        ({"method": "standard"}, "train.eps: has no effect with method: standard"),
        ({"method": "trades", "router": {}}, "train.router: has no effect with method: trades"),
        ({"method": "advmo"}, "train.method: .*did you mean 'advmoe'"),
        ({"router": {"target": "labels"}}, "train.router.target"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(tmp_path, keys, told):
    with pytest.raises(ConfigError, match=told):
        config(tmp_path, **keys)


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
