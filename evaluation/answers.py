"""What rows and ceilings say about the frames of a batch, at the pixels of the labels."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from evaluation.ceilings import Ceilings, ExpertPixels
from evaluation.enlarge import Enlargements, rows_in_cache
from evaluation.rows import Outputs, Prediction, Row, is_combination
from metrics.detection import bin_of, jensen_shannon

# A lead of no more than this share of the experts' largest logit is rounding. Enlarging takes up to 10 float32
# operations and mixing E + 1, each off by up to 2^-24 of that logit. So of two classes that all experts put in one
# order, a convex combination of them can lead the other way by (42 + 2 E) * 2^-24 of it: less for 100 experts.
ROUNDING = 2**-16
VIEW_PIXELS = 2**18  # on the CPU small enough for the cache, else large enough that calls are few
VIEW_PIXELS_GPU = 2**24

Bands = Iterator[tuple[slice, Tensor]]  # (rows, logits [b, C, rows, w]) from top to bottom


@dataclass(frozen=True)
class View:
    """Frames of a batch whose labels share a size, and the part of the network's input that they cover."""

    frames: slice
    labels: Tensor  # uint8 [b, h, w]
    window: tuple[int, int, int, int]  # top, left, height, width

    def crop(self, images: Tensor) -> Tensor:
        """The frames' part of images [B, 3, H, W] at the size of the input."""
        top, left, height, width = self.window
        return images[self.frames, :, top : top + height, left : left + width]


def views_of(batch, labels: Tensor, window: Callable) -> list[View]:
    """Frames at the network's resolution, or at their native size; neighbours of one size share a view as far as
    its pixels are few."""
    if batch.native_labels is None:
        sized, window = list(labels), lambda size: (0, 0, *size)
    else:
        sized = [torch.as_tensor(native).to(labels.device) for native in batch.native_labels]
    limit = VIEW_PIXELS if labels.device.type == "cpu" else VIEW_PIXELS_GPU
    views, start = [], 0
    for stop in range(1, len(sized) + 1):
        shape = sized[start].shape
        full = (stop + 1 - start) * shape.numel() > limit
        if stop == len(sized) or full or sized[stop].shape != shape:
            views.append(View(slice(start, stop), torch.stack(sized[start:stop]), window(tuple(shape))))
            start = stop
    return views


@dataclass
class Answers:
    """What was said at the pixels of a view, each [b, h, w].

    `networks` and `rows` (ceilings among them): class ids, uint8. `tied`, of each row that combines experts: where
    the lead of its answer over that of the first expert is rounding, bool. `bins`, by the experts of such rows:
    of their Jensen-Shannon distance, int32."""

    view: View
    networks: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    tied: dict[str, Tensor] = field(default_factory=dict)
    bins: dict[tuple[str, ...], Tensor] = field(default_factory=dict)

    def pieces(self) -> Iterator["Answers"]:
        """The same in bands of rows: what stays in the cache of the CPU is counted twice as fast."""
        labels = self.view.labels
        pixels = VIEW_PIXELS if labels.device.type == "cpu" else VIEW_PIXELS_GPU
        rows = max(1, pixels // (2 * labels[:, 0].numel()))
        for start in range(0, labels.shape[1], rows):
            band = slice(start, start + rows)
            kinds = (self.networks, self.rows, self.tied, self.bins)
            parts = [{name: said[:, band] for name, said in kind.items()} for kind in kinds]
            yield Answers(replace(self.view, labels=labels[:, band]), *parts)


def answer(
    outputs: Outputs,
    batch,
    views: Sequence[View],
    rows: Sequence[Row],
    ceilings: Ceilings,
    enlargements: Enlargements,
) -> tuple[list[Answers], dict[tuple[str, str], Tensor]]:
    """(the answers of each view, of the rows that have some ("weights", row): their mean weights [B, E, K], and
    ("dead", row): Prediction.dead)."""
    answers, of_gates = [Answers(view) for view in views], {}
    bands = partial(_bands, enlargements, outputs.size)
    for name in outputs.low_res:
        for one in answers:
            one.networks[name] = _classes(bands(outputs.prediction(name), one.view))
    for row in rows:
        if row.network:
            for one in answers:
                one.rows[row.name] = one.networks[row.network]
            continue
        prediction = row.predict(outputs, batch)
        if prediction.weights is not None:
            of_gates["weights", row.name] = prediction.weights.float().mean(dim=(-2, -1))
        if prediction.dead is not None:
            of_gates["dead", row.name] = prediction.dead
        for one in answers:
            if is_combination(row):
                first = one.networks[row.experts[0]]
                bound = ROUNDING * outputs.largest(row.experts)[one.view.frames]
                classes, ties = _classes_and_ties(bands(prediction, one.view), first, bound)
                one.rows[row.name], one.tied[row.name] = classes, ties
            else:
                one.rows[row.name] = _classes(bands(prediction, one.view))
    for experts in dict.fromkeys(row.experts for row in rows if is_combination(row)):
        logits, stride = outputs.together(experts)
        pieces = logits.split(rows_in_cache(logits), dim=3)
        distance = Prediction(torch.cat([jensen_shannon(one) for one in pieces], dim=1)[:, None], stride)
        for one in answers:
            parts = [bin_of(band[:, 0]) for _, band in bands(distance, one.view)]
            one.bins[experts] = torch.cat(parts, dim=1)
    for one in answers if ceilings.experts else ():
        together = [bands(outputs.prediction(name), one.view) for name in ceilings.experts]
        one.rows |= _bounds(ceilings, together, one)
    return answers, of_gates


def _bands(enlargements: Enlargements, size: tuple[int, int], prediction: Prediction, view: View) -> Bands:
    """The logits of a view's frames at the pixels of its labels; `size` is that of the input."""
    logits, label_size = prediction.logits, tuple(view.labels.shape[-2:])
    enlargement = enlargements.to_label(logits, prediction.stride, size, view.window, label_size)
    return enlargement.bands(logits[view.frames])


def _classes(bands: Bands) -> Tensor:
    """Class ids, uint8 [b, h, w]; `max` finds them sooner than `argmax`."""
    return torch.cat([band.max(dim=1).indices.to(torch.uint8) for _, band in bands], dim=1)


def _classes_and_ties(bands: Bands, first: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """(class ids, where these lead the class `first` [b, h, w] by no more than `bound` [b])."""
    classes, ties = [], []
    for rows, band in bands:
        largest, best = band.max(dim=1)
        lead = largest - band.gather(1, first[:, None, rows].long())[:, 0]
        classes.append(best.to(torch.uint8))
        ties.append(lead <= bound[:, None, None])
    return torch.cat(classes, dim=1), torch.cat(ties, dim=1)


def _bounds(ceilings: Ceilings, bands: Iterable[Bands], answers: Answers) -> dict[str, Tensor]:
    """Class ids of every ceiling; `bands` of each expert in turn."""
    labels = answers.view.labels
    said = torch.stack([answers.networks[name] for name in ceilings.experts], dim=1)
    found = {name: [decide(said, labels)] for name, decide in ceilings.oracles.items()}
    found |= {name: [] for name in ceilings.best_gates}
    for together in zip(*bands, strict=True):
        rows = together[0][0]
        logits = torch.stack([band.permute(0, 2, 3, 1) for _, band in together])  # [E, b, rows, w, C]
        pixels = ExpertPixels(logits.permute(1, 0, 4, 2, 3), said[:, :, rows])
        for name, decide in ceilings.best_gates.items():
            found[name].append(decide(pixels, labels[:, rows]))
    return {name: torch.cat(parts, dim=1) for name, parts in found.items()}
