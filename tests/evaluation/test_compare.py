"""Rows of several ledgers against each other: as in one ledger, or refused."""

import json
from itertools import combinations

import pytest
from scipy.stats import binomtest

from engine.command import run
from engine.config import UserError
from evaluation.compare import comparison, main, read_side, refuse_unlike
from evaluation.ledger import Ledger
from evaluation.plan import units_of
from evaluation.robust_results import COLUMNS
from tests.evaluation import image_ledgers as made
from tests.evaluation.test_robust_tables import IMAGES, LARGE, SMALL, ledger, results, steps


def write(folder, right=steps, *, change=None, leave_out=0, **keys):
    """A ledger of segmentation in `folder`/ledger; change: edits the manifest."""
    manifest, units = ledger(right, **keys)
    (change or (lambda _: None))(manifest)
    with Ledger(folder / "ledger", manifest) as one:
        for unit, records in list(zip(units_of(one.manifest), units.values(), strict=True))[leave_out:]:
            one.add(unit.name, records, 1.0)
    return folder


@pytest.fixture
def two(tmp_path):
    """[a mixture, an ensemble], each the only row of its evaluation."""
    return [read_side(f"{write(tmp_path / name, targets=(name,))}:{name}") for name in ("moe", "mean")]


@pytest.mark.parametrize("eps", [SMALL, LARGE])
def test_rows_of_two_ledgers_differ_as_those_of_one(two, eps):
    together, (moe, mean) = results(), two
    for column in COLUMNS:
        expected = together.differences(eps, column)["moe", "mean"]
        for name in ("miou", "aacc"):
            gap = moe.figures(eps, column)[name] - mean.figures(eps, column)[name]
            assert (gap.value, gap.interval()) == (expected[name].value, expected[name].interval())


def test_the_page_has_worst_cases_and_what_their_differences_say(two):
    text = comparison(two)
    assert text.count("## eps") == 2 and text.count("| 5 / 10 |") == 4
    last = [line for line in text.splitlines() if line.startswith("- aAcc")][-1]
    gap = results().differences(LARGE, "adaptive")["moe", "mean"]["aacc"]
    assert f"{two[0].name} - {two[1].name} = {100 * gap.value:+.2f} [" in last
    assert gap.interval()[1] < 0 and last.endswith("the first is less robust on data like these.")


def test_every_pair_of_three_rows_is_told_as_if_alone(tmp_path):
    three = [
        read_side(f"{write(tmp_path / name, targets=(name,))}:{name}") for name in ("moe", "mean", "other")
    ]
    page = comparison(three).splitlines()
    for pair in combinations(three, 2):
        told = [line for line in comparison(pair).splitlines() if line.startswith("- ")]
        assert told and set(told) <= set(page)
    assert not any("floor" in line for line in page)


def test_a_row_against_itself_in_another_run(tmp_path):
    pair = [read_side(f"{write(tmp_path / name)}:moe") for name in "ab"]
    assert comparison(pair).count("= +0.00 [0.0, 0.0]: these data can't tell.") == 4


def test_of_too_few_blocks_it_says_that_there_are_no_intervals(tmp_path):
    few = {"blocks": [str(place % 3) for place in range(len(IMAGES))]}
    page = comparison([read_side(f"{write(tmp_path / name, **few)}:moe") for name in "ab"])
    assert "In percent, [no intervals: 3 blocks of images, 10 are needed]." in page
    assert "[95 % bootstrap over 12 blocks of images]" in comparison(
        [read_side(f"{write(tmp_path / name)}:moe") for name in "cd"]
    )


def test_classifiers_are_compared_by_top1(tmp_path):
    plan = made.suite_plan()
    plan["protocol"]["task"] = "classification"
    for name in "ab":
        made.write(tmp_path / name / "ledger", plan, made.RIGHT)
    moe, plain = read_side(f"{tmp_path / 'a'}:{made.MOE}"), read_side(f"{tmp_path / 'b'}:{made.PLAIN}")
    right = [side.results.worst(side.row, 0.01, "adaptive") for side in (moe, plain)]
    gap = 100 * (right[0].mean() - right[1].mean())
    page = comparison([moe, plain])
    low, high = binomtest(int(right[0].sum()), len(right[0])).proportion_ci(method="exact")
    worst = f"{100 * right[0].mean():.2f} [{100 * low:.1f}, {100 * high:.1f}]"
    assert worst in next(line for line in page.splitlines() if line.startswith(f"| {moe.name} |"))
    assert "[95 % interval: Clopper-Pearson, of differences a bootstrap over the 12 images]" in page
    assert f"top-1, adaptive: {moe.name} - {plain.name} = {gap:+.2f} [" in page
    told = "not attacked as hard, by 30 and 13"
    assert page.count(told) == 2 and "if both trainings" not in page  # nobody is more robust there


