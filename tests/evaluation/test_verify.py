"""A submission is scored again: what is true is confirmed, and every kind of lie is found."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.config import UserError
from evaluation.ledger import canonical, digest, read_manifest, read_units
from evaluation.plan import units_of
from evaluation.robust_tables import write_robust
from evaluation.targets import target_of
from evaluation.verify import verify
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


def checked(folder, targets=None, scenes=None):
    return verify(folder, targets or toy.targets(), scenes or toy.scenes())


def rewrite(folder, change):
    """Changes records and gives them right checksums, as a cheat would, and makes the tables from them."""
    segment = folder / "ledger" / "segment_000.jsonl"
    lines = [json.loads(line) for line in segment.read_text().splitlines()]
    for line in lines:
        del line["sha"]
        change(line)
    segment.write_text("".join(canonical({**line, "sha": digest(line)}) + "\n" for line in lines))
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
    assert verdict.lines()[-1] == "verified" and "every pixel count is the recorded one" in verdict.lines()[0]


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
    assert problems and all("masked at eps" in one and "not as recorded" in one for one in problems)


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


@pytest.mark.parametrize("name", ["robustness.csv", "winners.csv", "telemetry.csv"])
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


def test_few_pixels_of_another_machine_are_no_lie_but_are_told(folder):
    def tip(line):
        line["valid"] *= 100_000  # so that a pixel is next to nothing
        if line["target"] == "first" and line["attack"] == "pgd" and line["place"] == 0:
            line["cells"][0][2] -= 1
            line["cells"][1][2] += 1

    rewrite(folder, tip)
    verdict = checked(folder)
    assert verdict.problems == [] and verdict.tipped == 3 * 2
    assert "6 of them differ in at most 0.1%" in verdict.lines()[0]


def test_threads_are_as_they_were(honest):
    before = torch.get_num_threads()
    checked(honest)
    assert torch.get_num_threads() == before
