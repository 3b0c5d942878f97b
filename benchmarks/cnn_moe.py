"""A mixture of pathways against its slim network and router, and AdvMoE's training step against the published one.

    python -m benchmarks.cnn_moe [--batch 32] [--repeats 5] [--threads 1] [--experts 2 5 8]

The published step (robust_moe_cnn: ResNet-18, ratio 0.5, K = 2) is written here as its description has it: all experts
run for all images and are masked, with ten passes of the whole network a step, its divergences without log targets, in
float32 and NCHW. Routes are balanced on both sides. bfloat16 is ours alone and stands in a row of its own.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import medians, report, side_by_side
from engine.config import ClassifierTrain
from engine.pathways import Inputs, RouterPhase, adversary_of
from engine.steps import Phase, compute_gradients
from networks.cnn_moe.model import CNN, CNNMoE
from networks.cnn_moe.moe_conv import ExpertConv
from networks.cnn_moe.routes import Route

ROUTER = "router passes of a step"
CLASSES, ARCH, RATIO, EPS, STEPS, STEP = 10, "resnet18", 0.5, 8 / 255, 2, 5 / 255
ALPHA = BETA = 6.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32, help="images (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, the median counts (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads (%(default)s)")
    parser.add_argument(
        "--experts", type=int, nargs="+", default=[2, 5, 8], help="E of the mixtures (%(default)s)"
    )
    parser.add_argument("--out", type=Path, help="write the figures to this file as JSON as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images, labels = torch.rand(options.batch, 3, 32, 32), torch.randint(CLASSES, (options.batch,))
    models = {experts: mixture(experts, images) for experts in options.experts}
    slim = CNN(CLASSES, arch=ARCH, ratio=RATIO).to(memory_format=torch.channels_last)
    forward(models, slim, images, options)
    training(models, slim, images, labels, options)


def mixture(experts: int, images: Tensor) -> CNNMoE:
    """Whose router sends equal shares of these images to all experts."""
    torch.manual_seed(experts)
    model = CNNMoE(CLASSES, arch=ARCH, ratio=RATIO, num_experts=experts)
    model.router.balance([model.entry(images)])
    return model.to(memory_format=torch.channels_last)


def forward(models: dict[int, CNNMoE], slim: CNN, images: Tensor, options) -> None:
    """Evaluation passes: the mixture with balanced routes, the slim network and the router by themselves."""
    fast = images.contiguous(memory_format=torch.channels_last)
    first = next(iter(models.values()))
    ways: dict[str, Callable] = {
        "slim network": evaluated(slim, fast),
        "router": evaluated(first.router, first.entry(fast)),
    }
    for experts, model in models.items():
        weights = balanced(model, len(images))
        ways[f"slim network, {experts} slices of the batch"] = evaluated(
            lambda x, e=experts: [slim(part) for part in x.tensor_split(e)], fast, slim
        )
        ways[f"mixture of {experts}, routes from the router"] = evaluated(model, fast)
        ways[f"mixture of {experts}, equal shares"] = evaluated(
            lambda x, m=model, w=weights: routed(m, x, w), fast, model
        )
        masked = MaskedNet(model)
        ways[f"all {experts} experts, masked (published)"] = evaluated(masked, images)
    seconds = medians(side_by_side(ways, options.repeats))
    whole = seconds["slim network"] + seconds["router"]
    report(
        f"Classifier forward: {ARCH}, ratio {RATIO}, batch {len(images)}, {options.threads} threads, float32",
        ("way", "ms", "x (slim + router)"),
        [(name, f"{1000 * value:.0f}", f"{value / whole:.2f}") for name, value in seconds.items()],
        f"Evaluation mode, without gradients; median of {options.repeats} interleaved rounds.",
        options.out,
    )


def evaluated(module, images: Tensor, network: nn.Module | None = None) -> Callable[[], Tensor]:
    (network or module).eval()

    @torch.no_grad()
    def run() -> Tensor:
        return module(images)

    return run


def balanced(model: CNNMoE, images: int) -> Tensor:
    """One-hot weights [1, B, E, 1, 1, 1], image by image the next expert."""
    chosen = torch.arange(images) % model.num_experts
    return F.one_hot(chosen, model.num_experts).float()[None, :, :, None, None, None]


def routed(model: CNNMoE, images: Tensor, weights: Tensor) -> Tensor:
    """A whole pass, router included, with given routes."""
    model.gate_logits(images)
    return model.forward_given(images, weights)


def training(models: dict[int, CNNMoE], slim: CNN, images: Tensor, labels: Tensor, options) -> None:
    """Steps of the slim network (TRADES) and of mixtures (AdvMoE, ours and as published)."""
    ways: dict[str, Callable] = {"slim network, TRADES": ours(slim, images, labels, method="trades")}
    for experts, model in models.items():
        ways[f"AdvMoE, E = {experts}, target task"] = ours(model, images, labels, router={"target": "task"})
        ways[f"AdvMoE, E = {experts}, label_mod, joint attack"] = ours(
            model, images, labels, router={"target": "label_mod", "attack": "joint"}
        )
        ways[f"AdvMoE, E = {experts}, label_mod"] = ours(
            model, images, labels, router={"target": "label_mod"}
        )
        ways[f"AdvMoE, E = {experts}, label_mod, bfloat16"] = ours(model, images, labels, precision="bf16")
        ways[f"published step, E = {experts}"] = Published(model, images, labels)
    ways[ROUTER] = router_passes(next(iter(models.values())), images)
    seconds = medians(side_by_side(ways, options.repeats))
    base = seconds["slim network, TRADES"]
    asked = 1.5 * base + seconds[ROUTER]
    rows = []
    for name, value in seconds.items():
        experts = name.split("E = ")[1].split(",")[0] if "E = " in name else None
        rival = seconds[f"published step, E = {experts}"] if experts else None
        gain = f"{rival / value:.1f}" if rival else "-"
        rows.append((name, f"{value:.2f}", f"{value / base:.2f}", f"{value / asked:.2f}", gain))
    report(
        f"Training step: {ARCH}, ratio {RATIO}, K = {STEPS}, batch {len(images)}, {options.threads} threads",
        ("way", "seconds", "x slim TRADES", "x (1.5 slim TRADES + router)", "gain on the published step"),
        rows,
        f"Attack, losses, gradients, SGD step; float32 but where told. Median of {options.repeats} interleaved rounds.",
        options.out,
    )


def router_passes(model: CNNMoE, images: Tensor) -> Callable[[], None]:
    """What AdvMoE's step asks of the router: in the pathways' phase 3 passes and one with a gradient of the image for
    each attack step, in its own the same again, two of the three with a gradient of its weights."""
    router = copy.deepcopy(model.router)
    entered = model.entry(images.contiguous(memory_format=torch.channels_last)).detach()

    def run() -> None:
        for _ in range(2 * STEPS):
            leaf = entered.clone().requires_grad_()
            torch.autograd.grad(router(leaf).sum(), leaf)
        with torch.no_grad():
            for _ in range(4):
                router(entered)
        for _ in range(2):
            torch.autograd.grad(router(entered).sum(), list(router.parameters()))

    return run


def ours(
    model: nn.Module, images: Tensor, labels: Tensor, precision: str = "fp32", **keys
) -> Callable[[], None]:
    """A step as the loop makes it, on a copy of the model."""
    plain = {"method": "advmoe", "epochs": 1, "eps": EPS, "steps": STEPS, "step_size": STEP, **keys}
    if plain["method"] == "advmoe":
        plain.setdefault("router", {})
    train = ClassifierTrain.model_validate(plain)
    model = copy.deepcopy(model).train()
    adversary = adversary_of(train)
    phases = [phase("network", adversary.loss, model.body if train.router else model, adversary.attack)]
    if train.router:
        routing = RouterPhase(train, train.router)
        phases.append(phase("router", routing.loss, model.router, routing.attack))
    inputs = Inputs(images.contiguous(memory_format=torch.channels_last), labels % 2)

    def run() -> None:
        for one in phases:
            compute_gradients(one, model, [(inputs, labels)], precision)
            one.optimizer.step()

    return run


def phase(name: str, loss, module: nn.Module, attack) -> Phase:
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4)
    return Phase(name, loss, parameters, optimizer, None, attack)


class Masked(nn.Module):
    """All experts for all images, a mask, and the channels that are not masked gathered again."""

    def __init__(self, conv: ExpertConv, net: "MaskedNet"):
        super().__init__()
        self.conv = conv
        self.net = [net]  # not a child

    def forward(self, x: Tensor, routes: list[Route] | None = None) -> Tensor:
        every = self.conv.convolve(x, self.conv.weight, None)
        one_hot = self.net[0].one_hot  # [B, E]
        mask = one_hot.repeat_interleave(self.conv.out_channels, dim=1)
        masked = every * mask[:, :, None, None]
        places = (mask.detach() != 0).nonzero()
        return masked[places[:, 0], places[:, 1]].view(len(x), self.conv.out_channels, *every.shape[2:])


class MaskedNet(nn.Module):
    """A mixture that computes all of its experts; in NCHW."""

    def __init__(self, model: CNNMoE):
        super().__init__()
        self.model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        for parent in list(self.model.body.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, ExpertConv) and child.num_experts > 1:
                    setattr(parent, name, Masked(child, self))

    def forward(self, images: Tensor) -> Tensor:
        scores = self.scores(images)
        chosen = torch.zeros_like(scores).scatter(1, scores.argmax(dim=1, keepdim=True), 1.0)
        self.one_hot = chosen + scores - scores.detach()
        return self.model.body(self.model.entry(images))

    def scores(self, images: Tensor) -> Tensor:
        return self.model.router(self.model.entry(images))[0]


class Published:
    """The step of section 3.2 of its description, K = 2: ten passes of the whole network."""

    def __init__(self, model: CNNMoE, images: Tensor, labels: Tensor):
        self.net, self.images, self.labels = MaskedNet(model).train(), images, labels
        self.own = torch.optim.SGD(self.net.model.body.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
        self.routed = torch.optim.SGD(
            self.net.model.router.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4
        )

    def __call__(self) -> None:
        net, x, y = self.net, self.images, self.labels
        net.train()
        first = net.scores(x)
        net(x)  # for the accuracy that it prints
        attacked = self.attack(first)
        net.train()
        logits, other = net(x), net(attacked)
        loss = F.cross_entropy(logits, y) + BETA / len(x) * summed(logits, other)
        self.own.zero_grad()
        self.routed.zero_grad()
        loss.backward()
        self.own.step()
        attacked = self.attack(first)
        net.train()
        net(x)
        loss = ALPHA * F.cross_entropy(first, y % first.shape[1]) + BETA / len(x) * summed(
            first, net.scores(attacked)
        )
        self.routed.zero_grad()
        loss.backward()
        self.routed.step()

    def attack(self, first: Tensor) -> Tensor:
        net, x = self.net.eval(), self.images
        logits = net(x)
        points = x + 0.001 * torch.randn_like(x)
        for _ in range(STEPS):
            points.requires_grad_()
            gap = summed(logits.detach(), net(points)) + summed(first.detach(), net.scores(points))
            (gradient,) = torch.autograd.grad(gap, points)
            points = points.detach() + STEP * gradient.sign()
            points = points.clamp(x - EPS, x + EPS).clamp(0, 1)
        return points


def summed(logits: Tensor, others: Tensor) -> Tensor:
    """Divergence of softmax(others) from softmax(logits), summed, the target as probabilities."""
    return F.kl_div(others.log_softmax(dim=1), logits.softmax(dim=1), reduction="sum")


if __name__ == "__main__":
    main()
