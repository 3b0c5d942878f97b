"""Times ways of doing the same thing side by side and tells where and at which commit that was."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "numpy", "opencv-python-headless", "albumentations")


def arguments(description: str, repeats: int) -> argparse.Namespace:
    """Command line of a benchmark: --repeats, --out."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds, of which the median counts")
    parser.add_argument("--out", type=Path, help="write the figures to this file as JSON as well")
    return parser.parse_args()


def side_by_side(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` per way; one round before is not counted.

    The ways take turns, so that a slow moment of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> dict[str, str]:
    """What a figure depends on: processor, cores, GPU, versions, commit."""
    versions = {package: metadata.version(package) for package in PACKAGES}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": processor(),
        "cores": str(cores),
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **versions,
        "commit": commit(),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """Short hash of the checkout, with "+" where files differ from it; "none" outside of git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True)
        changed = subprocess.check_output([*git, "status", "--porcelain"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return name.strip() + ("+" if changed.strip() else "")


def report(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], notes: str, out: Path | None
) -> None:
    """Prints a Markdown table, the notes and the machine; writes the same to `out` as JSON."""
    where = machine()
    print(f"\n**{title}**\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row) + " |")
    print(f"\n{notes}\n\n" + ", ".join(f"{key} {value}" for key, value in where.items()))
    if out:
        figures = {"title": title, "rows": [dict(zip(columns, row, strict=True)) for row in rows]}
        out.write_text(json.dumps(figures | {"notes": notes, "machine": where}, indent=1) + "\n")
