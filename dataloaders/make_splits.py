"""python -m dataloaders.make_splits ROOT: split lists without shared scenes for the A2D2 frames under ROOT.

Scenes, their splits and the road types of their frames come from a2d2_split/ beside this file."""

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from dataloaders.a2d2_lists import Entry, parse, write_lists
from dataloaders.command import table
from dataloaders.frames import SPLITS
from engine.command import run
from engine.config import UserError

TABLES = Path(__file__).parent / "a2d2_split"
SUBSETS = ("highway", "urban", "ambiguous")

Lists = dict[tuple[str, str], list[Entry]]  # (subset, split) -> frames


def scene_splits() -> dict[str, str]:
    """Scene -> train, gate, val, test, or "none" for a scene that is left out."""
    with open(TABLES / "scenes.csv", newline="", encoding="utf-8") as file:
        return {row["scene"]: row["split"] for row in csv.DictReader(file)}


def road_ranges() -> dict[str, list[tuple[int, int, str]]]:
    """Scene -> (first frame number, last frame number, road type) of its stretches."""
    ranges: dict[str, list[tuple[int, int, str]]] = {}
    with open(TABLES / "roads.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            ranges.setdefault(row["scene"], []).append((int(row["first"]), int(row["last"]), row["road"]))
    return ranges


def find_frames(root: Path) -> list[Entry]:
    """Every labelled front centre frame under ROOT (or its camera_lidar_semantic), by scene and number.

    Raises UserError where there is none."""
    scenes = root / "camera_lidar_semantic" if (root / "camera_lidar_semantic").is_dir() else root
    labels = scenes.glob("*/label/cam_front_center/*_label_frontcenter_*.png")
    entries = sorted(parsed[0] for path in labels if (parsed := parse(path.name)))
    if not entries:
        raise UserError(f"{scenes}: no SCENE/label/cam_front_center/..._label_frontcenter_....png found")
    return entries


def assign(entries: Iterable[Entry]) -> tuple[Lists, Counter]:
    """The frames by (subset, split), and how many frames were left out for which reason.

    A scene belongs to one split whatever its road types, so no recording is in two splits. Ambiguous frames
    are for testing only: those of scenes in other splits are left out."""
    splits, roads = scene_splits(), road_ranges()
    lists: Lists = {(subset, split): [] for subset in SUBSETS for split in SPLITS}
    left_out: Counter = Counter()
    for entry in entries:
        split = splits.get(entry.scene)
        number = int(entry.number)
        stretches = roads.get(entry.scene, ())
        road = next((road for first, last, road in stretches if first <= number <= last), None)
        if split is None:
            left_out[f"{entry.scene} is no known scene of A2D2"] += 1
        elif split == "none":
            left_out[f"{entry.scene} mixes highway and urban too closely"] += 1
        elif road is None:
            left_out["neither highway, urban nor ambiguous (country roads, car parks)"] += 1
        elif road == "ambiguous" and split != "test":
            left_out[f"ambiguous frames of {entry.scene}, a scene of {split}"] += 1
        else:
            lists[road, split].append(entry)
    return lists, left_out


def list_texts(lists: Lists) -> dict[str, str]:
    """File name -> text of every list that has frames; all_* is highway followed by urban."""
    everything = {("all", split): lists["highway", split] + lists["urban", split] for split in SPLITS}
    return {
        f"{subset}_{split}_gt.txt": "".join(f"{entry.path('label')}\n" for entry in entries)
        for (subset, split), entries in {**lists, **everything}.items()
        if entries
    }


def report(lists: Lists, left_out: Counter) -> str:
    """Frames by subset and split, the scenes of each split, and what is missing or left out."""
    rows = [[subset, *(len(lists[subset, split]) for split in SPLITS)] for subset in SUBSETS]
    lines = [table(["frames", *SPLITS], rows), ""]
    present = {entry.scene for entries in lists.values() for entry in entries}
    for split in SPLITS:
        scenes = [scene for scene, its_split in scene_splits().items() if its_split == split]
        here = [scene for scene in scenes if scene in present]
        lines.append(f"{split}: {len(here)} of {len(scenes)} scenes{': ' if here else ''}{', '.join(here)}")
        if absent := [scene for scene in scenes if scene not in present]:
            lines.append(f"    no frames of {', '.join(absent)}")
    lines += [f"left out: {count} frames: {reason}" for reason, count in sorted(left_out.items())]
    wanted = [(subset, split) for subset in SUBSETS[:2] for split in SPLITS] + [("ambiguous", "test")]
    if missing := [f"{subset} {split}" for subset, split in wanted if not lists[subset, split]]:
        lines.append(f"missing, so no list is written: {', '.join(missing)}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m dataloaders.make_splits", description=__doc__)
    parser.add_argument("root", type=Path, help="the folder of the scenes or its parent (data.root)")
    parser.add_argument("--splits", type=Path, help="where the lists go (data.splits); default ROOT/splits")
    parser.add_argument("--overwrite", action="store_true", help="replace other lists that are there")
    options = parser.parse_args(arguments)
    if not options.root.is_dir():
        raise UserError(f"there is no folder {options.root}")
    lists, left_out = assign(find_frames(options.root))
    print(report(lists, left_out))
    folder = options.splits or options.root / "splits"
    texts = list_texts(lists)
    if not texts:
        raise UserError(f"{options.root}: none of the frames found can be used, no list is written")
    write_lists(folder, texts, options.overwrite)
    print(f"{len(texts)} lists in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
