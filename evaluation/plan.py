"""What a robust evaluation consists of: the manifest of its ledger, and the units of work that follow from it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from engine.config import IGNORE, UserError
from engine.schema import boundless, motionless
from evaluation.adversarials import Kept
from evaluation.formats import aligned, number
from evaluation.ledger import Record, digest, plain
from evaluation.suites import CLEAN, Member
from evaluation.targets import Target


@dataclass(frozen=True)
class Scene:
    """A fixed batch of B images: float32 [B, C, H, W] in [0, 1], labels int64 [B, *S], and of each image its name and
    the block of neighbours that the bootstrap draws as one."""

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Setup:
    """How targets are attacked. about: what else must be told beside a figure (data set, split, sizes).
    deployment_precision: bf16 scores attacked images in that, too (see evaluation.deployment)."""

    classes: tuple[str, ...]
    eps: tuple[float, ...]
    suite: str = "quick"
    norm: Literal["linf", "l2"] = "linf"
    seed: int = 0
    ignore_index: int = IGNORE
    subset: str = "all"
    adversarials: Kept = "none"
    deployment_precision: Literal["fp32", "bf16"] = "fp32"
    about: dict = field(default_factory=dict)

    def __post_init__(self):
        positive = all(0 < one < math.inf for one in self.eps)
        if not self.eps or not positive or len(set(self.eps)) < len(self.eps):
            raise UserError(f"eps: {list(self.eps)} is wrong; expected numbers above 0, each only once")
        if self.norm not in ("linf", "l2"):
            raise UserError(f"norm: {self.norm!r} is unknown; allowed: linf, l2")
        if self.deployment_precision not in ("fp32", "bf16"):
            told = f"{self.deployment_precision!r} is unknown; allowed: fp32, bf16"
            raise UserError(f"deployment_precision: {told}")
        for mistake in boundless({"eps": list(self.eps), "norm": self.norm}):
            raise UserError(str(mistake))
        if self.adversarials == "uint8" and motionless(min(self.eps)):
            raise UserError(f"eps: {motionless(min(self.eps))}")

    def protocol(self, device: torch.device, threads: int) -> dict:
        """All that the records of every target depend on."""
        deployed = {"deployment_precision": self.deployment_precision}
        return {
            **self.about,
            "classes": list(self.classes),
            "norm": self.norm,
            "seed": self.seed,
            "ignore_index": self.ignore_index,
            "adversarials": self.adversarials,
            "precision": "float32",
            **(deployed if self.deployment_precision != "fp32" else {}),
            "device": device.type,
            "threads": threads,
            "torch": torch.__version__,
        }


@dataclass(frozen=True)
class Unit:
    """A batch of images of a target under a member of the suite at one eps; name: a digest of all that its
    records depend on."""

    name: str
    batch: int
    target: str
    eps: float
    member: str
    column: str
    images: tuple[str, ...]


def manifest_of(
    setup: Setup,
    protocol: Mapping,
    targets: Sequence[Target],
    members: Mapping[str, Sequence[Member]],
    images: Sequence[Mapping],
) -> dict:
    """What stands at the head of a ledger. images: name, sha256, block, batch and labelled pixels of each."""
    return plain(
        {
            "protocol": protocol,
            "suite": "custom" if setup.suite == "none" else setup.suite,
            "subset": setup.subset,
            "eps": sorted(setup.eps),
            "targets": [
                {
                    "name": one.name,
                    "role": one.role,
                    "identity": one.identity,
                    "members": [member.about for member in members[one.name]],
                }
                for one in targets
            ],
            "images": list(images),
        }
    )


def units_of(manifest: Mapping) -> Iterator[Unit]:
    """Every unit of an evaluation in the order in which they are done: batch by batch, target by target, the clean
    images first, then eps ascending, member by member."""
    batches: dict[int, list[Mapping]] = {}
    for image in manifest["images"]:
        batches.setdefault(image["batch"], []).append(image)
    for batch, images in batches.items():
        names = tuple(image["name"] for image in images)
        content = [(image["name"], image["sha256"]) for image in images]
        for target in manifest["targets"]:
            steps = [(0.0, CLEAN.about)]
            steps += [(eps, member) for eps in manifest["eps"] for member in target["members"]]
            for eps, member in steps:
                key = (manifest["protocol"], target["name"], target["identity"])
                name = digest([*key, member["attack"], member["version"], eps, content])
                yield Unit(name, batch, target["name"], eps, member["name"], member["column"], names)


def records_of(manifest: Mapping, units: Mapping[str, Sequence[Record]]) -> Iterator[Record]:
    """The records of a complete ledger's units, under the names that its attacks have now. Others are left out: a
    replaced ledger keeps those of earlier weights, attacks and images."""
    for unit in units_of(manifest):
        for record in units[unit.name]:
            yield {**record, "attack": unit.member}


def cost_table(manifest: Mapping) -> list[str]:
    """What every target costs, in passes per image, for one eps and for all; the sum for all images last.

    A pass is one forward pass, mostly with a backward pass; of a target that runs E networks it is E network passes.
    """
    ladder, count = len(manifest["eps"]), len(manifest["images"])
    lines = [["target", "kind", "members", "passes per image", f"at {ladder} eps", "network passes"]]
    whole = 0
    for target in manifest["targets"]:
        passes = sum(member["forwards"] for member in target["members"])
        own = sum(member["network_passes"] for member in target["members"])
        networks = target["identity"]["networks"] + own * ladder
        whole += networks * count
        sizes = [number(size) for size in (len(target["members"]), passes, 1 + passes * ladder, networks)]
        lines.append([target["name"], target["identity"]["kind"], *sizes])
    return [*aligned(lines, left=2), f"{count} images: at most {number(whole)} network passes"]
