"""The run folder: what a run was, what it said and measured. Never overwritten unless asked."""

import csv
import importlib.metadata
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from engine.checkpoints import atomic_write
from engine.config import UserError, dump
from engine.flat import differences, flatten

# May differ between a run and its resumption: they change no step of the training.
FREE_TO_DIFFER = ("evaluate", "data.workers", "data.cache_dir", "output")
DECIDES = ("evaluate.absent",)  # but this one: validation counts its classes, and chooses the best epoch

PACKAGES = (
    "torch", "torchvision", "numpy", "segmentation-models-pytorch", "timm", "albumentations",
    "opencv-python-headless", "pydantic", "safetensors",
)  # fmt: skip


class Table:
    """A CSV file that is rewritten as a whole with every row, so that it is never half a row long."""

    def __init__(self, path: Path, columns: Sequence[str], keep: int = 0):
        """Keeps the first `keep` rows of an existing file. Raises UserError if they aren't there."""
        self.path, self.columns = path, list(columns)
        self.rows: list[dict[str, str]] = []
        if keep:
            try:
                with open(path, newline="", encoding="utf-8") as file:
                    reader = csv.DictReader(file)
                    self.rows = [row for row, _ in zip(reader, range(keep), strict=False)]
            except (OSError, ValueError, csv.Error) as error:
                raise UserError(f"{path}: can't be read ({error}); start again with --overwrite") from error
            if len(self.rows) < keep or reader.fieldnames != self.columns:
                raise UserError(
                    f"{path}: expected {keep} rows of {', '.join(columns)}, as last.pt says; "
                    "start again with --overwrite"
                )
        self._write()

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row; every column must be given, None leaves it empty, floats keep all digits."""
        if row.keys() != set(self.columns):
            raise ValueError(f"{self.path}: row has {sorted(row)}, expected {sorted(self.columns)}")
        self.rows.append({name: "" if row[name] is None else str(row[name]) for name in self.columns})
        self._write()

    def _write(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        atomic_write(self.path, text.getvalue())


class RunFolder:
    """runs/<name>/: config.yaml, environment.json, log.txt, metrics.csv, timing.csv, progress.png,
    tensorboard/, checkpoints/last.pt (full state), checkpoints/best.safetensors (weights and metadata)."""

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        device: torch.device | str = "cpu",
    ):
        """Opens the folder for a run with this resolved config.

        Raises UserError where check_run_folder does, before anything is written or deleted."""
        check_run_folder(path, config, resume=resume, overwrite=overwrite)
        self.path, self.config = Path(path), dict(config)
        if overwrite and self.path.exists():
            shutil.rmtree(self.path)
        for leftover in self.path.rglob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink()
        atomic_write(self.path / "config.yaml", dump(self.config))
        text = json.dumps(environment(torch.device(device)), indent=2, sort_keys=True)
        atomic_write(self.path / "environment.json", text + "\n")

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.pt"

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best.safetensors"

    def table(self, name: str, columns: Sequence[str], keep: int = 0) -> Table:
        """The CSV of this name (metrics.csv, timing.csv) with its first `keep` rows; later ones are cut."""
        return Table(self.path / name, columns, keep)

    def log(self, text: str, *, show: bool = True) -> None:
        """Adds the text to log.txt with the time and, with show, prints it (beside a progress bar, too)."""
        if show:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        path = self.path / "log.txt"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        except OSError as error:
            raise UserError(f"{path}: can't be written: {error.strerror}") from error


def check_run_folder(
    path: str | Path, config: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
) -> None:
    """Raises UserError where a run with this resolved config may not use the folder. Changes nothing.

    A non-empty folder needs a flag: resume wants the same config (FREE_TO_DIFFER apart), overwrite wants to
    find the config.yaml of a run of that name, so that it can't delete anything else."""
    path = Path(path)
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other: go on with the run or start it again")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: should become the run's folder, but is a file")
    if not path.exists() or not any(path.iterdir()):
        return
    if not resume and not overwrite:
        raise UserError(
            f"{path}: not empty; go on with that run (--resume), start it again and lose what is there "
            "(--overwrite), or choose another name"
        )
    before = _config_in(path)
    if overwrite:
        if path.is_symlink() or path.resolve().name != Path(str(before.get("name"))).name:
            raise UserError(
                f"{path}: --overwrite deletes only the folder of a run; move this one away yourself"
            )
        return
    different = differing_keys(before, _parse(dump(dict(config))))
    if different:
        changes = "; ".join(f"{key} (was {was}, is {now})" for key, was, now in different)
        raise UserError(
            f"{path}: --resume needs the config that the run began with; different: {changes}. "
            "Use another name, or start again with --overwrite"
        )


def refuse_cache_inside(cache_dir: str | Path, folder: str | Path) -> None:
    """UserError for caches in the folder of a run, which --overwrite empties."""
    if Path(cache_dir).resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(
            f"data.cache_dir: {cache_dir} lies in the run's own folder {folder}; name another place"
        )


def differing_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, value before, value now) of all keys that must be equal to resume and are not."""
    return [
        one
        for one in differences(flatten(before), flatten(now))
        if one[0] in DECIDES or not any(f"{one[0]}.".startswith(f"{free}.") for free in FREE_TO_DIFFER)
    ]


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, git commit (None outside git), device, threads and command of this process."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "command": sys.argv,
        "cpus": os.cpu_count(),
        "device": f"{device} {name}".strip(),
        "git": {"commit": _git("rev-parse", "HEAD"), "dirty": _dirty()},
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def _config_in(path: Path) -> dict[str, Any]:
    file = path / "config.yaml"
    if not file.is_file():
        raise UserError(
            f"{path}: not empty, and not the folder of a run (no config.yaml in it); move it away"
        )
    try:
        config = _parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: can't be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: not the config of a run; move {path} away")
    return config


def _parse(text: str) -> Any:
    """The YAML with every value as text: no reader's idea of a number comes between equal files."""
    return yaml.load(text, Loader=yaml.BaseLoader)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _dirty() -> bool | None:
    """Whether tracked files differ from the commit."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return None if changes is None else bool(changes)
