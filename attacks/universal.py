"""One perturbation for a whole data set: its training, its file, and the attack that applies it again."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from attacks.pixel_losses import PixelLoss, image_loss
from attacks.search import Found, Search, scores
from attacks.threat import (
    Threat,
    count_labelled,
    lengths,
    project,
    random_change,
    refuse_bad_images,
    seed_of,
    steepest,
)
from engine.config import UserError

Batch = tuple[Tensor, Tensor]  # images [B, C, H, W] in [0, 1], labels [B, *S]


@dataclass(frozen=True)
class Universal:
    """delta: float32 [C, h, w] on the CPU. metadata: plain values, all that says where it comes from.

    Keys: norm, eps, size ([height, width] of the images), tiled (delta is a tile, repeated from the upper left
    corner on), loss, epochs, inner_steps, step_size, seed; steps (gradient steps made), bad_steps (those without
    a finite gradient), images (that were trained on), chosen_epoch, accuracy (of val after each epoch, that of the
    images themselves first), source and data as they were given.
    """

    delta: Tensor
    metadata: dict

    @property
    def sha256(self) -> str:
        """Of delta and metadata: what a record of an attack names."""
        text = json.dumps(self.metadata, sort_keys=True).encode()
        return hashlib.sha256(text + self.delta.contiguous().numpy().tobytes()).hexdigest()

    def apply(self, images: Tensor, threat: Threat) -> Tensor:
        """The images [B, C, H, W] with the perturbation, inside ball and box.

        In a ball smaller than its own it is scaled down, never up. UserError for another norm, and for images of
        another size unless it is a tile: resized it would be another perturbation.
        """
        if self.metadata["norm"] != threat.norm:
            raise UserError(
                f"universal: made for norm {self.metadata['norm']}, not {threat.norm}; train one for that norm"
            )
        size, own = tuple(images.shape[1:]), (len(self.delta), *self.metadata["size"])
        if size[0] != own[0] or (size != own and not self.metadata["tiled"]):
            raise UserError(
                f"universal: made for images [C, H, W] of {list(own)}, these are {list(size)}; it is not resized: "
                "train one at this size, or a tiled one, which fits any"
            )
        share = min(1.0, threat.eps / self.metadata["eps"]) if self.metadata["eps"] else 1.0
        return project(images + share * spread(self.delta, size[1:]).to(images), images, threat)

    def to_bytes(self) -> bytes:
        """A safetensors file, the same bytes for the same perturbation; to be written in one piece."""
        text = json.dumps({**self.metadata, "sha256": self.sha256}, sort_keys=True)
        return safetensors.torch.save({"delta": self.delta.contiguous()}, {"metadata": text})


def universal(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, threat: Threat, *, file: str
) -> Found:
    """A perturbation from a file, whatever network it was trained on (`train_universal`); one forward pass.

    Images [B, C, H, W] in [0, 1] of the size that it was trained for, of any size if it is tiled. At a smaller eps
    than its own it is scaled down.

    Args:
        file: the .safetensors file of the perturbation.
    """
    search = Search(model, images, labels, threat)
    found = load_universal(file)
    try:
        search.look(found.apply(images, threat))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return search.found()


def load_universal(path: str | Path) -> Universal:
    """What `Universal.to_bytes` gave. UserError for a file that is missing, damaged or something else."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no universal perturbation here; train it first")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("metadata", "null"))
            delta = file.get_tensor("delta")
        sha256 = metadata.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: damaged, or no universal perturbation ({error})") from error
    found = Universal(delta, metadata)
    if found.sha256 != sha256:
        raise UserError(f"{path}: damaged (it doesn't have the SHA-256 that was saved with it)")
    return found


