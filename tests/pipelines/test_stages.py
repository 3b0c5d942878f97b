"""Stages run when something they depend on changed, and never otherwise."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from engine.checkpoints import load_state
from engine.config import UserError, load
from pipelines import stages as module
from pipelines.cli import Options
from tests.pipelines.conftest import expert_config, gate_config, write_yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path, workshop):
    """A pipeline of one expert pair, a gate and an evaluation, with the experts' files as stage configs."""
    data = shutil.copytree(workshop.data, tmp_path / "data")
    expert = expert_config(tmp_path, data, "expert", ["day"])
    expert["train"]["epochs"] = 1
    write_yaml(tmp_path / "expert.yaml", expert)
    gate = gate_config(tmp_path, data, "gate")
    gate["train"]["epochs"] = 1
    write_yaml(tmp_path / "gate.yaml", gate)
    shared = {key: expert[key] for key in ("name", "data", "evaluate")}
    write_yaml(
        tmp_path / "evaluation.yaml", {**shared, "experts": {"day": "x", "night": "y"}, "ensembles": ["mean"]}
    )
    experts = {"day": "@day", "night": "@night"}
    pipeline = {
        "name": "line",
        "output": str(tmp_path / "runs"),
        "report": False,
        "stages": {
            "day": {"config": "expert.yaml"},
            "night": {"config": "expert.yaml", "set": {"data.subsets": ["night"], "train.seed": 7}},
            "gate": {"config": "gate.yaml", "set": {"experts": experts}},
            "evaluation": {
                "config": "evaluation.yaml",
                "set": {"experts": experts, "gates": {"gate": "@gate"}},
            },
        },
    }
    write_yaml(tmp_path / "pipeline.yaml", pipeline)
    return tmp_path


def run(folder, *overrides, **options):
    module.run(load(folder / "pipeline.yaml", overrides), Options(device="cpu", **options))


def ran(capsys) -> list[str]:
    """Names of the stages that were not skipped, in the order in which they finished."""
    return re.findall(r"^(\w+): finished in", capsys.readouterr().out, re.MULTILINE)


def change(file, key, value) -> None:
    config = yaml.safe_load(file.read_text())
    section, name = key.split(".")
    config[section][name] = value
    write_yaml(file, config)


def test_life_of_a_pipeline(folder, capsys):
    """One story, since each step takes seconds: run, skip, change, why, tamper, force, other data."""
    run(folder)
    assert ran(capsys) == ["day", "night", "gate", "evaluation"]
    evaluation = folder / "runs/line/evaluation/evaluation/test"
    assert (evaluation / "results.csv").exists()

    run(folder)
    assert ran(capsys) == []

    change(folder / "gate.yaml", "gate.hidden", 4)
    run(folder, why=True)
    told = capsys.readouterr().out
    assert "day: done" in told and "gate.hidden changed from 8 to 4" in told and "gate runs before it" in told
    run(folder)
    assert ran(capsys) == ["gate", "evaluation"]

    change(folder / "expert.yaml", "data.cache_dir", str(folder / "elsewhere"))
    run(folder)
    assert ran(capsys) == []  # where the cache lies changes no result

    (folder / "runs/line/night/checkpoints/best.safetensors").unlink()
    run(folder, status=True)
    assert "night: to run" in capsys.readouterr().out
    run(folder)
    assert ran(capsys) == ["night"]  # trained again to the same bytes, so what stands on it is still right

    run(folder, force="evaluation")
    assert ran(capsys) == ["evaluation"]

    run(folder, only="gate")
    assert ran(capsys) == []

    shutil.copy(folder / "data/labels/day_train_0.png", folder / "data/labels/day_train_1.png")
    image = folder / "data/images/day_train_1.png"
    image.write_bytes((folder / "data/images/night_train_1.png").read_bytes())
    run(folder, why=True)
    assert "data changed" in capsys.readouterr().out


