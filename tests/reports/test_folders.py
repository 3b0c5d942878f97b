"""What the report tells of a training: the best of the figure that it watched."""

import pytest
import yaml

from reports.folders import open_folder, run_row
from reports.report import _group

METRICS = "epoch,step,images_seen,miou,top1,robust_top1\n1,10,40,0.2,0.7,0.3\n2,20,80,0.1,0.6,0.4\n"


@pytest.mark.parametrize(
    ("train", "best", "epoch", "group"),
    [
        ({"monitor": "miou"}, "20.00", "1", "networks"),
        ({"method": "trades", "monitor": "robust_top1"}, "40.00", "2", "classifiers"),
        ({"method": "standard", "monitor": "top1"}, "70.00", "1", "plain classifiers"),
    ],
)
def test_the_best_is_that_of_the_figure_that_was_watched(tmp_path, train, best, epoch, group):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"name": "one", "train": train}))
    (tmp_path / "metrics.csv").write_text(METRICS)
    folder = open_folder(tmp_path)
    row = run_row(folder)
    assert (row["best"], row["at"], row["steps"]) == (best, epoch, "20")
    assert _group(folder) == group
