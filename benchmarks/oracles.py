"""Our attacks against figures that others measured, on the folder of sample data that MOE_DATA names (minutes).

    MOE_DATA=... python -m benchmarks.oracles [--only apgd|robust|autoattack] [--images 200] [--device cuda]

apgd: pyautoattack's APGD (CE, 100 steps, one restart) and ours on the CIFAR-10 ResNet-18 of its wheel, on the first
images of cifar10_jpeg that make up equal parts of the classes; robust accuracy may differ by one point.
robust: PGD-20 on the provably robust network of weights/cifar10_robust, all 6,670 test images, at 2/255 and 8/255.
autoattack: the standard AutoAttack on that ResNet-18 at 0.5/255, by an evaluation with its ledger, which goes on where
it was stopped (runs/oracle_autoattack), and called directly on the same batches: the same answers, image by image.
Exits with an error where a figure is not met.
"""

import argparse
import importlib.util
import json
import os
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pyautoattack
import torch
from PIL import Image
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from attacks.apgd import apgd
from attacks.clean import clean
from attacks.pgd import pgd
from attacks.threat import Threat
from benchmarks.timing import report
from engine.config import from_dict
from evaluation.classifier_autoattack import AUTOATTACK
from evaluation.image_results import load_images
from evaluation.robust import is_complete
from pipelines.classifier_evaluation import evaluate, folder_of
from pipelines.cli import Options

# eps in 1/255 -> (robust accuracy in %, tolerance): weights/README.md of the sample data
EXPECTED = {0: (53.9, 0.1), 2: (45.3, 0.5), 8: (20.7, 0.7)}
BATCH = 200
AUTOATTACK_EPS, AUTOATTACK_BATCH = 0.5 / 255, 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=tuple(ORACLES), help="one of them (all)")
    parser.add_argument(
        "--images", type=int, default=200, help="images of the comparison with pyautoattack's APGD"
    )
    parser.add_argument(
        "--autoattack-images", type=int, default=50, help="of that with its AutoAttack (%(default)s)"
    )
    parser.add_argument("--robust-images", type=int, help="of the robust network (all; fewer are not judged)")
    parser.add_argument("--steps", type=int, default=100, help="of APGD (%(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON")
    options = parser.parse_args()
    if "MOE_DATA" not in os.environ:
        raise SystemExit("MOE_DATA is unset; it has to name the folder of sample data")
    data = Path(os.environ["MOE_DATA"])
    wrong = [
        told for name in ORACLES if options.only in (None, name) for told in ORACLES[name](data, options)
    ]
    if wrong:
        raise SystemExit("not met: " + "; ".join(wrong))


def against_pyautoattack(data: Path, options: argparse.Namespace) -> list[str]:
    images, labels = test_images(data, options.images)
    images, labels = images.to(options.device), labels.to(options.device)
    model = wheel_network().to(options.device)
    rows, wrong = [], []
    for eps in (0.5, 1, 8):
        theirs, seconds = timed(
            lambda eps=eps: pyautoattacks(model, images, labels, eps / 255, options.steps)
        )
        ours, own_seconds = timed(
            lambda eps=eps: accuracy(model, images, labels, eps / 255, apgd, steps=options.steps)
        )
        rows.append((f"{eps}/255", f"{theirs:.1f}", f"{ours:.1f}", f"{seconds:.0f}", f"{own_seconds:.0f}"))
        if abs(theirs - ours) > 1:
            wrong.append(f"APGD at {eps}/255: {ours:.1f} % against {theirs:.1f} %")
    report(
        f"Robust accuracy in %, ResNet-18 of pyautoattack's wheel, {len(images)} images",
        ("eps", "pyautoattack APGD", "our APGD", "their seconds", "our seconds"),
        rows,
        f"APGD on cross-entropy, {options.steps} steps, one restart, linf, {options.device}; clean accuracy "
        f"{accuracy(model, images, labels, 0.0, clean):.1f} %. pyautoattack leaves images out that are wrong from the "
        "start, ours keeps batches as they are.",
        options.out and options.out / "oracle_apgd.json",
    )
    return wrong


def robust_network(data: Path, options: argparse.Namespace) -> list[str]:
    images, labels = test_images(data, options.robust_images)
    images, labels = images.to(options.device), labels.to(options.device)
    model = provably_robust(data / "weights" / "cifar10_robust" / "cifar_small_36px.pth").to(options.device)
    rows, wrong = [], []
    for eps, (expected, tolerance) in EXPECTED.items():
        attack, keys = (pgd, {"steps": 20, "step_size": eps / 255 / 8}) if eps else (clean, {})
        found = accuracy(model, images, labels, eps / 255, attack, **keys)
        rows.append((f"{eps}/255", f"{expected} +- {tolerance}", f"{found:.2f}"))
        if options.robust_images is None and abs(found - expected) > tolerance:
            wrong.append(f"PGD-20 at {eps}/255: {found:.2f} % instead of {expected} +- {tolerance}")
    report(
        f"Robust accuracy in %, provably robust CIFAR-10 network, {len(images)} images",
        ("eps", "expected", "our PGD-20"),
        rows,
        f"Random start, step eps / 8, best point kept, linf, {options.device}.",
        options.out and options.out / "oracle_robust.json",
    )
    return wrong


