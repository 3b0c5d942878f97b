"""Attacks that know the gate, on routed models of either kind, each scored on the unmodified model.

A routed model offers `gate_and_mix(images) -> (gate logits [S, B, E, K, h, w], mix)` with mix(weights) -> logits
[B, C, *S'], `route(gate logits) -> weights` and `routing`, "soft" or "hard"; or `gate_logits` and `forward_given`,
which run the experts twice. S routing sites, E experts, K = 1 or a weight for each class, h = w = 1 unless the gate
is spatial.

A step through a hard gate has no gradient, and one through a decided soft gate hardly any, so that an attack which
knows nothing of the gate finds the gate robust that it can't see. These attacks put a loss of the gate's own logits
beside or before the task's. Those logits are measured in units of their spread over the experts on the clean image:
a gate whose logits are a thousand times larger is no harder to attack. A logit of -inf is a mask: the gate never
takes that expert there, and nothing is raised or lowered by it.

`steps` are gradient steps of all runs of an attack together; each run looks at its last point with one more forward
pass, and what the gate says of the clean images takes another.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.parts import Climber, PartsSearch, TaskLoss, agreement, wrong_classes
from attacks.pixel_losses import image_loss
from attacks.search import Found, Objective, Trial, scores
from attacks.threat import Threat
from engine.config import PositiveInt, Positives, UserError

KEEP = 0.05  # by how much of its spread a gate has to be for a hard route; soft ones: by all of it
ROUNDS = 3  # of the search for the worst vertex
LOWEST = -1e4  # log-share of an expert that is masked; of others it is above


def soft_gate(
    model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    temperatures: Positives = (1.0, 0.3, 0.1),
    straight_through: bool = False,
    loss: TaskLoss = "masked_ce",
    steps: PositiveInt = 30,
    restarts: PositiveInt = 1,
    climber: Climber = "pgd",
) -> Found:
    """Raises the task's loss under weights softmax(gate logits / temperature) in place of the model's own.

    Args:
        temperatures: one run for each, in units of the spread of the gate logits on the clean image; each begins
            with the best points of the one before. An image of one label has no point that is better than its clean
            one before it is lost, and each but the first begins there.
        straight_through: the model's own weights forward, those of the softmax backward only.
        loss: of the task; a mask is that of the pixels which the model still gets right.
        steps: gradient steps of all runs together.
        restarts: times that all temperatures begin anew.
        climber: with a fixed step (pgd), or one that is halved where the loss no longer rises (apgd).
    """
    search = RoutedSearch(model, images, labels, threat, loss, climber)

    def objective(points: Tensor, progress: float, temperature: float) -> Trial:
        seen = search.inside(points)
        weights = (seen.gate_logits / (temperature * search.spread)).softmax(dim=-4)
        if straight_through:
            weights = seen.weights.detach() + (weights - weights.detach())
        return search.trial(seen.mix(weights), seen.logits)

    objectives = [partial(objective, temperature=temperature) for temperature in temperatures] * restarts
    return search.run("soft_gate", objectives, steps, sweep=len(temperatures))


def route_first(
    model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    loss: TaskLoss = "masked_ce",
    steps: PositiveInt = 30,
    restarts: PositiveInt = 1,
    climber: Climber = "pgd",
) -> Found:
    """Drives the weights to a vertex of the simplex, then raises the task's loss while the gate stays there.

    A run for each of the E vertices where all classes share a weight; one run, to the worst vertex, where each class
    has its own (`worst_vertex`).

    Args:
        loss: of the task; a mask is that of the pixels which the model still gets right.
        steps: gradient steps of all runs together.
        restarts: times that each run begins anew.
        climber: with a fixed step (pgd), or one that is halved where the loss no longer rises (apgd).
    """
    search = RoutedSearch(model, images, labels, threat, loss, climber)
    vertices = search.vertices() if search.gate_logits.shape[-3] == 1 else [worst_vertex(search)]
    objectives = [
        steer(search, vertex) for _ in range(restarts) for vertex in vertices
    ]  # each remembers its own run
    return search.run("route_first", objectives, steps)


def stay_route(
    model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    loss: TaskLoss = "masked_ce",
    steps: PositiveInt = 20,
    restarts: PositiveInt = 1,
    climber: Climber = "pgd",
) -> Found:
    """Raises the task's loss under the weights of the clean image, and keeps the gate's decision as it was there:
    no budget goes to the gate.

    Args:
        loss: of the task; a mask is that of the pixels which the model still gets right.
        steps: gradient steps of all restarts together.
        restarts: times that it begins anew.
        climber: with a fixed step (pgd), or one that is halved where the loss no longer rises (apgd).
    """
    search = RoutedSearch(model, images, labels, threat, loss, climber)

    def objective(points: Tensor, progress: float) -> Trial:
        seen = search.inside(points)
        missing = search.missing(seen.gate_logits, search.decision, KEEP)
        trial = search.trial(seen.mix(search.weights), seen.logits, beside=-missing)
        return replace(trial, loss=torch.where(missing > 0, -missing, trial.loss))

    return search.run("stay_route", [objective] * restarts, steps)


def joint(
    model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    strengths: Positives = (0.1, 1.0, 10.0),
    loss: TaskLoss = "masked_ce",
    steps: PositiveInt = 30,
    restarts: PositiveInt = 1,
    climber: Climber = "pgd",
) -> Found:
    """Raises the task's loss plus a strength times the gate's loss, the cross-entropy of its clean decision.

    Args:
        strengths: one run for each, which begins with the best points of the one before, as in soft_gate; a single
            strength may weaken an attack.
        loss: of the task; a mask is that of the pixels which the model still gets right.
        steps: gradient steps of all runs together.
        restarts: times that all strengths begin anew.
        climber: with a fixed step (pgd), or one that is halved where the loss no longer rises (apgd).
    """
    search = RoutedSearch(model, images, labels, threat, loss, climber)

    def objective(points: Tensor, progress: float, strength: float) -> Trial:
        seen = search.inside(points)
        return search.trial(seen.logits, seen.logits, strength * search.change(seen.gate_logits))

    objectives = [partial(objective, strength=strength) for strength in strengths] * restarts
    return search.run("joint", objectives, steps, sweep=len(strengths))


def weakest_expert(
    model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    loss: TaskLoss = "masked_ce",
    steps: PositiveInt = 40,
    climber: Climber = "pgd",
) -> Found:
    """Attacks each expert by itself, then steers each image to the one that lost most on it, and attacks there.

    Args:
        loss: of the task; a mask is that of the pixels which the model still gets right.
        steps: gradient steps; one half is shared by the experts, the other goes to the worst one.
        climber: with a fixed step (pgd), or one that is halved where the loss no longer rises (apgd).
    """
    search = RoutedSearch(model, images, labels, threat, loss, climber)
    vertices = search.vertices()
    fewest = torch.full((len(vertices), len(images)), torch.inf, device=images.device)

    def objective(points: Tensor, progress: float, expert: int) -> Trial:
        seen = search.inside(points)
        logits = seen.mix(vertices[expert])
        correct, _ = scores(logits.detach(), search.labels, threat.ignore_index)
        fewest[expert] = torch.minimum(fewest[expert], correct)
        return search.trial(logits, seen.logits)

    alone = [partial(objective, expert=expert) for expert in range(len(vertices))]
    search.run("weakest_expert, alone", alone, steps // 2)
    # of equally weak ones the expert that the gate likes best on the clean image
    liked = search.gate_logits.softmax(dim=-4).mean(dim=(0, 3, 4, 5)).T  # [E, B]
    weakest = (fewest - liked / 2).argmin(dim=0)
    chosen = torch.stack(vertices)[weakest, :, torch.arange(len(images), device=images.device)]
    return search.run("weakest_expert", [steer(search, chosen.transpose(0, 1))], steps - steps // 2)


def each_path(
    model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    loss: TaskLoss = "masked_ce",
    steps: PositiveInt = 20,
    restarts: PositiveInt = 1,
    climber: Climber = "pgd",
) -> Found:
    """Raises the task's loss with all weight on one expert, on each in turn, wherever the gate goes meanwhile.

    Args:
        loss: of the task; a mask is that of the pixels which the model still gets right.
        steps: gradient steps of all experts together.
        restarts: times that each expert's turn begins anew.
        climber: with a fixed step (pgd), or one that is halved where the loss no longer rises (apgd).
    """
    search = RoutedSearch(model, images, labels, threat, loss, climber)

    def objective(points: Tensor, progress: float, vertex: Tensor) -> Trial:
        seen = search.inside(points)
        return search.trial(seen.mix(vertex), seen.logits)

    objectives = [partial(objective, vertex=one) for one in search.vertices()] * restarts
    return search.run("each_path", objectives, steps)


def all_to_one_wrong(
    model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: PositiveInt = 20,
    targets: PositiveInt = 2,
    climber: Climber = "pgd",
) -> Found:
    """Drives all experts to the same wrong class at each pixel: whatever the gate, it has nothing better.

    Args:
        steps: gradient steps of all targets together.
        targets: runs; the first goes for each pixel's likeliest wrong class, the next for the second likeliest.
        climber: with a fixed step (pgd), or one that is halved where the loss no longer rises (apgd).
    """
    search = RoutedSearch(model, images, labels, threat, climber=climber)
    vertices = search.vertices()

    def objective(points: Tensor, progress: float, goal: Tensor) -> Trial:
        seen = search.inside(points)
        return Trial(agreement(each_expert(seen.mix, vertices), goal, threat), seen.logits)

    goals = wrong_classes(each_expert(search.clean_mix, vertices), search.labels, threat, targets)
    return search.run("all_to_one_wrong", [partial(objective, goal=goal) for goal in goals], steps)


def gate_only(
    model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: PositiveInt = 20,
    restarts: PositiveInt = 1,
    climber: Climber = "pgd",
) -> Found:
    """Raises the cross-entropy of the gate's clean decision, and nothing else: what the gate alone can do.

    Args:
        steps: gradient steps of all restarts together.
        restarts: times that it begins anew.
        climber: with a fixed step (pgd), or one that is halved where the loss no longer rises (apgd).
    """
    search = RoutedSearch(model, images, labels, threat, climber=climber)

    def objective(points: Tensor, progress: float) -> Trial:
        seen = search.inside(points)
        return Trial(search.change(seen.gate_logits), seen.logits)

    return search.run("gate_only", [objective] * restarts, steps)


def experts_only(
    model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    loss: TaskLoss = "masked_ce",
    steps: PositiveInt = 20,
    restarts: PositiveInt = 1,
    climber: Climber = "pgd",
) -> Found:
    """Raises the task's loss under the weights of the clean image, wherever the gate goes meanwhile.

    Args:
        loss: of the task; a mask is that of the pixels which the model still gets right.
        steps: gradient steps of all restarts together.
        restarts: times that it begins anew.
        climber: with a fixed step (pgd), or one that is halved where the loss no longer rises (apgd).
    """
    search = RoutedSearch(model, images, labels, threat, loss, climber)

    def objective(points: Tensor, progress: float) -> Trial:
        seen = search.inside(points)
        return search.trial(seen.mix(search.weights), seen.logits)

    return search.run("experts_only", [objective] * restarts, steps)


@dataclass(frozen=True)
class Inside:
    """What a routed model says of some points, from one pass of its experts."""

    gate_logits: Tensor  # [S, B, E, K, h, w]
    weights: Tensor  # of the same shape, the model's own
    mix: Callable[[Tensor], Tensor]
    logits: Tensor  # [B, C, *S'], the model's own


def look_inside(model, points: Tensor) -> Inside:
    """One pass. UserError for a network without a gate."""
    if hasattr(model, "gate_and_mix"):
        gate_logits, mix = model.gate_and_mix(points)
    elif hasattr(model, "gate_logits"):
        gate_logits, mix = model.gate_logits(points), partial(model.forward_given, points)
    else:
        raise UserError("attack: it is for routed models, and the network has no gate_logits")
    weights = model.route(gate_logits)
    return Inside(gate_logits, weights, mix, mix(weights))


def preferences(model, seen: Inside) -> Tensor:
    """Logits [S, B, E, K, h, w] whose softmax over the experts are the weights of a soft gate, whatever it made them
    by (a temperature, the k best); of a hard gate, whose weights tell no more than a winner, its gate logits."""
    return seen.weights.clamp_min(1e-30).log() if model.routing == "soft" else seen.gate_logits


class RoutedSearch(PartsSearch):
    """A search that knows the gate on the clean images: its logits and weights [S, B, E, K, h, w], its decision
    (one-hot, the largest logit) and the spread of its logits over the experts that it doesn't mask,
    [1, B, 1, 1, 1, 1]."""

    def __init__(
        self, model, images: Tensor, labels: Tensor, threat: Threat, loss: str = "ce", climber: str = "pgd"
    ):
        super().__init__(model, images, labels, threat, loss, climber)
        with torch.no_grad():
            seen = look_inside(model, images)
        self.forwards += 1
        self.offer(images, seen.logits)
        self.gate_logits, self.weights, self.clean_mix = seen.gate_logits, seen.weights, seen.mix
        self.decision = one_hot(seen.gate_logits)
        masked = ~torch.isfinite(seen.gate_logits)
        highest = seen.gate_logits.masked_fill(masked, -torch.inf).amax(dim=-4)
        lowest = seen.gate_logits.masked_fill(masked, torch.inf).amin(dim=-4)
        spread = (highest - lowest).clamp_min(0.0)  # -inf where none is finite
        spread = spread.mean(dim=(0, 2, 3, 4)).view(1, -1, 1, 1, 1, 1)
        self.spread = torch.where(spread > 0, spread, 1.0)

    def inside(self, points: Tensor) -> Inside:
        return look_inside(self.model, points)

    def change(self, gate_logits: Tensor) -> Tensor:
        """Mean cross-entropy [B] of the clean decision under softmax(gate logits / spread)."""
        log_shares = (gate_logits / self.spread).log_softmax(dim=-4)
        log_shares = log_shares.masked_fill(log_shares.isneginf(), LOWEST)
        return -(log_shares * self.decision).sum(dim=-4).mean(dim=(0, 2, 3, 4))

    def missing(self, gate_logits: Tensor, route: Tensor, lead: float) -> Tensor:
        """By how much the gate falls short of a one-hot route, in units of the spread, [B]: 0 where at each place
        the route's expert leads all others by `lead`. Where it is masked it counts as one spread behind them."""
        route = route.expand_as(gate_logits)
        others = gate_logits.masked_fill(route > 0, -torch.inf).amax(dim=-4)
        own = (gate_logits.masked_fill(gate_logits.isneginf(), 0.0) * route).sum(dim=-4)
        masked = (gate_logits.isneginf() & (route > 0)).any(dim=-4)
        own = torch.where(masked, (others - self.spread[:, :, 0]).detach(), own)
        ahead = (own - others) / self.spread[:, :, 0]
        return F.relu(lead - ahead).mean(dim=(0, 2, 3, 4))

    def vertices(self) -> list[Tensor]:
        """One-hot weights [S, B, E, K, 1, 1] for each expert: all of it, for all classes and places."""
        shape = self.gate_logits.shape[:-2]
        rows = torch.eye(shape[2], device=self.gate_logits.device, dtype=self.gate_logits.dtype)
        return [row.view(1, 1, -1, 1, 1, 1).expand(*shape, 1, 1) for row in rows]


