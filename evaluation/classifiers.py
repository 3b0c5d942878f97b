"""What classifiers say of clean images, and every figure that follows from it: accuracy, routes, swapped routers."""

import io
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engine.checkpoints import atomic_write
from engine.config import UserError
from metrics.gate import mean_effective_experts

BEST = 5  # classes that are kept of each answer
ANSWERS = "per_image.npz"


@dataclass(frozen=True, eq=False)
class Answers:
    """Of one classifier to N images. ranked int [N, 5]: its classes, the likeliest first (fewer where there are fewer).

    Of a mixture as well: routes int [N, S], the expert at each site (a site for each class and place where its weights
    have them); alone int [N, E], the answer with all sites on one expert; by_chance int [N], the answer with an expert
    drawn at random for each image and site. Of one that mixes experts (routing soft), whose images take no single
    route, in place of these weights float [N, S, E]."""

    ranked: np.ndarray
    routes: np.ndarray | None = None
    alone: np.ndarray | None = None
    by_chance: np.ndarray | None = None
    weights: np.ndarray | None = None

    @property
    def said(self) -> np.ndarray:
        """The answer to each image, int [N]."""
        return self.ranked[:, 0]

    @property
    def routed(self) -> bool:
        """Whether it is of a mixture."""
        return self.alone is not None or self.weights is not None

    @property
    def experts(self) -> int:
        """Of a mixture."""
        return (self.weights if self.alone is None else self.alone).shape[-1]

    @property
    def taken(self) -> np.ndarray:
        """The expert that most sites of an image take, the lowest of equals; int [N]."""
        experts = range(self.alone.shape[1])
        return np.stack([(self.routes == expert).sum(axis=1) for expert in experts], axis=1).argmax(axis=1)


@torch.no_grad()
def answers(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, int]],
    device: torch.device,
    seed: int = 0,
    name: str = "the model",
) -> Answers:
    """Of a model in eval mode to batches of (images float [B, C, H, W] in [0, 1], place of the first), each image once.

    seed: of the routes by chance, which follow from it and an image's place. name: of the model, for messages.
    UserError for logits that are not finite: they are no answer, though argmax makes one of them."""
    parts: dict[str, list[np.ndarray]] = {
        "ranked": [],
        "routes": [],
        "alone": [],
        "by_chance": [],
        "weights": [],
    }
    for images, place in batches:
        images = images.to(device)
        logits = model(images)
        refuse_not_finite(logits, name, place)
        ranked = logits.argsort(dim=1, descending=True, stable=True)  # of equals the lowest class first
        parts["ranked"].append(ranked[:, :BEST].cpu().numpy())
        if not hasattr(model, "forward_given"):
            continue
        scores = model.gate_logits(images)  # [S, B, E, K, h, w]
        if getattr(model, "routing", "hard") == "soft":
            weights = model.route(scores).permute(1, 0, 3, 4, 5, 2)  # [B, S, K, h, w, E]
            parts["weights"].append(weights.flatten(1, 4).cpu().numpy())
            continue
        taken = scores.argmax(dim=2, keepdim=True)
        experts, shape = scores.shape[2], taken.transpose(0, 1).shape  # [B, S, 1, K, h, w]
        sites = taken[:, 0].numel()

        def given(routes: Tensor, scores=scores, shape=shape, images=images) -> np.ndarray:
            routes = routes.to(device).view(shape).transpose(0, 1)
            weights = torch.zeros_like(scores).scatter(2, routes, 1.0)
            return model.forward_given(images, weights).argmax(dim=1).cpu().numpy()

        rows = range(place, place + len(images))
        dice = [np.random.default_rng([seed, row]).integers(0, experts, sites) for row in rows]
        constant = [torch.full((len(images), sites), expert) for expert in range(experts)]
        parts["routes"].append(taken.transpose(0, 1).flatten(1).cpu().numpy())
        parts["alone"].append(np.stack([given(one) for one in constant], axis=1))
        parts["by_chance"].append(given(torch.from_numpy(np.stack(dice))))
    return Answers(**{name: np.concatenate(own) for name, own in parts.items() if own})


