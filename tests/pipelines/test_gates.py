"""Gates in one pass: each ends as if trained alone; the loss at the logits' grid; pipelines name them."""

import csv

import pytest
import torch

from engine.config import Gate, UserError, load
from engine.losses import cross_entropy
from metrics.gate import gate_statistics
from networks.gates import SimpleGate
from networks.moe import Frozen, MixtureOfExperts
from networks.resize import upsample
from networks.routing import routing_penalty
from pipelines import segmentation as module
from pipelines import stages
from pipelines.cli import Options
from pipelines.gates import gate_loss, reduced
from tests.networks.conftest import ToyExpert
from tests.pipelines.conftest import write_yaml

SMALL = {"width": 2, "grid": [2, 2], "hidden": 8}
GATES = {
    "simple": {"type": "simple", **SMALL},
    "simple_w_conv": {"type": "simple", "conv": True, **SMALL},
    "classwise": {"type": "classwise", **SMALL},
    "classwise_w_conv": {"type": "classwise", "conv": True, "loss_at": "logits", **SMALL},
    "other_seed": {"type": "simple", "seed": 7, **SMALL},
    "other_rate": {"type": "simple", "optimizer": {"name": "sgd", "lr": 0.1}, **SMALL},
}


@pytest.fixture(scope="session")
def together(workshop):
    """All gates, trained in one pass; augmentation on."""
    config = workshop.gate("together")
    del config["gate"]
    workshop.train({**config, "gates": GATES})
    return workshop.run("together")


@pytest.mark.parametrize("name", GATES)
def test_a_gate_trained_with_others_is_the_one_trained_alone_bit_for_bit(workshop, together, name):
    config = workshop.gate(f"by_itself/{name}")
    workshop.train({**config, "gate": GATES[name]})
    for file in ("checkpoints/best.safetensors", "metrics.csv"):
        assert (together / name / file).read_bytes() == (
            workshop.run(f"by_itself/{name}") / file
        ).read_bytes()


def test_the_gates_differ(together):
    contents = {(together / name / "checkpoints/best.safetensors").read_bytes() for name in GATES}
    assert len(contents) == len(GATES)
    with open(together / "simple/metrics.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


def test_each_batch_passes_the_experts_once(workshop, monkeypatch):
    """Two epochs: 4 training batches of 4 and 2 validation batches each, whatever the number of gates."""
    calls = []
    forward = Frozen.forward_features
    monkeypatch.setattr(
        Frozen, "forward_features", lambda self, images: calls.append(len(images)) or forward(self, images)
    )
    config = workshop.gate("counted")
    del config["gate"]
    workshop.train({**config, "gates": dict(list(GATES.items())[:3])})
    assert calls == [4] * (2 * 2 * (4 + 2))


def test_a_run_of_several_gates_is_evaluated_with_all_of_them(workshop, together):
    config = workshop.gate("together")
    del config["gate"]
    results = workshop.evaluate({**config, "gates": GATES})
    assert results.names("gate") == list(GATES)


def test_interrupted_gates_are_resumed_each_from_its_own_state(workshop, together, monkeypatch):
    from engine import learner

    config = workshop.gate("stopped")
    del config["gate"]
    config = {**config, "gates": GATES}
    step = learner.Training.step

    def failing(self, *arguments):
        if self.run.path.name == "classwise" and self.at.step == 6:
            raise KeyboardInterrupt
        step(self, *arguments)

    monkeypatch.setattr(learner.Training, "step", failing)
    with pytest.raises(KeyboardInterrupt):  # as hard as a kill: nothing is saved
        workshop.train(config, "train.save_steps=1")
    monkeypatch.undo()
    workshop.train(config, "train.save_steps=1", resume=True)
    for name in GATES:
        path = f"{name}/metrics.csv"
        assert (workshop.run("stopped") / path).read_bytes() == (together / path).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": {"type": "simple"}, "gates": {"a": {"type": "simple"}}}, "gates: stands beside gate"),
        ({"gates": {"a": {"type": "simple"}}, "experts": {}}, "gates: needs experts"),
        ({"gates": {"a": {"type": "simpel"}}}, "did you mean 'simple'"),
        ({"gates": {"a": {"type": "uniform"}}}, "a uniform gate without conv"),
    ],
)
def test_mistakes(workshop, change, message):
    config = workshop.gate("wrong")
    del config["gate"]
    with pytest.raises(UserError, match=message):
        workshop.train({**config, **change})
    assert not workshop.run("wrong").exists()


