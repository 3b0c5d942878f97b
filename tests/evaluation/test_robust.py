"""Attacks into the ledger: killed and resumed it gives the same tables, and its records are what they say."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from attacks.evade import SCORES, listen
from attacks.pgd import pgd
from attacks.threat import TOLERANCE
from engine.config import UserError
from evaluation.adversarials import load_adversarials
from evaluation.ledger import read_manifest, read_units
from evaluation.plan import units_of
from evaluation.robust import Bench, attack_all, duration, shard, trace_places
from evaluation.suites import member
from evaluation.targets import target_of
from metrics.confusion import confusion
from tests.evaluation import robust_toy as toy

ROOT = Path(__file__).resolve().parents[2]


def tables(folder):
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name != "timing.csv"
    }


def records_of(folder):
    """(unit, record) of a whole ledger in the order of the plan."""
    units = read_units(folder / "ledger")
    return [
        (unit, record) for unit in units_of(read_manifest(folder / "ledger")) for record in units[unit.name]
    ]


@pytest.mark.parametrize("world", [1, 2])
def test_killed_ten_times_the_tables_are_those_of_an_uninterrupted_run(tmp_path, world):
    command = [sys.executable, "-m", "tests.evaluation.robust_toy", str(tmp_path), str(world), "10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 8  # processes that were at work when they were killed
    assert len(list((tmp_path / "killed" / "ledger").glob("segment_*.jsonl"))) == world
    whole, killed = tables(tmp_path / "whole"), tables(tmp_path / "killed")
    names = {
        "robustness.csv",
        "robustness.md",
        "winners.csv",
        "checks.csv",
        "telemetry.csv",
        "components.csv",
    }
    assert set(whole) == names
    assert whole == killed
    assert (tmp_path / "killed" / "timing.csv").is_file()


def test_complete_it_runs_no_attack_again_and_writes_the_same_tables(tmp_path, monkeypatch):
    toy.run_to_tables(tmp_path)
    before = tables(tmp_path)
    monkeypatch.setattr("evaluation.robust.Bench.run", None)
    toy.run_to_tables(tmp_path)
    assert tables(tmp_path) == before


def test_the_cost_that_is_told_is_the_cost_that_is_counted(tmp_path):
    lines = []
    toy.run(tmp_path, log=lines.append)
    # of each target: networks, the clean pass, at 2 eps twice 3 steps and a last look, and a pass before the third
    expected = toy.IMAGES * (1 * (1 + 2 * (4 + 4 + 4)) + 2 * 2 * (1 + 2 * (4 + 4 + 5)))
    text = f"{expected:,}".replace(",", " ")
    assert f"{toy.IMAGES} images: at most {text} network passes" in lines
    assert lines[-1].endswith(f"complete, {text} network passes")
    made = sum(
        record["network_passes"] for _, record in records_of(tmp_path) if record["incumbent"] == "pixels"
    )
    assert made == expected


def test_progress_is_told_between_batches_where_they_take_long(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.robust.SAID_EVERY", 0.0)
    lines = []
    toy.run(tmp_path, log=lines.append)
    names = [target.name for target in toy.targets()]
    told = [
        re.match(r"batch 0, (\w+): [\d ]+ network passes in \d+ s, about \d+ s to go", line) for line in lines
    ]
    assert list(dict.fromkeys(one[1] for one in told if one)) == names


def test_records_are_what_the_unmodified_network_says_of_images_inside_the_ball(tmp_path):
    toy.run(tmp_path, adversarials="float32")
    models = {target.name: target.model for target in toy.targets()}
    images = torch.cat([scene.images for scene in toy.scenes()])
    labels = torch.cat([scene.labels for scene in toy.scenes()])
    attacked = 0
    for unit, record in records_of(tmp_path):
        kept = load_adversarials(tmp_path / "ledger" / "adversarials" / f"{unit.name}.npz")[
            record["incumbent"]
        ]
        own, place = unit.images.index(record["image"]), int(record["image"].removeprefix("frame_"))
        change = (kept[own].double() - images[place].double()).abs().max().item()
        assert change == record["linf"] <= unit.eps + TOLERANCE
        assert kept[own].min() >= 0 and kept[own].max() <= 1
        with torch.no_grad():
            logits = models[unit.target](kept)[own : own + 1]
        counts = confusion(logits.argmax(1), labels[place : place + 1], toy.CLASSES)[0]
        assert [[truth, said, counts[truth, said]] for truth, said in counts.nonzero()] == record["cells"]
        assert record["valid"] == (labels[place] != 255).sum() and record["status"] == "ok"
        if record["incumbent"] == "pixels":
            assert counts.trace() == record["claimed_correct"]
        if unit.eps == 0:
            assert torch.equal(kept[own], images[place])
        attacked += change > 0.9 * unit.eps > 0
    assert attacked > 300


@pytest.mark.parametrize("incumbent", ["images", "balanced"])
def test_images_of_an_attack_that_leave_the_ball_get_no_record(tmp_path, monkeypatch, incumbent):
    def too_far(model, images, labels, threat, **keys):
        found = pgd(model, images, labels, threat, **keys)
        further = (getattr(found, incumbent) - images) * 1.01 + images
        return replace(found, **{incumbent: further.clamp(0, 1)})

    monkeypatch.setattr("attacks.pgd.pgd", too_far)
    with pytest.raises(AssertionError, match="an adversarial image is 0.0079.* from its image"):
        toy.run(tmp_path)
    manifest, units = read_manifest(tmp_path / "ledger"), read_units(tmp_path / "ledger")
    assert {unit.eps for unit in units_of(manifest) if unit.name in units} == {0}


def test_images_that_leave_the_ball_when_they_are_rounded_get_no_record(tmp_path, monkeypatch):
    def rounded_up(points, images, threat):
        return (points * 255 + 0.4).round().clamp(0, 255) / 255

    monkeypatch.setattr("evaluation.robust.quantised", rounded_up)
    with pytest.raises(AssertionError, match="an adversarial image is 0.0117.* from its image"):
        toy.run(tmp_path, adversarials="uint8", eps=(2.4 / 255,))


def test_an_eps_that_bytes_cannot_hold_is_refused():
    with pytest.raises(UserError, match="eps: 0.5/255 with adversarials: uint8 is no attack"):
        toy.setup(adversarials="uint8", eps=(2 / 255, 0.5 / 255))
    toy.setup(adversarials="float32", eps=(0.5 / 255,))
    toy.setup(adversarials="uint8", eps=(1 / 255,))


def test_uint8_images_are_rounded_before_they_are_scored(tmp_path):
    toy.run(tmp_path, adversarials="uint8")
    model = toy.targets()[0].model
    labels = {
        name: label for scene in toy.scenes() for name, label in zip(scene.names, scene.labels, strict=True)
    }
    changed = 0
    for unit, record in records_of(tmp_path):
        if unit.target != "first":
            continue
        kept = load_adversarials(tmp_path / "ledger" / "adversarials" / f"{unit.name}.npz")[
            record["incumbent"]
        ]
        own = unit.images.index(record["image"])
        assert torch.allclose(kept * 255, (kept * 255).round(), atol=1e-4)
        assert record["linf"] <= unit.eps + TOLERANCE
        right = (model(kept)[own].argmax(0) == labels[record["image"]]).sum().item()
        assert right == sum(pixels for truth, said, pixels in record["cells"] if truth == said)
        changed += record["linf"] > 0
    assert changed > 100


def test_routes_are_recorded(tmp_path):
    toy.run(tmp_path)
    gate = toy.targets()[2].model
    images, labels = (
        {name: one for scene in toy.scenes() for name, one in zip(scene.names, part(scene), strict=True)}
        for part in (lambda scene: scene.images, lambda scene: scene.labels)
    )
    flips = []
    for unit, record in records_of(tmp_path):
        assert ("route" in record) == (unit.target == "gate")
        if unit.target != "gate":
            continue
        assert sum(record["weights"][0][expert][0] for expert in (0, 1)) == 1  # a hard gate
        assert record["weights"][0][record["route"][0][0]] == [1.0]
        flips.append(record["flips"])
        assert record["gate_free"] <= min(record["expert_right"])
        if unit.eps == 0:
            right = gate.expert_logits(images[record["image"]][None]).argmax(2) == labels[record["image"]]
            assert record["gate_free"] == right.all(dim=1).sum()
            logits = gate.gate_logits(images[record["image"]][None])[0, 0, :, 0, 0, 0]
            assert record["flips"] == 0
            assert record["margin"] == pytest.approx((logits[0] - logits[1]).abs().item(), rel=1e-4)
            share = logits.softmax(0)
            assert record["entropy"] == pytest.approx(-(share * share.log()).sum().item(), rel=1e-3, abs=1e-6)
    assert set(flips) == {0.0, 1.0}


def test_a_route_of_the_k_best_is_another_where_any_of_them_is():
    class Best(toy.Mixture):
        conditional, top_k = True, 2

        def gate_logits(self, images):
            lead = images.mean(dim=(1, 2, 3)) - 0.5
            return torch.stack([lead + 9, lead, -lead], dim=1)[None, :, :, None, None, None]

    model = Best(toy.Net(0), toy.Net(1), toy.Net(2))
    (scene,) = toy.scenes(toy.IMAGES)
    target = target_of("best", model)
    flips = {}
    for active in (3, 2, 1):  # 3: all of them, whose best one counts
        bench = Bench(replace(target, active=active), scene, toy.setup(), torch.device("cpu"))
        assert bench.score(scene.images)["flips"] == [0.0] * toy.IMAGES
        flips[active] = bench.score(1 - scene.images)["flips"]
    assert target.active == 2 and flips == {3: flips[1], 2: [1.0] * toy.IMAGES, 1: [0.0] * toy.IMAGES}


def test_shares_of_a_soft_gate_are_its_weights_whatever_made_them(tmp_path):
    """Decided by a temperature, though its logits are close together."""

    class Sharp(toy.Mixture):
        def route(self, gate_logits):
            return (gate_logits / 0.1).softmax(dim=2)

    model = Sharp(toy.Net(0), toy.Net(1))
    (scene,) = toy.scenes(toy.IMAGES)
    bench = Bench(target_of("sharp", model), scene, toy.setup(), torch.device("cpu"))
    found = bench.score(scene.images)
    assert torch.allclose(*(torch.tensor(found[key]) for key in ("shares", "weights")), atol=1e-6)
    weights = torch.tensor(found["weights"])[:, 0, :, 0].double()
    expected = torch.special.entr(weights).sum(dim=1)
    assert torch.allclose(torch.tensor(found["entropy"]).double(), expected, atol=1e-4)
    assert 0.01 < expected.max() < 0.3 and min(found["margin"]) < 0.5
    score = SCORES["gate_entropy"](listen(model, scene.images))
    assert torch.allclose(score.double(), expected / math.log(2), atol=1e-4)


def test_batches_and_order_of_targets_change_no_count(tmp_path):
    def counts(folder, size):
        attack_all(folder / "ledger", toy.scenes(size), toy.targets(), toy.members(), toy.setup(), log=str)
        return {
            (unit.target, unit.eps, unit.member, record["image"], record["incumbent"]): record["cells"]
            for unit, record in records_of(folder)
        }

    whole = counts(tmp_path / "12", 12)
    assert all(counts(tmp_path / str(size), size) == whole for size in (1, 5, 7))


def test_processes_share_the_batches_and_the_last_one_knows(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert not toy.run(tmp_path)
    manifest, units = read_manifest(tmp_path / "ledger"), read_units(tmp_path / "ledger")
    assert {unit.batch for unit in units_of(manifest) if unit.name in units} == {1}
    monkeypatch.setenv("RANK", "0")
    assert toy.run(tmp_path)

    def other_process(line):
        """The other process begins and ends while this one is at work."""
        if line.startswith("batch 0"):
            monkeypatch.setenv("RANK", "1")
            assert not toy.run(tmp_path / "both")

    assert toy.run(tmp_path / "both", log=other_process)
    for rank, writes in (("0", True), ("1", False)):  # of what is complete already, one writes the tables
        monkeypatch.setenv("RANK", rank)
        assert toy.run(tmp_path / "both") == writes
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match="RANK 2 of WORLD_SIZE 2"):
        shard()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 2}, r"protocol.seed \(was 1, is 2\)"),
        ({"norm": "l2"}, r"protocol.norm \(was linf, is l2\)"),
        ({"eps": (2 / 255,)}, r"eps \(was \[0.0078.*\], is \[0.0078"),
        ({"about": {"dataset": "other"}}, r"protocol.dataset \(was toy, is other\)"),
    ],
)
def test_another_setup_is_refused(tmp_path, change, told):
    toy.run(tmp_path)
    with pytest.raises(UserError, match=told):
        toy.run(tmp_path, **change)


def test_other_weights_images_and_attacks_are_refused(tmp_path, monkeypatch):
    toy.run(tmp_path)
    scenes, targets, members = toy.scenes(), toy.targets(), toy.members()

    def again(scenes=scenes, targets=targets, members=members):
        attack_all(tmp_path / "ledger", scenes, targets, members, toy.setup(), log=str)

    again()
    with torch.no_grad():
        targets[2].model.gate.weight += 1e-6
    other = [*targets[:2], target_of("gate", targets[2].model, role="gate")]
    with pytest.raises(UserError, match=r"targets.gate.identity.tensors \(was [0-9a-f]{57}..., is"):
        again(targets=other)
    pixels = targets[0].class_pixels
    with pytest.raises(UserError, match=r"targets.first.identity.class_pixels"):
        again(targets=[replace(targets[0], class_pixels=(*pixels[:3], 11)), *targets[1:]])
    images = scenes[1].images.clone()
    images[0, 0, 0, 0] = 1 - images[0, 0, 0, 0]
    with pytest.raises(UserError, match="images.frame_4.sha256"):
        again(scenes=[scenes[0], replace(scenes[1], images=images), scenes[2]])
    more = member("own", {"name": "member_sum", "steps": 4}, "adaptive", "ensemble", 2)
    longer = {**members, "mean": [*members["mean"][:2], more]}
    with pytest.raises(UserError, match=r"targets.mean.members.own.attack.steps \(was 3, is 4\)"):
        again(members=longer)
    monkeypatch.setattr("attacks.pgd.VERSION", 2, raising=False)
    with pytest.raises(UserError, match=r"members.pgd.version \(was 1, is 2\)"):
        again()


def test_replaced_it_does_only_what_no_record_fits(tmp_path):
    toy.run(tmp_path)
    units = 3 * (1 + 2 * 3)  # of a target: batches, clean images, eps, attacks

    def to_do(targets=None, **changes):
        lines = []
        setup = toy.setup(**changes)
        own = toy.members(), setup
        attack_all(
            tmp_path / "ledger", toy.scenes(), targets or toy.targets(), *own, replace=True, log=lines.append
        )
        (line,) = [line for line in lines if "to do here" in line]
        return int(line.split()[-4])

    assert to_do() == 0
    assert to_do(eps=(*toy.EPS, 4 / 255)) == 3 * 3 * 3
    assert to_do() == 0
    targets = toy.targets()
    with torch.no_grad():
        targets[2].model.gate.weight *= 2
    assert to_do([*targets[:2], target_of("gate", targets[2].model, role="gate")]) == units
    assert to_do(seed=2) == 3 * units
    assert to_do() == to_do(seed=2) == 0


def test_threads_are_those_that_the_ledger_was_begun_with(tmp_path):
    toy.run(tmp_path)
    begun = torch.get_num_threads()
    assert read_manifest(tmp_path / "ledger")["protocol"]["threads"] == begun
    try:
        torch.set_num_threads(begun + 1)
        assert toy.run(tmp_path)
        assert torch.get_num_threads() == begun + 1
    finally:
        torch.set_num_threads(begun)


class Watched(nn.Module):
    """A network that notes the state it is called in."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, toy.CLASSES, 1)
        self.states = set()

    def forward(self, images):
        logits = self.conv(images)
        wants = any(parameter.requires_grad for parameter in self.parameters())
        self.states.add((self.training, wants, logits.dtype, images.is_inference()))
        return logits


