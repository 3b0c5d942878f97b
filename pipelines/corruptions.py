"""Rows of an evaluation under corruptions: the passes that a config asks for, and tables beside the clean ones."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree

from dataloaders.corruptions import VERSION, corrupt
from dataloaders.frames import Frame, FrameIndex
from engine.config import Evaluate
from evaluation.corruptions import CorruptionTables, rounds, write_corruptions
from evaluation.results import Results
from pipelines.matrix import Zoo

FOLDER = "corruptions"  # of the passes, in the folder of the evaluation
LAST = "corruptions.csv"  # where it is, all is there
TABLES = (LAST, "corruptions.md")


def is_asked(settings: Evaluate) -> bool:
    """Whether an evaluation corrupts anything."""
    return settings.corruptions != "none"


def describe(settings: Evaluate, frames: Sequence[Frame]) -> str:
    """What --dry-run tells: the passes over the frames."""
    asked = settings.corruptions
    names, levels = len(asked.chosen), len(asked.severities)
    return f"corruptions: {names} at {levels} severities: {names * levels} passes over {len(frames)} frames"


def begin(folder: Path, overwrite: bool) -> None:
    """Passes that were done before count, unless they are to be overwritten; the tables go, and are written again."""
    for name in TABLES:
        (folder / name).unlink(missing_ok=True)
    if overwrite and (folder / FOLDER).exists():
        rmtree(folder / FOLDER)


def corrupted_rows(
    folder: Path,
    settings: Evaluate,
    index: FrameIndex,
    frames: Sequence[Frame],
    zoo: Zoo,
    clean: Results,
    subsets: Sequence[str],
    run: Callable[..., Results],
    device_type: str,
) -> None:
    """Evaluates what the config asks for and writes the tables into the folder of the evaluation.

    run(change=...): the pass over the frames, each image changed by change(image, name of the frame)."""
    asked = settings.corruptions
    tables = CorruptionTables(clean, subsets, asked.chosen, asked.severities, asked.seed)
    grid = [(corruption, severity) for corruption in asked.chosen for severity in asked.severities]
    about = {
        "version": VERSION,
        "seed": asked.seed,
        "device": device_type,
        "protocol": asdict(clean.protocol),
        "frames": index.manifest(frames),
        "rows": [row.name for row in clean.rows if row.kind != "ceiling"],
        "networks": {name: trained.sha256 for name, trained in zoo.networks.items()},
        "gates": {name: trained.sha256 for name, (trained, _) in zoo.gates.items()},
    }

    def evaluate(corruption: str, severity: int) -> Results:
        def change(image, name):
            return corrupt(image, corruption, severity, name=name, seed=asked.seed)

        return run(change=change)

    for number, (corruption, severity, results) in enumerate(
        rounds(folder / FOLDER, grid, about, evaluate), 1
    ):
        tables.add(corruption, severity, results)
        print(f"corruptions: {corruption} {severity} ({number} of {len(grid)})", flush=True)
    write_corruptions(folder, tables)
    print(f"corruptions: {folder / 'corruptions.md'}")
