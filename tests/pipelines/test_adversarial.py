"""Adversarial training through the pipeline: every kind of run, several gates, what stays as it is, warm starts."""

import csv
from dataclasses import replace

import pytest
import torch

from attacks.threat import is_inside, random_point, seed_of
from engine.adversarial import Adversary, threat_of
from engine.checkpoints import load_metadata, load_weights, tensors_sha256
from engine.config import Adversarial, Gate, UserError, load
from engine.losses import cross_entropy
from engine.steps import Phase, compute_gradients, under_attack
from metrics.confusion import confusion
from pipelines import segmentation, stages
from pipelines.gates import gate_loss, loss_of_images
from pipelines.matrix import as_evaluation, load_zoo
from pipelines.models import load_gate, load_network, stored_network
from pipelines.robust_validation import attacked_confusion, climbed
from pipelines.robustness import with_ladder
from pipelines.segmentation import evaluation_batches, figures
from pipelines.shared_encoder import OwnImages, build, phases
from tests.pipelines.conftest import write_yaml
from tests.pipelines.test_segmentation import evaluation_of
from tests.pipelines.test_shared_encoder import FRRN, config_of, copied, stop_after

ADVERSARIAL = {"attack": "segpgd", "eps": 0.02, "steps": 2}
SMALL = {"width": 2, "grid": [2, 2], "hidden": 8}
GATES = {
    "simple": {"type": "simple", **SMALL},
    "classwise_w_conv": {"type": "classwise", "conv": True, **SMALL},
    "top1": {"type": "simple", "routing": "top1", "seed": 7, **SMALL},
}
LOSS = cross_entropy(None, 255)
NONE_ATTACKED = 1 - 1e-9  # clean_fraction of a control: 1 is refused in a config


def adversarial(config: dict, **keys) -> dict:
    """The config with adversarial training, or with the keys of train."""
    return {**config, "train": {**config["train"], **(keys or {"adversarial": ADVERSARIAL})}}


def several(config: dict) -> dict:
    return {**{key: value for key, value in config.items() if key != "gate"}, "gates": GATES}


def settings(**keys) -> Adversarial:
    return Adversarial.model_validate({**ADVERSARIAL, **keys})


def file_of(folder):
    return folder / "checkpoints/best.safetensors"


def rows(folder) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def trained(workshop):
    """A robust expert of day, and robust gates over the clean experts."""
    workshop.train(adversarial(workshop.expert("robust_day", ["day"])), "train.epochs=8")
    workshop.train(several(adversarial(workshop.gate("robust_gates"))))
    return workshop


# ------------------------------------------------------------------------------------------------ networks


def test_a_robust_expert_says_how_it_was_trained_and_a_clean_one_says_nothing_new(trained):
    about = load_metadata(file_of(trained.run("robust_day")))
    assert about["config"]["train"]["adversarial"] == {
        **ADVERSARIAL, "step_size": None, "norm": "linf", "clean_fraction": 0.5, "loss": "ce", "beta": 6.0
    }  # fmt: skip
    assert (
        about["monitor"] == "robust_miou" and 0 <= about["metrics"]["robust_miou"] <= about["metrics"]["miou"]
    )
    assert all(row["robust_miou"] for row in rows(trained.run("robust_day")))
    clean = load_metadata(file_of(trained.run("day")))
    assert not {"adversarial", "start_from"} & (clean.keys() | clean["config"]["train"].keys())
    assert "robust_miou" not in rows(trained.run("day"))[0]
    assert about["tensors_sha256"] != clean["tensors_sha256"]