def autoattack_directly(data: Path, options: argparse.Namespace) -> list[str]:
    config = from_dict({
        "name": "oracle_autoattack",
        "data": {"name": "cifar", "root": str(data / "cifar10_jpeg"), "classes": 10, "val_images": 500},
        "models": {"wheel": {"name": "external", "file": __file__, "function": "wheel_network"}},
        "evaluate": {
            "suite": "none", "eps": [AUTOATTACK_EPS], "autoattack": options.autoattack_images,
            "autoattack_batch_size": AUTOATTACK_BATCH,
        },
    })  # fmt: skip
    ledger = folder_of(config) / "ledger_autoattack"
    if not (ledger.exists() and is_complete(ledger)):
        evaluate(
            config, Options(device=options.device, overwrite=(folder_of(config) / "results.csv").exists())
        )
    results = load_images(ledger)
    ours = results.under("wheel", AUTOATTACK_EPS, [AUTOATTACK])
    split = config.data.build(config.data.cache_dir).split("test")
    place = {name: row for row, name in enumerate(split.names)}
    rows = [place[name] for name in results.images]
    images = torch.from_numpy(split.images[rows]).float().to(options.device) / 255
    labels = torch.from_numpy(split.labels[rows]).long().to(options.device)
    theirs = np.concatenate([
        directly(part, own, options.device)
        for part, own in zip(images.split(AUTOATTACK_BATCH), labels.split(AUTOATTACK_BATCH), strict=True)
    ])  # fmt: skip
    other = [name for name, one, two in zip(results.images, ours, theirs, strict=True) if one != two]
    report(
        f"Right answers under AutoAttack, ResNet-18 of pyautoattack's wheel, {len(rows)} images",
        ("eps", "called directly", "through our ledger", "images that differ"),
        [(f"{255 * AUTOATTACK_EPS:g}/255", f"{theirs.sum()}", f"{ours.sum()}", f"{len(other)}")],
        f"Standard version, batches of {AUTOATTACK_BATCH}, linf, {options.device}; without attack "
        f"{results.clean('wheel').sum()} are right.",
        options.out and options.out / "oracle_autoattack.json",
    )
    return [f"AutoAttack differs on {', '.join(other)}"] if other else []


def directly(images: Tensor, labels: Tensor, device: str) -> np.ndarray:
    """Whether each image is still right, by pyautoattack alone; layout as in evaluations."""
    model = wheel_network().to(device, memory_format=torch.channels_last)
    attack = AutoAttack(model, norm="Linf", eps=AUTOATTACK_EPS, seed=0, version="standard", device=device)
    found, _ = attack.run_standard_evaluation(images, labels, batch_size=len(images))
    with torch.no_grad():
        return (model(found).argmax(dim=1) == labels).cpu().numpy()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, eps: float, attack: Callable, **keys) -> float:
    """Share of images in % that the model gets right after an attack, by its answer on what the attack returned."""
    right = 0
    for start in range(0, len(images), BATCH):
        part = slice(start, start + BATCH)
        threat = Threat(eps, ignore_index=None, seeds=tuple(range(start, start + len(images[part]))))
        found = attack(model, images[part], labels[part], threat, **keys)
        right += correct(model, found.images, labels[part])
    return 100 * right / len(images)


def pyautoattacks(model: nn.Module, images: Tensor, labels: Tensor, eps: float, steps: int) -> float:
    attack = APGDAttack(model, n_iter=steps, norm="Linf", eps=eps, loss="ce", seed=0, device=images.device)
    right = sum(
        correct(model, attack.perturb(*part), part[1])
        for part in zip(images.split(BATCH), labels.split(BATCH), strict=True)
    )
    return 100 * right / len(images)


@torch.no_grad()
def correct(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    return (model(images).argmax(dim=1) == labels).sum().item()


def timed(call: Callable[[], float]) -> tuple[float, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def test_images(data: Path, count: int | None) -> tuple[Tensor, Tensor]:
    """(images [N, 3, 32, 32] in [0, 1], labels [N]) of cifar10_jpeg: one of each class in turn; None: all."""
    folder = data / "cifar10_jpeg"
    classes = json.loads((folder / "classes.json").read_text())
    files: dict[str, list[tuple[str, bytes]]] = {name: [] for name in classes}
    with tarfile.open(folder / "test.tar.gz") as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".jpg"):
                files[Path(member.name).parent.name].append((member.name, archive.extractfile(member).read()))
    ordered = [sorted(of_class) for of_class in files.values()]
    turns = [(row[1], label) for rank in zip(*ordered, strict=True) for label, row in enumerate(rank)][:count]
    pixels = np.stack([np.asarray(Image.open(BytesIO(content)).convert("RGB")) for content, _ in turns])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255
    return images, torch.tensor([label for _, label in turns])


def wheel_network() -> nn.Module:
    """The CIFAR-10 ResNet-18 that comes with pyautoattack, images in [0, 1]."""
    folder = Path(pyautoattack.__file__).parent / "examples"
    spec = importlib.util.spec_from_file_location("pyautoattack_resnet", folder / "resnet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.ResNet18()
    model.load_state_dict(torch.load(folder / "model_test.pt", map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False)


class Scaled(nn.Module):
    """(images - mean) / std in front of a network."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: float):
        super().__init__()
        self.network, self.std = network, std
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def provably_robust(path: Path) -> nn.Module:
    """The small network of convex_adversarial (Wong et al. 2018, arXiv 1805.12514)."""
    layers = nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten()
    network = nn.Sequential(*layers, nn.Linear(2048, 100), nn.ReLU(), nn.Linear(100, 10))
    weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"][0]
    network.load_state_dict(weights)
    return Scaled(network, (0.485, 0.456, 0.406), 0.225).eval().requires_grad_(False)


ORACLES = {"apgd": against_pyautoattack, "robust": robust_network, "autoattack": autoattack_directly}

if __name__ == "__main__":
    main()
