"""What an evaluation leaves behind: a confusion matrix per row and image, of which every figure follows."""

import io
import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from engine.checkpoints import atomic_write
from engine.config import UserError
from metrics.confusion import aacc, counted_classes, fwiou, macc, miou

KINDS = ("baseline", "expert", "ensemble", "gate", "control", "ceiling", "floor")
FLOOR = "best constant class"
VERSION = 2  # of per_image.npz
ARRAYS, BY_ROW = ("matrices", "truth", "luma"), ("weights", "cases", "scores")  # of Results


@dataclass(frozen=True)
class Protocol:
    """What must be told beside a figure for it to mean something. Sizes are (height, width).

    `training_subsets` are the subsets with training frames: together they are "all".
    `resolution` and `absent` as in the config; `attack` is the name of the attack on the images.
    """

    dataset: str
    split: str
    classes: tuple[str, ...]
    training_subsets: tuple[str, ...]
    image_size: tuple[int, int]
    resize: str = "squash"
    resolution: str = "native"
    absent: str = "nan"
    precision: str = "fp32"
    attack: str = "clean"


@dataclass(frozen=True)
class RowInfo:
    """A row of the matrix without its function. Fields as in rows.Row."""

    name: str
    kind: str
    experts: tuple[str, ...] = ()
    home: tuple[str, ...] = ()
    subsets: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class Results:
    """R rows, N images, K classes.

    `matrices` holds a row's counts (rows: truth, columns: prediction; 0 where the row is not defined on the
    image), `truth` the labelled pixels of each class, `luma` the mean luma of each image in [0, 1], `weights` per
    gate the weights of each image. For each gate and ensemble of several experts `cases` are pixels by class,
    case and who is right (`metrics.disagreement.count_cases`), `scores` right and wrong pixels by the bin of the
    experts' Jensen-Shannon distance (`metrics.detection`). The last row is the floor, which has no matrix: it
    follows from `truth`. `chosen` names the gate that was picked on the validation split ("" where none was).
    `dead`, of gates: the share of each image's hidden units that say nothing; it is told in gate.csv, not saved.
    """

    protocol: Protocol
    rows: tuple[RowInfo, ...]
    images: tuple[str, ...]
    subsets: tuple[str, ...]  # of each image
    blocks: tuple[str, ...]  # of each image: the unit of the bootstrap
    matrices: np.ndarray  # int32 [R - 1, N, K, K]
    truth: np.ndarray  # int64 [N, K]
    luma: np.ndarray  # float64 [N]
    weights: dict[str, np.ndarray] = field(default_factory=dict)  # float32 [N, E, K or 1]
    cases: dict[str, np.ndarray] = field(default_factory=dict)  # int32 [N, K, 5 + E, 2 + E]
    scores: dict[str, np.ndarray] = field(default_factory=dict)  # int32 [N, 2, bins]
    chosen: str = ""
    dead: dict[str, np.ndarray] = field(default_factory=dict)  # float32 [N]

    @cached_property
    def by_name(self) -> dict[str, int]:
        return {row.name: index for index, row in enumerate(self.rows)}

    def row(self, name: str) -> RowInfo:
        return self.rows[self.by_name[name]]

    def names(self, *kinds: str) -> list[str]:
        """Row names in the order of KINDS, of these kinds only (none given: all)."""
        ordered = sorted(self.rows, key=lambda row: KINDS.index(row.kind))
        return [row.name for row in ordered if not kinds or row.kind in kinds]

    @property
    def lead_gate(self) -> str:
        """The gate picked on the validation split, else the first; "" without gates."""
        return self.chosen or next(iter(self.names("gate")), "")

    @cached_property
    def subset_names(self) -> list[str]:
        """Subsets by their first image; "all" stands behind the training subsets where there are several."""
        seen = list(dict.fromkeys(self.subsets))
        trained = [subset for subset in seen if subset in self.protocol.training_subsets]
        complete = len(trained) > 1 and len(trained) == len(self.protocol.training_subsets)
        return trained + ["all"] * complete + [subset for subset in seen if subset not in trained]

    def mask(self, subset: str) -> np.ndarray:
        """Images of a subset, bool [N]; "all" is every image of a training subset."""
        wanted = self.protocol.training_subsets if subset == "all" else (subset,)
        mask = np.isin(np.array(self.subsets), wanted)
        if not mask.any():
            raise UserError(
                f"evaluate.subsets: {subset!r} has no image in this evaluation; there is "
                f"{', '.join(self.subset_names)}"
            )
        return mask

    def defined(self, name: str, subset: str) -> bool:
        """Whether the row has an answer for every image of the subset."""
        allowed = self.row(name).subsets
        used = {one for one, wanted in zip(self.subsets, self.mask(subset), strict=True) if wanted}
        return allowed is None or used <= set(allowed)

    def confusions(self, name: str, subset: str) -> np.ndarray:
        """int64 [n, K, K] of the images of a subset; zeros (every figure is NaN) where it is not defined.

        The floor predicts one class everywhere: the most frequent one of the subset, which no constant beats.
        """
        mask = self.mask(subset)
        if self.row(name).kind == "floor":
            truth = self.truth[mask]
            floor = np.zeros((*truth.shape, truth.shape[1]), dtype=np.int64)
            floor[:, :, truth.sum(axis=0).argmax()] = truth
            return floor
        return self.matrices[self.by_name[name], mask].astype(np.int64) * self.defined(name, subset)

    def total(self, name: str, subset: str) -> np.ndarray:
        """Pooled counts of a subset, int64 [K, K]."""
        if (name, subset) not in self._totals:
            self._totals[name, subset] = self.confusions(name, subset).sum(axis=0)
        return self._totals[name, subset]

    @cached_property
    def _totals(self) -> dict[tuple[str, str], np.ndarray]:
        return {}

    def miou(self, name: str, subset: str) -> float:
        """mIoU of the clean tables: the protocol's policy for absent classes; NaN where not defined."""
        total = self.total(name, subset)
        return float(miou(total, self.protocol.absent)) if total.any() else float("nan")

    def miou_gt_only(self, name: str, subset: str) -> float:
        """mIoU over the classes with ground truth in the subset, whatever the policy: the same classes for all rows,
        so that differences are of the rows and not of the classes that they answer. NaN where not defined."""
        return float(miou(self.total(name, subset), "gt_only"))

    def counted(self, name: str, subset: str) -> int:
        """Number of classes in that mean."""
        return int(counted_classes(self.total(name, subset), self.protocol.absent).sum())

    def common_classes(self, subsets: Iterable[str]) -> np.ndarray:
        """Ids of the classes with ground truth in every one of the subsets, ascending."""
        truth = [self.truth[self.mask(subset)].sum(axis=0) > 0 for subset in subsets]
        return np.flatnonzero(np.all(truth, axis=0))

    def miou_common(self, name: str, subset: str, subsets: Iterable[str]) -> float:
        """mIoU over the classes with ground truth in every one of `subsets`: comparable between subsets."""
        return float(miou(self.total(name, subset), "gt_only", self.common_classes(subsets)))

    def figures(self, name: str, subset: str) -> dict[str, float]:
        """The other figures of a row on a subset, each in [0, 1]."""
        total = self.total(name, subset)
        per_image = aacc(self.confusions(name, subset))
        labelled = per_image[~np.isnan(per_image)]
        return {
            "aacc": float(aacc(total)),
            "aacc_image_mean": float(labelled.mean()) if len(labelled) else float("nan"),
            "macc": float(macc(total)),
            "fwiou": float(fwiou(total)),
        }

    def present(self, subset: str) -> np.ndarray:
        """Number of images of the subset in which each class has ground truth, int [K]."""
        return (self.truth[self.mask(subset)] > 0).sum(axis=0)

    def save(self, path: str | Path) -> None:
        """Writes per_image.npz, atomically; the same results give the same bytes."""
        about = {
            "version": VERSION,
            "protocol": asdict(self.protocol),
            "rows": [asdict(row) for row in self.rows],
            "images": self.images,
            "subsets": self.subsets,
            "blocks": self.blocks,
            "by_row": {kind: list(getattr(self, kind)) for kind in BY_ROW},
            "chosen": self.chosen,
        }
        arrays = {name: getattr(self, name) for name in ARRAYS}
        for kind in BY_ROW:
            values = getattr(self, kind).values()
            arrays |= {f"{kind}_{index}": array for index, array in enumerate(values)}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, about=np.array(json.dumps(about)), **arrays)
        atomic_write(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> "Results":
        """Reads what `save` wrote. Raises UserError if it is missing, damaged or of another version."""
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                if about["version"] != VERSION:
                    raise UserError(
                        f"{path}: format {about['version']}, this code reads {VERSION}; evaluate again"
                    )
                arrays = {name: file[name] for name in ARRAYS}
                for kind, names in about["by_row"].items():
                    arrays[kind] = {name: file[f"{kind}_{index}"] for index, name in enumerate(names)}
        except FileNotFoundError as error:
            raise UserError(f"{path}: no evaluation here; run evaluate_*.py first") from error
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: damaged ({error}); evaluate again") from error
        protocol = Protocol(**_tuples(about["protocol"]))
        rows = tuple(RowInfo(**_tuples(row)) for row in about["rows"])
        columns = {key: tuple(about[key]) for key in ("images", "subsets", "blocks")}
        return cls(protocol, rows, **columns, **arrays, chosen=about["chosen"])


def _tuples(plain: dict) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}


def main_subset(subsets: Sequence[str]) -> str:
    """The subset that rows are compared on: "all" where it is there."""
    return "all" if "all" in subsets else subsets[0]


def best_row(results: Results, names: Iterable[str], subset: str = "all") -> str:
    """The row with the highest mIoU on a subset, the first of equals; for choices on the validation split."""
    return max(names, key=lambda name: results.miou(name, subset))
