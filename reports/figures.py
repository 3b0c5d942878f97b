"""The overlay of a frame: input, truth, experts, mixture, gate weights, and whom it follows where they differ."""

import io
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from engine.config import IGNORE
from evaluation.evaluate import Sample
from evaluation.results import Results, RowInfo
from evaluation.rows import is_combination
from metrics.disagreement import AGREED, UNLABELLED, case_names

EXPERT_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d31")  # after Okabe and Ito
CASE_COLORS = ("#8a97a5", "#b2182b", "#54278f")  # agree and followed, agree and contradicted, own answer
SEVERAL_COLOR = "#4a7ba6"
INK, MUTED, NO_LABEL = "#1f2933", "#616e7c", (225, 225, 225)
WIDTH, DPI = 400, 100  # pixels of a panel


def overlay(sample: Sample, results: Results, palette: Sequence[tuple[int, int, int]]) -> bytes:
    """One picture (PNG) of everything that was said about a frame. `palette`: RGB in 0..255 per class.

    The mixture is the chosen gate, else the first gate or ensemble. Without experts the baselines are shown.
    """
    lead = results.names("expert") or results.names("baseline")
    mixture = lead_mixture(results.rows, results.chosen)
    shown = [mixture] * bool(mixture) + lead
    titles = {name: f"{results.row(name).kind}: {name}" for name in lead}
    if mixture:
        titles[mixture] = f"MoE: {mixture}" if results.row(mixture).kind == "gate" else mixture
    experts = results.names("expert")
    panels = 2 + len(shown) + (mixture in sample.weights) + 2 * (mixture in sample.cases)
    columns = min(6, max(min(panels, 4), -(-panels // 2)))
    width, height = WIDTH, max(1, round(WIDTH * sample.label.shape[0] / sample.label.shape[1]))
    predictions = [sample.predictions[name] for name in shown]
    handles = _class_handles(sample, predictions, results.protocol.classes, palette)
    picture, axes = _canvas(-(-panels // columns), columns, width, height, handles)
    for panel in axes:
        panel.axis("off")
    free = iter(axes)
    image = cv2.resize(sample.image, (width, height), interpolation=_photo_mode(sample.image, width))
    _show(next(free), image, f"input: {sample.subset}")
    _show(next(free), _painted(sample.label, palette, width, height), "ground truth")
    for name in shown:
        prediction = sample.predictions[name]
        title = f"{titles[name]}, {_right_share(prediction, sample.label)} right"
        _show(next(free), _painted(prediction, palette, width, height), title)
        if name in sample.weights:
            names = _colored(results.row(name).experts, experts)
            _weights(next(free), sample, name, names, results.protocol.classes)
    if mixture in sample.cases:
        names = _colored(results.row(mixture).experts, experts)
        _disagreement(next(free), next(free), sample, mixture, names, image)
    return to_png(picture)


def lead_mixture(rows: Iterable[RowInfo], chosen: str) -> str:
    """The row that overlays are about: the chosen gate, else the first gate, else the first ensemble, else ""."""
    ordered = sorted(filter(is_combination, rows), key=lambda row: row.kind != "gate")
    return chosen or next((row.name for row in ordered), "")


def shown_rows(rows: Sequence[RowInfo], chosen: str) -> set[str]:
    """The rows whose answers an overlay needs."""
    return {lead_mixture(rows, chosen)} | {row.name for row in rows if row.kind in ("expert", "baseline")}


def to_png(figure: Figure, dpi: int = DPI) -> bytes:
    """The figure as the bytes of a PNG file, the same for the same figure."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def expert_color(index: int) -> str:
    return EXPERT_COLORS[index % len(EXPERT_COLORS)]


def _readable_on(color: str) -> str:
    """White or ink, whichever stands out from a #rrggbb colour."""
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _colored(names: Sequence[str], experts: Sequence[str]) -> list[tuple[str, str]]:
    """(name, colour) of a gate's experts: the colour that the expert has in the whole report."""
    order = [*experts, *(name for name in names if name not in experts)]
    return [(name, expert_color(order.index(name))) for name in names]


def _photo_mode(image: np.ndarray, width: int) -> int:
    return cv2.INTER_AREA if image.shape[1] > width else cv2.INTER_NEAREST


def _painted(ids: np.ndarray, palette: Sequence[tuple[int, int, int]], width: int, height: int) -> np.ndarray:
    """Class ids in the colours of their classes, uint8 [height, width, 3]."""
    colors = np.full((256, 3), NO_LABEL, np.uint8)
    colors[: len(palette)] = palette
    return colors[cv2.resize(ids, (width, height), interpolation=cv2.INTER_NEAREST)]


def _right_share(prediction: np.ndarray, label: np.ndarray) -> str:
    known = label != IGNORE
    return f"{100 * (prediction == label)[known].mean():.1f} %" if known.any() else "-"


def _show(panel: Axes, image: np.ndarray, title: str) -> None:
    panel.imshow(image, interpolation="nearest", aspect="auto")
    panel.set_title(title, fontsize=11, color=INK, loc="left", pad=6)


def _weights(
    panel: Axes, sample: Sample, gate: str, experts: list[tuple[str, str]], classes: Sequence[str]
) -> None:
    """One stacked bar of the weights, or one for each class in the frame, most pixels first."""
    weights = sample.weights[gate]  # [E, K]
    if weights.shape[1] == 1:
        bars = [("image", 0)]
    else:
        pixels = np.bincount(sample.label.flatten(), minlength=256)[: len(classes)]
        order = [int(index) for index in np.argsort(-pixels, kind="stable") if pixels[index]]
        bars = [(classes[index], index) for index in order[:12]]
    panel.axis("on")
    box = panel.get_position()
    title = "gate weights" + (" by class" if weights.shape[1] > 1 else "")
    panel.figure.text(
        box.x0, box.y1 + 8 / (panel.figure.get_figheight() * DPI), title, fontsize=11, color=INK
    )
    positions = np.arange(len(bars))
    thickness = 0.8 if len(bars) > 1 else 0.3
    start = np.zeros(len(bars))
    for (name, color), expert in zip(experts, weights, strict=True):
        values = np.array([expert[index] for _, index in bars])
        panel.barh(positions, values, thickness, left=start, color=color, label=name)
        for position, value, left in zip(positions, values, start, strict=True):
            if value > 0.14:
                panel.text(
                    left + value / 2,
                    position,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    color=_readable_on(color),
                    fontsize=8,
                )
        start += values
    panel.set(xlim=(0, 1), ylim=(max(len(bars), 2) - 0.4, -0.6), xticks=[])
    panel.set_yticks(positions, [name for name, _ in bars], fontsize=8, color=INK)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    margin = 125 / (panel.figure.get_figwidth() * DPI)  # for the names of the classes
    panel.set_position([box.x0 + margin, box.y0 + 0.1 * box.height, box.width - margin, 0.9 * box.height])
    panel.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        ncols=len(experts),
        frameon=False,
        fontsize=9,
        handlelength=1,
    )


def _disagreement(
    panel: Axes,
    key: Axes,
    sample: Sample,
    mixture: str,
    experts: list[tuple[str, str]],
    image: np.ndarray,
) -> None:
    """Whom the mixture follows, on the grey input: pale where it is right, full colour where it is wrong. The key
    tells the share of each case among the labelled pixels, and how much of it is right."""
    case, right = sample.cases[mixture], sample.predictions[mixture] == sample.label
    names = case_names([name for name, _ in experts])
    colors = [*CASE_COLORS, *(color for _, color in experts), SEVERAL_COLOR]
    height, width = image.shape[:2]
    small, well = (
        cv2.resize(one.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)[:, :, None]
        for one in (case, right)
    )
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None], 3, axis=2).astype(float)
    picture = 0.35 * grey + 0.65 * 255
    for index in range(len(names)):
        color = np.array([int(colors[index][at : at + 2], 16) for at in (1, 3, 5)])
        pale = picture if index == AGREED else 0.55 * picture + 0.45 * color
        picture = np.where(small == index, np.where(well, pale, 0.1 * grey + 0.9 * color), picture)
    _show(panel, picture.astype(np.uint8), "whom it follows: pale where right, full where wrong")
    labelled = max(1, int((case != UNLABELLED).sum()))
    handles = []
    for index, (name, color) in enumerate(zip(names, colors, strict=False)):
        pixels = int((case == index).sum())
        share = f"{100 * right[case == index].mean():.0f} % of it right" if pixels else "none"
        text = f"{100 * pixels / labelled:5.1f} %  {name}: {share}"
        handles.append(Patch(facecolor=color, edgecolor="#b8c0c8", label=text))
    key.legend(
        handles=handles, loc="upper left", frameon=False, fontsize=10, handlelength=1.2, labelspacing=0.7
    )


def _canvas(
    rows: int, columns: int, width: int, height: int, handles: list[Patch]
) -> tuple[Figure, np.ndarray]:
    """A picture of rows x columns panels of width x height pixels, titles above and the legend below."""
    total_width = (width + 24) * columns
    widest = max(46 + 7 * len(handle.get_label()) for handle in handles) if handles else 1
    legend_columns = max(1, min(len(handles), total_width // widest))
    below = 30 + 19 * -(-len(handles) // legend_columns)
    total_height = 34 + rows * height + (rows - 1) * 44 + below
    picture = Figure(figsize=(total_width / DPI, total_height / DPI), dpi=DPI)
    axes = picture.subplots(rows, columns, squeeze=False).flatten()
    picture.subplots_adjust(
        left=0.008, right=0.992, wspace=0.05, hspace=44 / height,
        top=1 - 34 / total_height, bottom=below / total_height,
    )  # fmt: skip
    picture.legend(
        handles=handles, loc="lower center", ncols=legend_columns, frameon=False, fontsize=9,
        handlelength=1.2, columnspacing=1.4, labelcolor=MUTED, borderpad=0.2,
    )  # fmt: skip
    return picture, axes


def _class_handles(
    sample: Sample, predictions: list[np.ndarray], classes: Sequence[str], palette: Sequence
) -> list[Patch]:
    """Colours of the classes in the frame, true or predicted, those with most pixels first."""
    everywhere = np.concatenate([sample.label.flatten(), *(one.flatten() for one in predictions)])
    pixels = np.bincount(everywhere, minlength=256)[: len(classes)]
    order = [int(index) for index in np.argsort(-pixels, kind="stable") if pixels[index]]
    handles = [Patch(facecolor=np.array(palette[index]) / 255, label=classes[index]) for index in order]
    if (sample.label == IGNORE).any():
        handles.append(Patch(facecolor=np.array(NO_LABEL) / 255, label="no label"))
    return handles
