"""Suites for classifiers: what they hold, that the cost told is the cost met, and that all networks get the same."""

import pytest
import torch
from torch import nn

from attacks.threat import Threat
from engine.config import UserError
from evaluation.classifier_suites import SUITES, classifier_members, passes_of, shown
from evaluation.ledger import read_manifest, read_units
from evaluation.plan import Setup, records_of
from evaluation.record_checks import check_manifest, masking
from evaluation.robust import attack_all
from evaluation.suites import main, member
from evaluation.targets import target_of
from networks.cnn_moe.model import CNNMoE
from tests.evaluation import classifier_toy as toy

CLASSES = 6


class Sure(nn.Module):
    """A linear pathway that can't be told otherwise; it counts the images that it sees."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.slope, self.seen = nn.Parameter(torch.randn(CLASSES, 9) / 100), 0

    def forward(self, images):
        self.seen += len(images)
        return (images.flatten(1) @ self.slope.T).index_fill(1, torch.tensor([2]), 10.0)


class SureMixture(nn.Module):
    """Runs just the pathways that the weights name; the router is as sure."""

    routing, conditional = "hard", True

    def __init__(self, num_experts):
        super().__init__()
        self.num_experts = num_experts
        self.paths = nn.ModuleList(Sure(seed) for seed in range(num_experts))
        self.slope = nn.Parameter(torch.randn(num_experts, 9) / 100)

    def gate_logits(self, images):
        scores = images.flatten(1) @ self.slope.T + 10.0 * torch.arange(self.num_experts)
        return scores[None, :, :, None, None, None]

    route = toy.Mixture.route

    def forward_given(self, images, weights):
        weights = weights.reshape(len(images), self.num_experts)
        logits = torch.zeros(len(images), CLASSES)
        for expert, path in enumerate(self.paths):
            rows = weights[:, expert].detach().nonzero()[:, 0]
            logits = logits.index_add(0, rows, path(images[rows]) * weights[rows, expert, None])
        return logits

    def forward(self, images):
        return self.forward_given(images, self.route(self.gate_logits(images)))

    @property
    def seen(self):
        return sum(path.seen for path in self.paths)


def target(experts):
    return target_of("net", (SureMixture(experts) if experts > 1 else Sure()).requires_grad_(False))


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("experts", [1, 2, 5])
def test_passes_and_networks_told_beforehand_are_those_that_run(suite, experts):
    own, images, labels = target(experts), torch.rand(2, 1, 3, 3), torch.tensor([2, 2])
    threat = Threat(1e-4, "linf", None, (0, 1))
    beside = passes_of(classifier_members(suite, "hard", 2, True)) if experts == 1 else 0
    for one in classifier_members(suite, own.kind, own.num_experts, own.active, beside):
        before = own.model.seen
        found = one.attack.build(own.model, images, labels, threat)
        if one.name != "change_route":
            assert found.correct.tolist() == [1, 1]
        assert (found.forwards, found.backwards) == (one.forwards, one.backwards), one.name
        assert own.model.seen - before == 2 * one.network_passes, one.name


def test_costs_of_a_ledger_are_those_that_were_met(tmp_path):
    own, lines = target(3), []
    members = {"net": classifier_members("quick", "hard", 3, True)}
    scene = toy.Scene(torch.rand(2, 1, 3, 3), torch.tensor([2, 2]), ("a", "b"), ("a", "b"))
    setup = Setup(tuple("abcdef"), (1e-4, 2e-4), "quick", ignore_index=-1)
    assert attack_all(tmp_path, [scene], [own], members, setup, log=lines.append)
    expected = 2 * (1 + 2 * passes_of(members["net"]))
    text = f"{expected:,}".replace(",", " ")
    assert f"2 images: at most {text} network passes" in lines
    assert lines[-1].endswith(f"complete, {text} network passes")


def test_an_attack_of_two_names_is_done_once_and_stands_under_both(tmp_path):
    own, lines = target(1), []
    twice = [member(name, {"name": "pgd", "steps": 3}, "common", "single", 1) for name in ("one", "other")]
    scene = toy.Scene(torch.rand(2, 1, 3, 3), torch.tensor([2, 2]), ("a", "b"), ("a", "b"))
    setup = Setup(tuple("abcdef"), (1e-4,), "none", ignore_index=-1)
    assert attack_all(tmp_path, [scene], [own], {"net": twice}, setup, log=lines.append)
    assert any(line.endswith(": 2 units of work, 2 to do here") for line in lines)  # one of them: clean
    assert lines[-1].endswith(f"complete, {2 * (1 + twice[0].network_passes)} network passes")
    manifest, units = read_manifest(tmp_path), read_units(tmp_path)
    attacks = [record["attack"] for record in records_of(manifest, units)]
    assert set(attacks) == {"clean", "one", "other"} and attacks.count("one") == attacks.count("other") > 0


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("experts", [2, 5])
def test_a_single_network_gets_as_many_network_passes_as_the_mixtures_beside_it(suite, experts):
    whole = passes_of(classifier_members(suite, "hard", experts, True))
    alone = passes_of(classifier_members(suite, "single", beside=whole))
    restart = passes_of(
        member(name, one, "adaptive", "single", 1) for name, one in SUITES[suite].single.items()
    )
    assert whole <= alone < whole + restart


@pytest.mark.parametrize("suite", SUITES)
def test_a_single_network_by_itself_meets_no_attack_twice(suite):
    once = classifier_members(suite, "single")
    assert {one.attack.args.get("restarts", 1) for one in once} == {1}
    attacks = [one.attack.plain() | {"restarts": 1} for one in once]
    assert all(attacks.count(one) == 1 for one in attacks)
    assert {one.name for one in once} == {
        "quick": {"pgd ce", "apgd dlr", "apgd ce"}, "standard": {"pgd ce", "apgd ce", "apgd dlr"},
    }[suite]  # fmt: skip


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize(("kind", "experts"), [("hard", 2), ("hard", 5), ("single", 1)])
def test_each_attack_begins_as_often_as_asked(suite, kind, experts):
    """The same members with three times the gradient steps, wherever a member counts them."""
    once = classifier_members(suite, kind, experts, kind == "hard")
    thrice = classifier_members(suite, kind, experts, kind == "hard", restarts=3)
    assert [one.name for one in once] == [one.name for one in thrice]
    assert [3 * one.backwards for one in once] == [one.backwards for one in thrice]
    assert {one.attack.args["restarts"] for one in thrice} == {3}


@pytest.mark.parametrize("suite", SUITES)
def test_a_single_network_by_itself_is_not_told_that_adaptive_attacks_are_missing(tmp_path, suite):
    own = target(1)
    scene = toy.Scene(torch.rand(2, 1, 3, 3), torch.tensor([2, 2]), ("a", "b"), ("a", "b"))
    setup = Setup(tuple("abcdef"), (1e-4,), suite, ignore_index=-1)
    assert attack_all(tmp_path, [scene], [own], {"net": classifier_members(suite, "single")}, setup)
    found = check_manifest(read_manifest(tmp_path), read_units(tmp_path), (masking,))
    assert {one.severity for one in found} <= {"ok", "note"} and found


@pytest.mark.parametrize("suite", SUITES)
def test_common_members_are_the_same_for_all_and_each_name_stands_once(suite):
    kinds = [("single", 1), ("hard", 2), ("hard", 5), ("soft", 3)]
    common = [
        [one.about for one in classifier_members(suite, *kind, True) if one.column == "common"]
        for kind in kinds
    ]
    assert common[0] == common[1] == common[2] and len(common[0]) >= 2  # at the same cost
    assert [one["attack"] for one in common[3]] == [one["attack"] for one in common[0]]
    for kind in kinds:
        own = [one.name for one in classifier_members(suite, *kind)]
        assert len(own) == len(set(own))


def test_standard_knows_every_way_past_a_router():
    members = {one.name: one for one in classifier_members("standard", "hard", 3, True)}
    assert members["pgd ce"].attack.plain()["steps"] == 50 and members["pgd ce"].column == "common"
    steps = {name: one.attack.args["steps"] for name, one in members.items() if one.column == "adaptive"}
    assert steps == {
        "stay_route": 50, "experts_only": 50, "each_path": 150, "route_first": 150, "joint": 150, "soft_gate": 50,
        "gate_only": 50, "change_route": 50,
    }  # fmt: skip
    assert len(members["joint"].attack.args["strengths"]) == 3  # 50 steps each
    quick = {one.name for one in classifier_members("quick", "hard", 3, True)}
    assert {"stay_route", "each_path", "route_first", "change_route"} < quick


def test_none_is_empty_for_all_and_others_are_refused():
    assert classifier_members("none", "hard", 2) == classifier_members("none", "ensemble", 2) == []
    with pytest.raises(UserError, match="suite: 'sea' is unknown; allowed: none, quick, standard"):
        classifier_members("sea", "hard", 2)
    with pytest.raises(UserError, match="standard has no members for ensembles"):
        classifier_members("standard", "ensemble", 2)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_mixture_of_the_k_best_costs_k_networks(top_k):
    """Of which a plain network beside it gets as many passes."""
    torch.manual_seed(0)
    model = CNNMoE(5, arch="resnet18", ratio=0.03, num_experts=4, top_k=top_k, router_width=0.1).eval()
    own = target_of("net", model)
    assert own.active == own.networks == own.identity["networks"] == top_k
    found = {one.name: one for one in classifier_members("quick", own.kind, 4, own.active)}
    assert found["pgd ce"].network_passes == top_k * found["pgd ce"].forwards
    forced = found["each_path"]  # a step of it runs one pathway beside those that are looked at
    assert forced.network_passes == forced.forwards * top_k + forced.backwards
    hard = passes_of(classifier_members("quick", "hard", 4, 1))
    assert hard <= passes_of(found.values()) <= top_k * hard


def test_a_pass_of_a_cnn_mixture_runs_the_pathways_that_its_weights_name():
    """Counted at its first expert convolution."""
    torch.manual_seed(0)
    model = CNNMoE(5, arch="resnet18", ratio=0.03, num_experts=2, router_width=0.1).eval()
    own, images, seen = target_of("net", model), torch.rand(3, 1, 8, 8), []
    assert own.active and own.networks == 1
    conv = model.body.expert_convs()[0]
    convolve = conv.convolve
    conv.convolve = lambda batch, *weights: (seen.append(len(batch)), convolve(batch, *weights))[1]
    with torch.no_grad():
        model(images)
        assert sum(seen) == 3
        model.forward_given(images, torch.full((1, 3, 2, 1, 1, 1), 0.5))
        assert sum(seen) == 3 + 6


def test_the_command_prints_them(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    text = printed[printed.index("standard (classifiers)") :].splitlines()
    (row,) = [line for line in text if line.startswith("network passes")]
    told = [f"{passes_of(own):,}".replace(",", " ") for own in shown()["standard"].values()]
    assert row.split("  ")[0] == "network passes" and row.replace(" ", "").endswith(
        "".join(told).replace(" ", "")
    )
    assert told[1] >= told[2]