def steer(search: RoutedSearch, route: Tensor) -> Objective:
    """Gate first: as long as an image's gate isn't at the one-hot route, its loss is what is missing; where it
    is, the task's loss. Images that never got there in the first half of the steps go for both at once."""
    lead = KEEP if search.model.routing == "hard" else 1.0
    reached = torch.zeros_like(search.alive)

    def objective(points: Tensor, progress: float) -> Trial:
        nonlocal reached
        seen = search.inside(points)
        missing = search.missing(seen.gate_logits, route, lead)
        reached = reached | (missing == 0)
        both = search.trial(seen.logits, seen.logits, beside=-missing)
        gate_first = (missing > 0) & (reached | (progress < 0.5))
        return replace(both, loss=torch.where(gate_first, -missing, both.loss))

    return objective


def worst_vertex(search: RoutedSearch) -> Tensor:
    """One-hot weights [S, B, E, K, 1, 1] that are worst for the labels on the clean images, the same at all places.

    For one pixel: the label's weight to the expert that likes it least, a rival's to the one that likes it most.
    Pixels share weights, so it is the vertex along the gradient, by the weights, of the mean over the pixels of
    log(sum over rivals of exp(logit)) - logit of the label, which never saturates: first from equal weights, then
    from the vertex that was found. The loss is convex in the weights, so that it rises each time.
    """
    weights = torch.full_like(search.gate_logits, 1 / search.gate_logits.shape[-4])
    for _ in range(ROUNDS):
        leaf = weights.requires_grad_()
        with torch.enable_grad():
            lead = image_loss(soft_margin, search.clean_mix(leaf), search.labels, search.threat).sum()
        (slope,) = torch.autograd.grad(lead, leaf)
        vertex = one_hot(slope.sum(dim=(-2, -1), keepdim=True))
        weights = vertex.expand_as(search.gate_logits).clone()
    return vertex


def soft_margin(logits: Tensor, labels: Tensor, threat: Threat, progress: float) -> Tensor:
    """log(sum over the rivals of exp(logit)) - logit of the label, of each pixel."""
    index = labels.unsqueeze(1)
    return logits.scatter(1, index, -torch.inf).logsumexp(dim=1) - logits.gather(1, index).squeeze(1)


def unmasked(gate_logits: Tensor) -> Tensor:
    """Gate logits [S, B, E, K, h, w] with each -inf one below the lowest of the others, where all is finite then."""
    masked = gate_logits.isneginf()
    lowest = gate_logits.detach().masked_fill(masked, torch.inf).amin(dim=-4, keepdim=True)
    return torch.where(masked, lowest - 1, gate_logits)


def each_expert(mix: Callable[[Tensor], Tensor], vertices: list[Tensor]) -> Tensor:
    """What each expert says by itself, [B, E, C, *S']."""
    return torch.stack([mix(vertex) for vertex in vertices], dim=1)


def one_hot(values: Tensor) -> Tensor:
    """1 at the largest of the experts (dimension -4), the first of equals, 0 elsewhere."""
    best = values.argmax(dim=-4, keepdim=True)
    return torch.zeros_like(values).scatter(-4, best, 1.0)
