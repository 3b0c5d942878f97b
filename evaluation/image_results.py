"""Robust figures of classifiers as a function of a ledger: each image is right or wrong under each attack."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evaluation.deployment import as_deployed, is_scored
from evaluation.ledger import Record, read_manifest, read_units
from evaluation.plan import units_of
from evaluation.robust_results import COLUMNS, Column
from evaluation.statistics import Resamples, Share, estimate_image_mean
from evaluation.suites import CLEAN
from evaluation.targets import PATH

ON_EXPERTS = ("experts_only",)  # attacks that aim at the pathway that the clean image takes


class ImageResults:
    """What a complete ledger of classifiers says of N images; all arrays are bool [N].

    Every image that an attack gave at a smaller eps is one at a larger eps, too. deployed: the same of the answers in
    bf16, where the ledger has them."""

    def __init__(self, manifest: Mapping, units: Mapping[str, Sequence[Record]]):
        self.manifest, self.protocol = manifest, manifest["protocol"]
        self.images = tuple(image["name"] for image in manifest["images"])
        self.targets = {target["name"]: target for target in manifest["targets"]}
        self.ladder = tuple(manifest["eps"])
        self.resamples = Resamples([str(place) for place in range(len(self.images))])
        self._place = {name: place for place, name in enumerate(self.images)}
        self._columns = {name: {} for name in self.targets}  # of each target: member -> column
        self._attacks = {  # of each target: member -> attack, with its settings
            name: {member["name"]: member["attack"] for member in target["members"]}
            for name, target in self.targets.items()
        }
        self._right: dict[tuple, np.ndarray] = {}  # (target, eps, member) -> right at every incumbent
        self._claimed: dict[tuple, np.ndarray] = {}  # ... by what the attack itself was made for
        self._flipped: dict[tuple, np.ndarray] = {}
        self._forwards: dict[tuple, np.ndarray] = {}
        self._labels = np.zeros(len(self.images), dtype=np.int64)
        self.seconds_of: dict[str, tuple] = {}
        for unit in units_of(manifest):
            self._columns[unit.target][unit.member] = unit.column
            self.seconds_of[unit.name] = (unit.target, unit.eps, unit.member)
            for record in units[unit.name]:
                self._take((unit.target, unit.eps, unit.member), record)
        self.deployed = ImageResults(manifest, as_deployed(units)) if is_scored(units) else None

    def _take(self, key: tuple, record: Record) -> None:
        image = self._place[record["image"]]
        ((truth, said, _),) = record["cells"]
        self._labels[image] = truth
        self._put(self._right, key, True)[image] &= truth == said
        self._put(self._claimed, key, True)[image] &= bool(record["claimed_correct"])
        self._put(self._flipped, key, False)[image] |= bool(record.get("flips"))
        self._put(self._forwards, key, 0)[image] = record["forwards"]

    def _put(self, table: dict, key: tuple, start: bool | int) -> np.ndarray:
        return table.setdefault(key, np.full(len(self.images), start))

    @property
    def mixtures(self) -> list[str]:
        return [name for name, one in self.targets.items() if one["identity"]["kind"] in ("soft", "hard")]

    @property
    def whole(self) -> list[str]:
        """Targets that are no pathway of another."""
        return [name for name, one in self.targets.items() if one["role"] != "pathway"]

    def pathways(self, mixture: str) -> list[str]:
        """Rows of its pathways; none where they were not attacked."""
        return [name for name in self.targets if name.rpartition(PATH)[0] == mixture]

    def members(self, target: str, column: Column = "adaptive") -> list[str]:
        """Attacks of a column; the adaptive one has the common ones, too."""
        wanted = COLUMNS[: COLUMNS.index(column) + 1]
        return [name for name, own in self._columns[target].items() if own in wanted and name != CLEAN.name]

    def attack(self, target: str, member: str) -> Mapping:
        """What a member is: the name of an attack, with its settings."""
        return self._attacks[target][member]

    def clean(self, target: str) -> np.ndarray:
        return self._right[target, 0.0, CLEAN.name]

    def under(self, target: str, eps: float, members: Sequence[str]) -> np.ndarray:
        """Right on the clean image and under all of these attacks at every eps up to this one."""
        right = self.clean(target)
        for member in members:
            for step in self.ladder:
                if step <= eps:
                    right = right & self._right[target, step, member]
        return right

    def worst(self, target: str, eps: float, column: Column) -> np.ndarray:
        return self.under(target, eps, self.members(target, column))

    def claimed(self, target: str, eps: float, member: str) -> np.ndarray:
        """Right, by what the attack was made for: of an attack on one pathway, that pathway."""
        return self._claimed[target, eps, member]

    def of(self, target: str, attacks: Sequence[str]) -> list[str]:
        """Members that are one of these attacks."""
        return [member for member in self.members(target) if self.attack(target, member)["name"] in attacks]

    def stable(self, target: str, eps: float) -> np.ndarray:
        """Images of which no attack that was recorded changed the expert at any site."""
        flipped = np.zeros(len(self.images), dtype=bool)
        for member in self.members(target):
            for step in self.ladder:
                if step <= eps:
                    flipped |= self._flipped[target, step, member]
        return ~flipped

    def all_paths(self, mixture: str, eps: float) -> np.ndarray | None:
        """Images that every pathway by itself withstands attacks on: empirical, no proof. An attack on the mixture is
        one on the pathway that it leads to, so that what breaks the mixture breaks one of them. None where they were
        not attacked one by one."""
        rows = self.pathways(mixture)
        if not rows:
            return None
        return np.logical_and.reduce([self.worst(row, eps, "adaptive") for row in (mixture, *rows)])

    def floor(self) -> float:
        """Accuracy of the best constant answer."""
        return float(np.bincount(self._labels).max() / len(self.images))

    def passes(self, target: str, eps: float, members: Sequence[str]) -> float:
        """Passes per image that these attacks took at one eps, as counted."""
        return float(sum(self._forwards[target, eps, member].mean() for member in members))

    def estimate(self, right: np.ndarray) -> Share:
        """Of a share of all images, with its exact interval; differences are paired."""
        mean = estimate_image_mean(self.resamples, right.astype(float))
        return Share(mean.value, mean.replicates, mean.resamples)

    def only(self, images: Sequence[str], right: np.ndarray) -> np.ndarray:
        """Of these images alone. KeyError for one that isn't there."""
        return right[[self._place[name] for name in images]]


def load_images(ledger: str | Path) -> ImageResults:
    """What a complete ledger says. UserError where there is none."""
    return ImageResults(read_manifest(ledger), read_units(ledger))
