"""Honesty checks of the networks themselves, on a few images; each tells what it costs, in passes per image."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attacks.pgd import pgd
from attacks.pixel_losses import image_loss
from attacks.routed import Inside, look_inside
from attacks.search import scores
from attacks.threat import Threat, count_labelled, random_point, refuse_bad_images, seed_of
from engine.config import Component
from engine.steps import under_attack
from evaluation.active_test import active_test
from evaluation.findings import Finding
from evaluation.formats import percent
from evaluation.plan import Scene, Setup
from evaluation.record_checks import ALARM, WHITE_BOX
from evaluation.suites import Member
from evaluation.targets import PRODUCTS, ROUTED, Target, exact_float32, threat_on

CHECKED = 2  # images of a batch that are looked at, of each target those that it gets right if there are some
FREED = 16  # images with one answer each that an attack without bounds is tried on: two would say little
VANISHING = 1e-12  # of the largest entry of a gradient of mean cross-entropy: nothing moves by it
SAME_LOGITS = 1e-4  # of the largest logit: what another batch may change by rounding
UNSTABLE = 0.1  # of answers that noise may change
LEFT = 0.05  # of the answers that an attack without bounds may leave
NOTHING = "no image has a right pixel: there is nothing to attack, and nothing to check"
CONSTANT = "it says the same of all images, as a pathway does that is never trained: no attack changes that"
SLOPE_ERROR = 0.1  # relative, of a derivative against finite differences


def check_first(
    scenes: Iterable[Scene],
    targets: Sequence[Target],
    members: Mapping[str, Sequence[Member]],
    setup: Setup,
    device: torch.device,
) -> list[Finding]:
    """`check_targets` on the first batch that has a labelled image, at the largest eps."""
    scene = next(scene for scene in scenes if count_labelled(scene.labels, setup.ignore_index))
    seeds = tuple(seed_of(setup.seed, name, "checks") for name in scene.names)
    threat = Threat(max(setup.eps), setup.norm, setup.ignore_index, seeds)
    return check_targets(targets, scene.images.to(device), scene.labels.to(device), threat, members)


def check_targets(
    targets: Sequence[Target],
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    members: Mapping[str, Sequence[Member]],
) -> list[Finding]:
    """The checks that run the networks, on CHECKED of the images. UserError for images that are not float32 in
    [0, 1]."""
    refuse_bad_images(images)
    found = []
    for target in targets:
        with as_attacked(target, images.device):
            with torch.no_grad():
                logits = target.model(images)
            right, _ = scores(logits, labels.long(), threat.ignore_index)
            allowed = threat_on(target, threat, images.device)
            few = chosen(right, images, labels, allowed)
            own, attacks = few[2], members[target.name]
            found += identity_at_zero(target, *few, attacks)
            found += batch_invariance(target, few[0])
            found += float32_throughout(target, *few)
            found += unavailable_gradients(target, *few)
            found += unstable_predictions(target, few[0], own)
            if labels.ndim == 1 and len(images) > 1 and logits.argmax(dim=1).unique().numel() == 1:
                found.append(Finding("unconstrained attack", target.name, None, "", "note", CONSTANT))
            else:
                more = chosen(right, images, labels, allowed, CHECKED if labels.ndim > 1 else FREED)
                found += unconstrained_attack(target, *more)
            if target.kind in ROUTED:
                found += gate_gradient(target, *few)
                found += gate_direction(target, *few)
            found += active_test(target, *few, attacks)
    return found + transfer_failure(targets, *chosen(torch.zeros(len(images)), images, labels, threat))


def chosen(
    right: Tensor, images: Tensor, labels: Tensor, threat: Threat, count: int = CHECKED
) -> tuple[Tensor, Tensor, Threat]:
    """The first `count` images, before all others those with right pixels ([B], how many), then labelled ones; their
    labels, and the threat on them."""
    labelled = [count_labelled(one, threat.ignore_index) > 0 for one in labels]
    rank = [-(2 * bool(some) + known) for some, known in zip(right.tolist(), labelled, strict=True)]
    places = sorted(sorted(range(len(rank)), key=rank.__getitem__)[:count])
    seeds = tuple(threat.seeds[place] for place in places)
    return images[places], labels[places], replace(threat, seeds=seeds)


@contextmanager
def as_attacked(target: Target, device: torch.device) -> Iterator[None]:
    with under_attack(target.model), exact_float32(device):
        yield


def identity_at_zero(
    target: Target, images: Tensor, labels: Tensor, threat: Threat, members: Sequence[Member]
) -> list[Finding]:
    """Each attack gives the images back at eps = 0, bit for bit. Passes: those of each attack with its steps cut to
    two for each run."""
    wrong, tried = [], {}
    for member in members:
        tried.setdefault(str(shortened(member.attack, target.num_experts).plain()), member)
    for member in tried.values():
        attack = shortened(member.attack, target.num_experts)
        found = attack.build(target.model, images, labels, threat.at(0.0))
        if not (torch.equal(found.images, images) and torch.equal(found.balanced, images)):
            change = max((one - images).abs().max().item() for one in (found.images, found.balanced))
            text = f"at eps 0 it changes values by up to {change:.3g}"
            wrong.append(Finding("identity at eps 0", target.name, None, member.name, "flag", text))
    text = f"{len(tried)} attacks give the images back bit for bit"
    return wrong or [Finding("identity at eps 0", target.name, None, "", "ok", text)]


def shortened(attack: Component, num_experts: int) -> Component:
    """The same attack with two steps for each of its runs, and one restart."""
    cut = {key: 1 for key in ("restarts", "targets") if key in attack.args}
    cut |= {"queries": 2} if "queries" in attack.args else {}
    if "steps" in attack.args:
        sweeps = [len(attack.args[key]) for key in ("temperatures", "strengths") if key in attack.args]
        runs = 1 if attack.name in WHITE_BOX else max([*sweeps, 2 * num_experts])  # at most
        cut["steps"] = min(attack.args["steps"], 2 * runs)
    return replace(attack, args={**attack.args, **cut})


def batch_invariance(target: Target, images: Tensor) -> list[Finding]:
    """An image has the same logits alone, in a batch and in the batch reversed, but for rounding, and twice the same.
    Otherwise an image's attack depends on its neighbours (capacity-limited routing, BatchNorm), or the network
    draws lots. 4 passes."""
    with torch.no_grad():
        whole, again = target.model(images), target.model(images)
        backwards = target.model(images.flip(0)).flip(0)
        alone = torch.cat([target.model(one[None]) for one in images])
    unit = whole.abs().amax().clamp_min(1e-30)
    apart = {
        "asked twice": ((again - whole).abs().amax() / unit).item(),
        "in the batch reversed": ((backwards - whole).abs().amax() / unit).item(),
        "alone": ((alone - whole).abs().amax() / unit).item(),
    }
    bad = [f"{how} {size:.2g}" for how, size in apart.items() if not size <= SAME_LOGITS]
    if bad:
        text = f"logits of an image change, in units of the largest: {', '.join(bad)}"
        return [Finding("batch invariance", target.name, None, "", "flag", text)]
    text = f"logits of an image change by {max(apart.values()):.2g} of the largest at most"
    if len(images) == 1:
        return [Finding("batch invariance", target.name, None, "", "note", f"one image can't tell: {text}")]
    return [Finding("batch invariance", target.name, None, "", "ok", text)]


class Precisions(TorchDispatchMode):
    """Notes the floating types that operations give, those of backward passes too."""

    def __init__(self):
        super().__init__()
        self.seen: dict[torch.dtype, str] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor) and one.is_floating_point():
                self.seen.setdefault(one.dtype, str(function))
        return result


def float32_throughout(target: Target, images: Tensor, labels: Tensor, threat: Threat) -> list[Finding]:
    """No operation, forward or back to the image, gives less than float32, and TF32 is off: rounding to bf16 changes
    up to 80 % of a perturbation of 0.25/255. 1 pass with a backward pass."""
    with Precisions() as precisions:
        gradient, logits = input_gradient(target.model, images, labels, threat)
    low = [
        f"{str(kind).removeprefix('torch.')} (first in {where})"
        for kind, where in precisions.seen.items()
        if torch.finfo(kind).bits < 32
    ]
    if gradient is not None and gradient.dtype != torch.float32:
        low.append(f"{gradient.dtype} gradient")
    if logits.dtype != torch.float32:
        low.append(f"{logits.dtype} logits")
    products = {one.fp32_precision for one in PRODUCTS.get(images.device.type, ())}
    low += [f"products of float32 in {one}" for one in sorted(products & {"tf32", "bf16"})]
    if low:
        text = f"computes in {', '.join(low)}"
        return [Finding("float32", target.name, None, "", "flag", text)]
    return [Finding("float32", target.name, None, "", "ok", "float32 forward and back to the image")]


def input_gradient(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, threat: Threat
) -> tuple[Tensor | None, Tensor]:
    """(gradient of each image's mean cross-entropy by the image, None where there is no path; logits)."""
    leaf = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = model(leaf)
        loss = image_loss("ce", logits, labels, threat).sum()
    if not loss.requires_grad:
        return None, logits.detach()
    (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    return gradient, logits.detach()


def unavailable_gradients(target: Target, images: Tensor, labels: Tensor, threat: Threat) -> list[Finding]:
    """Indicator 1. The loss has a gradient by the image that is finite, and not zero or vanishing; nothing is known
    without a right pixel, whose loss an attack raises. 1 pass with a backward pass."""
    gradient, logits = input_gradient(target.model, images, labels, threat)
    right, _ = scores(logits, labels.long(), threat.ignore_index)
    counted = right > 0

    def finding(severity: str, text: str) -> list[Finding]:
        return [Finding("unavailable gradients", target.name, None, "", severity, text)]

    if gradient is None:
        return finding("flag", "the loss has no gradient by the image: some step isn't differentiable")
    if not counted.any():
        return finding("note", NOTHING)
    largest = gradient.flatten(1).abs().amax(dim=1)[counted]
    bad = int((~torch.isfinite(largest)).sum())
    small = int((largest < VANISHING).sum())
    if bad:
        return finding("flag", f"the gradient of {bad} of {len(largest)} images is not finite")
    if small:
        low = largest.min().item()
        return finding(
            "flag", f"the gradient of {small} of {len(largest)} images vanishes: largest {low:.2g}"
        )
    size = f"between {largest.min():.2g} and {largest.max():.2g} at its largest"
    return finding("ok", f"the gradient of all {len(largest)} images is finite, {size}")


def unstable_predictions(target: Target, images: Tensor, threat: Threat, count: int = 20) -> list[Finding]:
    """Indicator 2. Random points of the ball change few answers; where they change many, a gradient says little about
    the points around. `count` passes; the paper takes 100."""
    with torch.no_grad():
        clean = target.model(images).argmax(dim=1)
        changed = [
            (target.model(random_point(images, threat, "unstable", place)).argmax(dim=1) != clean)
            .double()
            .mean()
            for place in range(count)
        ]
    share = torch.stack(changed).mean().item()
    text = f"noise inside the ball changes {percent(share)} % of the answers ({count} points per image)"
    severity = "flag" if share > UNSTABLE else "ok"
    return [Finding("unstable predictions", target.name, threat.eps, "", severity, text)]


def unconstrained_attack(
    target: Target, images: Tensor, labels: Tensor, threat: Threat, steps: int = 20
) -> list[Finding]:
    """Indicator 6. An attack that may change everything (linf, eps = 1) leaves next to nothing of what was right.
    steps + 2 passes."""
    with torch.no_grad():
        right, _ = scores(target.model(images), labels.long(), threat.ignore_index)
    if not right.any():
        return [Finding("unconstrained attack", target.name, None, "", "note", NOTHING)]
    free = replace(threat, eps=1.0, norm="linf")
    found = pgd(target.model, images, labels, free, loss="masked_ce", steps=steps)
    left = found.correct.sum().item() / max(count_labelled(labels, threat.ignore_index), 1)
    text = f"PGD of {steps} steps at eps = 1 leaves {percent(left)} % of the answers right ({len(images)} images)"
    severity = "flag" if left > LEFT else "ok"
    return [Finding("unconstrained attack", target.name, None, "", severity, text)]


def transfer_failure(
    targets: Sequence[Target], images: Tensor, labels: Tensor, threat: Threat, steps: int = 10
) -> list[Finding]:
    """Indicator 5. Images made for another target do less harm than those made for this one, by the same attack. Of
    each target steps + 1 passes, and one for each other target."""
    if len(targets) < 2:
        text = "there is no other network to make images for"
        return [Finding("transfer failure", one.name, threat.eps, "", "note", text) for one in targets]
    made, found = {}, []
    for target in targets:
        with as_attacked(target, images.device):
            made[target.name] = pgd(target.model, images, labels, threat, loss="masked_ce", steps=steps)
    total = max(count_labelled(labels, threat.ignore_index), 1)
    for target in targets:
        own = made[target.name].correct
        worst, source = own, ""
        with as_attacked(target, images.device), torch.no_grad():
            for other in targets:
                logits = target.model(made[other.name].images)
                right = torch.minimum(own, scores(logits, labels.long(), threat.ignore_index)[0])
                if right.sum() < worst.sum():
                    worst, source = right, other.name
        gain = ((own - worst).sum() / total).item()
        text = f"PGD of {steps} steps leaves {percent(own.sum().item() / total)} %"
        if gain > ALARM:
            text += f"; images made for {source} take {percent(gain)} points more: gradients are masked, or "
            text += "these steps too few"
            found.append(Finding("transfer failure", target.name, threat.eps, "", "flag", text))
        else:
            text += f"; images made for {len(targets) - 1} other networks add {percent(gain)} points"
            found.append(Finding("transfer failure", target.name, threat.eps, "", "ok", text))
    return found


def gate_gradient(target: Target, images: Tensor, labels: Tensor, threat: Threat) -> list[Finding]:
    """The loss has a gradient by the gate logits of each expert, where only the top_k best are mixed of each that is
    among them for some image; else attacks don't see the gate. 1 pass with a backward pass from the weights on."""
    with torch.no_grad():
        seen = look_inside(target.model, images)
    leaf = seen.gate_logits.detach().requires_grad_()
    slope = slope_of(lambda: task_loss(seen, target.model.route(leaf), labels, threat).sum(), leaf)
    if not torch.isfinite(slope).all():
        return [Finding("gate gradient", target.name, None, "", "flag", "the gate's gradient is not finite")]
    if leaf.shape[2] == 1:
        text = "there is one expert: the gate has nothing to choose"
        return [Finding("gate gradient", target.name, None, "", "note", text)]
    best = getattr(target.model, "top_k", 1) if target.kind == "soft" else 1
    wanted = torch.ones_like(slope, dtype=torch.bool)
    if best > 1:  # by rank: a weight may be 0 by saturation, too
        wanted = torch.zeros_like(wanted).scatter(2, leaf.topk(best, dim=2).indices, True)
    wanted &= ~leaf.detach().isneginf()  # masked: nothing to reach
    wanted = wanted.amax(dim=(1, 3, 4, 5))  # of sites and experts
    reached = (slope.abs() >= VANISHING).amax(dim=(1, 3, 4, 5))[wanted]
    text = f"the loss has a gradient by the gate logits of {int(reached.sum())} of {reached.numel()} experts"
    if reached.all():
        return [Finding("gate gradient", target.name, None, "", "ok", text)]
    text += ": hard-routed or saturated, plain attacks don't see the gate; only the adaptive column counts"
    return [Finding("gate gradient", target.name, None, "", "flag", text)]


def gate_direction(
    target: Target, images: Tensor, labels: Tensor, threat: Threat, step: float = 1e-3
) -> list[Finding]:
    """Along the direction in which the image moves the gate, the experts' outputs held still, the gradient of the loss
    is what finite differences say. 9 passes, 2 of them with a backward pass."""

    def finding(severity: str, text: str) -> list[Finding]:
        return [Finding("gate direction", target.name, None, "", severity, text)]

    leaf = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        seen = look_inside(target.model, leaf)
        if seen.gate_logits.shape[2] == 1:
            return finding("note", "there is one expert: the gate has nothing to choose")
        if seen.gate_logits.isnan().any():
            return finding("flag", "the gate's logits are not finite: it has no direction")
        best, second = seen.gate_logits.topk(2, dim=2).values.unbind(2)
        second = second.masked_fill(second.isneginf(), 0.0)  # all others are masked
        ahead = (best - second).mean(dim=(0, 2, 3, 4))

    direction = slope_of(lambda: ahead.sum(), leaf)
    size = direction.flatten(1).abs().amax(dim=1)
    with torch.no_grad():
        still = look_inside(target.model, images)
        noisy = look_inside(target.model, random_point(images, threat, "gate direction")).gate_logits
    if not (size > 0).all():
        if torch.equal(noisy, still.gate_logits):
            return finding("note", "the gate says the same of all images around these: it has no direction")
        return finding("flag", "the gate looks at the image, but its logits have no gradient by it")
    direction = direction / size.view(-1, *[1] * (images.ndim - 1))

    def loss_at(points: Tensor) -> Tensor:
        return task_loss(
            still, target.model.route(look_inside(target.model, points).gate_logits), labels, threat
        )

    leaf = images.detach().clone().requires_grad_()
    slope = (slope_of(lambda: loss_at(leaf).sum(), leaf) * direction).flatten(1).sum(dim=1).double()
    with torch.no_grad():
        near, far = (
            (loss_at(images + reach * direction).double() - loss_at(images - reach * direction)) / (2 * reach)
            for reach in (step, 2 * step)
        )
        rounding = 1e-6 * loss_at(images).double().abs().clamp_min(1) / step
    error = (near - slope).abs()
    allowed = SLOPE_ERROR * torch.maximum(near.abs(), slope.abs()) + 3 * (near - far).abs() + rounding
    wrong = error > allowed
    agree = int((~wrong).sum())
    text = f"along the gate's direction gradient and differences agree on {agree} of {len(images)} images"
    if not wrong.any():
        return finding("ok", text)
    worst = int((error / allowed).argmax())
    text += f" ({slope[worst]:.3g} and {near[worst]:.3g} on one of the others)"
    straight = target.kind == "hard" and bool((near[wrong].abs() <= rounding[wrong]).all())
    return finding("note", f"{text}: straight-through") if straight else finding("flag", text)


def task_loss(seen: Inside, weights: Tensor, labels: Tensor, threat: Threat) -> Tensor:
    return image_loss("ce", seen.mix(weights), labels, threat)


def slope_of(value: Callable[[], Tensor], leaf: Tensor) -> Tensor:
    """Gradient of a scalar by a leaf; zeros where there is no path."""
    with torch.enable_grad():
        total = value()
    if not total.requires_grad:
        return torch.zeros_like(leaf)
    (slope,) = torch.autograd.grad(total, leaf, allow_unused=True)
    return torch.zeros_like(leaf) if slope is None else slope
