"""Mixtures with a shared encoder: what each training may change, checkpoints, and rows of an evaluation."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pandas
import pytest
import torch

from engine.checkpoints import load_weights, save_weights
from engine.config import Gate, UserError
from engine.losses import cross_entropy
from engine.steps import Phase, compute_gradients
from networks import deeplab
from networks.complexity import gmacs, parameters
from pipelines.gates import gate_loss
from pipelines.models import load_gate, load_network, stored_network
from pipelines.shared_encoder import OwnImages, build, evaluating, own_images, phases, settled_outputs

GATE = {"type": "classwise", "width": 2, "grid": [2, 2], "hidden": 8, "conv": True}
FRRN = {"name": "frrn", "width": 0.1, "residual_channels": 4}
LOSS = cross_entropy(None, 255)


def mixture_of(gate=GATE, network=FRRN, names=("day", "night")):
    torch.manual_seed(0)
    return build(stored_network({"network": network}), Gate.model_validate(gate), 3, names)


def batch_of(decoders=(1, 0, 1)):
    torch.manual_seed(1)
    images, labels = torch.rand(len(decoders), 3, 32, 48), torch.randint(3, (len(decoders), 32, 48))
    return OwnImages(images, list(decoders)), labels


def step_of(mixture, training):
    """Phases with optimizers that move everything that they may."""
    parts = phases(mixture, training, LOSS, gate_loss(LOSS, Gate.model_validate(GATE)))
    optimizers = [torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=0.1) for _, _, trained in parts]
    return [
        Phase(name, loss, trained, optimizer, None)
        for (name, loss, trained), optimizer in zip(parts, optimizers, strict=True)
    ]


def changed_parts(mixture, before):
    """The parts of the mixture, each decoder one, of which a tensor differs from those before."""
    parts = set()
    for name, tensor in mixture.state_dict().items():
        if not torch.equal(tensor, before[name]):
            parts.add(".".join(name.split(".")[: 2 if name.startswith("decoders") else 1]))
    return parts


def copied(mixture):
    return {name: tensor.clone() for name, tensor in mixture.state_dict().items()}


# --- the phases


def test_separate_training_has_a_phase_for_the_experts_and_one_for_the_gate():
    mixture = mixture_of().train()
    experts, gate = step_of(mixture, "separate")
    inputs, labels = batch_of()
    before = copied(mixture)
    compute_gradients(experts, mixture, [(inputs, labels)])
    experts.optimizer.step()
    assert changed_parts(mixture, before) == {"encoder", "decoders.0", "decoders.1"}
    before = copied(mixture)
    compute_gradients(gate, mixture, [(inputs, labels)])
    gate.optimizer.step()
    assert changed_parts(mixture, before) == {"gate", "conv"}  # no BatchNorm buffer either
    assert all(module.training for module in mixture.modules())


def test_a_decoder_whose_subset_is_absent_rests():
    mixture = mixture_of().train()
    experts, gate = step_of(mixture, "separate")
    for decoders in ((1, 0, 1), (1, 1)):  # first with momentum gathered in both
        before = copied(mixture)
        inputs, labels = batch_of(decoders)
        values = compute_gradients(experts, mixture, [(inputs, labels)])
        experts.optimizer.step()
        assert values.isfinite().all() and values[1] == labels.numel()
    assert changed_parts(mixture, before) == {"encoder", "decoders.1"}


def test_micro_batches_of_one_subset_each_are_a_batch_of_both():
    inputs, labels = batch_of((0, 0, 1, 1))
    gradients = []
    for rows in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
        mixture = mixture_of().double().train()
        mixture.encoder.eval()  # BatchNorm of the encoder sees a batch
        experts, _ = step_of(mixture, "separate")
        parts = [
            (OwnImages(inputs.images[part].double(), inputs.decoders[part]), labels[part]) for part in rows
        ]
        compute_gradients(experts, mixture, parts)
        gradients.append([parameter.grad for parameter in experts.parameters])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_the_gradient_of_a_decoder_depends_on_its_own_frames_only():
    def gradients(labels, images):
        mixture = mixture_of().train()
        mixture.encoder.eval()  # so that only the decoders could mix frames up
        experts, _ = step_of(mixture, "separate")
        experts.optimizer.zero_grad()
        loss, _ = experts.loss(mixture, OwnImages(images, inputs.decoders), labels)
        loss.backward()
        return [[parameter.grad for parameter in decoder.parameters()] for decoder in mixture.decoders]

    inputs, labels = batch_of((1, 0, 1))
    images, other = inputs.images.clone(), labels.clone()
    images[1], other[1] = torch.rand(3, 32, 48), 2 - other[1]  # the frame of decoder 0
    for index, (one, two) in enumerate(
        zip(gradients(labels, inputs.images), gradients(other, images), strict=True)
    ):
        same = [torch.equal(a, b) for a, b in zip(one, two, strict=True)]
        assert all(same) if index == 1 else not any(same)


def test_the_gate_learns_from_what_the_decoders_say_in_evaluation_mode():
    mixture = mixture_of(network={"name": "deeplabv3plus", "backbone": "mobilenet_v2", "pretrained": "none"})
    inputs, labels = batch_of((0, 1))
    mixture.train()
    before = copied(mixture)
    found = settled_outputs(mixture, inputs.images)
    assert not found.logits.requires_grad and changed_parts(mixture, before) == set()
    expected = deepcopy(mixture).eval().run_experts(inputs.images)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.features[0], expected.features[0])
    _, gate = step_of(mixture, "separate")
    loss, count = gate.loss(mixture, inputs, labels)
    with torch.no_grad():
        assert loss.item() == pytest.approx(LOSS(mixture.eval()(inputs.images), labels)[0].item(), rel=1e-6)
    loss.backward()
    assert all(parameter.grad is not None for parameter in gate.parameters)
    assert all(
        parameter.grad is None
        for parameter in [*mixture.encoder.parameters(), *mixture.decoders.parameters()]
    )


@pytest.mark.parametrize("dry", [True, False])
def test_decoders_that_cannot_be_trained_on_one_image_are_refused_first(workshop, dry):
    network = {"name": "smp", "architecture": "UPerNet", "backbone": "mobilenet_v2", "pretrained": "none"}
    config = {**config_of(workshop, "lone", "separate"), "network": network}
    with pytest.raises(
        UserError, match="shared_encoder.training: separate .* smp can't be trained so; take .*UPerNet"
    ):
        workshop.train(config, dry_run=dry)
    assert not workshop.run("lone").exists()


def test_modes_are_restored_one_by_one():
    mixture = mixture_of().train()
    mixture.decoders[0].eval()
    modes = [module.training for module in mixture.modules()]
    with pytest.raises(ZeroDivisionError), evaluating(mixture.encoder, mixture.decoders):
        assert not any(module.training for module in mixture.decoders.modules())
        raise ZeroDivisionError
    assert [module.training for module in mixture.modules()] == modes


def test_joint_training_changes_everything_in_one_phase():
    mixture = mixture_of().train()
    (phase,) = step_of(mixture, "joint")
    inputs, labels = batch_of()
    before = copied(mixture)
    total, count, norm = compute_gradients(phase, mixture, [(inputs.images, labels)]).tolist()
    assert len(phase.parameters) == len(list(mixture.parameters()))
    assert all(parameter.grad is not None for parameter in mixture.parameters())
    phase.optimizer.step()
    assert changed_parts(mixture, before) == {"encoder", "decoders.0", "decoders.1", "gate", "conv"}
    again = mixture_of().train()
    expected, number = LOSS(again(inputs.images), labels)
    assert (total, count) == (pytest.approx(expected.item(), rel=1e-6), number.item())


def test_a_gate_with_nothing_to_train_has_no_phase():
    mixture = mixture_of({"type": "uniform"})
    assert [phase.name for phase in step_of(mixture, "separate")] == ["experts"]
    mixture = mixture_of({"type": "uniform", "conv": True})
    assert [phase.name for phase in step_of(mixture, "separate")] == ["experts", "gate"]


def test_frames_go_to_the_decoder_of_their_subset():
    mixture = mixture_of(names=("night", "day", "dawn"))
    frames = [SimpleNamespace(subset=subset) for subset in ("day", "night", "dawn", "day")]
    batch = SimpleNamespace(images=torch.full((4, 3, 2, 2), 51, dtype=torch.uint8), frames=frames)
    inputs = own_images(mixture)(batch, torch.device("cpu"), torch.preserve_format)
    assert inputs.decoders == [1, 0, 2, 1]
    assert torch.equal(inputs.images, torch.full((4, 3, 2, 2), 0.2))


@pytest.mark.parametrize("read", ["features", "logits", "image"])
def test_the_gate_fits_what_it_reads(read):
    mixture = mixture_of({**GATE, "input": read}, names=("a", "b", "c"))
    assert mixture.gate.conv.in_channels == {"features": 40, "logits": 9, "image": 3}[read]
    assert mixture(torch.rand(1, 3, 32, 48)).shape == (1, 3, 32, 48)


def test_pretrained_weights_are_read_once_for_the_one_encoder(tmp_path, monkeypatch):
    network = stored_network(
        {"network": {"name": "deeplabv3plus", "backbone": "mobilenet_v2", "pretrained": "none"}}
    )
    known = network.build(3).network.encoder.state_dict()
    torch.save(known, tmp_path / "encoder.pth")
    reads = []
    read = deeplab.load_encoder
    monkeypatch.setattr(deeplab, "load_encoder", lambda *given: reads.append(given) or read(*given))
    pretrained = replace(network, args={**network.args, "pretrained": str(tmp_path / "encoder.pth")})
    mixture = build(pretrained, Gate.model_validate(GATE), 3, ("day", "night"))
    assert len(reads) == 1
    found = mixture.encoder.network.encoder.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in known.items())


# --- runs


def config_of(workshop, name, training, **changes):
    config = workshop.gate(name, type="classwise", conv=True)
    del config["experts"]
    return {**config, "shared_encoder": {"training": training}, "network": FRRN, **changes}


@pytest.fixture(scope="session")
def trained(workshop):
    """A run of each training: the workshop, and what fit returned."""
    for training in ("separate", "joint"):
        workshop.train(config_of(workshop, f"shared_{training}", training))
    return workshop


def file_of(workshop, name):
    return workshop.run(name) / "checkpoints/best.safetensors"


@pytest.mark.parametrize("training", ["separate", "joint"])
def test_a_checkpoint_holds_the_whole_mixture_once(trained, training):
    tensors, about = load_weights(file_of(trained, f"shared_{training}"))
    mixture, experts = load_gate(str(trained.run(f"shared_{training}")), "gates.shared")
    inside = mixture.network.state_dict()
    assert inside.keys() == tensors.keys()
    assert all(torch.equal(inside[name], tensors[name]) for name in tensors)
    assert about["parameters"] == about["trained_parameters"] == parameters(mixture.network)[0]
    assert about["shared_encoder"] == {"training": training, "decoders": ["day", "night"]}
    assert about["network"]["name"] == "frrn" and about["gate"]["type"] == "classwise"
    assert about["normalisation"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert about["budget"]["images"] == 2 * 16  # of split train, whatever data.gate_data says
    assert not any(parameter.requires_grad for parameter in mixture.network.parameters())
    assert list(experts) == ["day", "night"]
    homes = [["day"], ["night"]] if training == "separate" else [["day", "night"]] * 2
    assert [expert.metadata["subsets"] for expert in experts.values()] == homes
    assert len({expert.sha256 for expert in (mixture, *experts.values())}) == 3
    assert not any(module.training for module in (mixture.network, *(e.network for e in experts.values())))


def test_both_trainings_move_everything(trained):
    fresh = trained.load(config_of(trained, "x", "joint"))
    for training in ("separate", "joint"):
        torch.manual_seed(0)
        tensors, _ = load_weights(file_of(trained, f"shared_{training}"))
        start = build(fresh.network, fresh.gate, 3, ["day", "night"])
        assert changed_parts(start, tensors) == {"encoder", "decoders.0", "decoders.1", "gate", "conv"}


def test_a_mixture_is_no_expert_and_its_file_has_to_fit(trained, tmp_path):
    with pytest.raises(UserError, match=r"experts\.day: .*holds a mixture, not a network"):
        load_network(str(trained.run("shared_joint")), "experts.day")
    tensors, about = load_weights(file_of(trained, "shared_joint"))
    name = "decoders.1.decoder.classifier.weight"
    save_weights(tmp_path / "cut.safetensors", {key: tensors[key] for key in tensors if key != name}, about)
    with pytest.raises(
        UserError, match=f"gates.shared: .*cut.safetensors doesn't fit its own description.*{name}"
    ):
        load_gate(str(tmp_path / "cut.safetensors"), "gates.shared")


def test_training_goes_on_where_it_stopped(trained):
    """Momentum of decoders that have rested, and what the gate's optimizer knows, come back too."""
    changes = {
        "train.batch_size=1",
        "train.optimizer={name: sgd, lr: 0.01, momentum: 0.9}",
        "train.save_steps=1",
    }
    trained.train(config_of(trained, "whole", "separate"), *changes)
    config = config_of(trained, "halved", "separate")
    stop_after(trained, config, changes, steps=3)
    trained.train(config, *changes, resume=True)
    assert file_of(trained, "halved").read_bytes() == file_of(trained, "whole").read_bytes()


