"""Generated road scenes in the layout, file names and label colours of A2D2, read by the same code as A2D2.

They were built to show what a mixture of experts does where its experts disagree, and are no evidence about
real roads. `python -m dataloaders.roadscenes OUT.png` writes a sheet of examples."""

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from dataloaders.a2d2 import a2d2
from dataloaders.a2d2_classes import CATEGORIES, list_entries, rgb
from dataloaders.a2d2_lists import Entry
from dataloaders.cache_parts import say
from dataloaders.frames import SPLITS, FrameIndex
from dataloaders.scene_furniture import FRAMES_PER_SCENE
from dataloaders.scene_layouts import SUBSETS, paint_frame
from dataloaders.scene_painter import CLASS_BITS
from engine.command import run
from engine.config import NonNegativeInt, PositiveInt, Size, UserError
from engine.disk import progress

GENERATOR = "roadscenes"
VERSION = 2  # raise it whenever the same parameters would give other bytes
STAMP = "roadscenes.json"
OWN = re.compile(r"2000\d{4}_\d{6}|splits|class_list\.json|" + re.escape(STAMP))
NUMBER_STEP = 15  # half a second of A2D2's 30 numbers a second; a scene stays within one bootstrap block


def roadscenes(
    *,
    root: str,
    num_classes: Literal[11, 38, 55] = 38,
    size: Size = (128, 192),
    train: PositiveInt = 400,
    gate: PositiveInt = 256,
    val: PositiveInt = 96,
    test: PositiveInt = 160,
    ambiguous: PositiveInt = 96,
    seed: NonNegativeInt = 0,
) -> FrameIndex:
    """Highway and urban scenes, and test frames of roads between the two, written to `root` when needed.

    root: folder for the frames: missing, empty, or written by this function; frames of other parameters than
        the ones given are replaced.
    num_classes: 55 list entries, 38 categories or 11 groups, as for a2d2.
    size: height and width of the frames.
    train: frames a subset (highway, urban) in the train split. Splits share no scene; a scene has 8 frames.
    gate: frames a subset in the gate split.
    val: frames a subset in the val split.
    test: frames a subset in the test split.
    ambiguous: frames of the subset "ambiguous", which has a test split only.
    seed: every frame follows from the seed, its scene and its place in the scene alone.

    Raises UserError for a folder that holds anything else, and for one that can't be written."""
    counts = {
        (subset, split): count
        for split, count in zip(SPLITS, (train, gate, val, test), strict=True)
        for subset in ("highway", "urban")
    }
    plan = Plan(seed, tuple(size), {**counts, ("ambiguous", "test"): ambiguous})
    folder = Path(root).resolve()  # of a link, the target is replaced
    if read_stamp(folder) != plan.stamp:
        check_replaceable(folder)
        try:
            generate(plan, folder)
        except OSError as error:
            raise UserError(
                f"roadscenes: {folder} (data.root) can't be written: {error.strerror or error}"
            ) from None
    index = a2d2(root=root, num_classes=num_classes, frame_size=size)
    return replace(index, name="roadscenes")


