"""One pass over the frames: every network runs once per batch, every row is a function of what came out."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from attacks.clean import clean
from engine.config import UserError
from evaluation.results import FLOOR, Protocol, Results, RowInfo
from evaluation.rows import Ceilings, Outputs, Row
from metrics.confusion import confusion

NO_CEILINGS = Ceilings()


@dataclass(frozen=True)
class View:
    """Frames of a batch whose labels share a size, and the part of the network's input that they cover."""

    index: slice
    labels: Tensor  # uint8 [b, h, w]
    window: tuple[int, int, int, int]  # top, left, height, width

    def fit(self, logits: Tensor) -> Tensor:
        """Logits [B, C, H, W] of the network's input -> [b, C, h, w] of the labels: crop, then bilinear."""
        top, left, height, width = self.window
        logits = logits[self.index, :, top : top + height, left : left + width]
        logits = logits.contiguous(memory_format=torch.channels_last)  # resize and argmax: twice as fast
        size = tuple(self.labels.shape[-2:])
        if size == (height, width):
            return logits
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Sample:
    """Everything an overlay shows of one frame; `image` is what the network saw of it."""

    name: str
    subset: str
    image: np.ndarray  # uint8 [h', w', 3]
    label: np.ndarray  # uint8 [h, w]
    predictions: dict[str, np.ndarray]  # row -> uint8 [h, w]
    weights: dict[str, np.ndarray]  # gate -> [E, K]


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
    attack: Callable = clean,
    keep: Collection[str] = (),
    on_sample: Callable[[Sample], None] = print,
    chosen: str = "",
) -> Results:
    """Per-image confusion matrices of every row, of the ceilings, and the floor (best constant class).

    batches: with images uint8 [B, 3, H, W], labels uint8 [B, H, W], native_labels (uint8 [h, w]
    per frame, or None where `labels` is what counts) and frames (name, subset, block).
    networks: in eval mode, with forward_features(images) -> (logits, features) and `stride`;
    `upsample(logits, size, stride)` brings the logits to the input's size. `window(native size)` tells which
    part (top, left, height, width) of the network's input a frame of that size covers. `attack(model, images,
    labels)` works on images in [0, 1]. Frames named in `keep` are handed to `on_sample`.

    Raises UserError where there is no frame, and where two rows or two frames have one name.
    """
    infos = [row.info for row in rows] + ceilings.infos + [RowInfo(FLOOR, "floor")]
    _refuse_repeats("rows", [info.name for info in infos])
    for network in networks.values():
        network.eval()
    frames, scores, weights = [], [], []
    for batch in tqdm(batches, desc=f"evaluate {protocol.split}", unit="batch", disable=None, leave=False):
        images = batch.images.to(device, non_blocking=True).float() / 255
        labels = batch.labels.to(device, non_blocking=True)
        images = attack(networks, images, labels)  # `clean` is the same for every row, so one pass serves all
        with torch.inference_mode():
            outputs = Outputs(networks, images, protocol.precision, upsample)
            views = _views(batch, labels, window)
            answers, batch_weights = _answer(outputs, batch, views, rows, ceilings)
            scores.append(_count(answers, infos[:-1], views, batch.frames, len(protocol.classes)))
        for sample in _samples(answers, batch_weights, batch, views, keep):
            on_sample(sample)
        weights.append(batch_weights)
        frames += batch.frames
    if not frames:
        raise UserError(f"evaluate: {protocol.dataset} has no {protocol.split} frame to evaluate on")
    _refuse_repeats("frames", [frame.name for frame in frames])
    matrices, truth = zip(*scores, strict=True)
    return Results(
        protocol=protocol,
        rows=tuple(infos),
        images=tuple(frame.name for frame in frames),
        subsets=tuple(frame.subset for frame in frames),
        blocks=tuple(frame.block for frame in frames),
        matrices=np.concatenate(matrices, axis=1),
        truth=np.concatenate(truth),
        weights={name: np.concatenate([part[name] for part in weights]) for name in weights[0]},
        chosen=chosen,
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


def _views(batch, labels: Tensor, window: Callable) -> list[View]:
    """One view of the whole batch at the network's resolution, or one per frame at its native size."""
    if batch.native_labels is None:
        return [View(slice(0, len(labels)), labels, (0, 0, *labels.shape[-2:]))]
    natives = [torch.as_tensor(native).to(labels.device) for native in batch.native_labels]
    return [
        View(slice(index, index + 1), native[None], window(tuple(native.shape)))
        for index, native in enumerate(natives)
    ]


def _answer(
    outputs: Outputs, batch, views: list[View], rows: Sequence[Row], ceilings: Ceilings
) -> tuple[dict[str, list[Tensor]], dict[str, np.ndarray]]:
    """Class ids of every row and ceiling, uint8 [b, h, w] per view, and the weights [B, E, K] of rows."""
    answers: dict[str, list[Tensor]] = {}
    weights: dict[str, np.ndarray] = {}
    for row in rows:
        logits, row_weights = row.predict(outputs, batch)
        answers[row.name] = [view.fit(logits).argmax(dim=1).to(torch.uint8) for view in views]
        if row_weights is not None:
            weights[row.name] = row_weights.float().mean(dim=(-2, -1)).cpu().numpy()
    for view in views if ceilings.decide else ():
        expert_logits = torch.stack([view.fit(outputs.logits(name)) for name in ceilings.experts], dim=1)
        for name, decide in ceilings.decide.items():
            answers.setdefault(name, []).append(decide(expert_logits, view.labels).to(torch.uint8))
    return answers, weights


def _count(
    answers: Mapping[str, list[Tensor]],
    infos: Sequence[RowInfo],
    views: list[View],
    frames: list,
    num_classes: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Counts int32 [R, B, K, K], 0 where a row is not defined, and labelled pixels int64 [B, K]."""
    counts = []
    for info in infos:
        pairs = zip(answers[info.name], views, strict=True)
        parts = [confusion(answer, view.labels, num_classes) for answer, view in pairs]
        defined = [info.subsets is None or frame.subset in info.subsets for frame in frames]
        counts.append(torch.cat(parts) * torch.tensor(defined, device=parts[0].device)[:, None, None])
    labels = [label.flatten().int() for view in views for label in view.labels]
    truth = [torch.bincount(label, minlength=256)[:num_classes] for label in labels]
    return torch.stack(counts).int().cpu().numpy(), torch.stack(truth).cpu().numpy()


def _samples(
    answers: Mapping[str, list[Tensor]], weights, batch, views: list[View], keep: Collection[str]
) -> Iterable[Sample]:
    """A Sample of each frame named in `keep`."""
    for position, view in enumerate(views):
        top, left, height, width = view.window
        for offset, index in enumerate(range(view.index.start, view.index.stop)):
            frame = batch.frames[index]
            if frame.name in keep:
                image = batch.images[index, :, top : top + height, left : left + width]
                predictions = {row: parts[position][offset].cpu().numpy() for row, parts in answers.items()}
                yield Sample(
                    name=frame.name,
                    subset=frame.subset,
                    image=image.permute(1, 2, 0).cpu().numpy(),
                    label=view.labels[offset].cpu().numpy(),
                    predictions=predictions,
                    weights={gate: per_image[index] for gate, per_image in weights.items()},
                )
