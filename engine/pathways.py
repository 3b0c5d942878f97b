"""How a mixture of pathways is trained: AdvMoE's two phases, or both at once (Zhang et al. 2023, arXiv 2308.10110).

The pathways are trained given the router, the router given the pathways, in turn on each batch, both against attacked
images with a TRADES-like loss. The model offers gate_logits(images) [S, B, E, 1, 1, 1], route and forward_given. All
divergences take log-probabilities on both sides, so that they and their gradients are finite at any gap of the scores.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.threat import Threat, seed_of
from engine.adversarial import Adversary, Attacked, craft, divergence
from engine.config import Adversarial, ClassifierTrain, RouterTraining
from engine.loop import supervised
from engine.losses import cross_entropy
from engine.steps import PhaseLoss, evaluating, under_attack

NO_LABEL = -1  # no image is without one
CROSS_ENTROPY = cross_entropy(None, NO_LABEL)


@dataclass(frozen=True)
class Inputs:
    """images float [B, C, H, W] in [0, 1]; clusters int64 [B], what the router is to tell apart, or None."""

    images: Tensor
    clusters: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> "Inputs":
        return Inputs(self.images[rows], None if self.clusters is None else self.clusters[rows])


def whole(model: nn.Module, inputs: Inputs) -> Tensor:
    """logits with all gradients."""
    return model(inputs.images)


def given_router(model: nn.Module, inputs: Inputs) -> Tensor:
    """logits of the pathways that the router picks; it gets a gradient under attack only, where the image wants one."""
    if inputs.images.requires_grad or not hasattr(model, "gate_logits"):
        return model(inputs.images)
    with torch.no_grad():
        weights = model.route(model.gate_logits(inputs.images))
    return model.forward_given(inputs.images, weights)


def classified(run=whole) -> PhaseLoss:
    """Cross-entropy of what `run` gives."""
    return replace(supervised(CROSS_ENTROPY), run=run)


def balanced(loss, weight: float):
    """A phase's loss of a whole mixture, plus `weight` times the imbalance of its routes on the clean images."""

    def total(model: nn.Module, inputs: Inputs | Attacked, labels: Tensor) -> tuple[Tensor, Tensor]:
        value, count = loss(model, inputs, labels)
        clean = inputs.clean if isinstance(inputs, Attacked) else inputs
        return value + weight * imbalance(model.gate_logits(clean.images)).double() * count, count

    return total


def attack_settings(train: ClassifierTrain) -> Adversarial:
    """The training attack of a classifier in the words of engine.adversarial."""
    return Adversarial(
        attack="pgd",
        eps=train.eps,
        steps=train.steps,
        step_size=train.step_size,
        clean_fraction=0.0,
        loss="ce" if train.method == "pgd_at" else "trades",
        beta=6.0 if train.method == "pgd_at" else train.beta,
    )


def adversary_of(train: ClassifierTrain) -> Adversary:
    """Attack and loss of a network, of a mixture as a whole (at_moe), or of its pathways given the router (advmoe)."""
    run = given_router if train.method == "advmoe" else whole
    return Adversary(attack_settings(train), classified(run), NO_LABEL, train.seed)


@dataclass(frozen=True)
class RouterPhase:
    """`attack` and `loss` of the router's phase. The pathways are in evaluation mode: their BatchNorm stays."""

    train: ClassifierTrain
    settings: RouterTraining

    def attack(self, model: nn.Module, inputs: Inputs, labels: Tensor, first: int) -> Attacked:
        """Raises the divergence of the router's scores from those of the clean images, with attack: joint that of the
        logits as well. first: number of the first image in the training."""
        images, train = inputs.images, self.train
        seeds = tuple(seed_of(train.seed, first + place, "router") for place in range(len(labels)))
        threat = Threat(train.eps, "linf", NO_LABEL, seeds)
        with under_attack(model):
            with torch.no_grad():
                scores = model.gate_logits(images)
                logits = (
                    model.forward_given(images, model.route(scores))
                    if self.settings.attack == "joint"
                    else None
                )

            def gap(points: Tensor) -> Tensor:
                found = model.gate_logits(points)
                apart = score_divergence(scores, found)
                if logits is None:
                    return apart
                return apart + divergence(logits, model.forward_given(points, model.route(found)))

            points = craft(gap, images, labels, threat, _as_told, train.steps, train.step_size)
        rows = torch.arange(len(labels), device=labels.device)
        return Attacked(inputs, replace(inputs, images=points), rows)

    def loss(self, model: nn.Module, inputs: Attacked, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(sum, count) of the target's loss on the clean images, plus beta times the divergence of the scores under
        attack, plus balance."""
        settings, count = self.settings, torch.tensor(len(labels), dtype=torch.float64, device=labels.device)
        with evaluating(model):
            clean = model.gate_logits(inputs.clean.images)
            attacked = model.gate_logits(inputs.adversarial.images)
            total = settings.beta * score_divergence(clean, attacked).sum().double()
            if settings.target == "task":
                total = total + self.task(model, inputs, clean, attacked, labels)
            elif settings.target != "none":
                wanted = labels % clean.shape[2] if settings.target == "label_mod" else inputs.clean.clusters
                total = total + score_entropy(clean, wanted).sum().double()
            if settings.balance:
                total = total + settings.balance * imbalance(clean).double() * count
        return total, count

    def task(
        self, model: nn.Module, inputs: Attacked, clean: Tensor, attacked: Tensor, labels: Tensor
    ) -> Tensor:
        """Sum of TRADES of the mixture, whose gradient reaches the router through the routes alone."""
        logits = model.forward_given(inputs.clean.images, model.route(clean))
        other = model.forward_given(inputs.adversarial.images, model.route(attacked))
        return CROSS_ENTROPY(logits, labels)[0] + self.train.beta * divergence(logits, other).sum().double()


def score_divergence(scores: Tensor, others: Tensor) -> Tensor:
    """Kullback-Leibler divergence of softmax(others) from softmax(scores), both [S, B, E, 1, 1, 1], mean over sites and
    [B]."""
    log_p, log_q = (one.flatten(2).float().log_softmax(dim=2) for one in (scores, others))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=2).mean(dim=0)


def score_entropy(scores: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of the experts wanted, int64 [B], under scores [S, B, E, 1, 1, 1], mean over sites, [B]."""
    log_p = scores.flatten(2).float().log_softmax(dim=2)
    return -log_p.gather(2, wanted.expand(len(scores), -1)[..., None])[..., 0].mean(dim=0)


def imbalance(scores: Tensor) -> Tensor:
    """Covariance of loads and mean scores over the experts, mean over sites: its gradient lowers the scores of experts
    with more than their share of the images, in proportion. Of scores, not of probabilities as Switch has it (arXiv
    2101.03961): where one expert has all images its probability is 1 for all, and that gradient is gone."""
    values = scores.flatten(2).float()  # [S, B, E]
    loads = F.one_hot(values.argmax(dim=2), values.shape[2]).float().mean(dim=1)
    return ((loads - 1 / values.shape[2]) * values.mean(dim=1)).sum(dim=1).mean()


def _as_told(losses: Tensor, labels: Tensor, threat: Threat, progress: float) -> Tensor:
    """Losses [B] that need no label."""
    return losses
