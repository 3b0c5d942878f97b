"""Freed memory that the process keeps against glibc's own way, on adversarial passes of DeepLabv3+.

    python -m benchmarks.memory [--repeats 5]

Each round is a process of its own, the two ways in turn: PGD on four images at 288x384, EfficientNet-Lite0, one thread.
"""

import resource
import subprocess
import sys
import time

import torch

from attacks.pgd import pgd
from attacks.threat import Threat
from benchmarks.timing import arguments, medians, report
from engine.memory import keep_freed_memory
from networks.deeplab import DeepLabV3Plus

WAYS = {"glibc's own": "left", "kept (ours)": "kept"}
IMAGES, SIZE, STEPS, WARM, COUNTED = 4, (288, 384), 3, 3, 3


def main() -> None:
    options = arguments(__doc__.splitlines()[0], repeats=5)
    seconds = {name: [] for name in WAYS}
    faults = {name: [] for name in WAYS}
    peaks = {name: [] for name in WAYS}
    for _ in range(options.repeats):
        for name, way in WAYS.items():
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.memory", way], check=True, capture_output=True, text=True
            )
            for values, value in zip((seconds, faults, peaks), done.stdout.split(), strict=True):
                values[name].append(float(value))
    middle, pages, peak = map(medians, (seconds, faults, peaks))
    first, *_ = middle.values()
    report(
        f"PGD of {STEPS} steps on {IMAGES} images {SIZE[0]}x{SIZE[1]}, DeepLabv3+ EfficientNet-Lite0, one thread",
        ("freed memory", "seconds", "gain", "page faults", "peak MiB"),
        [
            (
                name,
                f"{middle[name]:.2f}",
                f"{first / middle[name]:.2f}",
                f"{pages[name]:,.0f}",
                f"{peak[name]:,.0f}",
            )
            for name in WAYS
        ],
        f"Median over {options.repeats} processes each way, of the mean of {COUNTED} calls after {WARM} others.",
        options.out,
    )


def measured(way: str) -> str:
    """Seconds and page faults of a call in this process, and the most MiB that it has held."""
    if way == "kept":
        keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DeepLabV3Plus(11, backbone="tu-tf_efficientnet_lite0", pretrained="none")
    model.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    images = torch.rand(IMAGES, 3, *SIZE).contiguous(memory_format=torch.channels_last)
    labels, threat = (
        torch.randint(11, (IMAGES, *SIZE)),
        Threat(1 / 255, ignore_index=255, seeds=tuple(range(IMAGES))),
    )
    for call in range(WARM + COUNTED):
        if call == WARM:
            pages, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        pgd(model, images, labels, threat, steps=STEPS, loss="masked_ce")
    took = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_SELF)
    return f"{took / COUNTED} {(used.ru_minflt - pages) / COUNTED} {used.ru_maxrss / 1024}"


if __name__ == "__main__":
    if sys.argv[1:2] in (["left"], ["kept"]):
        print(measured(sys.argv[1]))
    else:
        main()