def test_interrupted_stage_goes_on_where_it_stopped(folder, capsys, monkeypatch):
    from pipelines import segmentation

    train = segmentation.train
    calls = []

    def killed(config, options):
        calls.append(options.resume)
        if len(calls) == 1:
            train(config, options)
            raise KeyboardInterrupt
        return train(config, options)

    monkeypatch.setattr(segmentation, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        run(folder, only="day")
    run(folder, only="day")
    assert calls == [False, True]


def test_interrupted_evaluation_keeps_the_passes_that_were_done_and_a_changed_one_begins_anew(
    folder, monkeypatch
):
    from pipelines import evaluation

    pipeline = yaml.safe_load((folder / "pipeline.yaml").read_text())
    del pipeline["stages"]["gate"], pipeline["stages"]["evaluation"]["set"]["gates"]
    write_yaml(folder / "pipeline.yaml", pipeline)
    corruptions = {"names": ["fog"], "severities": [1, 2], "seed": 0}
    change(folder / "evaluation.yaml", "evaluate.corruptions", corruptions)
    run_rows, passes, kills = evaluation.run_rows, [], [KeyboardInterrupt()]

    def counted(*args, change=None, **options):
        if change is not None and len(passes) == 1 and kills:
            raise kills.pop()
        passes.extend([] if change is None else [change])
        return run_rows(*args, change=change, **options)

    monkeypatch.setattr(evaluation, "run_rows", counted)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    assert len(passes) == 1
    run(folder)
    assert len(passes) == 2
    records = json.loads((folder / "runs/line/stages.json").read_text())
    records["evaluation"]["done"] = False  # killed when all was there but this
    (folder / "runs/line/stages.json").write_text(json.dumps(records))
    run(folder)
    assert len(passes) == 2
    change(folder / "evaluation.yaml", "evaluate.corruptions", {**corruptions, "seed": 1})
    run(folder)
    assert len(passes) == 4


def test_jobs_side_by_side_give_the_same_weights_and_label_their_lines(folder, capfd):
    run(folder, only="day")
    alone = (folder / "runs/line/day/checkpoints/best.safetensors").read_bytes()
    run(folder, "jobs=2", "name=both")
    told = capfd.readouterr().out
    assert "night | epoch 1/1 done" in told and "evaluation: finished" in told
    assert (folder / "runs/both/day/checkpoints/best.safetensors").read_bytes() == alone


def test_interrupt_of_jobs_side_by_side_saves_and_goes_on(folder):
    """Ctrl-C on a terminal reaches the pipeline and its workers alike."""
    change(folder / "expert.yaml", "train.epochs", 20)
    change(folder / "expert.yaml", "train.save_steps", 1)
    command = [sys.executable, "run_pipeline.py", str(folder / "pipeline.yaml"), "jobs=2", "--device", "cpu"]
    states = [folder / f"runs/line/{name}/checkpoints/last.pt" for name in ("day", "night")]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not all(state.exists() for state in states):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate()[1]
    assert process.returncode == 130, told
    assert "Traceback" not in told
    steps = [load_state(state)["position"]["step"] for state in states]
    assert all(0 < step < 40 for step in steps)
    run(folder, "jobs=2", only="day")
    assert load_state(states[0])["position"]["step"] == 40


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_save_and_end_with_a_pipeline_that_is_killed(folder, number):
    """SIGKILL of the pipeline alone, of which its workers hear nothing; SIGTERM of all, as of a scheduler."""
    change(folder / "expert.yaml", "train.epochs", 200)
    command = [sys.executable, "run_pipeline.py", str(folder / "pipeline.yaml"), "jobs=2", "--device", "cpu"]
    runs = [folder / f"runs/line/{name}" for name in ("day", "night")]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    while not all((run / "checkpoints/last.pt").exists() for run in runs):
        assert process.poll() is None
        time.sleep(0.05)
    (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)
    process.wait()
    for _ in range(600):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("workers outlive the pipeline")
    assert all("the state is saved" in (run / "log.txt").read_text() for run in runs)


def test_stages_that_are_done_take_no_place_beside_those_that_run(folder, monkeypatch):
    """Both of two jobs are given work before any is waited for, also to what needed a stage that is done."""
    monkeypatch.setattr(module, "result_hash", lambda stage: "made")
    run(folder, only="day")
    events = []

    def submit(label, function, *arguments):
        events.append(label)
        return Future()

    def wait(futures, return_when):
        events.append("wait")
        for future in futures:
            future.set_result(0.0)
        return SimpleNamespace(done=set(futures))

    monkeypatch.setattr(module, "workers", lambda jobs: nullcontext(submit))
    monkeypatch.setattr(module, "wait", wait)
    stages = module.build_stages(load(folder / "pipeline.yaml"))
    more = [
        replace(stages["night"], name=name, needs=needs) for name, needs in (("late", ("day",)), ("last", ()))
    ]
    records = module.Records(folder / "runs/line/stages.json")
    module.run_stages([stages["day"], stages["night"], *more], records, Options(device="cpu"), 2)
    assert events == ["night", "late", "wait", "last", "wait"]


def test_failing_stage_stops_the_pipeline_but_not_what_runs_beside_it(folder, capsys, monkeypatch):
    change(folder / "expert.yaml", "train.batch_size", 500)
    with pytest.raises(UserError, match="train.batch_size: 500"):
        run(folder)
    assert ran(capsys) == []


def test_mistakes_of_all_stages_are_told_at_once(folder):
    overrides = [f"stages.{name}.set.train.epohs=3" for name in ("day", "gate")]
    with pytest.raises(UserError) as error:
        run(folder, *overrides)
    told = str(error.value).splitlines()
    assert [line.partition(": train.epohs: unknown key")[0] for line in told] == [
        "stages.day.set",
        "stages.gate.set",
    ]


def test_seed_shifts_every_training_and_its_own_offsets_stay(folder):
    plain = module.build_stages(load(folder / "pipeline.yaml"))
    shifted = module.build_stages(load(folder / "pipeline.yaml", ["seed=10"]))
    assert [
        shifted[name].config.train.seed - plain[name].config.train.seed for name in ("day", "night", "gate")
    ] == [10] * 3
    assert plain["night"].config.train.seed == 7


def test_shared_settings_reach_every_stage_but_training_ones_only_those_that_train(folder):
    config = load(folder / "pipeline.yaml", ["set={train.batch_size: 2, data.image_size: [16, 16]}"])
    built = module.build_stages(config)
    assert {stage.config.data.image_size for stage in built.values()} == {(16, 16)}
    assert built["gate"].config.train.batch_size == 2


def test_a_run_without_training_is_a_stage_that_evaluates(folder, capsys):
    """Such as a network of others that is evaluated by itself."""
    config = yaml.safe_load((folder / "gate.yaml").read_text())
    whole = {key: config[key] for key in ("name", "output", "data", "evaluate")}
    whole["data"]["subsets"] = ["day", "night"]
    build = "import torch\n\ndef build():\n    return torch.nn.Conv2d(3, 3, 1)\n"
    (folder / "theirs.py").write_text(build)
    whole["network"] = {"name": "external", "file": str(folder / "theirs.py"), "function": "build"}
    write_yaml(folder / "theirs.yaml", whole)
    pipeline = yaml.safe_load((folder / "pipeline.yaml").read_text())
    pipeline["stages"] = {"theirs": {"config": "theirs.yaml"}}
    write_yaml(folder / "pipeline.yaml", pipeline)
    run(folder)
    assert ran(capsys) == ["theirs"]
    assert (folder / "runs/line/theirs/evaluation/test/matrix.csv").exists()


def test_ctrl_c_ends_an_evaluation_in_a_worker(tmp_path):
    """Outside of a training, too, a worker heeds it while it has work, and not while it waits."""
    script = (
        "import os, signal, sys, time\n"
        "from pipelines.workers import run_labelled\n"
        "def stop():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "try:\n"
        "    run_labelled('stage', stop)\n"
        "except KeyboardInterrupt:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('ended')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr


def test_missing_weights_are_told_by_stage_and_role(folder):
    with pytest.raises(UserError, match="stage gate needs the weights of day"):
        run(folder, only="gate")


def test_unknown_stage_is_told_with_those_there_are(folder):
    with pytest.raises(UserError, match="--only gates: there is no such stage.*day, night, gate, evaluation"):
        run(folder, only="gates")


@pytest.mark.parametrize(("name", "work"), [("day", "network"), ("gate", "gate"), ("evaluation", "evaluate")])
def test_a_raised_version_constant_runs_that_kind_again(folder, monkeypatch, name, work):
    stage = module.build_stages(load(folder / "pipeline.yaml"))[name]
    before = module.ingredients_of(stage)
    monkeypatch.setitem(module.VERSIONS, work, 99)
    assert module.changes(before, module.ingredients_of(stage)) == [
        f"version changed from {before['version']} to 99"
    ]


def test_another_pretrained_file_under_the_same_name_changes_the_key(folder):
    file = folder / "encoder.pth"
    file.write_bytes(b"one")
    change(folder / "expert.yaml", "network.pretrained", str(file))
    stage = module.build_stages(load(folder / "pipeline.yaml"))["day"]
    before = module.ingredients_of(stage)
    file.write_bytes(b"two")
    assert [line.split(" changed")[0] for line in module.changes(before, module.ingredients_of(stage))] == [
        "weights.pretrained"
    ]


def test_another_perturbation_under_the_same_name_changes_the_key_of_an_evaluation(folder):
    files = {name: folder / f"{name}.safetensors" for name in ("shown", "transferred")}
    attacks = {name: {"name": "universal", "file": str(file)} for name, file in files.items()}
    change(folder / "evaluation.yaml", "evaluate.attacks", [{"name": "fgsm"}, attacks["shown"]])
    change(folder / "evaluation.yaml", "evaluate.transfer", attacks["transferred"])
    change(folder / "expert.yaml", "evaluate.attacks", [attacks["shown"]])
    stages = module.build_stages(load(folder / "pipeline.yaml"))
    for file in files.values():
        file.write_bytes(b"one")
    before = {name: module.ingredients_of(stage) for name, stage in stages.items()}
    for file in files.values():
        file.write_bytes(b"two")
        changed = module.changes(before["evaluation"], module.ingredients_of(stages["evaluation"]))
        assert f"weights.{file}" in [line.split(" changed")[0] for line in changed]
    assert before["day"] == module.ingredients_of(stages["day"])


def test_what_is_evaluated_changes_no_training_but_how_absent_classes_count_does(folder):
    def keys(*overrides):
        built = module.build_stages(load(folder / "pipeline.yaml", overrides))
        return {name: module.ingredients_of(built[name]) for name in ("day", "evaluation")}

    before, overlays, absent = keys(), keys("set={evaluate.overlays: 3}"), keys("set={evaluate.absent: zero}")
    assert overlays["day"] == before["day"] and overlays["evaluation"] != before["evaluation"]
    assert absent["day"] != before["day"]


def test_records_survive_as_json(folder):
    records = module.Records(folder / "stages.json")
    record = {"key": "a", "ingredients": {}, "done": True}
    records.write("day", record)
    assert module.Records(folder / "stages.json").read("day") == record
    assert json.loads((folder / "stages.json").read_text())


@pytest.mark.parametrize("text", ["", '{"day": {"do', "[]", '{"day": 3}', '{"day": {"key": "a"}}', b"\xff"])
def test_damaged_records_are_told_with_their_file(folder, text):
    path = folder / "stages.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"stages.json: damaged; .* delete it, and every stage runs again"):
        module.Records(path)


def test_a_section_that_a_newer_version_added_and_nobody_uses_is_no_change():
    before = {"config.train.epochs": 2, "config.train.ema": None}
    after = {"config.train.epochs": 2, "config.cache": "none", "config.shared_encoder": None}
    assert module.changes(before, after) == []
    assert module.changes(before, {**after, "config.cache": "auto"}) == ["config.cache is new: auto"]
    assert module.changes({**before, "config.train.ema": 0.9}, after) == ["config.train.ema is gone, was 0.9"]


def test_a_pipeline_is_no_stage(folder):
    change(folder / "pipeline.yaml", "stages.day", {"config": "pipeline.yaml"})
    with pytest.raises(
        UserError, match=r"^stages\.day\.config: .*pipeline\.yaml is a pipeline; name the config of"
    ):
        module.build_stages(load(folder / "pipeline.yaml"))
