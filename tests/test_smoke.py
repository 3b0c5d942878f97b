"""The whole demo in small: every stage, every row, the report; a second run has nothing to do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas

ROOT = Path(__file__).resolve().parents[1]


def run_smoke(folder: Path, config: str = "smoke.yaml") -> str:
    command = [sys.executable, str(ROOT / "run_pipeline.py"), str(ROOT / "configs/demo" / config)]
    environment = {key: value for key, value in os.environ.items() if key != "MOE_CACHE"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_smoke_pipeline_from_nothing_to_the_report(tmp_path):
    assert "8 of 8 stages ran" in run_smoke(tmp_path)
    runs = tmp_path / "runs/smoke"
    matrix = pandas.read_csv(runs / "evaluation/evaluation/test/matrix.csv").set_index("model")
    assert set(matrix["kind"]) == {"baseline", "expert", "ensemble", "gate", "control", "ceiling", "floor"}
    assert matrix["note"].eq("chosen on val").sum() == 1
    together = matrix.loc[["highway", "urban"], "steps"].sum()
    assert (matrix.loc[["baseline", "baseline_2"], "steps"] == together).all()
    report = (runs / "report.html").read_text()
    assert "no evidence about real roads" in re.sub(r"\s+", " ", report)
    assert not re.search(r'(src|href)="(https?:|/|\w+\.png)', report)  # one file that needs no other
    assert "0 of 8 stages ran" in run_smoke(tmp_path)


def test_both_families_give_every_row_of_the_published_table(tmp_path):
    """The stages of configs/pipeline_a2d2.yaml with small networks on generated scenes."""
    told = run_smoke(tmp_path, "smoke_a2d2.yaml")
    assert "16 of 16 stages ran" in told
    nine = [
        "baseline", "highway", "urban", "ensemble mean", "ensemble max", "moe_simple", "moe_simple_w_conv",
        "moe_classwise", "moe_classwise_w_conv",
    ]  # fmt: skip
    for family in ("deeplab", "frrnA"):
        lines = [line.removeprefix(f"{family} | ") for line in told.splitlines() if f"{family} | " in line]
        header = next(place for place, line in enumerate(lines) if line.split()[:2] == ["highway", "urban"])
        rows = lines[header + 1 : header + 10]
        assert [re.split(r"  +", row)[0] for row in rows] == nine
        table = pandas.read_csv(tmp_path / f"runs/smoke_a2d2/{family}/evaluation/test/matrix.csv")
        shared = {"shared_encoder", "shared_encoder:highway", "shared_encoder:urban"}
        assert {*nine, *shared} <= set(table["model"])
        cases = pandas.read_csv(tmp_path / f"runs/smoke_a2d2/{family}/evaluation/test/disagreement.csv")
        simple = cases[(cases["model"] == "moe_simple") & (cases["class"].isna()) & cases["followed"].isna()]
        against = simple[simple["case"].str.contains("contradict")]
        assert len(against) and (against["pixels"] == 0).all()
