"""Where gates get the experts' outputs of a batch from: a cache on disk, or the experts themselves."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dataloaders.loader import EvalBatches, TrainBatches
from dataloaders.transforms import only_flips
from engine.config import Gate, Run, UserError
from engine.expert_cache import bytes_on_disk
from engine.expert_contents import pack
from networks.moe import ExpertOutputs, MixtureOfExperts
from pipelines.expert_parts import Experts, Part, size_text
from pipelines.models import Trained

# cache.content -> what may be kept of train and of val, in order of preference; None: the experts run again.
CHOICES = {
    "auto": [("float32", "float32"), ("bfloat16", "bfloat16")],
    "float32": [("float32", "float32")],
    "bfloat16": [("bfloat16", "bfloat16")],
    "top_k": [("top_k", "top_k")],
    "label_probs": [("label_probs", "float32"), ("label_probs", None)],
}


@dataclass(frozen=True)
class ExpertSource:
    """Two `prepare` of engine.loop.fit: (batch, device, layout) -> ExpertOutputs, for the batches of the
    training loader and of the validation loader. Images are there where a gate reads them."""

    training: Callable[..., ExpertOutputs]
    validation: Callable[..., ExpertOutputs]


class NoCache(Exception):
    """Why the experts run for every batch."""


def open_source(
    config: Run,
    mixtures: Sequence[MixtureOfExperts],
    experts: Mapping[str, Trained],
    training: TrainBatches,
    validation: EvalBatches,
    device: torch.device,
    log: Callable[[str], None],
) -> ExpertSource:
    """The outputs of the experts that all mixtures share, from the cache that the config asks for.

    The cache is made first where it is missing. Where there can be none the reason is logged, and the experts
    run for every batch. Raises UserError for a content that is not enough for the gates."""
    run = Experts(mixtures, config.train, device)
    if config.cache == "none":
        return ExpertSource(run.filled, run)
    refuse_too_little(config)
    try:
        kept = choose(config, run, experts, training, validation)
        return ExpertSource(kept[0].open(log), kept[1].open(log) if kept[1] else run)
    except (NoCache, OSError) as reason:
        log(f"cache: none, the experts run for every batch: {reason}")
        return ExpertSource(run.filled, run)


def refuse_too_little(config: Run) -> None:
    """UserError where cache.content is label_probs, and a gate or the loss needs more than that."""
    if config.cache == "none" or config.cache.content != "label_probs":
        return
    loss = config.train.loss
    if loss.name not in ("cross_entropy", "ohem") or loss.args.get("label_smoothing"):
        raise UserError(
            f"cache.content: label_probs is not enough for train.loss {loss.name}, which needs other classes than the "
            "label; it is for cross_entropy without label_smoothing and for ohem; take auto"
        )
    for name, gate in (config.gates or {"gate": config.gate}).items():
        wrong = needing_more(gate)
        if wrong:
            raise UserError(
                f"cache.content: label_probs is not enough for {name} with {', '.join(wrong)}; it is for type: simple "
                "with mix: probs, loss_at: logits, conv: false, calibrate: false, input: features or image; take auto"
            )


def needing_more(gate: Gate) -> list[str]:
    """The settings of a gate that need more than the probabilities of the labels."""
    found = {
        "type": gate.name,
        **{key: getattr(gate, key) for key in ("mix", "loss_at", "conv", "calibrate")},
    }
    fitting = {"type": "simple", "mix": "probs", "loss_at": "logits", "conv": False, "calibrate": False}
    wrong = [f"{key}: {value}" for key, value in found.items() if value != fitting[key]]
    return wrong + (["input: logits"] if gate.input == "logits" else [])


def choose(
    config: Run,
    run: Experts,
    experts: Mapping[str, Trained],
    training: TrainBatches,
    validation: EvalBatches,
) -> tuple[Part, Part | None]:
    """What is kept of train and of val: the first of the CHOICES that there is room for. Raises NoCache."""
    augment = config.data.augment
    if not only_flips(augment):
        raise NoCache(
            "data.augment changes frames in more ways than left-right flips; set it to none, or its scale to "
            "[1, 1], color to 0 and blur to 0"
        )
    copies = 2 if augment != "none" and augment.flip else 1
    folder = Path(config.data.cache_dir) / "experts"

    def parts(contents: tuple[str, str | None]) -> tuple[Part, Part | None]:
        first, second = contents
        return (
            Part("train", first, folder, run, experts, training.cache, copies, filled=True),
            second and Part("val", second, folder, run, experts, validation.cache, 1, filled=False),
        )

    example = run(parts(("float32", None))[0].batch([0]))
    choices = CHOICES[config.cache.content]
    if config.cache.content == "auto" and fits_bfloat16(example):
        choices = [("bfloat16", "bfloat16")]
    for contents in choices:
        kept = parts(contents)
        sizes = {part: row_bytes(part.content, example) * part.count * part.copies for part in kept if part}
        reason = no_room(sizes, config, folder)
        if not reason:
            return kept
    raise NoCache(reason)


def fits_bfloat16(outputs: ExpertOutputs) -> bool:
    """Whether bfloat16 holds the outputs as they are, since that is how they were computed."""
    tensors = (outputs.logits, *outputs.features)
    return all(torch.equal(tensor, tensor.bfloat16().to(tensor.dtype)) for tensor in tensors)


def row_bytes(content: str, example: ExpertOutputs) -> int:
    """Bytes of a row whose outputs are like these of one image."""
    labels = torch.zeros(1, *example.logits.shape[-2:], device=example.logits.device)
    return sum(tensor.nbytes for tensor in pack(content, example.logits, example.features, labels).values())


def no_room(sizes: Mapping[Part, int], config: Run, folder: Path) -> str:
    """Why parts of these bytes can't be kept; "" where they can."""
    needed = sum(sizes.values())
    kinds = " and ".join(
        f"{part.content} of {part.count * part.copies} {part.title} images" for part in sizes
    )
    if needed > config.cache.bytes:
        return f"cache.budget: {config.cache.budget} is less than the {size_text(needed)} of {kinds}"
    missing = sum(max(0, size - bytes_on_disk(part.store)) for part, size in sizes.items())
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if missing > free:
        return f"{folder}: {size_text(free)} are free, and {kinds} take {size_text(missing)} more"
    return ""
