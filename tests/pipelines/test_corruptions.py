"""An evaluation under corruptions: killed and restarted, overwritten, refused; and networks of others in it."""

import csv

import pytest

from engine.checkpoints import tensors_sha256
from engine.config import ConfigError, UserError
from evaluation.results import Results
from pipelines.models import load_gate
from tests.pipelines.test_segmentation import evaluation_of

ASKED = {"names": ["brightness", "gaussian_noise"], "severities": [1, 5], "seed": 2}
NET = """
import torch
from torch import nn

def build(num_classes, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.ReLU(), nn.Conv2d(8, num_classes, 1))
"""


def config_of(workshop, name, **changes):
    config = evaluation_of(workshop, name=name)
    config["evaluate"] = {"subsets": ["day", "all"], "overlays": 0, "corruptions": ASKED, **changes}
    return config


def files_of(folder):
    names = ("results.csv", "corruptions.csv", "corruptions.md", "gate.csv")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="session")
def evaluated(workshop):
    workshop.evaluate(config_of(workshop, "corrupted"))
    return workshop.run("corrupted") / "evaluation" / "test"


def test_every_row_is_there_under_every_corruption(evaluated):
    with open(evaluated / "results.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["corruption"] and row["metric"] == "miou_gt_only"]
    models = {row["model"] for row in rows}
    assert {
        "day",
        "night",
        "ensemble mean",
        "ensemble max",
        "gate",
        "true subset",
        "best constant class",
    } <= models
    for model in models:
        pairs = [
            (row["corruption"], row["severity"])
            for row in rows
            if (row["model"], row["subset"]) == (model, "day")
        ]
        assert len(pairs) == len(set(pairs)) == 9
    clean = Results.load(evaluated / "per_image.npz")
    noisy = Results.load(evaluated / "corruptions" / "gaussian_noise_5.npz")
    assert noisy.images == clean.images and (noisy.truth == clean.truth).all()
    assert (noisy.matrices[noisy.by_name["day"]] != clean.matrices[clean.by_name["day"]]).any()


def test_killed_and_restarted_gives_the_same_tables(workshop, evaluated, monkeypatch):
    from pipelines import evaluation

    run_rows, calls = evaluation.run_rows, []

    def dying(*args, change=None, **options):
        calls.append(change)
        if len([one for one in calls if one]) == 3:
            raise KeyboardInterrupt
        return run_rows(*args, change=change, **options)

    monkeypatch.setattr(evaluation, "run_rows", dying)
    config = config_of(workshop, "killed")
    with pytest.raises(KeyboardInterrupt):
        workshop.evaluate(config)
    folder = workshop.run("killed") / "evaluation" / "test"
    assert not (folder / "corruptions.csv").exists()
    calls.clear()
    calls.extend([None] * 9)
    monkeypatch.setattr(evaluation, "run_rows", run_rows)
    ran = []
    monkeypatch.setattr(
        evaluation,
        "run_rows",
        lambda *a, change=None, **o: (ran.append(change), run_rows(*a, change=change, **o))[1],
    )
    workshop.evaluate(config)
    assert len([one for one in ran if one]) == 2  # of four passes two were done
    assert files_of(folder) == files_of(evaluated)
    with pytest.raises(UserError, match="holds an evaluation already"):
        workshop.evaluate(config)
    ran.clear()
    workshop.evaluate(config, overwrite=True)
    assert len([one for one in ran if one]) == 4
    assert files_of(folder) == files_of(evaluated)


def test_passes_of_another_seed_are_not_mixed_in(workshop, evaluated):
    (evaluated / "corruptions.csv").rename(evaluated / "kept.csv")
    try:
        with pytest.raises(
            UserError, match=r"passes of another evaluation, different in seed \(was 2, is 3\)"
        ):
            workshop.evaluate(config_of(workshop, "corrupted"), "evaluate.corruptions.seed=3")
    finally:
        (evaluated / "kept.csv").rename(evaluated / "corruptions.csv")


def test_dry_run_tells_the_passes(workshop, capsys):
    workshop.evaluate(config_of(workshop, "dry"), dry_run=True)
    assert "corruptions: 2 at 2 severities: 4 passes over 8 frames" in capsys.readouterr().out
    assert not (workshop.run("dry")).exists()


def test_config_of_corruptions(workshop):
    def corruptions(text):
        return workshop.load(config_of(workshop, "x"), f"evaluate.corruptions={text}").evaluate.corruptions

    assert corruptions("none") == "none"
    assert len(corruptions("{}").chosen) == 15 and corruptions("{}").severities == [1, 2, 3, 4, 5]
    assert corruptions("{names: all}").chosen[-4:] == [
        "speckle_noise",
        "gaussian_blur",
        "spatter",
        "saturate",
    ]
    assert corruptions("{names: [fog]}").chosen == ["fog"]
    for text, message in (
        ("fog", "none, or a mapping of names, severities, seed"),
        ("{names: [fogg]}", "evaluate.corruptions.names: .fogg. is unknown; .*did you mean 'fog'"),
        ("{names: [fog, fog]}", "each only once"),
        ("{severities: [0]}", "severities: .* whole numbers from 1 to 5"),
        ("{severities: [2, 1]}", "ascending"),
        ("{sed: 1}", "did you mean 'seed'"),
    ):
        with pytest.raises(ConfigError, match=message):
            corruptions(text)


@pytest.fixture(scope="session")
def net(workshop):
    file = workshop.folder / "my_net.py"
    file.write_text(NET)
    return file


def test_networks_of_others_are_rows_beside_our_own(workshop, net):
    config = config_of(workshop, "foreign", corruptions="none", ceilings=True)
    config["baselines"] = {"theirs": {"name": "external", "file": str(net)}}
    config["experts"]["guest"] = {"name": "external", "file": str(net), "args": {"seed": 1}}
    results = workshop.evaluate(config)
    assert {"theirs", "guest", "day", "gate", "ensemble max"} <= set(results.names())
    with open(workshop.run("foreign") / "evaluation/test/matrix.csv", newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    parameters = 3 * 8 * 25 + 8 + 8 * 3 + 3
    assert rows["theirs"]["parameters"] == str(parameters) and rows["theirs"]["images_seen"] == ""
    assert float(rows["theirs"]["gmacs"]) > 0 and rows["ensemble mean"]["steps"] == ""
    assert rows["gate"]["steps"] != ""
    resolved = (workshop.run("foreign") / "evaluation/test/config.yaml").read_text()
    assert str(net) in resolved


def test_a_config_with_an_external_network_and_no_training_is_evaluated_as_it_is(workshop, net):
    config = workshop.expert("only_theirs", ["day", "night"], network={"name": "external", "file": str(net)})
    del config["train"]
    results = workshop.evaluate(config)
    assert results.row("only_theirs").kind == "baseline"


def test_external_networks_can_be_trained_and_loaded_again(workshop, net):
    config = workshop.expert("theirs_trained", ["day"], network={"name": "external", "file": str(net)})
    workshop.train(config)
    results = workshop.evaluate(config)
    assert results.row("theirs_trained").kind == "expert"


def guests(workshop, net, name, **gate):
    config = workshop.gate(name, **gate)
    del config["network"]
    config["experts"] = {
        "first": {"name": "external", "file": str(net)},
        "second": {"name": "external", "file": str(net), "args": {"seed": 1}},
    }
    return config


@pytest.mark.parametrize("what", ["logits", "image"])
def test_gates_over_networks_of_others(workshop, net, what):
    name = f"over_guests_{what}"
    workshop.train(guests(workshop, net, name, input=what))
    mixture, experts = load_gate(str(workshop.run(name)), "gate")
    assert list(experts) == ["first", "second"]
    assert experts["first"].sha256 != experts["second"].sha256
    assert experts["first"].metadata["tensors_sha256"] == tensors_sha256(
        experts["first"].network.network.state_dict()
    )
    results = workshop.evaluate(guests(workshop, net, name, input=what))
    assert {name, "first", "second"} <= set(results.names())
    net.write_text(NET.replace("8, num_classes", "8,  num_classes"))
    try:
        with pytest.raises(UserError, match="was trained with another expert first"):
            load_gate(str(workshop.run(name)), "gate")
    finally:
        net.write_text(NET)


def test_a_gate_that_reads_features_needs_some(workshop, net):
    with pytest.raises(
        UserError, match=r"experts\.first: .*my_net\.py offers no features .*gate\.input: logits"
    ):
        workshop.train(guests(workshop, net, "no_features"))


def test_a_mistake_in_a_foreign_network_is_told_at_a_dry_run(workshop, net):
    config = config_of(workshop, "bad", corruptions="none")
    bad = net.with_name("bad_net.py")
    bad.write_text(NET.replace("8, num_classes, 1)", "8, 7, 1)"))
    config["baselines"] = {"theirs": {"name": "external", "file": str(bad)}}
    with pytest.raises(
        UserError, match=r"bad_net\.py:build gave \[1, 7, 8, 12\] float32, expected logits \[1, 3"
    ):
        workshop.evaluate(config, dry_run=True)


@pytest.mark.parametrize(
    "value, message",
    [
        ("{name: external}", "baselines.theirs.file: missing; external needs it"),
        ("{name: deeplabv3plus}", "baselines.theirs.name: deeplabv3plus has no weights of its own"),
        ("7", "a run folder, a checkpoint file, or a network such as"),
    ],
)
def test_mistakes_in_the_config_are_told(workshop, value, message):
    with pytest.raises(ConfigError, match=message):
        workshop.load({**config_of(workshop, "x"), "baselines": {}}, f"baselines={{theirs: {value}}}")
