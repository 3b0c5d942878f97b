"""The test-only ESPNet: the published weights fit it exactly and give about the stated figure on real frames."""

import csv
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from engine.config import load
from metrics.confusion import aacc, confusion, miou
from networks.external import External

HERE = Path(__file__).parent
DATA = Path(os.environ.get("MOE_DATA", ""))

pytestmark = pytest.mark.skipif(
    "MOE_DATA" not in os.environ or not (DATA / "weights/espnet").is_dir(),
    reason="MOE_DATA names no folder with weights/espnet",
)


@pytest.fixture(scope="module")
def network():
    return External(11, file=str(HERE / "espnet.py")).eval()


def test_reaches_about_the_stated_figure(network):
    with open(DATA / "camvid/manifest.csv", newline="") as file:
        names = [row["name"] for row in csv.DictReader(file) if row["official_split"] == "test"][::12]
    total = np.zeros((11, 11), np.int64)
    for name in names:
        image = cv2.imread(str(DATA / f"camvid/images/{name}.jpg"), cv2.IMREAD_COLOR_RGB)
        labels = cv2.imread(str(DATA / f"camvid/labels/{name}.png"), cv2.IMREAD_UNCHANGED)
        with torch.no_grad():
            logits = network(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)
        total += confusion(logits.argmax(1), torch.from_numpy(labels)[None], 11).sum(0).numpy()
    assert len(names) == 13 and logits.shape == (1, 11, 360, 480)
    assert 0.52 < miou(total, "gt_only") < 0.62 and 0.84 < aacc(total) < 0.91


def test_gradient_reaches_the_image_and_padding_takes_an_odd_size():
    network = External(11, file=str(HERE / "espnet.py"), stride=8).eval()
    images = torch.rand(1, 3, 45, 61, requires_grad=True)
    logits = network(images)
    assert logits.shape == (1, 11, 45, 61)
    (gradient,) = torch.autograd.grad(logits.square().mean(), images)
    assert gradient.abs().sum() > 0


def test_its_config_loads(monkeypatch):
    monkeypatch.chdir(HERE.parents[1])
    config = load("tests/networks/espnet_camvid.yaml")
    assert config.baselines["espnet"].name == "external"
    assert config.data.build().counts["open", "test"] + config.data.build().counts["street", "test"] == 153