def test_classifiers_that_differ_on_no_image_may_differ_on_others(tmp_path):
    plan = made.suite_plan()
    plan["protocol"]["task"] = "classification"
    for name in "ab":
        made.write(tmp_path / name / "ledger", plan, {})  # all right everywhere
    sides = [read_side(f"{tmp_path / name}:{made.MOE}") for name in "ab"]
    unseen = 100 * (1 - 0.025 ** (1 / 12))  # Clopper-Pearson's for 0 of 12
    assert f"= +0.00 [-{unseen:.1f}, {unseen:.1f}]: these data can't tell" in comparison(sides)


def other_image(manifest):
    manifest["images"][3]["sha256"] = "another"


def other_eps(manifest):
    manifest["eps"] = [SMALL, 3 / 255]


def of_one_name(manifest):
    for member in manifest["targets"][0]["members"]:
        member["attack"]["name"] = "apgd"
        member["column"] = "common"


def other_steps(manifest):
    of_one_name(manifest)
    manifest["targets"][0]["members"][0]["attack"]["steps"] = 7


def other_size(manifest):
    manifest["protocol"]["image_size"] = [8, 9]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_image, "of 12 and 12 images 11 are the same"),
        (other_eps, r"eps \(was"),
        (other_steps, r"attacks.fast.steps \(was missing, is 7\)"),
        (other_size, r"protocol.image_size \(was missing, is \[8, 9\]\)"),
    ],
)
def test_other_images_or_attacks_are_refused(tmp_path, change, words):
    same = of_one_name if change is other_steps else None
    mine = read_side(f"{write(tmp_path / 'mine', targets=('moe',), change=same)}:moe")
    theirs = read_side(f"{write(tmp_path / 'theirs', targets=('mean',), change=change)}:mean")
    with pytest.raises(UserError, match=words):
        refuse_unlike([mine, theirs])


def test_adaptive_attacks_are_the_same_for_rows_of_a_kind_alone(tmp_path):
    fast = (("fast", "common"),)
    moe = read_side(f"{write(tmp_path / 'moe', targets=('moe',))}:moe")
    mean = read_side(f"{write(tmp_path / 'mean', targets=('mean',), members=fast)}:mean")
    refuse_unlike([moe, mean])
    other = read_side(f"{write(tmp_path / 'other', targets=('other',), members=fast)}:other")
    with pytest.raises(UserError, match="attacks.sly"):
        refuse_unlike([moe, other])


def test_rows_that_were_not_attacked_as_hard_are_told(tmp_path, two):
    assert "not attacked as hard" not in comparison(two)

    def fewer(manifest):
        for member in manifest["targets"][0]["members"]:
            member["network_passes"] = 7

    weak = read_side(f"{write(tmp_path / 'weak', targets=('mean',), change=fewer)}:mean")
    assert "not attacked as hard" not in comparison([two[0], weak])  # no restarts: they differ in experts

    def single(manifest):
        fewer(manifest)
        manifest["targets"][0]["identity"]["kind"] = "single"

    weak = read_side(f"{write(tmp_path / 'single', targets=('mean',), change=single)}:mean")
    lines = [line for line in comparison([two[0], weak]).splitlines() if line.startswith("- ")]
    assert len(lines) == 4 and all(
        "not attacked as hard, by 20 and 14 network passes" in line for line in lines
    )


def test_another_machine_is_none_of_it(tmp_path, two):
    def elsewhere(manifest):
        manifest["protocol"] |= {"threads": 8, "torch": "3.0", "device": "cuda"}

    refuse_unlike([two[0], read_side(f"{write(tmp_path / 'x', targets=('mean',), change=elsewhere)}:mean")])


def test_mistakes_are_told_in_a_line(tmp_path, capsys):
    whole, half = write(tmp_path / "whole"), write(tmp_path / "half", leave_out=1)
    for arguments, words in (
        ([f"{whole}:moe"], "at least two rows"),
        ([f"{whole}:moe"] * 2, "each once"),
        ([f"{whole}:moe", "mean"], "takes FOLDER:ROW"),
        ([f"{whole}:moe", f"{whole}:man"], "there is no row 'man'; allowed: mean, moe"),
        ([f"{whole}:moe", f"{half}:moe"], "is not complete"),
        ([f"{whole}:moe", f"{tmp_path / 'nowhere'}:moe"], "no ledger here"),
        ([f"{whole}:moe", f"{tmp_path}:moe"], "several ledgers"),
    ):
        assert run(main, arguments) == 2
        told = capsys.readouterr().err
        assert words in told and told.count("\n") == 1
    assert run(main, [f"{whole}:moe", f"{whole}:mean"]) == 0
    assert "eps 2/255" in capsys.readouterr().out


def test_a_damaged_manifest_is_told(tmp_path):
    folder = write(tmp_path / "one")
    (folder / "ledger/manifest.json").write_text(json.dumps([]))
    with pytest.raises(UserError, match="ledger of format None"):
        read_side(f"{folder}:moe")
