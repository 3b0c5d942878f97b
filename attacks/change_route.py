"""An attack on the router by itself: whether an image's route can be changed at all."""

from dataclasses import replace

import torch
from torch import Tensor

from attacks.apgd import apgd
from attacks.routed import unmasked
from attacks.search import Found
from attacks.threat import Threat
from engine.config import PositiveInt, UserError


def change_route(
    model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: PositiveInt = 50,
    restarts: PositiveInt = 1,
) -> Found:
    """Auto-PGD on the router of a routed model (see attacks.routed) as if it were a classifier of its clean decisions,
    with the margin of its scores as loss. Of all points tried its images are those at which the fewest of the sites,
    classes and places keep their expert, whatever the model answers there; these it counts as correct.

    Args:
        steps: gradient steps of a restart.
        restarts: times that it begins anew, unless every route of every image is changed.
    """
    if not hasattr(model, "gate_logits"):
        raise UserError("attack: change_route is for routed models, and the network has no gate_logits")

    def router(points: Tensor) -> Tensor:
        """[B, E, S * K * h * w]"""
        return unmasked(model.gate_logits(points)).permute(1, 2, 0, 3, 4, 5).flatten(2)

    with torch.no_grad():
        decision = router(images).argmax(dim=1)
    found = apgd(
        router,
        images,
        decision,
        replace(threat, ignore_index=None),
        loss="margin",
        steps=steps,
        restarts=restarts,
    )
    return replace(found, forwards=found.forwards + 1)