def stop_after(workshop, config, changes, steps):
    from engine import learner

    class Enough(Exception):
        pass

    def step(self, *arguments):
        if self.at.step == steps:
            raise Enough
        return original(self, *arguments)

    original = learner.Training.step
    learner.Training.step = step
    try:
        with pytest.raises(Enough):
            workshop.train(config, *changes)
    finally:
        learner.Training.step = original


def test_an_evaluation_has_a_row_for_the_mixture_and_for_each_decoder(trained, monkeypatch):
    from networks.frrn import Encoder

    seen = {"cpu": 0, "meta": 0}  # meta: counting multiply-adds
    forward = Encoder.forward

    def counted(self, images):
        seen[images.device.type] += len(images)
        return forward(self, images)

    monkeypatch.setattr(Encoder, "forward", counted)
    shared = {key: config_of(trained, "rows", "joint")[key] for key in ("output", "data", "evaluate")}
    results = trained.evaluate(
        {
            **shared,
            "name": "rows",
            "experts": {name: str(trained.run(name)) for name in ("day", "night")},
            "gates": {
                "separate": str(trained.run("shared_separate")),
                "joint": str(trained.run("shared_joint")),
                "gate": str(trained.run("gate")),
            },
        },
        "evaluate.controls=false",
    )
    assert seen["cpu"] == 2 * (8 + 8)  # two mixtures on the frames of test and of val
    kinds = {name: results.row(name).kind for name in results.names()}
    for name in ("separate", "joint"):
        assert kinds[name] == "gate" and kinds[f"{name}:day"] == kinds[f"{name}:night"] == "expert"
        assert results.row(name).experts == (f"{name}:day", f"{name}:night")
    assert results.row("separate:day").home == ("day",) and results.row("joint:day").home == ("day", "night")

    matrix = pandas.read_csv(trained.run("rows") / "evaluation/test/matrix.csv").set_index("model")
    mixture, experts = load_gate(str(trained.run("shared_separate")), "gates.separate")
    row, of_decoder = matrix.loc["separate"], matrix.loc["separate:day"]
    assert row["parameters"] == row["trained_parameters"] == parameters(mixture.network)[0]
    assert of_decoder["parameters"] == parameters(experts["day"].network)[0] < row["parameters"]
    assert (row["images_seen"], row["steps"]) == (32, 8)
    assert row["gmacs"] == pytest.approx(gmacs(mixture.network, (32, 48)), rel=1e-3)
    assert of_decoder["gmacs"] < row["gmacs"] < 2 * of_decoder["gmacs"]