def test_a_pipeline_takes_a_gate_of_a_stage(workshop, tmp_path):
    gates = workshop.gate("gates")
    del gates["gate"]
    gates["gates"] = {name: GATES[name] for name in ("simple", "classwise")}
    write_yaml(tmp_path / "gates.yaml", gates)
    shared = {key: gates[key] for key in ("name", "data", "evaluate", "experts")}
    write_yaml(tmp_path / "evaluation.yaml", {**shared, "gates": {"x": "y"}})
    pipeline = {
        "name": "line",
        "output": str(tmp_path / "runs"),
        "stages": {
            "gates": {"config": "gates.yaml"},
            "evaluation": {
                "config": "evaluation.yaml",
                "set": {"gates": {"simple": "@gates/simple", "classwise": "@gates/classwise"}},
            },
        },
    }
    file = write_yaml(tmp_path / "pipeline.yaml", pipeline)

    def run() -> list[str]:
        config = load(file)
        built = stages.build_stages(config)
        records = stages.Records(tmp_path / "runs/line/stages.json")
        return stages.run_stages(list(built.values()), records, Options(device="cpu"), 1)

    assert run() == ["gates", "evaluation"]
    assert run() == []
    (tmp_path / "runs/line/gates/classwise/checkpoints/best.safetensors").unlink()
    assert run() == ["gates"]  # the same weights come out, so the evaluation still holds
    pipeline["stages"]["gates"]["set"] = {"gates.simple.seed": 5}
    write_yaml(file, pipeline)
    assert run() == ["gates", "evaluation"]


# ------------------------------------------------------------------------------------------------ the loss


def gate_section(**keys) -> Gate:
    return Gate.model_validate({"type": "simple", **keys})


def mixture() -> MixtureOfExperts:
    torch.manual_seed(0)
    experts = {"a": ToyExpert(5), "b": ToyExpert(5)}
    channels = sum(expert.feature_channels for expert in experts.values())
    return MixtureOfExperts(experts, SimpleGate(channels, 2, 5, width=2, hidden=8), 5, conv=True)


@pytest.mark.parametrize("size", [(32, 48), (40, 50)])
def test_reduced_labels_are_those_at_the_centres_of_the_cells(size):
    grid = tuple(-(-side // 16) * 16 for side in size)
    labels = torch.randint(0, 5, (2, *size))
    found = reduced(labels, grid, (grid[0] // 4, grid[1] // 4))
    for row in range(grid[0] // 4):
        for column in range(grid[1] // 4):
            at = (4 * row + 2, 4 * column + 2)
            inside = at[0] < size[0] and at[1] < size[1]
            expected = labels[:, at[0], at[1]] if inside else torch.full((2,), 255)
            assert torch.equal(found[:, row, column], expected)


def test_labels_on_the_logits_own_grid_stay_as_they_are():
    labels = torch.randint(0, 5, (2, 32, 48))
    assert torch.equal(reduced(labels, (32, 48), (32, 48)), labels)


@pytest.mark.parametrize("loss_at", ["full", "logits"])
def test_gate_loss_compares_on_the_grid_that_it_says(loss_at):
    model, loss = mixture(), cross_entropy(None, 255)
    outputs = model.run_experts(torch.rand(2, 3, 40, 50))
    labels = torch.randint(0, 5, (2, 40, 50))
    total, count = gate_loss(loss, gate_section(loss_at=loss_at))(model, outputs, labels)
    mixed, _ = model.mix(outputs)
    if loss_at == "full":
        expected = loss(upsample(mixed, (40, 50), 16), labels)
        assert count == 2 * 40 * 50
    else:
        expected = loss(mixed, reduced(labels, (48, 64), mixed.shape[-2:]))
    assert count == expected[1]
    assert total.item() == pytest.approx(expected[0].item(), rel=1e-5)


def test_penalties_are_added_to_the_mean_loss():
    model, loss = mixture(), cross_entropy(None, 255)
    outputs, labels = model.run_experts(torch.rand(2, 3, 32, 48)), torch.randint(0, 5, (2, 32, 48))
    plain, count = gate_loss(loss, gate_section())(model, outputs, labels)
    pushed, same = gate_loss(loss, gate_section(balance=0.5, entropy=0.1))(model, outputs, labels)
    penalty = routing_penalty(model.mix(outputs)[1], 0.5, 0.1)
    assert penalty > 0 and count == same
    assert (pushed / count).item() == pytest.approx((plain / count + penalty).item(), rel=1e-5)


def test_a_gate_that_has_collapsed_is_told_in_its_log(workshop, monkeypatch):
    monkeypatch.setattr(
        module, "gate_statistics", lambda weights: gate_statistics(weights * 0 + [[0.99], [0.01]])
    )
    config = workshop.gate("collapsed")
    del config["gate"]
    workshop.train(
        {**config, "gates": {"one": GATES["simple"], "uniform": {"type": "uniform", "conv": True}}}
    )
    told = "warning: gate collapsed/one has collapsed: more than 95 % of the weight over 8 images goes to expert day"
    assert (workshop.run("collapsed") / "one/log.txt").read_text().count(told) == 2  # one for each epoch
    assert "collapsed:" not in (workshop.run("collapsed") / "uniform/log.txt").read_text()
