"""Our PGD and APGD against the bare passes that they make, and against those of other libraries.

    python -m benchmarks.attacks [--network resnet18] [--steps 20] [--device cuda]
    python -m benchmarks.attacks --network deeplab [--backbone resnet50] [--batch 2]

A bare pass is what no attack can do without: forward, mean cross-entropy, gradient of the input. The networks are
untrained and eps is tiny, so that no image is lost and no attack ends early. Attacks of pyautoattack, torchattacks and
foolbox run beside ours on ResNet-18 where these are installed:

    pip install foolbox; pip install --no-deps torchattacks   (it asks for a version of requests from 2021)
"""

import argparse
from collections.abc import Callable
from functools import partial
from importlib import util
from operator import truediv
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.apgd import apgd
from attacks.pgd import pgd
from attacks.threat import Threat
from benchmarks.timing import report, side_by_side

EPS = 1e-5
BARE = "bare passes"
RIVALS = ("pyautoattack", "torchattacks", "foolbox")
NETWORKS = {"resnet18": (32, (32, 32), 10), "deeplab": (2, (240, 320), 12)}  # batch, size, classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--backbone", default="resnet50", help="encoder of DeepLabv3+ (%(default)s)")
    parser.add_argument("--batch", type=int, help="images (32 for resnet18, 2 for deeplab)")
    parser.add_argument("--steps", type=int, default=20, help="gradient steps (%(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, the median counts (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the figures to this file as JSON as well")
    options = parser.parse_args()

    batch, size, classes = NETWORKS[options.network]
    torch.manual_seed(0)
    model = build(options.network, options.backbone, classes).to(options.device)
    images = torch.rand(options.batch or batch, 3, *size, device=options.device)
    labels = model(images).argmax(dim=1)
    ways = {BARE: partial(bare, model, images, labels, options.steps)}
    ways |= own(model, images, labels, options.steps, maps=options.network == "deeplab")
    missing = []
    if options.network == "resnet18":
        missing = [name for name in RIVALS if not util.find_spec(name)]
        ways |= {
            f"{name} {attack}": way
            for name in RIVALS
            if name not in missing
            for attack, way in LIBRARIES[name](model, images, labels, options.steps).items()
        }
    rounds = side_by_side({name: timed(way, images) for name, way in ways.items()}, options.repeats)
    name = "ResNet-18" if options.network == "resnet18" else f"DeepLabv3+ {options.backbone}"
    report(
        f"Attacks: {name}, {len(images)} images {size[0]}x{size[1]}, {options.steps} steps, {options.device}",
        ("way", "ms per step", f"x {BARE}"),
        [
            (
                name,
                f"{1000 * median(own) / options.steps:.2f}",
                f"{median(map(truediv, own, rounds[BARE])):.3f}",
            )
            for name, own in rounds.items()
        ],
        f"Each of ours makes {options.steps} passes and one more forward, as the bare passes do; APGD of pyautoattack "
        f"one more pass and one more forward. Medians over {options.repeats} rounds, of the ratios as well, "
        f"{torch.get_num_threads()} threads, linf, one restart from a random point."
        + (f" Not installed: {', '.join(missing)}." if missing else ""),
        options.out,
    )


def build(network: str, backbone: str, classes: int) -> nn.Module:
    """In eval mode, its weights without gradient."""
    if network == "resnet18":
        from torchvision.models import resnet18

        model = resnet18(num_classes=classes)
    else:
        from networks.deeplab import DeepLabV3Plus

        model = DeepLabV3Plus(classes, backbone=backbone, pretrained="none")
    return model.eval().requires_grad_(False)


def bare(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    for _ in range(steps):
        points = images.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(points), labels), points)
    with torch.no_grad():
        model(images)


def own(model: nn.Module, images: Tensor, labels: Tensor, steps: int, maps: bool) -> dict[str, Callable]:
    """Our attacks, those of label maps with the losses that they are used with as well."""
    threat = Threat(EPS, ignore_index=255 if maps else None, seeds=tuple(range(len(images))))

    def run(attack: Callable, **keys) -> None:
        found = attack(model, images, labels, threat, steps=steps, **keys)
        assert (found.forwards, found.backwards) == (steps + 1, steps), "an attack ended early"

    ways = {"ours: PGD": partial(run, pgd), "ours: APGD": partial(run, apgd)}
    if maps:
        ways["ours: SegPGD"] = partial(run, pgd, loss="segpgd")
        ways |= {
            f"ours: APGD {loss}": partial(run, apgd, loss=loss) for loss in ("masked_ce", "jensen_shannon")
        }
    return ways


def of_pyautoattack(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> dict[str, Callable]:
    from pyautoattack.autopgd_base import APGDAttack

    attack = APGDAttack(model, n_iter=steps, norm="Linf", eps=EPS, device=images.device)
    return {"APGD": partial(attack.perturb, images, labels)}


def of_torchattacks(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> dict[str, Callable]:
    import torchattacks

    attack = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=steps, random_start=True)
    return {"PGD": partial(attack, images, labels)}


def of_foolbox(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> dict[str, Callable]:
    import foolbox

    attack = foolbox.attacks.LinfPGD(rel_stepsize=0.25, steps=steps, random_start=True)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
    return {"PGD": partial(attack, wrapped, images, labels, epsilons=EPS)}


LIBRARIES = {"pyautoattack": of_pyautoattack, "torchattacks": of_torchattacks, "foolbox": of_foolbox}


def timed(way: Callable, images: Tensor) -> Callable[[], None]:
    """The call, until the device has done it."""

    def run() -> None:
        way()
        if images.is_cuda:
            torch.cuda.synchronize()

    return run


if __name__ == "__main__":
    main()
