"""Trainings killed in mid-epoch at random places and resumed end with an uninterrupted run's bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pipelines.conftest import expert_config, write_data, write_yaml

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, workers):
    data = write_data(tmp_path / "data")
    config = expert_config(tmp_path, data, "whole", ["day", "night"])
    config["data"]["workers"] = workers
    config["train"] |= {"epochs": 3, "batch_size": 2, "save_steps": 1, "ema": 0.9}
    killed_equals_whole(tmp_path, config, "train_deeplab.py", seed=workers)


@pytest.mark.parametrize(
    ("network", "method"),
    [
        ({"name": "cnn_moe", "arch": "resnet18", "ratio": 0.03}, "advmoe"),
        ({"name": "sparse_cnn", "arch": "densenet", "ratio": 0.2}, "trades"),
    ],
    ids=["mixture", "sparse"],
)
def test_a_classifier_killed_and_resumed_equals_uninterrupted(tmp_path, network, method):
    config = {
        "name": "whole",
        "output": str(tmp_path / "runs"),
        "data": {"name": "digits", "test_images": 1400, "val_images": 20, "pad": 1},
        "network": network,
        "train": {"method": method, "epochs": 3, "batch_size": 48, "eps": 0.1, "val_steps": 1, "val_images": 10,
                  "save_steps": 1, "ema": 0.9, "tensorboard": False, "optimizer": {"name": "sgd", "lr": 0.05}},
    }  # fmt: skip
    killed_equals_whole(tmp_path, config, "train_cnn_moe.py", seed=5)


def killed_equals_whole(tmp_path: Path, config: dict, script: str, seed: int) -> None:
    """Three kills on the way; three epochs of eight steps or so."""
    path = write_yaml(tmp_path / "config.yaml", config)
    assert train(script, path, "name=whole").wait() == 0

    chance = random.Random(seed)
    for attempt in range(3):
        process = train(script, path, "name=killed", *(["--resume"] if attempt else []))
        kill_after(process, tmp_path / "runs/killed/checkpoints/last.pt", saves=chance.randint(2, 5))
    assert train(script, path, "name=killed", "--resume").wait() == 0
    for file in ("checkpoints/best.safetensors", "metrics.csv"):
        assert (tmp_path / "runs/killed" / file).read_bytes() == (tmp_path / "runs/whole" / file).read_bytes()


def train(script: str, path: Path, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, str(path), *arguments, "--device", "cpu"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )


def kill_after(process: subprocess.Popen, state: Path, saves: int) -> None:
    """SIGKILL to the process and its workers once it has saved its state so many times, one step or so later."""
    seen = set()
    while process.poll() is None and len(seen) <= saves:
        if state.exists():
            seen.add(state.stat().st_mtime_ns)
        time.sleep(0.01)
    assert process.poll() is None, "the training ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
