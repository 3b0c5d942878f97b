"""python -m dataloaders.import_splits FOLDER [--root DATA_ROOT]: imports the good ones of public A2D2 lists.

Lists that name camera images, repeat frames or train on test frames are refused with their counts."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from dataloaders.a2d2_lists import Entry, find_lists, read_list, write_lists
from dataloaders.command import table
from dataloaders.frames import SPLITS
from engine.command import run
from engine.config import UserError

MAIN = ("highway", "urban", "ambiguous", "all")  # what the experiments use; other lists must fit to these
LEARNING = ("train", "gate", "val")
NEAR = 50  # frame numbers: 1.7 seconds

Lists = dict[str, dict[str, list[Entry]]]  # subset -> split -> frames


def read_lists(folder: Path) -> tuple[Lists, dict[str, list[str]]]:
    """Every list of the folder, the subsets of MAIN first, and by subset the reasons to refuse its form.

    Raises UserError where there is no list or a line names no frame."""
    found = find_lists(folder)
    if not found:
        raise UserError(f"{folder}: there are no split lists (SUBSET_SPLIT_gt.txt)")
    lists: Lists = {}
    reasons: dict[str, list[str]] = {}
    for subset in sorted(found, key=lambda name: (MAIN.index(name) if name in MAIN else len(MAIN), name)):
        lists[subset], reasons[subset] = {}, []
        for split, path in found[subset].items():
            lists[subset][split], first_camera = read_list(path)
            if first_camera is not None:
                reasons[subset].append(f"{path.name}:{first_camera} names a camera image, not a label")
    return lists, reasons


def contradictions(lists: Lists, subset: str) -> list[str]:
    """Why lists cannot be used: frames repeated, frames in two splits, test frames in a list for learning."""
    found = []
    for split, entries in lists[subset].items():
        if repeated := len(entries) - len(set(entries)):
            found.append(f"{repeated} frames are repeated in {subset}_{split}")
    for one, other in combinations(lists[subset], 2):
        if shared := len(set(lists[subset][one]) & set(lists[subset][other])):
            found.append(f"{shared} frames are in {subset}_{one} and in {subset}_{other}")
    for other in MAIN[:3]:
        if other in lists and other != subset:
            found += leaks(lists, learner=subset, tested=other)
            if subset not in MAIN:
                found += leaks(lists, learner=other, tested=subset)
    return found


def leaks(lists: Lists, learner: str, tested: str) -> list[str]:
    """How many test frames of one subset are in another one's lists for learning."""
    test = set(lists[tested].get("test", ()))
    shared = {split: len(test & set(lists[learner].get(split, ()))) for split in LEARNING}
    return [
        f"{learner}_{split} contains {count} of the {len(test)} frames of {tested}_test"
        for split, count in shared.items()
        if count
    ]


def overview(lists: Lists) -> str:
    """Table of frames and scenes by subset and split."""
    rows = []
    for subset, splits in lists.items():
        entries = [splits.get(split, []) for split in SPLITS]
        rows.append([subset, *map(len, entries), *(len({entry.scene for entry in part}) for part in entries)])
    return table(["lists", *SPLITS, *(f"{split} scenes" for split in SPLITS)], rows)


def facts(lists: Lists, subset: str) -> list[str]:
    """What to know about usable lists: their test scenes, and what the splits share short of frames."""
    splits = lists[subset]
    trained = Counter(entry.scene for entry in splits.get("train", ()))
    lines = [f"{subset}: no frame is repeated, none is in two splits"]
    if trained:
        scene, count = trained.most_common(1)[0]
        lines.append(f"{subset}_train: {count / trained.total():.0%} of its frames are of {scene}")
    for split in SPLITS[1:]:
        scenes = Counter(entry.scene for entry in splits.get(split, ()))
        if trained and scenes:
            shared = len(scenes.keys() & trained.keys())
            lines.append(f"{subset}_{split}: {shared} of its {len(scenes)} scenes are in {subset}_train")
    if trained and splits.get("val"):
        distances = nearest(splits["val"], splits["train"])
        lines.append(
            f"{subset}_val: its frames lie a median of {np.median(distances):.0f} frame numbers from a train "
            f"frame, {np.mean(distances <= NEAR):.0%} within {NEAR}: almost training data"
        )
    tested = Counter(entry.scene for entry in splits.get("test", ()))
    lines += [f"{subset}_test: {count} frames of {scene}" for scene, count in tested.most_common()]
    if tested and not trained:
        learned = {entry.scene for other in lists for entry in lists[other].get("train", ()) if other in MAIN}
        shared = sum(count for scene, count in tested.items() if scene in learned)
        lines.append(
            f"{subset}_test: {shared} of its {tested.total()} frames are of scenes that are trained on"
        )
    if subset == "all" and {"highway", "urban"} <= lists.keys():
        joined = {split: lists["highway"].get(split, []) + lists["urban"].get(split, []) for split in splits}
        lines.append(f"all is {'' if joined == splits else 'not '}highway followed by urban")
    return lines


def nearest(entries: Sequence[Entry], others: Sequence[Entry]) -> np.ndarray:
    """Distance in frame numbers from each entry to the nearest other of its scene, where there is one."""
    numbers: dict[str, list[int]] = {}
    for entry in others:
        numbers.setdefault(entry.scene, []).append(int(entry.number))
    ordered = {scene: np.array(sorted(values)) for scene, values in numbers.items()}
    distances = [
        np.abs(ordered[entry.scene] - int(entry.number)).min() for entry in entries if entry.scene in ordered
    ]
    return np.array(distances)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m dataloaders.import_splits", description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder that holds the public lists")
    root = Path(os.environ.get("A2D2_ROOT", "data/a2d2"))
    parser.add_argument(
        "--root", type=Path, default=root, help=f"data.root; lists go to its splits/ ({root})"
    )
    parser.add_argument("--skip-refused", action="store_true", help="import the others when some are refused")
    parser.add_argument("--overwrite", action="store_true", help="replace other lists that are there")
    options = parser.parse_args(arguments)
    lists, reasons = read_lists(options.folder)
    usable = {subset: splits for subset, splits in lists.items() if not reasons[subset] or subset not in MAIN}
    for subset in usable:
        reasons[subset] += contradictions(usable, subset)
    refused = {subset: why for subset, why in reasons.items() if why}
    good = {subset: splits for subset, splits in lists.items() if subset not in refused}
    print(overview(lists) + "\n")
    for subset in good:
        print("\n".join(facts(good, subset)))
    for subset, why in refused.items():
        print(f"\nrefused: {subset}\n" + "\n".join(f"    {reason}" for reason in why))
    if refused and not options.skip_refused:
        raise UserError(
            f"nothing was written: {', '.join(refused)} refused for the reasons above; "
            "--skip-refused imports the other lists"
        )
    if not good:
        raise UserError(f"{options.folder}: no usable lists, nothing was written")
    if not options.root.is_dir():
        raise UserError(f"there is no folder {options.root}; give the data's folder with --root")
    texts = {
        f"{subset}_{split}_gt.txt": "".join(f"{entry.path('label')}\n" for entry in entries)
        for subset, splits in good.items()
        for split, entries in splits.items()
    }
    write_lists(options.root / "splits", texts, options.overwrite)
    print(f"\n{len(texts)} lists of {', '.join(good)} in {options.root / 'splits'}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
