"""Every YAML under configs/ loads; the main files are self-contained, short, and open with their command."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from engine.config import Evaluation, Pipeline, load
from pipelines.cli import FAMILIES, SCRIPTS, check

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
MAIN = [name for name in NAMES if Path(name).parent == Path("configs")]
GATE_FILES = {
    "deeplab": [
        f"configs/config_deeplab_moe{kind}.yaml"
        for kind in ("", "_simple", "_simple_w_conv", "_classwise_w_conv")
    ],
    "frrn": [
        f"configs/config_frrnA_moe_{kind}.yaml"
        for kind in ("classwise", "simple", "simple_w_conv", "classwise_w_conv")
    ],
}
NETWORK_FILES = {
    "deeplab": [f"configs/config_deeplab_{kind}.yaml" for kind in ("highway", "urban", "baseline")],
    "frrn": [f"configs/config_frrnA_{kind}.yaml" for kind in ("highway", "urban", "baseline")],
}
NEEDED = {
    "configs/config_deeplab_expert.yaml",
    *(name for family in (*NETWORK_FILES.values(), *GATE_FILES.values()) for name in family),
    "configs/config_deeplab_ensemble_mean.yaml",
    "configs/config_deeplab_ensemble_max.yaml",
    "configs/config_frrnA_ensemble_mean.yaml",
    "configs/config_frrnA_ensemble_max.yaml",
    "configs/config_eval_deeplab_moe.yaml",
    "configs/config_eval_frrn.yaml",
    "configs/pipeline_a2d2.yaml",
    "configs/demo/pipeline.yaml",
    "configs/demo/pipeline_frrn.yaml",
    "configs/demo/smoke.yaml",
    "configs/camvid/pipeline.yaml",
    "configs/camvid/pipeline_frrn.yaml",
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
    alone = {file.removesuffix(".py"): command for command, file in SCRIPTS.items()}
    kind, _, family = script.partition("_")
    check(load(name), *((alone[script], None) if script in alone else (kind, family)), name)
    assert script in alone or family in FAMILIES


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in NAMES
        if name.startswith("configs/cnn_moe/") and "a slim network" in Path(name).read_text()
    ],
)
def test_the_slim_network_of_a_classifier_is_the_change_that_its_file_tells(name):
    told = shlex.split(re.search(r"a slim network: (.*)\n", Path(name).read_text())[1])  # as a shell has it
    mixture, slim = load(name), load(name, told)
    assert (mixture.network.name, slim.network.name) == ("cnn_moe", "cnn")
    kept = ("arch", "ratio", "stem", "enlarge", "mean", "std")
    assert [slim.network.args[key] for key in kept] == [mixture.network.args[key] for key in kept]
    assert slim.train.method == "trades" and slim.train.router is None and slim.train.eps == mixture.train.eps


def test_the_sparse_network_is_trained_as_the_slim_one():
    """Beside the mixture: another network, TRADES, no router."""
    name = "configs/cnn_moe/resnet18_cifar10"
    sparse, mixture = (load(f"{name}{kind}.yaml").resolved() for kind in ("_sparse", ""))
    assert sparse.pop("name") == f"{mixture.pop('name')}_sparse"
    assert sparse["network"] == {
        **{key: value for key, value in mixture["network"].items() if key in sparse["network"]},
        "name": "sparse_cnn",
    }
    assert mixture["train"].pop("router") and not sparse["train"].pop("router", None)
    assert (mixture["train"].pop("method"), sparse["train"].pop("method")) == ("advmoe", "trades")
    assert sparse["train"] == mixture["train"] and sparse["data"] == mixture["data"]


@pytest.mark.parametrize("name", MAIN)
def test_main_configs_are_self_contained_and_short(name):
    text = Path(name).read_text()
    assert "_base_" not in text
    assert len(text.splitlines()) <= (60 if "\nstages:" in text else 45)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_four_gates_of_a_family_differ_in_name_and_gate_only(family):
    configs = [yaml.safe_load(Path(name).read_text()) for name in GATE_FILES[family]]
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
    resolved = [load(name).resolved() for name in GATE_FILES[family]]
    for config in resolved:
        del config["name"], config["gate"]
    assert resolved[1:] == resolved[:-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_networks_of_a_family_differ_in_name_and_subsets_only(family):
    resolved = [load(name).resolved() for name in NETWORK_FILES[family]]
    subsets = [config["data"].pop("subsets") for config in resolved]
    assert subsets == [["highway"], ["urban"], ["highway", "urban"]]
    assert len({config.pop("name") for config in resolved}) == 3
    assert resolved[1:] == resolved[:-1]


def test_the_main_files_of_frrn_name_each_others_runs():
    """What an evaluation, an ensemble or a gate reads is what another file's command has written."""
    written = {load(name).name for name in NETWORK_FILES["frrn"] + GATE_FILES["frrn"]}
    evaluation = load("configs/config_eval_frrn.yaml")
    read = {*evaluation.baselines.values(), *evaluation.experts.values(), *evaluation.gates.values()}
    assert {Path(path).name for path in read} == written
    for name in (*GATE_FILES["frrn"], *(n for n in MAIN if n.startswith("configs/config_frrnA_ensemble"))):
        assert load(name).experts == evaluation.experts


@pytest.mark.parametrize("name", [*NETWORK_FILES["frrn"], *GATE_FILES["frrn"]])
def test_frrn_b_is_one_word_away(name):
    changed = load(name, ["network.variant=B"])
    assert (load(name).network.args["variant"], changed.network.args["variant"]) == ("A", "B")
    assert Path(name).read_text().count("variant: A") == 1


@pytest.mark.parametrize("folder", ["demo", "camvid"])
def test_pipelines_of_both_families_have_the_same_stages_and_rows(folder):
    from pipelines.stages import build_stages

    deeplab, frrn = (
        build_stages(load(f"configs/{folder}/{name}.yaml")) for name in ("pipeline", "pipeline_frrn")
    )
    assert list(deeplab) == list(frrn)
    for name, stage in frrn.items():
        theirs, ours = deeplab[name].config, stage.config
        if isinstance(ours, Evaluation):
            assert [*ours.baselines, *ours.experts, *ours.gates] == [
                *theirs.baselines,
                *theirs.experts,
                *theirs.gates,
            ]
        else:
            assert (theirs.network.name, ours.network.name) == ("deeplabv3plus", "frrn")
            assert ours.network.args["width"] < 1
        size = theirs.data.image_size  # FRRN is slow: it may see smaller frames
        assert ours.data.model_copy(update={"image_size": size}) == theirs.data
        assert ours.data.image_size <= size
