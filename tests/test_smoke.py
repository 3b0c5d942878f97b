"""The whole demo in small: every stage, every row, the report; a second run has nothing to do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas

ROOT = Path(__file__).resolve().parents[1]


def run_smoke(folder: Path) -> str:
    command = [sys.executable, str(ROOT / "run_pipeline.py"), str(ROOT / "configs/demo/smoke.yaml")]
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