def refuse_not_finite(logits: Tensor, name: str, place: int) -> None:
    """UserError for logits [B, K] with NaN or inf; place: of the first image."""
    bad = (~logits.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
    if bad:
        raise UserError(
            f"{name}: NaN or inf among its logits of clean images, first of image {place + bad[0]}: no answer, and "
            "nothing to score; its training broke: train it again, or name another checkpoint"
        )


# A figure: (images that count for it, images of these that are right), both bool [N].
Right = tuple[np.ndarray, np.ndarray]


def accuracies(found: Answers, labels: np.ndarray, classes: int) -> dict[str, Right]:
    """Every figure that is a share of images.

    top1, top5 (where there are more than five classes); of a mixture also route_E (top-1 of the images that take
    expert E at most sites), constant_E (top-1 with all images on it), random_route, oracle_route and worst_route
    (images that some, and that all, of the constant routes have right), unless it mixes experts."""
    every = np.ones(len(labels), dtype=bool)
    figures = {"top1": (every, found.said == labels)}
    if classes > BEST:
        figures["top5"] = (every, (found.ranked == labels[:, None]).any(axis=1))
    if found.alone is None:
        return figures
    alone = found.alone == labels[:, None]  # [N, E]
    for expert in range(alone.shape[1]):
        taken = found.taken == expert
        figures[f"route_{expert}"] = (taken, (found.said == labels) & taken)
        figures[f"constant_{expert}"] = (every, alone[:, expert])
    figures["random_route"] = (every, found.by_chance == labels)
    figures["oracle_route"] = (every, alone.any(axis=1))
    figures["worst_route"] = (every, alone.all(axis=1))
    return figures


def loads(found: Answers) -> np.ndarray:
    """Share of images and sites that each expert takes, or of the weight where they are mixed; float [E]."""
    return loads_by_site(found).mean(axis=0)


def loads_by_site(found: Answers) -> np.ndarray:
    """Share of images, or of the weight where experts are mixed, that each expert takes at each site; float [S, E]."""
    if found.weights is not None:
        return found.weights.mean(axis=0, dtype=np.float64)
    return np.stack([(found.routes == expert).mean(axis=0) for expert in range(found.experts)], axis=1)


def balance(found: Answers) -> float:
    """Effective number of experts, exp of the entropy of their loads, mean over the sites: 1 (every image the same way)
    to E."""
    return mean_effective_experts(loads_by_site(found))


def labels_by_expert(found: Answers, labels: np.ndarray, classes: int) -> np.ndarray:
    """Images of each label that take each expert at most sites, int [classes, E]."""
    table = np.zeros((classes, found.alone.shape[1]), dtype=np.int64)
    np.add.at(table, (labels, found.taken), 1)
    return table


def save_answers(
    path: str | Path, names: np.ndarray, labels: np.ndarray, found: Mapping[str, Answers], of: str = ""
) -> None:
    """per_image.npz: names, labels, and of each model MODEL/ranked, MODEL/routes, ..., written atomically. of: a digest
    of what they follow from."""
    arrays = {
        "names": np.asarray(names),
        "labels": labels,
        "models": np.asarray(list(found)),
        "of": np.asarray(of),
    }
    for model, own in found.items():
        arrays |= {f"{model}/{key}": value for key, value in vars(own).items() if value is not None}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    atomic_write(path, buffer.getvalue())


def source_of_answers(path: str | Path) -> str:
    """The digest of what a per_image.npz follows from, "" where it has none or can't be read."""
    try:
        with np.load(path) as file:
            return str(file["of"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return ""


def load_answers(path: str | Path) -> tuple[np.ndarray, np.ndarray, dict[str, Answers]]:
    """(names [N], labels [N], answers by model) of a per_image.npz."""
    with np.load(path) as file:
        models = file["models"].tolist()
        keys = [key.rpartition("/") for key in file.files]  # the name of a row may have a / as well
        found = {
            model: Answers(**{key: file[f"{model}/{key}"] for row, _, key in keys if row == model})
            for model in models
        }
        return file["names"], file["labels"], found
