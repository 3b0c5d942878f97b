"""A submission is scored again: what is true is confirmed, and every kind of lie is found."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.config import UserError
from evaluation.beside import CERTIFICATES, FINDINGS, write_beside
from evaluation.certificate import certify_targets
from evaluation.findings import Finding
from evaluation.ledger import canonical, digest, read_manifest, read_units
from evaluation.plan import units_of
from evaluation.robust import attack_all
from evaluation.robust_tables import write_robust
from evaluation.suites import member
from evaluation.targets import target_of
from evaluation.verify import main, verify
from tests.evaluation import robust_toy as toy


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("honest")
    toy.run(folder, adversarials="uint8")
    write_robust(folder, folder / "ledger")
    return folder


@pytest.fixture
def folder(honest, tmp_path):
    return shutil.copytree(honest, tmp_path / "submission")


def checked(folder, targets=None, scenes=None, **keys):
    setup = toy.setup(adversarials="uint8")
    return verify(folder, targets or toy.targets(), toy.members(), setup, scenes or toy.scenes(), **keys)


def test_evaluations_of_classifiers_are_named_as_what_they_are_not(tmp_path):
    (tmp_path / "config.yaml").write_text("name: x\ndata: {name: digits}\nmodels: {a: runs/a}\n")
    with pytest.raises(UserError, match="config.yaml: is not the config of an evaluation of segmentation"):
        main([str(tmp_path)])


def rewrite(folder, change, tables=True):
    """Changes records and gives them right checksums, as a cheat would, and makes the tables from them."""
    segment = folder / "ledger" / "segment_000.jsonl"
    lines = [json.loads(line) for line in segment.read_text().splitlines()]
    for line in lines:
        del line["sha"]
        change(line)
    segment.write_text("".join(canonical({**line, "sha": digest(line)}) + "\n" for line in lines))
    if tables:
        write_robust(folder, folder / "ledger")


def kept_images(folder, member="pgd"):
    """A file of kept images of an attack."""
    unit = next(unit for unit in units_of(read_manifest(folder / "ledger")) if unit.member == member)
    path = folder / "ledger" / "adversarials" / f"{unit.name}.npz"
    with np.load(path) as file:
        return path, dict(file)


def test_the_truth_is_confirmed(honest):
    verdict = checked(honest)
    units = list(units_of(read_manifest(honest / "ledger")))
    assert verdict.problems == [] and verdict.tipped == 0
    assert verdict.units == len(units) == 3 * 3 * (1 + 2 * 3)
    assert verdict.images == sum(len(records) for records in read_units(honest / "ledger").values())
    assert "every pixel count is the recorded one" in verdict.lines()[0]
    assert verdict.lines()[-2].startswith(
        "not checked: honesty checks that run the networks (the submission has"
    )
    assert checked(honest, checks=True).lines()[-2].startswith("not checked: losses and gradients")
    assert verdict.lines()[-1] == "verified, but for the attacks: none was run again (--rerun N)"


def test_a_network_that_is_known_by_what_it_says_is_verified(tmp_path):
    """On another machine its logits may differ in the last bits: they are no part of what is compared."""
    network = toy.Net(0).requires_grad_(False)
    target = target_of("function", lambda images: network(images))
    own = {"function": toy.members()["first"]}
    setup = toy.setup(adversarials="uint8")
    assert attack_all(tmp_path / "ledger", toy.scenes(), [target], own, setup, log=str)
    write_robust(tmp_path, tmp_path / "ledger")
    assert "answers" in read_manifest(tmp_path / "ledger")["targets"][0]["identity"]
    assert verify(tmp_path, [target], own, setup, toy.scenes()).problems == []
    other = target_of("function", lambda images: -network(images))
    assert verify(tmp_path, [other], own, setup, toy.scenes()).problems


def test_attacks_that_are_run_again_say_the_same(honest):
    verdict = checked(honest, rerun=1000)
    valid, recorded, here = verdict.pixels
    assert verdict.problems == [] and verdict.lines()[-1] == "verified"
    assert len(set(verdict.rerun)) == 3 * 3 * 2 * 3 and 0 < recorded == here < valid
    assert "54 units of work run again" in "\n".join(verdict.lines())
    records = [one for many in read_units(honest / "ledger").values() for one in many]
    assert valid == sum(one["valid"] for one in records if one["eps"] and one["incumbent"] == "pixels")
    assert len(checked(honest, rerun=2).rerun) == 2


def test_attacks_that_were_never_run_are_found_by_running_them(folder):
    """Clean images in place of the attacked ones, scored truly: a network that withstands everything."""
    records = read_units(folder / "ledger")
    units = {unit.name: unit for unit in units_of(read_manifest(folder / "ledger"))}
    clean = {unit.target: {} for unit in units.values()}
    for name, unit in units.items():
        if unit.member == "clean":
            clean[unit.target] |= {(one["image"], one["incumbent"]): one for one in records[name]}
    scored = ("cells", "linf", "l2", "weights", "shares", "expert_right", "gate_free", "route", "flips", "margin",
              "least_margin", "entropy")  # fmt: skip

    def flatter(line):
        same = clean[line["target"]][line["image"], line["incumbent"]]
        line.update({key: same[key] for key in scored if key in same})

    for name, unit in units.items():
        source = next(one for one in units.values() if (one.target, one.batch, one.member) == (
            unit.target, unit.batch, "clean"))  # fmt: skip
        kept = folder / "ledger" / "adversarials"
        if name != source.name:
            shutil.copy(kept / f"{source.name}.npz", kept / f"{name}.npz")
    rewrite(folder, flatter)
    assert checked(folder).problems == []
    (problem,) = checked(folder, rerun=1000).problems
    assert "attacks run again leave" in problem


def test_flags_that_were_erased_are_found(folder, monkeypatch):
    found = [
        Finding("gate gradient", "gate", None, "", "flag", "no gradient"),
        Finding("identity", "gate", None, "", "ok", "nothing"),
    ]
    monkeypatch.setattr("evaluation.verify.check_first", lambda *_: found)
    write_beside(folder / FINDINGS, found)
    write_robust(folder, folder / "ledger")
    assert checked(folder, checks=True).problems == []
    write_beside(folder / FINDINGS, found[1:])
    write_robust(folder, folder / "ledger")
    assert checked(folder).problems == []
    (problem,) = checked(folder, checks=True).problems
    assert problem == "findings.json lacks a flag: gate: gate gradient: no gradient"


def test_records_that_say_more_than_the_network_are_found(folder):
    def flatter(line):
        if line["target"] == "gate" and line["attack"] == "own":
            line["cells"] = [[truth, truth, count] for truth, _, count in line["cells"]]

    rewrite(folder, flatter)
    problems = checked(folder).problems
    assert problems and all(one.startswith("gate, own at eps") for one in problems)
    assert "pixels are not as recorded" in problems[0]


def test_kept_images_outside_the_ball_are_found(folder):
    path, arrays = kept_images(folder)
    arrays["pixels"][1, 0, 0, 0] = 255 - arrays["pixels"][1, 0, 0, 0]
    np.savez(path, **arrays)
    assert any("frame_1: outside the ball" in problem for problem in checked(folder).problems)


def test_other_images_inside_the_ball_are_found(folder):
    path, arrays = kept_images(folder, "masked")
    _, clean = kept_images(folder, "clean")
    np.savez(path, **{name: clean["pixels"] for name in arrays})
    problems = checked(folder).problems
    assert len(problems) == 2 * 4  # of the first batch, both incumbents
    assert all("masked at eps" in one and "linf is 0.0" in one for one in problems)
    assert any("pixels are not as recorded; linf is" in one for one in problems)


def test_other_weights_and_rows_are_found(honest):
    targets = toy.targets()
    targets[0] = target_of("first", toy.Net(7), role="expert", class_pixels=[40, 30, 20, 10])
    verdict = checked(honest, targets[:2])
    assert [problem.split(":")[0] for problem in verdict.problems] == ["first", "gate"]
    assert "other weights or another network: tensors" in verdict.problems[0]
    assert "no such row" in verdict.problems[1]
    assert verdict.units == 3 * (1 + 2 * 3)  # of the ensemble, whose weights are right


def test_other_clean_images_labels_and_fewer_of_them_are_found(honest):
    scenes = toy.scenes()
    labels = scenes[0].labels.clone()
    labels[2, 0, 0] = (labels[2, 0, 0] + 1) % toy.CLASSES
    changed = [replace(scenes[0], labels=labels), *scenes[1:2]]
    problems = checked(honest, scenes=changed).problems
    assert problems[0] == "batch 0: other clean images, labels or blocks: frame_2"
    assert problems[1].startswith("the data set gives 2 batches")


@pytest.mark.parametrize(
    ("key", "change", "told"),
    [
        ("valid", lambda value: 10**9, "valid is 1000000000, should be "),
        ("gate_free", lambda value: value + 20, "gate_free is"),
        ("flips", lambda value: 0.5, "flips is 0.5, should be"),
        ("route", lambda value: [[1 - expert for expert in site] for site in value], "route is"),
        ("weights", lambda value: [[[0.5] for _ in site] for site in value], "weights is"),
        ("expert_right", lambda value: [*value[:1], value[1] + 20], "expert_right is"),
        ("linf", lambda value: value / 2 + 1e-5, "linf is"),
        ("l2", lambda value: value + 0.01, "l2 is"),
        ("settings", lambda value: {**value, "steps": 1000}, "settings is"),
        ("forwards", lambda value: 10**6, "forwards is 1000000, the attack takes"),
        ("backwards", lambda value: 10**6, "backwards is 1000000, the attack takes"),
        ("network_passes", lambda value: value + 1, "network_passes is"),
        (
            "image",
            lambda value: {"frame_0": "frame_1", "frame_1": "frame_0"}.get(value, value),
            "its records are of other images",
        ),
    ],
)
def test_every_value_that_scoring_gives_is_compared(folder, key, change, told):
    def forge(line):
        if line["target"] == "gate" and line["attack"] == "own":
            line[key] = change(line[key])

    rewrite(folder, forge, tables=False)
    problems = checked(folder).problems
    assert problems and all(one.startswith("gate, own at eps") and told in one for one in problems)


def test_a_forged_count_of_pixels_does_not_widen_the_tolerance(folder):
    """Of an image said to be huge, any number of pixels would be a thousandth."""

    def flatter(line):
        line["cells"] = [[truth, truth, count] for truth, _, count in line["cells"]]
        line["valid"] = 10**9

    rewrite(folder, flatter)
    verdict = checked(folder)
    assert verdict.tipped == 0 and any("pixels are not as recorded" in one for one in verdict.problems)


def test_kept_images_that_are_missing_are_found(folder):
    path, arrays = kept_images(folder)
    np.savez(path, balanced=arrays["balanced"])
    assert checked(folder).problems == ["first, pgd at eps 2/255, pixels: no images"]


def test_a_pixel_that_is_no_number_is_outside(folder):
    path, arrays = kept_images(folder)
    arrays = {name: points.astype(np.float32) / 255 for name, points in arrays.items()}
    arrays["pixels"][1, 0, 0, 0] = np.nan
    np.savez(path, **arrays)
    assert any("frame_1: outside the ball" in problem for problem in checked(folder).problems)


def submission(folder, **changes):
    """A ledger that is made of other parts than the config asks for, honestly scored."""
    parts = {
        "scenes": toy.scenes(),
        "targets": toy.targets(),
        "members": toy.members(),
        "setup": toy.setup(adversarials="uint8"),
    } | changes
    attack_all(
        folder / "ledger", parts["scenes"], parts["targets"], parts["members"], parts["setup"], log=str
    )
    write_robust(folder, folder / "ledger")
    return folder


def test_fewer_rows_members_and_steps_than_the_config_asks_for_are_found(tmp_path):
    own, kind = toy.members(), ("hard", 2)
    weak = member("own", {"name": "gate_only", "steps": 1}, "adaptive", *kind)
    own = {**own, "first": own["first"][:2], "gate": [*own["gate"][:2], weak]}
    problems = checked(submission(tmp_path, targets=toy.targets()[::2], members=own)).problems
    assert problems[0].startswith(
        "first: other attacks than the config asks for: members.own.name (was missing"
    )
    assert "gate: other attacks" in problems[1] and "members.own.attack.steps (was 1, is 3)" in problems[1]
    assert problems[2:] == ["mean: the ledger lacks this row"]


def test_another_eps_or_suite_than_the_config_asks_for_is_found(tmp_path):
    setup = toy.setup(adversarials="uint8", eps=toy.EPS[:1], suite="sea", seed=2)
    problems = checked(submission(tmp_path, setup=setup)).problems
    told = problems[0].removeprefix("the ledger is not what the config asks for: ")
    assert told != problems[0] and {one.split(" ")[0] for one in told.split("; ")} == {
        "protocol.seed", "suite", "eps"
    }  # fmt: skip


def test_certificates_are_computed_again(folder):
    known, scenes, setup = toy.targets(), toy.scenes(), toy.setup()
    certified = certify_targets(known, scenes, setup)
    write_beside(folder / CERTIFICATES, certified)
    write_robust(folder, folder / "ledger")
    assert checked(folder).problems == []
    write_beside(folder / CERTIFICATES, [replace(certified[0], value=1.0), *certified[1:]])
    write_robust(folder, folder / "ledger")
    assert checked(folder).problems == ["certificates.json is not what interval bounds give"]


@pytest.mark.parametrize("name", ["results.csv", "transfer.csv"])
def test_rows_of_attacks_in_other_tables_are_found(folder, name):
    (folder / name).write_text((folder / "robustness.csv").read_text())
    honest = checked(folder).problems
    assert honest == ([] if name == "results.csv" else ["transfer.csv is not what follows from the ledger"])
    text = (folder / name).read_text()
    (folder / name).write_text(text[: text.rindex("0.")] + "1.0\n")
    assert checked(folder).problems == [f"{name} is not what follows from the ledger"]


@pytest.mark.parametrize(
    "name", ["robustness.csv", "winners.csv", "telemetry.csv", "checks.csv", "timing.csv", "robustness.md"]
)
def test_tables_that_do_not_follow_are_found(folder, name):
    path = folder / name
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3] + [lines[3].replace("0.", "0.9", 1)] + lines[4:]))
    if path.read_text() == "".join(lines):
        path.write_text("".join(lines[:-1]))
    assert checked(folder).problems == [f"{name} is not what follows from the ledger"]


def test_a_torn_line_is_told(folder):
    with open(folder / "ledger" / "segment_000.jsonl", "a") as file:
        file.write('{"unit": "x"}\n')
    assert checked(folder).problems == ["1 lines of the ledger have a wrong checksum"]


def test_what_cannot_be_verified_is_refused(folder, tmp_path):
    toy.run(tmp_path / "bare")
    with pytest.raises(UserError, match="holds no adversarial images; .*uint8"):
        checked(tmp_path / "bare")
    with pytest.raises(UserError, match="no ledger here"):
        checked(tmp_path / "nothing")
    path, _ = kept_images(folder)
    path.unlink()
    with pytest.raises(UserError, match="no adversarial images here"):
        checked(folder)
    segment = folder / "ledger" / "segment_000.jsonl"
    segment.write_text("".join(segment.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="1 of 63 units of work are missing"):
        checked(folder)


def test_few_pixels_of_another_machine_are_no_lie_but_are_told(folder, monkeypatch):
    monkeypatch.setattr(
        "evaluation.verify.ARITHMETIC", 0.03
    )  # more than one of some 45 pixels, less than two

    def tip(line):
        if line["target"] == "first" and line["attack"] == "pgd" and line["place"] == 0:
            line["cells"][0][2] -= 1
            line["cells"][1][2] += 1

    rewrite(folder, tip)
    verdict = checked(folder)
    assert verdict.problems == [] and verdict.tipped == 3 * 2
    assert "6 of them differ in at most 3.0%" in verdict.lines()[0]


def test_threads_are_as_they_were(honest):
    before = torch.get_num_threads()
    checked(honest)
    assert torch.get_num_threads() == before


def test_the_command_says_what_it_needs(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().err.splitlines()[-1].endswith("arguments are required: SUBMISSION")
