"""One pass over the frames: every network runs once per batch, every row is a function of what came out."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine.config import UserError
from evaluation.answers import Answers, answer, views_of
from evaluation.ceilings import NO_CEILINGS, Ceilings
from evaluation.enlarge import Enlargements
from evaluation.results import BY_ROW, FLOOR, Protocol, Results, RowInfo
from evaluation.rows import Outputs, Row, is_combination
from metrics.confusion import confusion
from metrics.detection import count_scores
from metrics.disagreement import case_map, count_cases

LUMA = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601


@dataclass(frozen=True)
class Sample:
    """Everything an overlay shows of one frame; `image` is what the network saw of it. Class ids by row and by
    network; of rows that combine experts `metrics.disagreement.case_map` as well."""

    name: str
    subset: str
    image: np.ndarray  # uint8 [h', w', 3]
    label: np.ndarray  # uint8 [h, w]
    predictions: dict[str, np.ndarray]  # row -> uint8 [h, w]
    weights: dict[str, np.ndarray]  # gate -> [E, K]
    cases: dict[str, np.ndarray] = field(default_factory=dict)  # gate or ensemble -> uint8 [h, w]


def evaluate(
    batches: Iterable,
    networks: Mapping[str, nn.Module],
    rows: Sequence[Row],
    protocol: Protocol,
    *,
    upsample: Callable[[Tensor, tuple[int, int], int], Tensor],
    window: Callable[[tuple[int, int]], tuple[int, int, int, int]],
    device: torch.device,
    ceilings: Ceilings = NO_CEILINGS,
    keep: Collection[str] = (),
    on_sample: Callable[[Sample], None] = print,
    chosen: str = "",
) -> Results:
    """Per-image counts of every row, of the ceilings, and the floor (best constant class).

    batches: with images uint8 [B, 3, H, W], labels uint8 [B, H, W], native_labels (uint8 [h, w]
    per frame, or None where `labels` is what counts) and frames (name, subset, block).
    networks: in eval mode, with forward_features(images) -> (logits, features) and `stride`;
    `upsample(logits, size, stride)` brings the logits to the input's size, as `enlarge.Enlargements` says.
    `window(native size)` tells which part (top, left, height, width) of the network's input a frame of that size
    covers. Frames named in `keep` are handed to `on_sample`.

    Raises UserError where there is no frame, and where two rows or two frames have one name.
    """
    infos = [row.info for row in rows] + ceilings.infos + [RowInfo(FLOOR, "floor")]
    _refuse_repeats("rows", [info.name for info in infos])
    for network in networks.values():
        network.eval()
    enlargements = Enlargements(upsample, device)
    frames, counts = [], []
    for batch in tqdm(batches, desc=f"evaluate {protocol.split}", unit="batch", disable=None, leave=False):
        images = batch.images.to(device, non_blocking=True).float() / 255
        labels = batch.labels.to(device, non_blocking=True)
        with torch.inference_mode():
            outputs = Outputs(networks, images, protocol.precision, enlargements)
            views = views_of(batch, labels, window)
            answers, of_gates = answer(outputs, batch, views, rows, ceilings, enlargements)
            of_gates = {key: values.cpu().numpy() for key, values in of_gates.items()}
            for one in answers:
                part = _count(one, rows, infos[:-1], batch.frames, len(protocol.classes))
                part["luma"] = _luma(one.view.crop(images))
                part |= {key: values[one.view.frames] for key, values in of_gates.items()}
                counts.append(part)
        weights = {name: values for (kind, name), values in of_gates.items() if kind == "weights"}
        for sample in _samples(answers, weights, batch, rows, keep):
            on_sample(sample)
        frames += batch.frames
    if not frames:
        raise UserError(f"evaluate: {protocol.dataset} has no {protocol.split} frame to evaluate on")
    _refuse_repeats("frames", [frame.name for frame in frames])
    whole = {key: np.concatenate([part[key] for part in counts]) for key in counts[0]}
    by_row = {
        kind: {key[1]: array for key, array in whole.items() if key[0] == kind} for kind in (*BY_ROW, "dead")
    }
    return Results(
        protocol=protocol,
        rows=tuple(infos),
        images=tuple(frame.name for frame in frames),
        subsets=tuple(frame.subset for frame in frames),
        blocks=tuple(frame.block for frame in frames),
        matrices=whole["matrices"].swapaxes(0, 1),
        truth=whole["truth"],
        luma=whole["luma"],
        chosen=chosen,
        **by_row,
    )


def spread_frames(frames: Sequence, per_subset: int) -> set[str]:
    """Names of up to `per_subset` frames of each subset, evenly spaced: those that get an overlay."""
    by_subset: dict[str, list[str]] = {}
    for frame in frames:
        by_subset.setdefault(frame.subset, []).append(frame.name)
    chosen = set()
    for names in by_subset.values():
        count = min(per_subset, len(names))
        chosen |= {names[(2 * index + 1) * len(names) // (2 * count)] for index in range(count)}
    return chosen


def _refuse_repeats(what: str, names: list[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(f"evaluate: two {what} are named {repeated[0]!r}; give each its own name")


def _luma(images: Tensor) -> np.ndarray:
    """Mean luma of images [b, 3, h, w] in [0, 1], float64 [b]."""
    channels = images.mean(dim=(2, 3), dtype=torch.float64)
    return (channels @ channels.new_tensor(LUMA)).cpu().numpy()


def _count(
    answers: Answers, rows: Sequence[Row], infos: Sequence[RowInfo], frames: list, num_classes: int
) -> dict:
    """Counts of a view's b frames, the frames along the first axis; `frames` are those of the batch.

    "matrices": int32 [b, R, K, K], 0 where a row is not defined. "truth": labelled pixels int64 [b, K]. For each
    row that combines experts ("cases", row) and ("scores", row) as Results has them."""
    frames = frames[answers.view.frames]
    pieces = [_count_piece(piece, rows, infos, frames, num_classes) for piece in answers.pieces()]
    return {key: sum(piece[key] for piece in pieces) for key in pieces[0]}


def _count_piece(answers: Answers, rows, infos, frames: list, num_classes: int) -> dict:
    labels = answers.view.labels
    counts = torch.stack([confusion(answers.rows[info.name], labels, num_classes) for info in infos], dim=1)
    defined = [[info.subsets is None or frame.subset in info.subsets for info in infos] for frame in frames]
    counts *= torch.tensor(defined, device=counts.device)[:, :, None, None]
    truth = torch.stack([torch.bincount(one.flatten().int(), minlength=256)[:num_classes] for one in labels])
    found = {"matrices": counts.int().cpu().numpy(), "truth": truth.cpu().numpy()}
    for experts, bins in answers.bins.items():
        names = [row.name for row in rows if is_combination(row) and row.experts == experts]
        said, stacked, tied = _together(answers, names, experts)
        cases = count_cases(stacked, said, labels, tied, num_classes).astype(np.int32)
        scores = count_scores(bins, stacked != labels, labels).int().cpu().numpy()
        for place, name in enumerate(names):
            found["cases", name], found["scores", name] = cases[place], scores[place]
    return found


def _together(
    answers: Answers, names: Sequence[str], experts: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """(class ids of the experts [E, b, h, w], class ids and ties of rows that combine them [R, b, h, w])."""
    said = torch.stack([answers.networks[name] for name in experts])
    return said, *(torch.stack([where[name] for name in names]) for where in (answers.rows, answers.tied))


def _samples(
    answers: Sequence[Answers], weights: Mapping, batch, rows: Sequence[Row], keep: Collection[str]
) -> Iterable[Sample]:
    """A Sample of each frame named in `keep`."""
    for one in answers:
        images = one.view.crop(batch.images)
        for place, index in enumerate(range(*one.view.frames.indices(len(batch.frames)))):
            frame = batch.frames[index]
            if frame.name not in keep:
                continue
            cases = {}
            for row in filter(is_combination, rows):
                said, answer, tied = _together(one, [row.name], row.experts)
                cases[row.name] = case_map(answer, said, one.view.labels, tied)[0, place].cpu().numpy()
            yield Sample(
                name=frame.name,
                subset=frame.subset,
                image=images[place].permute(1, 2, 0).cpu().numpy(),
                label=one.view.labels[place].cpu().numpy(),
                predictions={name: said[place].cpu().numpy() for name, said in one.rows.items()},
                weights={gate: per_image[index] for gate, per_image in weights.items()},
                cases=cases,
            )