def test_the_robust_figure_is_the_miou_of_frames_attacked_one_by_one(trained):
    config = trained.load(adversarial(trained.expert("robust_day", ["day"])))
    index = config.data.build()
    network = load_network(str(trained.run("robust_day")), "x").network
    frames = index.select("val", ["day"])
    found = []
    for size in (4, 1):  # whatever the batch
        batches = evaluation_batches(config.data, index, frames, size, "network")
        (matrix,) = attacked_confusion([network], index, batches, config.train, torch.device("cpu"))
        found.append(figures(matrix, "nan")["miou"])
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    best = max(rows(trained.run("robust_day")), key=lambda row: float(row["robust_miou"]))
    assert found[0] == pytest.approx(float(best["robust_miou"]), abs=1e-3)
    clean = confusion(
        torch.cat([network(batch.images.float() / 255).argmax(1) for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        3,
        255,
    )
    assert found[0] < figures(clean.sum(0).numpy(), "nan")["miou"]


def test_checkpointing_changes_no_step_of_frrn():
    """Gradients and BatchNorm's statistics, moved once by a step, whatever the attack runs before it."""

    def step(checkpointing):
        torch.manual_seed(0)
        network = stored_network({"network": {**FRRN, "checkpointing": checkpointing}}).build(3).train()
        one = Adversary(settings(clean_fraction=0.0), segmentation.supervised(LOSS), 255, 0)
        phase = Phase("n", one.loss, list(network.parameters()), torch.optim.SGD(network.parameters()), None)
        phase.attack = one.attack
        compute_gradients(phase, network, [(images, labels)])
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        return gradients, {name: buffer for name, buffer in network.named_buffers()}

    torch.manual_seed(1)
    images, labels = torch.rand(2, 3, 32, 48), torch.randint(3, (2, 32, 48))
    (plain, buffers), (again, other_buffers) = step(False), step(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, again[name], rtol=1e-4, atol=1e-6)
    tracked = [name for name in buffers if name.endswith("num_batches_tracked")]
    assert tracked and all(buffers[name] == other_buffers[name] == 1 for name in tracked)
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, other_buffers[name], rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------- gates


@pytest.mark.parametrize("name", GATES)
def test_a_gate_trained_with_others_is_the_one_trained_alone_bit_for_bit(trained, name):
    trained.train({**adversarial(trained.gate(f"robust_alone/{name}")), "gate": GATES[name]})
    for file in ("checkpoints/best.safetensors", "metrics.csv"):
        together = trained.run("robust_gates") / name / file
        assert together.read_bytes() == (trained.run(f"robust_alone/{name}") / file).read_bytes()


def test_robust_gates_are_others_than_clean_ones(trained):
    trained.train(several(trained.gate("clean_gates")))
    for name in GATES:
        clean, robust = (
            load_weights(file_of(trained.run(folder) / name))[0] for folder in ("clean_gates", "robust_gates")
        )
        assert tensors_sha256(clean) != tensors_sha256(robust)


def test_experts_stay_bit_identical_in_the_mixture_and_on_disk(trained, monkeypatch):
    """The mixture that was trained, not a copy loaded later: BatchNorm buffers included."""
    before = {name: file_of(trained.run(name)).read_bytes() for name in ("day", "night")}
    seen = {}
    original = segmentation.build_mixture

    def keep(experts, gate):
        seen["model"] = original(experts, gate)
        return seen["model"]

    monkeypatch.setattr(segmentation, "build_mixture", keep)
    trained.train(adversarial(trained.gate("kept_robust_gate", conv=True)))
    for name, expert in zip(seen["model"].expert_names, seen["model"].experts, strict=True):
        assert file_of(trained.run(name)).read_bytes() == before[name]
        inside = {key.removeprefix("network."): value for key, value in expert.state_dict().items()}
        stored = load_metadata(file_of(trained.run(name)))["tensors_sha256"]
        assert tensors_sha256(inside) == stored
        assert all(parameter.grad is None for parameter in expert.parameters())


def test_the_attack_on_a_gate_passes_through_its_experts(trained):
    """Each gate gets its own images: those that raise the loss of its own mixture."""
    mixtures = [load_gate(str(trained.run("robust_gates") / name), "x")[0].network for name in GATES]
    torch.manual_seed(0)
    images, labels = torch.rand(4, 3, 32, 48), torch.randint(3, (4, 32, 48))
    found = []
    for mixture in mixtures:
        value = loss_of_images(gate_loss(LOSS, trained.load(trained.gate("x")).gate))
        one = Adversary(settings(attack="pgd", clean_fraction=0.0, steps=5), value, 255, 0)
        found.append(one.attack(mixture, images, labels, 0).adversarial)
        ball = threat_of(one.settings, 255, [seed_of(0, number) for number in range(4)])
        start = random_point(images, ball, "training")
        losses = [LOSS(mixture(points), labels)[0] for points in (images, start, found[-1])]
        assert max(losses[:2]) < losses[2] and is_inside(found[-1], images, ball).all()
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


@pytest.mark.parametrize("name", ["simple", "top1"])
def test_attacks_of_a_training_see_the_choice_of_a_hard_gate(trained, name):
    """In evaluation mode, where the network itself has no gradient there: as if its weights were soft backward."""
    torch.manual_seed(0)
    images, labels = torch.rand(2, 3, 32, 48), torch.randint(3, (2, 32, 48))
    mixture = load_gate(str(trained.run("robust_gates") / name), "x")[0].network
    value = loss_of_images(gate_loss(LOSS, trained.load(trained.gate("x")).gate))
    slopes = []
    with under_attack(mixture):
        for logits_of in (
            lambda points: value.logits(mixture, value.run(mixture, points)),
            climbed(mixture),
            mixture,
        ):
            points = images.clone().requires_grad_()
            logits = logits_of(points)
            assert torch.equal(logits, mixture(images))
            slopes.append(torch.autograd.grad(LOSS(logits, labels)[0], points)[0])
    assert torch.equal(slopes[0], slopes[1])
    assert torch.equal(slopes[0], slopes[2]) is (name == "simple")


@pytest.mark.parametrize("kind", ["gate", "shared"])
def test_training_goes_on_where_it_stopped(trained, kind):
    changes = ("train.save_steps=1", "train.ema=0.9")

    def config(name):
        if kind == "shared":
            return adversarial(config_of(trained, f"{name}_{kind}", "separate"))
        return adversarial(trained.gate(f"{name}_{kind}"))

    trained.train(config("whole"), *changes)
    stop_after(trained, config("halved"), changes, steps=3)
    trained.train(config("halved"), *changes, resume=True)
    for file in ("checkpoints/best.safetensors", "metrics.csv"):
        whole, halved = (trained.run(f"{name}_{kind}") / file for name in ("whole", "halved"))
        assert whole.read_bytes() == halved.read_bytes()


def test_nothing_but_clean_images_is_the_training_without_the_section(trained):
    """For gates too, whose experts run inside the loss then."""
    for config in (trained.expert("day_again", ["day"]), trained.gate("gate_again")):
        attacked = {"adversarial": {**ADVERSARIAL, "clean_fraction": NONE_ATTACKED}}
        trained.train(adversarial(config, **attacked))
        first = {"day_again": "day", "gate_again": "gate"}[config["name"]]
        shas = [
            load_metadata(file_of(trained.run(name)))["tensors_sha256"] for name in (config["name"], first)
        ]
        assert shas[0] == shas[1]


# -------------------------------------------------------------------------------------------- shared encoder


def test_both_phases_of_separate_training_attack_what_they_train():
    """The decoders through each image's own, the gate through the mixture; neither moves a statistic."""
    torch.manual_seed(0)
    gate = Gate.model_validate({"type": "classwise", **SMALL})
    mixture = build(stored_network({"network": FRRN}), gate, 3, ("day", "night")).train()
    inputs = OwnImages(torch.rand(4, 3, 32, 48), [1, 0, 1, 1])
    labels = torch.randint(3, (4, 32, 48))
    before, found = copied(mixture), []
    for _, value, _ in phases(mixture, "separate", LOSS, gate_loss(LOSS, gate)):
        one = Adversary(settings(attack="pgd", steps=5), value, 255, 0)
        attacked = one.attack(mixture, inputs, labels, 0)
        assert attacked.clean is inputs and attacked.adversarial.decoders == inputs.decoders
        assert attacked.rows.tolist() == [1, 3]
        found.append(attacked.adversarial.images)
        assert torch.equal(found[-1][[0, 2]], inputs.images[[0, 2]])
        mixture.eval()
        with torch.no_grad():
            losses = [
                value(mixture, replace(inputs, images=images)[attacked.rows], labels[attacked.rows])[0]
                for images in (inputs.images, found[-1])
            ]
        mixture.train()
        assert losses[0] < losses[1]
    assert not torch.equal(*found)
    assert all(torch.equal(tensor, before[name]) for name, tensor in mixture.state_dict().items())
    assert all(module.training for module in mixture.modules())


def test_rows_of_own_images():
    inputs = OwnImages(torch.arange(4.0).view(4, 1, 1, 1), [3, 2, 1, 0])
    chosen = inputs[torch.tensor([1, 3])]
    assert chosen.images.flatten().tolist() == [1, 3] and chosen.decoders == [2, 0]


@pytest.mark.parametrize("loss", ["ce", "trades"])
def test_joint_training_runs(trained, loss):
    config = adversarial(
        config_of(trained, f"robust_joint_{loss}", "joint"),
        epochs=1,
        adversarial={**ADVERSARIAL, "loss": loss},
    )
    trained.train(config)
    assert rows(trained.run(f"robust_joint_{loss}"))[0]["robust_miou"]


# --------------------------------------------------------------------------------------------- warm starts


def test_a_network_starts_from_the_weights_of_another_run(trained):
    still = {"optimizer": {"name": "sgd", "lr": 1e-30}, "epochs": 1, "ema": None}
    config = adversarial(trained.expert("warm", ["night"]), **still, start_from=str(trained.run("day")))
    trained.train(
        {**config, "network": {**config["network"], "pretrained": "imagenet"}}
    )  # nothing is fetched
    day, warm = (load_weights(file_of(trained.run(name))) for name in ("day", "warm"))
    parameters = [name for name in day[0] if "running_" not in name and "num_batches" not in name]
    assert all(torch.allclose(day[0][name], warm[0][name], rtol=0, atol=1e-30) for name in parameters)
    about = warm[1]["start_from"]["start_from"]
    assert about == {"path": str(trained.run("day")), "sha256": day[1]["tensors_sha256"]}


def test_several_gates_start_each_from_its_own_as_if_alone(trained):
    start = {"start_from": str(trained.run("robust_gates")), "epochs": 1}
    trained.train(several(adversarial(trained.gate("warm_gates"), **start)))
    alone = {**start, "start_from": str(trained.run("robust_gates") / "simple")}
    trained.train({**adversarial(trained.gate("warm_simple"), **alone), "gate": GATES["simple"]})
    together = trained.run("warm_gates") / "simple"
    assert file_of(together).read_bytes() == file_of(trained.run("warm_simple")).read_bytes()
    cold = file_of(trained.run("robust_gates") / "simple")
    assert load_metadata(cold)["tensors_sha256"] != load_metadata(file_of(together))["tensors_sha256"]


@pytest.mark.parametrize(
    ("kind", "start", "message"),
    [
        ("expert", "gone", r"train.start_from: no checkpoint at .*gone.*; train that network first"),
        ("expert", "gate", r"train.start_from: .* holds a gate, and a network is to be trained"),
        ("gate", "day", r"train.start_from: .* holds a network, and a gate is to be trained"),
        ("resnet", "day", r"train.start_from: .*network.backbone: mobilenet_v2, the config says resnet18"),
        ("gate", "robust_gates/classwise_w_conv", r"train.start_from: .*of another network: .* don't fit"),
        ("swapped", "gate", r"train.start_from: .* joins day, night; here it is night, day"),
    ],
)
def test_starts_that_do_not_fit_are_refused_before_anything_is_written(trained, kind, start, message):
    config = trained.gate("refused") if kind in ("gate", "swapped") else trained.expert("refused", ["day"])
    if kind == "swapped":
        config["experts"] = dict(reversed(config["experts"].items()))
    if kind == "resnet":
        config["network"] = {**config["network"], "backbone": "resnet18"}
    with pytest.raises(UserError, match=message):
        trained.train(adversarial(config, start_from=str(trained.run(start))))
    assert not trained.run("refused").exists()


def test_another_start_is_no_resumption(trained):
    config = trained.expert("moved", ["day"])
    trained.train(adversarial(config, start_from=str(trained.run("day")), epochs=1))
    last = trained.run("moved") / "checkpoints/last.pt"
    state = torch.load(last, weights_only=True)
    state["identity"]["start_from"] = "another"
    torch.save(state, last)
    with pytest.raises(UserError, match="began with another start_from"):
        trained.train(adversarial(config, start_from=str(trained.run("day")), epochs=1), resume=True)


# --------------------------------------------------------------------------------------------------- stages


def stage_of(workshop, tmp_path, config: dict) -> stages.Stage:
    write_yaml(tmp_path / "config.yaml", config)
    pipeline = {"name": "line", "stages": {"one": {"config": "config.yaml"}}}
    return stages.build_stages(load(write_yaml(tmp_path / "pipeline.yaml", pipeline)))["one"]


def test_stages_of_before_are_still_done(trained, tmp_path):
    """A key that was recorded without the new keys is that of a stage that does not use them."""
    now = stages.ingredients_of(stage_of(trained, tmp_path, trained.expert("x", ["day"])))
    before = {
        key: value for key, value in now.items() if "adversarial" not in key and "start_from" not in key
    }
    assert before != now and stages.changes(before, now) == []


def test_the_attack_and_the_weights_that_a_stage_starts_from_are_part_of_its_key(trained, tmp_path):
    def of(**train):
        return stages.ingredients_of(
            stage_of(trained, tmp_path, adversarial(trained.expert("x", ["day"]), **train))
        )

    plain = of(epochs=2)
    assert any("adversarial" in line for line in stages.changes(plain, of(adversarial=ADVERSARIAL)))
    day, night = (of(start_from=str(trained.run(name))) for name in ("day", "night"))
    assert [line.split()[0] for line in stages.changes(plain, day)] == ["weights.start_from"]
    assert [line.split()[0] for line in stages.changes(day, night)] == ["weights.start_from"]
    assert (
        stages.changes(day, of(start_from=str(file_of(trained.run("day"))))) == []
    )  # where it lies is nothing
    gates = stage_of(
        trained,
        tmp_path,
        several(adversarial(trained.gate("x"), start_from=str(trained.run("robust_gates")))),
    )
    assert {f"weights.start_from/{name}" for name in GATES} <= stages.ingredients_of(gates).keys()


def test_an_evaluation_of_robust_networks_alone_has_a_ladder_of_its_own(trained, capsys):
    def ladder(experts, gates=None, **settings):
        config = evaluation_of(trained, experts=experts, baselines={}, gates=gates or {}, ensembles=[])
        config = trained.load({**config, "evaluate": {"suite": "quick", **settings}})
        return with_ladder(config, load_zoo(config, config.data.build())).evaluate.eps

    robust = {"robust_day": str(trained.run("robust_day"))}
    both = {**robust, "night": str(trained.run("night"))}
    both_clean = {name: str(trained.run(name)) for name in ("day", "night")}
    gates = {"robust": str(trained.run("robust_gates") / "simple")}
    assert ladder(robust) == [2 / 255, 4 / 255, 8 / 255]
    assert capsys.readouterr().out.startswith(
        "evaluate.eps: 2/255, 4/255, 8/255, as all networks were trained"
    )
    assert max(ladder(both)) == 2 / 255
    assert "note: robust_day were trained on attacked images, other networks" in capsys.readouterr().out
    assert max(ladder({"day": both_clean["day"], "night": both_clean["night"]}, gates=gates)) == 2 / 255
    assert "note: robust were trained on attacked images" in capsys.readouterr().out
    assert ladder(robust, eps=[0.5 / 255]) == [0.5 / 255] and max(ladder({"night": both["night"]})) == 2 / 255
    assert max(ladder(robust, suite="none")) == 2 / 255 and capsys.readouterr().out == ""
    run = {**trained.expert("joined", ["day"]), "ensemble": {"type": "mean"}, "evaluate": {"suite": "quick"}}
    run["experts"] = {"a": robust["robust_day"], "b": robust["robust_day"]}
    joined = as_evaluation(trained.load({key: run[key] for key in run if key not in ("network", "train")}))
    assert with_ladder(joined, load_zoo(joined, joined.data.build())).evaluate.eps == [
        2 / 255,
        4 / 255,
        8 / 255,
    ]
