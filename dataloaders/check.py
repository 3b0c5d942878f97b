"""python -m dataloaders.check CONFIG [a.b=c ...]: reads every frame of the data and tells what is wrong with
it."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from tqdm import tqdm

from dataloaders.check_images import check_images
from dataloaders.command import listed, many, table
from dataloaders.frames import SPLITS, Frame, FrameIndex
from engine.command import run
from engine.config import Data, ImageData, Pipeline, UserError, load

SHOWN = 20  # files that are named for one problem, problems that are printed of many alike


@dataclass
class Report:
    """What a check found: `problems` make the data unfit for use, `warnings` are for the reader to judge.

    histogram: (subset, split) -> int64 [K + 1], pixels of each class and, last, of none (ignored or unknown).
    Unreadable frames are not in it. unknown: colour that the data set does not know -> pixels."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    histogram: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    unknown: Counter = field(default_factory=Counter)

    def text(self, index: FrameIndex) -> str:
        """The report as people read it: counts, class shares, warnings, problems."""
        lines = [
            f"{index.name} at {index.root}: {index.describe()}",
            *index.notes,
            "",
            shares(index, self.histogram),
        ]
        lines += ["", *(f"warning: {warning}" for warning in self.warnings)] if self.warnings else []
        lines += ["", *(f"problem: {problem}" for problem in self.problems[:SHOWN])] if self.problems else []
        if more := len(self.problems) - SHOWN:
            lines += [f"... and {more} more problems"] if more > 0 else []
        unknown = f"{self.unknown.total()} pixels of {len(self.unknown)} unknown colours"
        return "\n".join(
            [*lines, "", f"{len(index.frames)} frames, {len(self.problems)} problems, {unknown}"]
        )


def check(index: FrameIndex, workers: int | None = None) -> Report:
    """Looks at the lists, then reads every image and label of the index on `workers` threads (all cores).

    Problems: frames listed twice, scenes of train or gate in test, files missing, undecodable, of a wrong
    size or with values out of range, unknown colours. Threads are enough, since decoding runs outside
    Python's lock."""
    report = check_lists(index)
    empty, unreadable, seen_in = [], [], Counter()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        found = pool.map(lambda frame: examine(index, frame), index.frames)
        progress = tqdm(found, "frames", total=len(index.frames), disable=None)
        for frame, (pixels, unknown, problem) in zip(index.frames, progress, strict=True):
            if problem:
                unreadable.append(problem)
                continue
            place = (frame.subset, frame.split)
            report.histogram[place] = report.histogram.get(place, 0) + pixels
            report.unknown += unknown
            seen_in.update(unknown.keys())
            if not pixels[:-1].any():
                empty.append(frame.name)
    if empty:
        report.warnings.append(f"{many(empty, 'frame')} without a labelled pixel: {listed(empty)}")
    for colour, pixels in report.unknown.most_common():
        frames = f"{seen_in[colour]} frames" if seen_in[colour] > 1 else "1 frame"
        report.problems.append(f"unknown colour {colour}: {pixels} pixels in {frames}, they count as ignored")
    report.problems += unreadable
    return report


def check_lists(index: FrameIndex) -> Report:
    """What can be told without reading a frame: frames listed twice and scenes in several splits."""
    report = Report(problems=repeated_frames(index))
    for problem, places in shared_scenes(index.frames):
        (report.problems if problem else report.warnings).append(places)
    return report


def missing_files(index: FrameIndex) -> list[str]:
    """One line for the images and labels that are not there."""
    paths = [path for frame in index.frames for path in (frame.image, frame.label)]
    missing = [str(path) for path in paths if not path.is_file()]
    return [f"{many(missing, 'file')} missing: {listed(missing)}"] if missing else []


def examine(index: FrameIndex, frame: Frame) -> tuple[np.ndarray | None, Counter, str | None]:
    """Pixels by class [K + 1] (last: none), pixels by unknown colour, and what is wrong with the files."""
    try:
        _, labels, unknown = index.read(frame)
        colours = Counter(index.unknown_values(frame.label)) if unknown else Counter()
    except UserError as error:
        return None, Counter(), str(error)
    counts = np.bincount(labels.ravel(), minlength=index.ignore_index + 1)
    return np.append(counts[: index.num_classes], counts[index.ignore_index]), colours, None


def repeated_frames(index: FrameIndex) -> list[str]:
    """One line for each frame that is listed more than once, the first 20 of them, and one for the others."""
    lines = [f"{name} is listed in {' and '.join(places)}" for name, places in index.repeated.items()]
    others = [f"{len(lines) - SHOWN} more frames are listed more than once"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + others


def shared_scenes(frames: Sequence[Frame]) -> list[tuple[bool, str]]:
    """(whether it is a problem, text) for every two splits that share scenes.

    What is learnt from (train, gate) must not share a scene with test. The rest is only a warning: val does
    not enter the figures, and splits of one recording make it optimistic, not wrong."""
    scenes = {split: Counter(frame.scene for frame in frames if frame.split == split) for split in SPLITS}
    found = []
    for one, other in combinations(SPLITS, 2):
        if shared := sorted(scenes[one].keys() & scenes[other].keys()):
            count = sum(scenes[other][scene] for scene in shared)
            told = f"{one} and {other} share {many(shared, 'scene')} ({count} frames of {other})"
            text = f"{told}: {listed(shared)}"
            found.append((other == "test" and one != "val", text))
    return found


def shares(index: FrameIndex, histogram: dict[tuple[str, str], np.ndarray]) -> str:
    """Table of the classes' shares of the labelled pixels, in percent, by subset and split."""
    places = [(subset, split) for subset in index.subsets for split in SPLITS if (subset, split) in histogram]
    rows = []
    for number, name in enumerate(index.classes):
        counts = [histogram[place] for place in places]
        rows.append(
            [name, *(f"{100 * c[number] / max(c[:-1].sum(), 1):.2f}" if c[number] else "-" for c in counts)]
        )
    ignored = (100 * histogram[place][-1] / max(histogram[place].sum(), 1) for place in places)
    rows.append(["(ignored, of all)", *(f"{share:.2f}" for share in ignored)])
    return table(["% of pixels", *("/".join(place) for place in places)], rows)


def data_of(path: str, overrides: Sequence[str]) -> list[Data | ImageData]:
    """The data section of a config; of a pipeline the different ones of its stages."""
    config = load(path, overrides)
    if not isinstance(config, Pipeline):
        return [config.data]
    sections: list[Data | ImageData] = []
    for stage in config.stages.values():
        changes = {
            key: value for key, value in {**config.set, **stage.set}.items() if key.split(".")[0] == "data"
        }
        data = load(stage.config, changes).data
        if not any(data.component == other.component for other in sections):
            sections.append(data)
    return sections


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m dataloaders.check", description=__doc__)
    parser.add_argument("config", help="YAML of a run, an evaluation or a pipeline")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="keys to change, such as data.root=FOLDER"
    )
    parser.add_argument("--workers", type=int, help="threads that read frames (all cores)")
    options = parser.parse_args(arguments)
    problems = 0
    for data in data_of(options.config, options.overrides):
        if isinstance(data, ImageData):
            text, found = check_images(data.build(data.cache_dir))
            print(text)
            problems += found
            continue
        index = data.build()
        report = check(index, options.workers)
        print(report.text(index))
        problems += len(report.problems)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(run(main))