def test_the_rows_are_what_the_networks_say(trained):
    config = trained.load(config_of(trained, "shared_separate", "separate"))
    results = trained.evaluate(config_of(trained, "shared_separate", "separate"), overwrite=True)
    index = config.data.build()
    mixture, experts = load_gate(str(trained.run("shared_separate")), "gates.shared")
    from pipelines.segmentation import evaluation_batches

    frames = index.select("test", ["day", "night"])
    (batch,) = evaluation_batches(config.data, index, frames, 8, "network")
    for row, network in (
        ("shared_separate", mixture),
        ("shared_separate:night", experts["night"]),
    ):
        with torch.no_grad():
            logits = network.network(batch.images.float() / 255)
        logits = torch.nn.functional.interpolate(logits, (24, 40), mode="bilinear", align_corners=False)
        labels = torch.stack([torch.from_numpy(index.read(frame)[1]) for frame in frames])
        right = int((logits.argmax(1) == labels).sum())
        assert results.total(row, "all").trace() == pytest.approx(right, abs=3)


def test_dry_run_tells_sizes(trained, capsys):
    trained.train(config_of(trained, "dry", "separate"), dry_run=True)
    told = capsys.readouterr().out
    assert "features: 1x40x2x3" in told and "trains on 16 (train)" in told
    assert not trained.run("dry").exists()
