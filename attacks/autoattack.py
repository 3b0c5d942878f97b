"""AutoAttack as others have it (pyautoattack), for classifiers, on the whole model or on one pathway of a mixture."""

import logging
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from attacks.search import Found, Search
from attacks.threat import Threat, project
from engine.config import NonNegativeInt, UserError

NORMS = {"linf": "Linf", "l2": "L2"}
TARGETS = 9  # other classes that targeted attacks go for, at most
FEWEST = 4  # classes that the targeted DLR loss needs
FOR_CLASSIFIERS = True  # label maps are not for it


def autoattack(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    version: Literal["standard", "rand"] = "standard",
    pathway: NonNegativeInt | None = None,
    seed: NonNegativeInt = 0,
) -> Found:
    """AutoAttack (Croce and Hein 2020, arXiv 2003.01690): APGD-CE, APGD-T, FAB-T and Square, each on the images that
    the ones before it left right.

    Images [B, C, H, W] in [0, 1], labels [B]; at least 4 classes. A batch is attacked as a whole: the same batch, seed
    and machine give the same images. The images are brought into ball and box once more, as FAB may leave them by
    rounding.

    Args:
        version: standard, or rand (APGD-CE and APGD-DLR over 20 draws each) for networks that draw lots.
        pathway: attack this expert of a mixture as if all images took it; what is found counts correct answers of
            that pathway, and is to be shown to the whole model.
        seed: of all its dice.
    """
    from pyautoattack import AutoAttack  # heavy, and not needed by others

    if labels.ndim != 1:
        raise UserError("autoattack: it is for classifiers, labels [B]; label maps have apgd and square")
    victim = Counting(model if pathway is None else forced(model, pathway))
    search = Search(victim, images, labels, threat)
    logits = search.look(images)
    classes = logits.shape[1]
    if classes < FEWEST:
        raise UserError(f"autoattack: {classes} classes; its targeted attacks need {FEWEST} or more")
    if threat.eps > 0:
        logging.getLogger("auto-attack").setLevel(logging.ERROR)  # what it would say is in our own checks
        attack = AutoAttack(
            victim, norm=NORMS[threat.norm], eps=threat.eps, seed=seed, version=version, device=images.device
        )
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(TARGETS, classes - 1)
        with torch.random.fork_rng(), torch.enable_grad():
            found, _ = attack.run_standard_evaluation(images, labels, batch_size=len(images))
        search.look(project(found.detach(), images, threat))
    search.forwards, search.backwards = victim.passes(len(images))
    return search.found()


def passes_at_most(
    kind: str,
    num_experts: int,
    active: int,
    *,
    version: str = "standard",
    pathway: int | None = None,
    seed: int = 0,
) -> tuple[int, int, int]:
    """(forward passes, backward passes, passes of networks) per image that is never lost, for a kind of target as in
    evaluation.targets. Of standard: 12 looks at the image (ours and its checks), 101 passes and a look for APGD-CE
    and for each of 9 targets of APGD-T, twice 100 and some for each target of FAB-T, 5,000 queries and two looks.

    UserError for a pathway that isn't there."""
    if pathway is not None:
        refuse_other_pathways(pathway, num_experts if kind in ("soft", "hard") else 0)
    networks = (1 if pathway is not None else active) if active else num_experts
    if version == "rand":
        forwards, backwards = 2 * 20 * 101 + 12, 2 * 20 * 101
    else:
        forwards, backwards = 12 + 102 + TARGETS * (102 + 210) + 5002, 102 + TARGETS * (102 + 105)
    return forwards, backwards, forwards * networks


def refuse_other_pathways(pathway: int, num_experts: int) -> None:
    """UserError for one that isn't among those of a mixture; num_experts 0: of a network that is none."""
    if not num_experts:
        raise UserError("autoattack: pathway is for mixtures, and this network has none")
    if pathway >= num_experts:
        raise UserError(f"autoattack: pathway {pathway} is wrong; expected 0 to {num_experts - 1}")


def forced(model, pathway: int) -> Callable[[Tensor], Tensor]:
    """The mixture with all weight on one expert at all sites. UserError for a model or an expert that isn't there."""
    refuse_other_pathways(pathway, model.num_experts if hasattr(model, "forward_given") else 0)

    shape: list[torch.Size] = []  # of an image's weights, known from the first pass

    def forward(images: Tensor) -> Tensor:
        if not shape:
            with torch.no_grad():
                shape.append(model.gate_logits(images).shape)
        sites, _, *others = shape[0]
        weights = torch.zeros(sites, len(images), *others, device=images.device)
        weights[:, :, pathway] = 1.0
        return model.forward_given(images, weights)

    return forward


class Counting(nn.Module):
    """A network that counts the images that pass through it, forwards and, where a gradient is wanted, backwards."""

    def __init__(self, model: Callable[[Tensor], Tensor]):
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += len(images)
        self.backwards += len(images) * (images.requires_grad and torch.is_grad_enabled())
        return self.model(images)

    def passes(self, images: int) -> tuple[int, int]:
        """Mean over the images, rounded up."""
        return -(-self.forwards // images), -(-self.backwards // images)
