"""A tiny data set of two domains and a trained pair of experts, shared by the tests of this folder."""

import csv
import json
import os
from pathlib import Path

import cv2
import numpy
import pytest
import yaml

from engine.config import load
from pipelines.cli import Options

CLASSES = [
    {"id": 0, "name": "ground", "color": [90, 90, 90], "ignore": False},
    {"id": 1, "name": "left", "color": [200, 0, 0], "ignore": False},
    {"id": 2, "name": "right", "color": [0, 0, 200], "ignore": False},
]
COUNTS = {"train": 8, "gate": 8, "val": 4, "test": 4}


def write_data(root: Path, classes=CLASSES) -> Path:
    """Frames 24x40 of subsets `day` and `night`: what is bright on the left of one is dark on that of the other."""
    rng = numpy.random.default_rng(0)
    rows = []
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for subset, low in (("day", 40), ("night", 160)):
        for split, count in COUNTS.items():
            for number in range(count):
                name = f"{subset}_{split}_{number}"
                label = numpy.zeros((24, 40), numpy.uint8)
                label[:16, : rng.integers(10, 30)] = 1
                label[:16][label[:16] == 0] = 2
                image = numpy.full((24, 40, 3), 100, numpy.uint8)
                image[label == 1], image[label == 2] = low, 200 - low
                image = (image + rng.integers(0, 20, image.shape)).astype(numpy.uint8)
                cv2.imwrite(str(root / "images" / f"{name}.png"), image)
                cv2.imwrite(str(root / "labels" / f"{name}.png"), label)
                rows.append({"name": name, "subset": subset, "split": split})
    (root / "classes.json").write_text(json.dumps(classes))
    with open(root / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["name", "subset", "split"])
        writer.writeheader()
        writer.writerows(rows)
    return root


def expert_config(folder: Path, data: Path, name: str, subsets: list[str]) -> dict:
    return {
        "name": name,
        "output": str(folder / "runs"),
        "data": {
            "name": "folder",
            "root": str(data),
            "image_size": [32, 48],
            "subsets": subsets,
            "cache_dir": str(folder / "cache"),
            "workers": 0,
        },
        "network": {
            "name": "deeplabv3plus",
            "backbone": "mobilenet_v2",
            "pretrained": "none",
            "aspp_separable": True,  # a third of the weights: steps and saves are as much faster
        },
        "train": {
            "epochs": 2,
            "batch_size": 4,
            "optimizer": {"name": "adamw", "lr": 2e-3},
            "tensorboard": False,
        },
        "evaluate": {"subsets": ["day", "night", "all"], "overlays": 1},
    }


def gate_config(folder: Path, data: Path, name: str, **gate) -> dict:
    experts = {subset: str(folder / "runs" / subset) for subset in ("day", "night")}
    return {
        **expert_config(folder, data, name, ["day", "night"]),
        "experts": experts,
        "gate": {"type": "simple", "width": 2, "grid": [2, 2], "hidden": 8, **gate},
    }


def write_yaml(path: Path, config: dict) -> Path:
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


class Workshop:
    """A folder with data, trained experts `day` and `night`, and the means to run more."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = write_data(folder / "data")

    def expert(self, name: str, subsets: list[str], **changes) -> dict:
        return {**expert_config(self.folder, self.data, name, subsets), **changes}

    def gate(self, name: str, **gate) -> dict:
        return gate_config(self.folder, self.data, name, **gate)

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def load(self, config: dict, *overrides: str):
        return load(write_yaml(self.folder / "config.yaml", config), overrides)

    def train(self, config: dict, *overrides: str, **options):
        from pipelines.segmentation import train

        return train(self.load(config, *overrides), Options(device="cpu", **options))

    def evaluate(self, config: dict, *overrides: str, **options):
        from pipelines.evaluation import evaluate

        return evaluate(self.load(config, *overrides), Options(device="cpu", **options))


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    os.environ["OMP_NUM_THREADS"] = "1"
    workshop = Workshop(tmp_path_factory.mktemp("workshop"))
    for subset in ("day", "night"):
        workshop.train(workshop.expert(subset, [subset]))
    workshop.train(workshop.gate("gate"))
    return workshop