@dataclass(frozen=True)
class Plan:
    """What is to be written: frames by (subset, split)."""

    seed: int
    size: tuple[int, int]
    counts: dict[tuple[str, str], int]

    @property
    def stamp(self) -> dict:
        """All that the files depend on."""
        counts = {f"{subset}_{split}": count for (subset, split), count in self.counts.items()}
        return {
            "generator": GENERATOR,
            "version": VERSION,
            "seed": self.seed,
            "size": list(self.size),
            **counts,
        }

    def scenes(self) -> Iterator["SceneJob"]:
        for (subset, split), count in self.counts.items():
            for number in range(-(-count // FRAMES_PER_SCENE)):
                frames = min(FRAMES_PER_SCENE, count - number * FRAMES_PER_SCENE)
                yield SceneJob(self.seed, self.size, subset, split, number, frames)


@dataclass(frozen=True)
class SceneJob:
    """One recording to write; picklable, for the worker processes."""

    seed: int
    size: tuple[int, int]
    subset: str
    split: str
    number: int
    frames: int

    @property
    def key(self) -> tuple[int, ...]:
        """What all randomness of the scene follows from; none is 0, which would count as missing."""
        subset, split = list(SUBSETS).index(self.subset), SPLITS.index(self.split)
        return self.seed, subset + 1, split + 1, self.number + 1

    @property
    def entries(self) -> list[Entry]:
        """Names of the frames: the day tells split (month) and subset (day), the time counts the scenes."""
        _, subset, split, number = self.key
        minutes, seconds = divmod(number - 1, 60)
        scene = f"2000{split:02d}{subset:02d}_{minutes // 60:02d}{minutes % 60:02d}{seconds:02d}"
        return [Entry(scene, f"{(frame + 1) * NUMBER_STEP:09d}") for frame in range(self.frames)]

    def paint(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images and labels, both uint8 [H, W, 3] RGB."""
        scene = SUBSETS[self.subset](np.random.default_rng(self.key))
        for frame in range(self.frames):
            sensor = np.random.default_rng((*self.key, frame + 1))
            image, values = paint_frame(scene, frame, self.size, sensor)
            yield image, label_colours()[values]

    def write(self, folder: Path) -> int:
        """Writes the frames below `folder` and gives their number."""
        for entry, pictures in zip(self.entries, self.paint(), strict=True):
            for kind, picture in zip(("camera", "label"), pictures, strict=True):
                path = folder / entry.path(kind)
                path.parent.mkdir(parents=True, exist_ok=True)
                _, encoded = cv2.imencode(".png", picture[..., ::-1], (cv2.IMWRITE_PNG_COMPRESSION, 1))
                path.write_bytes(encoded)
        return self.frames


@cache
def label_colours() -> np.ndarray:
    """RGB colour of each label value, uint8 [256, 3]; after the last variant of a class comes its first."""
    colours = [[rgb(int(colour, 16)) for colour in listed.split()] for _, _, listed in CATEGORIES]
    table = np.zeros((256, 3), np.uint8)
    for value in range(256):
        variants = colours[min(value & CLASS_BITS, len(colours) - 1)]
        table[value] = variants[value // (CLASS_BITS + 1) % len(variants)]
    return table


def generate(plan: Plan, folder: Path) -> None:
    """Writes everything beside `folder` and renames it: others see the old data set or the new one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as aside:
        made = Path(aside, "made")
        (made / "splits").mkdir(parents=True)
        jobs = list(plan.scenes())
        write_scenes(jobs, made)
        for subset, split in plan.counts:
            entries = [e for job in jobs if (job.subset, job.split) == (subset, split) for e in job.entries]
            lines = "".join(entry.path("label") + "\n" for entry in entries)
            (made / "splits" / f"{subset}_{split}_gt.txt").write_text(lines)
        classes = {f"#{colour}": name for name, (colour, _, _) in list_entries().items()}
        (made / "class_list.json").write_text(json.dumps(classes, indent=1))
        (made / STAMP).write_text(json.dumps(plan.stamp, indent=1))
        if read_stamp(folder) == plan.stamp:  # another process was faster
            return
        if folder.exists():
            folder.rename(Path(aside, "replaced"))
        made.rename(folder)


def write_scenes(jobs: Sequence[SceneJob], folder: Path) -> None:
    """All scenes, on all cores where they are worth a process; no frame depends on the order."""
    total = sum(job.frames for job in jobs)
    with ExitStack() as stack:
        written = map(SceneJob.write, jobs, [folder] * len(jobs))
        if total > 100:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            pool = ProcessPoolExecutor(cores, context, initializer=cv2.setNumThreads, initargs=(1,))
            stack.callback(pool.shutdown, cancel_futures=True)
            written = pool.map(SceneJob.write, jobs, [folder] * len(jobs), chunksize=4)
        for _ in progress((frame for frames in written for frame in range(frames)), total, "roadscenes", say):
            pass


def read_stamp(folder: Path) -> dict | None:
    """What the folder was generated with, None where it has no readable stamp of this generator."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) and stamp.get("generator") == GENERATOR else None


def check_replaceable(folder: Path) -> None:
    """UserError unless the folder is missing, empty, or holds nothing but a data set of this generator."""
    if not folder.exists():
        return
    names = sorted(os.listdir(folder)) if folder.is_dir() else [folder.name]
    strange = [name for name in names if not OWN.fullmatch(name)]
    if not names or (not strange and read_stamp(folder)):
        return
    raise UserError(
        f"roadscenes: {folder} (data.root) holds something else, e.g. {(strange or names)[0]}; "
        "allowed: a folder that is missing, empty or written by roadscenes"
    )


def contact_sheet(path: Path, rows: int, size: tuple[int, int], seed: int) -> None:
    """A picture of `rows` scenes of each subset: images above their labels, a column for each subset."""
    columns = []
    for subset in SUBSETS:
        pairs = [next(SceneJob(seed, size, subset, "test", number, 1).paint()) for number in range(rows)]
        columns.append(np.concatenate([picture for pair in pairs for picture in pair]))
    sheet = np.concatenate(columns, axis=1)
    if not cv2.imwrite(str(path), sheet[..., ::-1]):
        raise UserError(f"{path}: cannot be written")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m dataloaders.roadscenes", description=__doc__)
    parser.add_argument("picture", type=Path, help="PNG to write: columns highway, urban, ambiguous")
    parser.add_argument("--rows", type=int, default=2, help="scenes a subset")
    parser.add_argument("--size", type=int, nargs=2, default=(192, 288), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    contact_sheet(options.picture, options.rows, tuple(options.size), options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
