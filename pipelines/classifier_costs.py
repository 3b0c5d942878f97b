"""What a classifier costs: parameters, those that an image meets, and multiply-adds per image.

python -m pipelines.classifier_costs prints a table of all architectures."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from evaluation.formats import markdown_table, number
from networks.cnn_moe import ARCHITECTURES
from networks.cnn_moe.model import CNN, CNNMoE
from networks.cnn_moe.sparse import SparseCNN
from networks.complexity import parameters


@dataclass(frozen=True)
class ClassifierCost:
    """parameters: all. active: of the router and one pathway. pathway, router, executed: GMACs per image.

    Of a sparse network all this is of what is left without the pruned filters, as networks.cnn_moe.sparse cuts it:
    every filter that is kept, each reading the channels that are kept; sums of residual networks keep all channels."""

    parameters: int
    active: int
    pathway: float
    router: float
    executed: float


def cost_of(model: nn.Module, size: tuple[int, int, int]) -> ClassifierCost:
    """Of one image of `size` (channels, height, width). executed: counted in a pass of a batch of one."""
    model = without_pruned(model)
    total, _ = parameters(model)
    device = next((one.device for one in model.parameters()), None)
    image = torch.zeros(1, *size, device=device)
    if not hasattr(model, "pathway"):
        gmacs = counted(model, image)
        return ClassifierCost(total, total, gmacs, 0.0, gmacs)
    plain = model.pathway(0)
    routed = sum(parameter.numel() for parameter in model.router.parameters())
    return ClassifierCost(
        total,
        sum(parameter.numel() for parameter in plain.parameters()) + routed,
        counted(plain, image),
        counted(model.router, model.entry(image)),
        counted(model, image),
    )


def without_pruned(model: nn.Module) -> nn.Module:
    """A copy without its pruned filters, of a sparse network; others as they are."""
    return model.kept() if hasattr(model, "kept") else model


@torch.no_grad()
def counted(module: nn.Module, image: torch.Tensor) -> float:
    """GMACs of convolutions and matrix products, by torch.utils.flop_counter; the module stays in its mode."""
    before = module.training
    module.eval()
    with FlopCounterMode(display=False) as counter:
        module(image)
    module.train(before)
    return counter.get_total_flops() / 2e9


def describe_costs(model: nn.Module, size: tuple[int, int, int]) -> list[str]:
    """For people."""
    cost = cost_of(model, size)
    active = f"{cost.active:,} of them active for an image"
    if hasattr(model, "kept"):
        active = (
            f"what is left of {sum(one.numel() for one in model.body.parameters()):,} without pruned filters"
        )
    lines = [f"parameters: {cost.parameters:,}, {active}"]
    shape = " x ".join(map(str, size))
    if cost.router:
        parts = f"a pathway {cost.pathway:.4f}, the router {cost.router:.4f}"
        lines.append(f"GMACs per image of {shape}: {cost.executed:.4f} ({parts})")
    else:
        lines.append(f"GMACs per image of {shape}: {cost.executed:.4f}")
    return lines


def cost_table(
    num_classes: int, size: tuple[int, int, int], stem: str, ratio: float, experts: tuple[int, ...]
) -> list[str]:
    """A Markdown table: every architecture dense, slim, sparse and as mixtures."""
    lines = []
    for arch in ARCHITECTURES:
        keys = {"arch": arch, "stem": stem}
        kinds = [
            ("dense", 1.0, CNN),
            ("slim", ratio, CNN),
            ("sparse", ratio, SparseCNN),
            *((f"E = {count}", ratio, partial(CNNMoE, num_experts=count)) for count in experts),
        ]
        for kind, share, network in kinds:
            cost = cost_of(network(num_classes, ratio=share, **keys), size)
            gmacs = (cost.pathway, cost.router, cost.executed)
            numbers = [number(cost.parameters), number(cost.active), *(f"{one:.4f}" for one in gmacs)]
            lines.append([arch, kind, f"{share:g}", *numbers])
    titles = ["network", "kind", "ratio", "parameters", "active", "GMACs pathway", "router", "executed"]
    return markdown_table(titles, lines, left=2)


def main() -> None:
    """Prints the tables of docs/classifier_costs.md."""
    for num_classes, edge, stem in ((10, 32, "cifar"), (200, 64, "cifar"), (1000, 224, "imagenet")):
        title = f"{edge}x{edge}, {num_classes} classes, stem {stem}"
        print(
            "\n".join(["", f"## {title}", "", *cost_table(num_classes, (3, edge, edge), stem, 0.5, (2, 5))])
        )


if __name__ == "__main__":
    main()