def test_networks_run_in_float32_eval_mode_without_gradients_to_weights_and_are_as_before_afterwards(
    tmp_path,
):
    model = Watched().train()
    model.conv.bias.requires_grad_(False)
    target = target_of("watched", model)
    with torch.autocast("cpu", torch.bfloat16):
        attack_all(
            tmp_path / "ledger",
            toy.scenes(),
            [target],
            {"watched": toy.members()["first"]},
            toy.setup(),
            log=str,
        )
    assert model.states == {(False, False, torch.float32, False)}
    assert model.training and model.conv.weight.requires_grad and not model.conv.bias.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_images_and_labels_that_no_attack_takes_are_refused(tmp_path):
    (scene,) = toy.scenes(toy.IMAGES)

    def run(**changes):
        attack_all(
            tmp_path / "ledger",
            [replace(scene, **changes)],
            toy.targets(),
            toy.members(),
            toy.setup(),
            log=str,
        )

    with pytest.raises(UserError, match=r"float32 in \[0, 1\]"):
        run(images=scene.images * 255)
    with pytest.raises(UserError, match="frame_0: labels from 0 to 4, allowed: 0..3 and 255"):
        run(labels=scene.labels.index_fill(2, torch.tensor([0]), 4))


def test_words_and_places():
    assert [duration(seconds) for seconds in (3, 90, 7200)] == ["3 s", "1.5 min", "2.0 h"]
    assert trace_places(3) == [0, 1, 2] and trace_places(300)[0] == 0 and trace_places(300)[-1] == 299
    assert len(set(trace_places(300))) == 8


def test_images_without_a_labelled_pixel_are_refused_before_any_attack(tmp_path):
    void = [replace(scene, labels=torch.full_like(scene.labels, 255)) for scene in toy.scenes()]
    with pytest.raises(UserError, match="all labels of the 12 images to attack are 255"):
        attack_all(tmp_path / "ledger", void, toy.targets(), toy.members(), toy.setup(), log=str)
    assert not (tmp_path / "ledger").exists()
