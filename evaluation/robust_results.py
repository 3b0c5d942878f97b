"""Every robust figure as a function of a ledger: worst cases with intervals, single attacks, floor, differences."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from evaluation.deployment import as_deployed, is_scored
from evaluation.ledger import INCUMBENTS, Record
from evaluation.plan import units_of
from evaluation.statistics import (
    ClassCounts,
    Estimate,
    Resamples,
    aacc,
    estimate_image_mean,
    estimates,
    mean_iou,
)
from evaluation.suites import CLEAN
from evaluation.targets import ROUTED
from evaluation.worst_case import SearchBracket, estimate_worst_miou, select, worst_aacc, worst_miou

Column = Literal["common", "adaptive"]
COLUMNS: tuple[Column, ...] = ("common", "adaptive")
FIGURES = ("aacc", "aacc_image_mean", "miou")


@dataclass(frozen=True)
class Candidate:
    """An image that an attack gave of each image; eps 0 is the image itself."""

    eps: float
    attack: str
    incumbent: str
    column: str


@dataclass(frozen=True, eq=False)
class Worst:
    """The worst case of a target over candidates: figures by the names of FIGURES, and who won.

    accuracy, iou: the candidate of each image [N] in the worst case of accuracy and of mIoU, as places in
    `candidates`."""

    candidates: tuple[Candidate, ...]
    figures: dict[str, Estimate]
    bracket: SearchBracket
    accuracy: np.ndarray
    iou: np.ndarray


class RobustResults:
    """What a complete ledger says. N images; counts of a target are [A, N, K] with A candidates, clean first, then
    eps ascending: every candidate of a smaller eps is one of a larger eps, too. only: names of the images that count,
    such as those that another evaluation has as well (None: all). deployed: the same of the answers in bf16, where the
    ledger has them."""

    def __init__(
        self, manifest: Mapping, units: Mapping[str, Sequence[Record]], only: Collection[str] | None = None
    ):
        self.manifest, self.protocol = manifest, manifest["protocol"]
        self.classes = tuple(self.protocol["classes"])
        images = [image for image in manifest["images"] if only is None or image["name"] in only]
        self.images = tuple(image["name"] for image in images)
        self.targets = {target["name"]: target for target in manifest["targets"]}
        self.ladder = tuple(manifest["eps"])
        self.resamples = Resamples([image["block"] for image in images])
        self._place = {name: place for place, name in enumerate(self.images)}
        self._columns = {name: {} for name in self.targets}  # of each target: member -> column
        self._cells: dict[tuple, ClassCounts] = {}  # (target, eps, member, incumbent) -> [N, K]
        self._forwards: dict[tuple, np.ndarray] = {}  # (target, eps, member) -> [N]
        self._gate_free: dict[
            tuple, list
        ] = {}  # (target, eps, member, incumbent) -> N times pixels, or why not
        self.seconds_of: dict[str, tuple] = {}  # unit -> (target, eps, member)
        for unit in units_of(manifest):
            self._columns[unit.target][unit.member] = unit.column
            self.seconds_of[unit.name] = (unit.target, unit.eps, unit.member)
            for record in units[unit.name]:
                if record["image"] in self._place:
                    self._take(unit, record)
        self._worst: dict[tuple, Worst] = {}
        self.deployed = RobustResults(manifest, as_deployed(units), only) if is_scored(units) else None

    def _take(self, unit, record: Record) -> None:
        key, image = (unit.target, unit.eps, unit.member), self._place[record["image"]]
        shape = (len(self.images), len(self.classes))
        empty = ClassCounts(*(np.zeros(shape, np.int64) for _ in range(3)))
        counts = self._cells.setdefault((*key, record["incumbent"]), empty)
        for truth, said, pixels in record["cells"]:
            counts.true[image, truth] += pixels
            counts.predicted[image, said] += pixels
            counts.right[image, truth] += pixels * (truth == said)
        self._forwards.setdefault(key, np.zeros(len(self.images), np.int64))[image] = record["forwards"]
        if "gate_free" in record:
            every = self._gate_free.setdefault((*key, record["incumbent"]), [0] * len(self.images))
            every[image] = record["gate_free"]

    @cached_property
    def truth(self) -> np.ndarray:
        """Labelled pixels of each class, int64 [N, K]."""
        return self.clean_counts(next(iter(self.targets))).true

    @cached_property
    def counted(self) -> np.ndarray:
        """Ids of the classes of every mIoU here: those with ground truth in the images."""
        return np.flatnonzero(self.truth.sum(axis=0))

    @cached_property
    def shared(self) -> dict:
        """Figures of counts [N, K]: aacc and miou over the classes counted."""
        return {"aacc": aacc, "miou": mean_iou(self.counted)}

    def members(self, target: str, column: Column = "adaptive") -> list[str]:
        """Attacks of a column; the adaptive one has the common ones, too."""
        wanted = COLUMNS[: COLUMNS.index(column) + 1]
        return [name for name, own in self._columns[target].items() if own in wanted and name != CLEAN.name]

    def clean_counts(self, target: str) -> ClassCounts:
        return self._cells[target, 0.0, CLEAN.name, "pixels"]

    def clean(self, target: str) -> dict[str, Estimate]:
        return self.figures(self.clean_counts(target))

    def figures(self, counts: ClassCounts) -> dict[str, Estimate]:
        """FIGURES of counts [N, K]."""
        right, true = counts.right.sum(axis=1), counts.true.sum(axis=1)
        share = np.divide(right, true, out=np.full(len(true), np.nan), where=true > 0)
        found = estimates(self.resamples, counts, self.shared)
        return {**found, "aacc_image_mean": estimate_image_mean(self.resamples, share)}

    def single(self, target: str, eps: float, member: str) -> dict[str, Estimate]:
        """Figures of one attack at one eps: accuracies at the images with the fewest right pixels, mIoU at those or
        at the ones with the lowest class balance, whichever is lower over all images."""
        found = [self.figures(self._cells[target, eps, member, incumbent]) for incumbent in INCUMBENTS]
        return {**found[0], "miou": min((one["miou"] for one in found), key=lambda one: one.value)}

    def hidden(self, target: str, eps: float, member: str) -> dict[str, Estimate]:
        """{"hidden_<class>": share of its pixels, by the labels, that are not answered as it} under an attack that
        hides a class, at its incumbent of whole pixels (eps 0: on the clean images). Empty for other attacks, and
        where no image has the class."""
        (attack,) = (one["attack"] for one in self.targets[target]["members"] if one["name"] == member)
        if attack["name"] != "hide" or not self.truth[:, attack["class_id"]].any():
            return {}
        found = self._cells[target, eps, member, "pixels"] if eps else self.clean_counts(target)
        right, true = (part[:, [attack["class_id"]]] for part in (found.right, found.true))
        name = f"hidden_{self.classes[attack['class_id']]}"
        return {
            name: estimates(self.resamples, ClassCounts(true - right, true, true), {"aacc": aacc})["aacc"]
        }

    def candidates(self, target: str, eps: float, column: Column) -> tuple[Candidate, ...]:
        """Clean images, then those of every attack of the column at every eps up to this one."""
        found = [Candidate(0.0, CLEAN.name, "pixels", "clean")]
        return tuple(
            found
            + [
                Candidate(step, member, incumbent, self._columns[target][member])
                for step in self.ladder
                if step <= eps
                for member in self.members(target, column)
                for incumbent in INCUMBENTS
            ]
        )

    def worst(self, target: str, eps: float, column: Column) -> Worst:
        """Never above the worst case at a smaller eps, nor that of fewer attacks."""
        if (target, eps, column) not in self._worst:
            self._worst[target, eps, column] = self._find_worst(target, eps, column)
        return self._worst[target, eps, column]

    def _find_worst(self, target: str, eps: float, column: Column) -> Worst:
        candidates = self.candidates(target, eps, column)
        single = [self._cells[target, one.eps, one.attack, one.incumbent] for one in candidates]
        counts = ClassCounts(
            *(np.stack([getattr(one, part) for one in single]) for part in ("right", "true", "predicted"))
        )
        before = []  # worst cases over some of these candidates
        if column == "adaptive":
            before.append(self.worst(target, eps, "common"))
        if eps > self.ladder[0]:
            before.append(self.worst(target, self.ladder[self.ladder.index(eps) - 1], column))
        previous = None
        if before:
            lowest = min(before, key=lambda one: one.bracket.upper)
            previous = np.array([candidates.index(lowest.candidates[place]) for place in lowest.iou])
        accuracy = worst_aacc(counts).selection
        names = [f"{one.attack} {one.eps} {one.incumbent}" for one in candidates]
        bracket = worst_miou(counts, names=names, classes=self.counted, previous=previous)
        figures = self.figures(select(counts, accuracy))
        figures["miou"] = estimate_worst_miou(self.resamples, counts, bracket)
        return Worst(candidates, figures, bracket, accuracy, bracket.selection)

    def gate_free(self, target: str, eps: float, column: Column = "adaptive") -> Estimate | str | None:
        """Share of the pixels that every weight of the gate's kind leaves right, at the images of the worst case of
        accuracy (eps 0: the clean ones): a diagnostic of those images. In words why it is not known; None for what
        has no gate."""
        if (target, 0.0, CLEAN.name, "pixels") not in self._gate_free:
            return None
        won = [Candidate(0.0, CLEAN.name, "pixels", "clean")] * len(self.images)
        if eps:
            worst = self.worst(target, eps, column)
            won = [worst.candidates[place] for place in worst.accuracy]
        found = [
            self._gate_free[target, one.eps, one.attack, one.incumbent][image]
            for image, one in enumerate(won)
        ]
        unknown = next((one for one in found if isinstance(one, str)), None)
        if unknown is not None:
            return unknown
        true = self.truth.sum(axis=1)[:, None]
        counts = ClassCounts(np.array(found)[:, None], true, true)
        return estimates(self.resamples, counts, {"aacc": aacc})["aacc"]

    def floor(self) -> dict[str, float]:
        """The best of all constant answers, each figure by itself."""
        true = self.truth
        found = []
        for constant in self.counted:
            predicted, right = np.zeros_like(true), np.zeros_like(true)
            predicted[:, constant], right[:, constant] = true.sum(axis=1), true[:, constant]
            found.append(self.figures(ClassCounts(right, true, predicted)))
        return {name: max(one[name].value for one in found) for name in FIGURES}

    def passes(self, target: str, eps: float, members: Sequence[str]) -> float:
        """Passes per image that these attacks took at one eps, as counted."""
        return float(sum(self._forwards[target, eps, member].mean() for member in members))

    def of_role(self, role: str) -> list[str]:
        return [name for name, target in self.targets.items() if target["role"] == role]

    @property
    def mixtures(self) -> list[str]:
        """Rows that route: gates, and mixtures of others in whatever role."""
        return [
            name
            for name, target in self.targets.items()
            if target["role"] == "gate" or target["identity"]["kind"] in ROUTED
        ]

    @property
    def rivals(self) -> list[str]:
        """What mixtures are compared with: ensembles, then baselines."""
        every = (*self.of_role("ensemble"), *self.of_role("baseline"))
        return [name for name in every if name not in self.mixtures]

    def differences(self, eps: float, column: Column) -> dict[tuple[str, str], dict[str, Estimate]]:
        """(mixture, rival) -> worst case of the mixture minus that of the rival, on the same resamples."""
        return {
            (mixture, rival): {
                name: self.worst(mixture, eps, column).figures[name]
                - self.worst(rival, eps, column).figures[name]
                for name in FIGURES
            }
            for mixture in self.mixtures
            for rival in self.rivals
        }

    def gaps(self, target: str, eps: float) -> dict[str, Estimate]:
        """Common worst case minus the adaptive one: what attacks find that know the target, on the same resamples."""
        common, adaptive = (self.worst(target, eps, column).figures for column in COLUMNS)
        return {name: common[name] - adaptive[name] for name in FIGURES}


def within_floor(estimate: Estimate, floor: float) -> bool:
    """Whether a figure is no more than its own interval above the floor; without an interval, at the floor."""
    low, _ = estimate.interval()
    return not (estimate.value if np.isnan(low) else low) > floor