def train_universal(
    model: Callable[[Tensor], Tensor],
    train_batches: Callable[[int], Iterable[Batch]],
    val_batches: Iterable[Batch],
    threat: Threat,
    *,
    loss: str | PixelLoss = "ce",
    epochs: int = 30,
    inner_steps: int = 1,
    step_size: float | None = None,
    tile: tuple[int, int] | None = None,
    random_start: bool = False,
    seed: int = 0,
    source: dict | None = None,
    data: dict | None = None,
    on_epoch: Callable[[int, float], None] = lambda epoch, accuracy: None,
) -> Universal:
    """The perturbation after the epoch that leaves fewest pixels of val right; the zero before the first counts too.

    Steps of fixed size (sign of the gradient, or the gradient at length 1 for l2) on the loss averaged over a
    batch, projected to the ball each time (Moosavi-Dezfooli et al. 2017 and Metzen et al. 2017, arXiv 1704.05712,
    from which averaging, sign steps and tiles are).

    train_batches: epoch -> its batches (see `shuffled`). val_batches: gone through after every epoch.
    inner_steps: steps on a batch before the next. step_size: in pixels' units, None: eps / 10. tile: (height,
    width) of a small delta that is repeated. random_start: begin at a random point of the ball, not at zero; a
    tile at one of its own ball, shortened as its repeats need it.
    source, data: what identifies network and frames, kept in the metadata. on_epoch: told the share of val's pixels
    that is right; epoch 0 is val without perturbation.
    """
    step_size = threat.eps / 10 if step_size is None else step_size
    first = next(iter(val_batches))[0]
    size = tuple(first.shape[2:])
    delta = torch.zeros(first.shape[1], *(tile or size))
    if random_start:
        die = torch.Generator().manual_seed(seed_of(seed, "universal start"))
        delta = threat.eps * random_change(delta.shape, threat.norm, [die])[0]
    delta = _shortened(delta.to(first.device), size, threat)
    kept, chosen = torch.zeros_like(delta), 0
    accuracy = [share_right(model, val_batches, kept, threat)]
    on_epoch(0, accuracy[0])
    images_seen = steps = bad_steps = 0
    for epoch in range(epochs):
        for images, labels in train_batches(epoch):
            refuse_bad_images(images)
            images_seen += len(images)
            for _ in range(inner_steps):
                gradient = _gradient(model, images, labels, delta, threat, loss, epoch / epochs)
                finite = bool(torch.isfinite(gradient).all())
                steps, bad_steps = steps + 1, bad_steps + (not finite)
                if finite:
                    moved = delta + step_size * steepest(gradient[None], threat.norm)[0]
                    delta = _shortened(moved, size, threat)
        accuracy.append(share_right(model, val_batches, delta, threat))
        on_epoch(epoch + 1, accuracy[-1])
        if accuracy[-1] < accuracy[chosen]:
            kept, chosen = delta, epoch + 1
    metadata = {
        "norm": threat.norm,
        "eps": threat.eps,
        "size": size,
        "tiled": tile is not None,
        "loss": loss if isinstance(loss, str) else loss.__name__,
        "epochs": epochs,
        "inner_steps": inner_steps,
        "step_size": step_size,
        "seed": seed,
        "steps": steps,
        "bad_steps": bad_steps,
        "images": images_seen // epochs,
        "chosen_epoch": chosen,
        "accuracy": accuracy,
        "source": source or {},
        "data": data or {},
    }
    return Universal(kept.cpu(), json.loads(json.dumps(metadata)))


def shuffled(
    samples: Sequence[tuple[Tensor, Tensor]], batch_size: int, seed: int
) -> Callable[[int], Iterable[Batch]]:
    """epoch -> batches of the samples (image [C, H, W], labels [*S]) in the order that (seed, epoch) gives."""

    def batches(epoch: int) -> Iterable[Batch]:
        die = torch.Generator().manual_seed(seed_of(seed, "universal order", epoch))
        order = torch.randperm(len(samples), generator=die).tolist()
        for start in range(0, len(order), batch_size):
            images, labels = zip(
                *(samples[place] for place in order[start : start + batch_size]), strict=True
            )
            yield torch.stack(images), torch.stack(labels)

    return batches


def spread(delta: Tensor, size: Sequence[int]) -> Tensor:
    """A tile [C, h, w] repeated from the upper left corner on and cut to [C, *size]; itself at its own size."""
    repeats = [-(-edge // own) for edge, own in zip(size, delta.shape[1:], strict=True)]
    return delta.repeat(1, *repeats)[:, : size[0], : size[1]]


@torch.no_grad()
def share_right(
    model: Callable[[Tensor], Tensor], batches: Iterable[Batch], delta: Tensor, threat: Threat
) -> float:
    """Share of the labelled pixels of all batches that are right with the perturbation. UserError without any."""
    right = counted = 0
    for images, labels in batches:
        points = project(images + spread(delta, images.shape[2:]), images, threat)
        right += int(scores(model(points), labels.long(), threat.ignore_index)[0].sum())
        counted += count_labelled(labels, threat.ignore_index)
    if not counted:
        raise UserError(
            "universal: val has no labelled pixel; give batches that can be gone through many times"
        )
    return right / counted


def _gradient(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    delta: Tensor,
    threat: Threat,
    loss: str | PixelLoss,
    progress: float,
) -> Tensor:
    """Of the loss averaged over the batch, through clamping to the box and the repeats of a tile."""
    leaf = delta.detach().requires_grad_()
    points = (images + spread(leaf, images.shape[2:])).clamp(0.0, 1.0)
    losses = image_loss(loss, model(points), labels.long(), threat, progress)
    return torch.autograd.grad(losses.mean(), leaf)[0]


def _shortened(delta: Tensor, size: Sequence[int], threat: Threat) -> Tensor:
    """The perturbation brought into the ball, as a whole image sees it."""
    if threat.norm == "linf":
        return delta.clamp(-threat.eps, threat.eps)
    return delta * (threat.eps / lengths(spread(delta, size)[None])[0].clamp_min(1e-12)).clamp_max(1.0)
