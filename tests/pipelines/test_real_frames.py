"""Real A2D2 frames through the whole path: an expert trained for a few steps and evaluated at 1920x1208."""

import os
from pathlib import Path

import pytest

from dataloaders.check import check
from tests.pipelines.conftest import expert_config, write_yaml

SAMPLE = Path(os.environ.get("MOE_DATA", "")) / "a2d2_sample" / "camera_lidar_semantic"
LISTS = {
    "train": ["20180807145028_label_frontcenter_000006882", "20181107132300_label_frontcenter_000002994"],
    "val": ["20181107132730_label_frontcenter_000005599"],
    "test": ["20181108091945_label_frontcenter_000022360", "20181108123750_label_frontcenter_000004559"],
}

pytestmark = pytest.mark.skipif(
    "MOE_DATA" not in os.environ or not SAMPLE.is_dir(), reason="MOE_DATA names no folder with a2d2_sample"
)


@pytest.fixture
def config(tmp_path):
    from engine.config import load

    lists = tmp_path / "splits"
    lists.mkdir()
    for split, names in LISTS.items():
        (lists / f"road_{split}_gt.txt").write_text("".join(f"road/GT/{name}.png\n" for name in names))
    plain = expert_config(tmp_path, SAMPLE, "a2d2", ["road"])
    plain["data"] |= {"name": "a2d2", "splits": str(lists)}
    plain["train"] |= {"epochs": 1, "batch_size": 2}
    plain["evaluate"] = {"overlays": 1, "resolution": "native"}
    return load(write_yaml(tmp_path / "config.yaml", plain))


def test_sample_frames_have_no_unknown_colour_and_no_problem(config):
    report = check(config.data.build())
    assert not report.problems and not report.unknown


def test_expert_trains_and_every_native_pixel_is_counted(config, tmp_path):
    from pipelines.cli import Options
    from pipelines.evaluation import evaluate
    from pipelines.segmentation import train

    train(config, Options(device="cpu"))
    results = evaluate(config, Options(device="cpu"))
    assert results.total("a2d2", "road").sum() == 2 * 1920 * 1208
    folder = tmp_path / "runs/a2d2/evaluation/test"
    assert "the label's own size" in (folder / "matrix.md").read_text()
    assert len(list((folder / "overlays").glob("*.png"))) == 1
