"""What run and evaluation folders tell about themselves: configs, tables, commands, environments."""

import csv
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from evaluation.formats import number, percent


@dataclass(frozen=True)
class Folder:
    """A run or evaluation folder: its name, resolved config, environment and the tables that are there."""

    path: Path
    name: str
    config_text: str
    config: dict
    environment: dict

    def table(self, name: str) -> list[dict[str, str]]:
        """Rows of a CSV file of the folder, none where it isn't there."""
        path = self.path / name
        if not path.is_file():
            return []
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def open_folder(path: Path) -> Folder:
    config_path, environment_path = path / "config.yaml", path / "environment.json"
    text = config_path.read_text(encoding="utf-8") if config_path.is_file() else ""
    config = yaml.safe_load(text) or {}
    environment = json.loads(environment_path.read_text()) if environment_path.is_file() else {}
    return Folder(path, str(config.get("name", path.name)).split("/")[-1], text, config, environment)


def is_classifier(folder: Folder) -> bool:
    """Whether a run folder is that of a classifier's training."""
    return "method" in (folder.config.get("train") or {})


def run_row(folder: Folder) -> dict:
    """Steps, images, best validation figure and time of a training, from its tables."""
    rows, timing = folder.table("metrics.csv"), folder.table("timing.csv")
    watched = (folder.config.get("train") or {}).get("monitor", "miou")
    validated = [row for row in rows if row.get(watched)]
    best = max(validated, key=lambda row: float(row[watched]), default=None)
    seconds = sum(float(row["seconds"]) + float(row["validation_seconds"] or 0) for row in timing)
    return {
        "name": folder.name,
        "epochs": rows[-1]["epoch"] if rows else "-",
        "steps": number(int(rows[-1]["step"])) if rows else "-",
        "images": number(int(rows[-1]["images_seen"])) if rows else "-",
        "best": percent(float(best[watched])) if best else "-",
        "at": best["epoch"] if best else "-",
        "time": f"{int(seconds) // 60}:{int(seconds) % 60:02d}" if timing else "-",
    }


def commands(folders: Sequence[Folder]) -> list[str]:
    """The command lines that the runs were started with, each once."""
    argvs = [folder.environment.get("command") for folder in folders]
    lines = [shlex.join(["python", Path(argv[0]).name, *argv[1:]]) for argv in argvs if argv]
    return list(dict.fromkeys(lines))


def environments(folders: Sequence[Folder]) -> list[dict[str, str]]:
    """Device, versions and commit, one for each different environment among the runs."""
    found = []
    for environment in (folder.environment for folder in folders if folder.environment):
        git = environment.get("git") or {}
        commit = (git.get("commit") or "unknown")[:12] + (" with local changes" if git.get("dirty") else "")
        versions = environment.get("versions") or {}
        facts = {
            "device": environment.get("device"),
            "cpus": environment.get("cpus"),
            "threads": environment.get("threads"),
            "platform": environment.get("platform"),
            "commit": commit,
            "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
        }
        facts = {name: str(value) for name, value in facts.items() if value not in (None, "")}
        if facts not in found:
            found.append(facts)
    return found
