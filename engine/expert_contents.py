"""What is kept of experts' outputs: all of it, half the bits, the largest logits, or the label's probability."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

APPROXIMATE = ("bfloat16", "top_k")
TOP = 4  # logits that top_k keeps of each pixel
NEGLIGIBLE = -200.0  # logarithm of a probability that is 0 in float32, and finite


def pack(
    content: str, logits: Tensor, features: Sequence[Tensor], labels: Tensor | None
) -> dict[str, Tensor]:
    """The tensors to store, all [B, ...], of logits [B, E, C, h, w] in float32 and features [B, F, h', w'].

    float32: both as they are. bfloat16: both in bfloat16. top_k: of each pixel and expert the TOP largest
    logits, their classes, and the log-sum-exp of the others, in bfloat16 like the features. label_probs: the
    logarithm of the probability that an expert gives to the label [B, h, w], and the features as they are.
    """
    if content == "label_probs":
        log_probs = logits.log_softmax(2)
        stored = {"label_log_probs": log_probs.gather(2, _places(labels, logits.shape)).squeeze(2)}
    elif content == "top_k":
        largest, classes = logits.topk(min(TOP, logits.shape[2]), dim=2)
        rest = logits.scatter(2, classes, -math.inf).logsumexp(2)
        stored = {"largest": largest.bfloat16(), "classes": classes.byte(), "rest": rest.bfloat16()}
    else:
        stored = {"logits": logits.bfloat16() if content == "bfloat16" else logits}
    for number, feature in enumerate(features):
        stored[f"features{number}"] = feature.bfloat16() if content in APPROXIMATE else feature
    return stored


def unpack(
    content: str,
    stored: Mapping[str, Tensor],
    labels: Tensor | None,
    num_classes: int,
    feature_type: torch.dtype | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """(logits [B, E, C, h, w] in float32, features, in the type that they had if told) from what `pack` made.

    top_k spreads the rest evenly over the classes that were left out. label_probs gives log-probabilities that
    are right for the label and spread the rest evenly: enough for a cross-entropy of mixed probabilities."""
    if content == "label_probs":
        label = stored["label_log_probs"][:, :, None]
        rest = (-label.expm1()).log().clamp_min(NEGLIGIBLE) - math.log(max(1, num_classes - 1))
        every = rest.expand(-1, -1, num_classes, -1, -1)
        logits = every.scatter(2, _places(labels, every.shape), label)
    elif content == "top_k":
        largest, classes = stored["largest"].float(), stored["classes"].long()
        rest = stored["rest"].float()[:, :, None] - math.log(max(1, num_classes - largest.shape[2]))
        logits = rest.expand(-1, -1, num_classes, -1, -1).scatter(2, classes, largest)
    else:
        logits = stored["logits"].float()
    features = [tensor for name, tensor in stored.items() if name.startswith("features")]
    return logits, [feature.to(feature_type or feature.dtype) for feature in features]


def difference(exact: Tensor, found: Tensor) -> dict:
    """How two sets of logits [B, E, C, h, w] differ: `largest` and `mean` absolute error, and for each expert
    the share of pixels where another class is the largest (`changed`)."""
    error = (exact - found).abs()
    changed = exact.argmax(2) != found.argmax(2)  # [B, E, h, w]
    return {
        "largest": error.max().item(),
        "mean": error.mean().item(),
        "changed": changed.double().mean((0, 2, 3)).tolist(),
    }


def _places(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Labels [B, h, w] as an index [B, E, 1, h, w] into the classes; what is no class stands at class 0."""
    classes = labels.long().where(labels < shape[2], 0)
    return classes[:, None, None].expand(-1, shape[1], 1, -1, -1)
