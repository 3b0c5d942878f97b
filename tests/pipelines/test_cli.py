"""The command line: options, exit codes, which config fits which script, and what stays unimported."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from engine.config import Evaluation, Interrupted, Pipeline, Run, UserError, from_dict
from pipelines import cli
from pipelines.cli import Options, main

ROOT = Path(__file__).resolve().parents[2]
DATA = "data: {name: a2d2, root: somewhere, image_size: [48, 64], subsets: [highway]}\n"
NETWORK = f"name: expert\n{DATA}network: {{name: deeplabv3plus}}\ntrain: {{epochs: 3}}\n"
FRRN = NETWORK.replace("deeplabv3plus", "frrn, variant: B")
ENSEMBLE = f"name: ensemble\n{DATA}experts: {{a: runs/a, b: runs/b}}\nensemble: {{type: mean}}\n"
EVALUATION = f"name: rows\n{DATA}baselines: {{baseline: runs/baseline}}\n"
SCRIPTS = [f"{command}_{family}.py" for family in cli.FAMILIES for command in ("train", "evaluate")]
PIPELINE = "name: stages\nstages: {expert: {config: config.yaml}}\n"


@pytest.fixture
def calls(monkeypatch):
    """Replaces what the commands run by recorders; `raises` makes them fail."""
    made = types.SimpleNamespace(list=[], raises=None)

    def record(command):
        def run(config, options):
            made.list.append((command, config, options))
            if made.raises is not None:
                raise made.raises

        return run

    for module, function, command in (
        ("segmentation", "train", "train"),
        ("evaluation", "evaluate", "evaluate"),
        ("stages", "run", "pipeline"),
        ("classification", "train", "train_cnn_moe"),
    ):
        stand_in = types.ModuleType(module)
        setattr(stand_in, function, record(command))
        monkeypatch.setitem(sys.modules, f"pipelines.{module}", stand_in)
    return made


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        (tmp_path / "config.yaml").write_text(text)
        return "config.yaml"

    return write


def train(*argv: str) -> int:
    return main("Train.", "train", family="deeplab", argv=list(argv))


def test_options_and_overrides_in_any_order(write, calls):
    path = write(NETWORK)
    assert train("--dry-run", path, "train.epochs=5", "--device", "cuda:1", "name=other", "--resume") == 0
    (command, config, options), *others = calls.list
    assert (command, others) == ("train", [])
    assert isinstance(config, Run)
    assert (config.train.epochs, config.name) == (5, "other")
    assert options == Options(dry_run=True, resume=True, device="cuda:1")


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_several_processes_train_nothing_and_may_evaluate(write, calls, monkeypatch, capsys, dry):
    cnn = "name: c\ndata: {name: digits}\nnetwork: {name: cnn, arch: resnet18}\n"
    commands = {
        "train": NETWORK, "train_cnn_moe": cnn + "train: {method: standard, epochs: 1}\n", "pipeline": PIPELINE,
        "evaluate": NETWORK,
    }  # fmt: skip
    for world in ("2", "1", ""):
        monkeypatch.setenv("WORLD_SIZE", world)
        for command, text in commands.items():
            calls.list.clear()
            refused = world == "2" and command != "evaluate"
            assert main("", command, argv=[write(text), *dry]) == (2 if refused else 0)
            assert [one[0] for one in calls.list] == ([] if refused else [command])
            error = capsys.readouterr().err
            assert error.count("\n") == refused and error.startswith(
                "WORLD_SIZE: 2 processes " if refused else ""
            )


def test_a_flag_says_what_it_does_in_its_own_command(capsys):
    told = {}
    for command in ("train", "evaluate", "train_cnn_moe", "evaluate_cnn_moe"):
        with pytest.raises(SystemExit):
            main("", command, argv=["--help"])
        told[command] = " ".join(capsys.readouterr().out.split())
    for training, evaluating in (("train", "evaluate"), ("train_cnn_moe", "evaluate_cnn_moe")):
        assert "--overwrite empty the run folder first" in told[training]
        assert "--overwrite evaluate again" in told[evaluating]
        assert "--resume go on with an evaluation that was stopped" in told[evaluating]
        assert "last.pt" in told[training] and "last.pt" not in told[evaluating]


def test_options_of_a_pipeline(write, calls):
    path = write(PIPELINE)
    assert (
        main("Run.", "pipeline", argv=[path, "--status", "--why", "--only", "expert", "--force", "expert"])
        == 0
    )
    (command, config, options), *_ = calls.list
    assert (command, type(config)) == ("pipeline", Pipeline)
    assert options == Options(status=True, why=True, only="expert", force="expert")


def test_evaluate_takes_runs_and_evaluations(write, calls):
    for text, kind in ((NETWORK, Run), (ENSEMBLE, Run), (EVALUATION, Evaluation)):
        assert main("Evaluate.", "evaluate", family="deeplab", argv=[write(text)]) == 0
        assert type(calls.list[-1][1]) is kind


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--devise", "cpu", "config.yaml"],
        ["config.yaml", "--device", "gpu"],
        ["config.yaml", "--device", "cuda:x"],
        ["config.yaml", "--resume", "--overwrite"],
        ["config.yaml", "--only", "expert"],
        ["config.yaml", "--dry"],
    ],
)
def test_wrong_arguments_exit_with_2(write, calls, argv):
    write(NETWORK)
    with pytest.raises(SystemExit) as stop:
        train(*argv)
    assert stop.value.code == 2
    assert calls.list == []


@pytest.mark.parametrize(
    ("command", "family", "text", "words", "run"),
    [
        ("train", "deeplab", ENSEMBLE, "an ensemble has nothing to train", "evaluate_deeplab.py"),
        ("train", "deeplab", EVALUATION, "nothing to train", "evaluate_deeplab.py"),
        ("train", "deeplab", PIPELINE, "a pipeline of stages", "run_pipeline.py"),
        ("evaluate", "deeplab", PIPELINE, "a pipeline of stages", "run_pipeline.py"),
        (
            "train",
            "deeplab",
            NETWORK.replace("train: {epochs: 3}", ""),
            "train: missing",
            "evaluate_deeplab.py",
        ),
        ("train", "frrn", ENSEMBLE, "an ensemble has nothing to train", "evaluate_frrn.py"),
        ("train", "frrn", NETWORK, "train_frrn.py takes frrn, not deeplabv3plus", "train_deeplab.py"),
        ("evaluate", "frrn", NETWORK, "evaluate_frrn.py takes frrn", "evaluate_deeplab.py"),
        (
            "train",
            "deeplab",
            FRRN,
            "train_deeplab.py takes deeplabv3plus, smp, external, not frrn",
            "train_frrn.py",
        ),
        ("pipeline", None, NETWORK, "a single run", "train_deeplab.py"),
        ("pipeline", None, FRRN, "a single run", "train_frrn.py"),
        ("pipeline", None, ENSEMBLE, "an ensemble has nothing to train", "evaluate_deeplab.py"),
        ("pipeline", None, EVALUATION, "evaluates finished runs", "evaluate_deeplab.py"),
    ],
)
def test_another_script_is_named(write, calls, capsys, command, family, text, words, run):
    assert main("", command, family=family, argv=[write(text)]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.rstrip().endswith(f"run: python {run} config.yaml")
    assert (ROOT / run).is_file()
    assert calls.list == []


def test_network_of_another_family_is_refused(write, calls, capsys, monkeypatch):
    monkeypatch.setitem(cli.FAMILIES, "other", ("something",))
    monkeypatch.setitem(cli.FAMILIES, "deeplab", ("another",))
    monkeypatch.setitem(cli.FAMILIES, "third", ("deeplabv3plus",))
    assert train(write(NETWORK)) == 2
    assert capsys.readouterr().err == (
        "config.yaml: network.name: train_deeplab.py takes another, not deeplabv3plus; "
        "run: python train_third.py config.yaml\n"
    )
    assert calls.list == []


def test_exit_codes(write, calls, capsys):
    path = write(NETWORK)
    for raised, code, message in (
        (None, 0, ""),
        (UserError("experts.a: no checkpoint"), 2, "experts.a: no checkpoint\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Interrupted("go on with --resume"), 130, "go on with --resume\n"),
    ):
        calls.raises = raised
        assert train(path) == code
        assert capsys.readouterr().err == message
    calls.raises = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        train(path)


def test_print_config_prints_what_loads_again_and_runs_nothing(write, calls, capsys):
    assert train(write(NETWORK), "train.epochs=4", "--print-config") == 0
    printed = capsys.readouterr().out
    assert re.search(r"epochs: 4 +# command line\n", printed)
    assert re.search(r"name: deeplabv3plus +# config.yaml:3\n", printed)
    assert calls.list == []
    assert train(write(printed)) == 0
    assert from_dict(calls.list[0][1].resolved()).train.epochs == 4


def test_wrong_config_is_told_and_nothing_runs(write, calls, capsys):
    assert train(write(NETWORK), "train.epochs=none") == 2
    assert (
        capsys.readouterr().err
        == 'command line: train.epochs: "none" is wrong; expected a whole number above 0\n'
    )
    assert calls.list == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_three_mistakes_in_one_answer_without_heavy_imports(tmp_path, script):
    config = tmp_path / "broken.yaml"
    config.write_text(
        NETWORK.replace("train: {epochs: 3}", "train: {epochs: 3, batch_sise: 4}").replace("plus}", "plis}")
        + "evalution: {split: val}\n"
    )
    code = (
        "import runpy, sys\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n"
        "    heavy = {'torch', 'segmentation_models_pytorch', 'albumentations', 'cv2', 'numpy', 'pandas'}\n"
        "    print('imported:', sorted(heavy & set(sys.modules)))\n"
    )
    run = f"import sys; sys.argv = [{script!r}, {str(config)!r}]\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", run],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    lines = done.stderr.splitlines()
    assert [line.split("; allowed")[0] for line in lines] == [
        f'{config}:3: network.name: "deeplabv3plis" is unknown',
        f"{config}:4: train.batch_sise: unknown key",
        f"{config}:5: evalution: unknown key",
    ]
    suggested = [line.rpartition("; did you mean ")[2] for line in lines]
    assert suggested == ["'deeplabv3plus'?", "'batch_size'?", "'evaluate'?"]
    assert done.returncode == 2
    assert done.stdout == "imported: []\n"


def test_scripts_explain_themselves():
    for script in (*SCRIPTS, "run_pipeline.py"):
        done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0
        assert f"python {script}" in " ".join(done.stdout.split())
        assert "--print-config" in done.stdout
