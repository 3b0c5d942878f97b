"""Every YAML under configs/ loads; the main files are self-contained, short, and open with their command."""

import re
from pathlib import Path

import pytest
import yaml

from engine.config import Pipeline, load
from pipelines.cli import FAMILIES, check

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
MAIN = [name for name in NAMES if Path(name).parent == Path("configs")]
GATE_FILES = [
    f"configs/config_deeplab_moe{kind}.yaml"
    for kind in ("", "_simple", "_simple_w_conv", "_classwise_w_conv")
]
NEEDED = {
    "configs/config_deeplab_expert.yaml",
    "configs/config_deeplab_highway.yaml",
    "configs/config_deeplab_urban.yaml",
    "configs/config_deeplab_baseline.yaml",
    *GATE_FILES,
    "configs/config_deeplab_ensemble_mean.yaml",
    "configs/config_deeplab_ensemble_max.yaml",
    "configs/config_eval_deeplab_moe.yaml",
    "configs/pipeline_a2d2.yaml",
    "configs/demo/pipeline.yaml",
    "configs/demo/smoke.yaml",
    "configs/camvid/pipeline.yaml",
}


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch):
    """The repository's root as working folder; no variable is set that a config may fall back from."""
    monkeypatch.chdir(ROOT)
    for name in re.findall(r"\$\{(\w+)", "".join(path.read_text() for path in FILES)):
        monkeypatch.delenv(name, raising=False)


def test_the_configs_that_users_are_told_of_are_there():
    assert set(NAMES) >= NEEDED


@pytest.mark.parametrize("name", NAMES)
def test_config_loads(name):
    load(name)


@pytest.mark.parametrize(
    "name", [name for name, path in zip(NAMES, FILES, strict=True) if "\nstages:" in path.read_text()]
)
def test_every_stage_of_a_pipeline_loads(name):
    from pipelines.stages import build_stages

    config = load(name)
    assert isinstance(config, Pipeline)
    assert list(build_stages(config)) == list(config.stages)


@pytest.mark.parametrize("name", NAMES)
def test_config_opens_with_the_command_that_takes_it(name):
    command = re.match(rf"# python (\w+)\.py {re.escape(name)}( |\n)", Path(name).read_text())
    assert command, f"{name} opens with # python SCRIPT.py {name}"
    script = command[1]
    assert (ROOT / f"{script}.py").is_file()
    kind, _, family = script.partition("_")
    check(load(name), *(("pipeline", None) if script == "run_pipeline" else (kind, family)), name)
    assert script == "run_pipeline" or family in FAMILIES


@pytest.mark.parametrize("name", MAIN)
def test_main_configs_are_self_contained_and_short(name):
    text = Path(name).read_text()
    assert "_base_" not in text
    assert len(text.splitlines()) <= 45


def test_the_four_gates_of_a_family_differ_in_name_and_gate_only():
    configs = [yaml.safe_load(Path(name).read_text()) for name in GATE_FILES]
    gates = [config.pop("gate") for config in configs]
    names = [config.pop("name") for config in configs]
    assert len(set(names)) == 4
    assert configs[1:] == configs[:-1]
    assert [(gate["type"], gate["conv"]) for gate in gates] == [
        ("classwise", False),
        ("simple", False),
        ("simple", True),
        ("classwise", True),
    ]
    resolved = [load(name).resolved() for name in GATE_FILES]
    for config in resolved:
        del config["name"], config["gate"]
    assert resolved[1:] == resolved[:-1]
