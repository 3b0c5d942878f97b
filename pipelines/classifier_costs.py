"""What a classifier costs: parameters, those that an image meets, and multiply-adds per image.

python -m pipelines.classifier_costs prints a table of all architectures."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from evaluation.formats import markdown_table, number
from networks.cnn_moe import ARCHITECTURES
from networks.cnn_moe.model import CNN, CNNMoE
from networks.cnn_moe.sparse import SparseCNN
from networks.complexity import counted, parameters

SMALL = 0.1  # share of a pathway that a router should cost at most ...
LARGE = 224  # ... of images from this shorter side on; of small ones it can't

# What the published code counts, by network, ratio, experts (0: one plain network), classes, edge and stem: parameters,
# GMACs of one pathway and GMACs executed, as it computes all pathways; all without the router.
PUBLISHED = {
    ("resnet18", 1.0, 0, 10, 32, "cifar"): (11_173_962, 0.5554, 0.5554),
    ("resnet18", 0.5, 0, 10, 32, "cifar"): (2_797_610, 0.1393, 0.1393),
    ("resnet18", 0.2, 0, 10, 32, "cifar"): (444_218, 0.0214, 0.0214),
    ("resnet18", 0.8, 0, 10, 32, "cifar"): (7_122_360, 0.3534, 0.3534),
    ("resnet18", 0.5, 2, 10, 32, "cifar"): (5_565_450, 0.1517, 0.2980),
    ("resnet18", 0.5, 5, 10, 32, "cifar"): (13_832_202, 0.1517, 0.7368),
    ("resnet18", 0.2, 2, 10, 32, "cifar"): (891_937, 0.0293, 0.0559),
    ("resnet18", 0.2, 5, 10, 32, "cifar"): (2_211_346, 0.0293, 0.1355),
    ("resnet18", 0.8, 2, 10, 32, "cifar"): (14_137_814, 0.3632, 0.7173),
    ("resnet18", 1.0, 2, 10, 32, "cifar"): (22_159_434, 0.5554, 1.1028),
    ("resnet50", 1.0, 0, 10, 32, "cifar"): (23_520_842, 1.2978, 1.2978),
    ("resnet50", 0.5, 2, 10, 32, "cifar"): (11_075_274, 0.3310, 0.6267),
    ("wrn_28_4", 1.0, 0, 10, 32, "cifar"): (5_849_050, 0.8456, 0.8456),
    ("wrn_28_4", 0.5, 2, 10, 32, "cifar"): (2_924_530, 0.2115, 0.4228),
    ("wrn_28_10", 1.0, 0, 10, 32, "cifar"): (36_479_194, 5.2433, 5.2433),
    ("wrn_28_10", 0.5, 0, 10, 32, "cifar"): (9_126_002, 1.3109, 1.3109),
    ("wrn_28_10", 0.5, 2, 10, 32, "cifar"): (18_239_602, 1.3109, 2.6217),
    ("wrn_28_10", 0.5, 5, 10, 32, "cifar"): (45_580_402, 1.3109, 6.5538),
    ("wrn_34_10", 1.0, 0, 10, 32, "cifar"): (46_160_474, 6.6589, 6.6589),
    ("wrn_34_10", 0.5, 2, 10, 32, "cifar"): (23_080_242, 1.6648, 3.3295),
    ("vgg16_bn", 1.0, 0, 10, 32, "cifar"): (15_311_818, 0.3138, 0.3138),
    ("vgg16_bn", 0.5, 0, 10, 32, "cifar"): (4_013_034, 0.0791, 0.0791),
    ("vgg16_bn", 0.5, 2, 10, 32, "cifar"): (7_690_218, 0.0791, 0.1569),
    ("vgg16_bn", 0.5, 5, 10, 32, "cifar"): (18_721_770, 0.0791, 0.3905),
    ("densenet", 1.0, 0, 10, 32, "cifar"): (176_122, 0.0724, 0.0724),
    ("densenet", 0.5, 0, 10, 32, "cifar"): (45_802, 0.0183, 0.0183),
    ("densenet", 0.2, 0, 10, 32, "cifar"): (5_882, 0.0021, 0.0021),
    ("resnet18", 1.0, 0, 200, 128, "imagenet"): (11_279_112, 0.5923, 0.5923),
    ("resnet18", 0.5, 2, 200, 128, "imagenet"): (5_639_656, 0.1577, 0.2961),
    ("vgg16_bn", 1.0, 0, 200, 128, "cifar"): (15_360_648, 5.0118, 5.0118),
    ("vgg16_bn", 0.5, 2, 200, 128, "cifar"): (7_739_048, 1.2602, 2.5060),
    ("resnet18", 1.0, 0, 1000, 224, "imagenet"): (11_689_512, 1.8141, 1.8141),
    ("resnet18", 0.5, 0, 1000, 224, "imagenet"): (3_055_880, 0.4831, 0.4831),
    ("resnet18", 0.5, 2, 1000, 224, "imagenet"): (5_845_256, 0.4831, 0.9070),
    ("resnet50", 1.0, 0, 1000, 224, "imagenet"): (25_557_032, 4.0892, 4.0892),
    ("resnet50", 0.5, 2, 1000, 224, "imagenet"): (12_779_016, 1.0523, 2.0446),
    ("wrn_28_10", 1.0, 0, 1000, 224, "imagenet"): (37_115_736, 16.0865, 16.0865),
    ("wrn_28_10", 0.5, 2, 1000, 224, "imagenet"): (18_558_368, 4.0292, 8.0432),
}  # fmt: skip


@dataclass(frozen=True)
class ClassifierCost:
    """parameters: all. active: those that an image meets, of the router and its top_k pathways, shared parts once.
    pathway: GMACs per image of these pathways; router, executed: likewise.

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
    one, routed = parameters(model.pathway(0))[0], parameters(model.router)[0]
    expert = (total - routed - one) // (
        model.num_experts - 1
    )  # what each further one adds to the shared parts
    weights = torch.zeros(model.router.sites, 1, model.num_experts, 1, 1, 1, device=device)
    weights[:, :, : model.top_k] = 1 / model.top_k
    return ClassifierCost(
        total,
        one + (model.top_k - 1) * expert + routed,
        counted(model, image, lambda image: model.forward_given(image, weights)),
        counted(model.router, model.entry(image)),
        counted(model, image),
    )


def without_pruned(model: nn.Module) -> nn.Module:
    """A copy without its pruned filters, of a sparse network; others as they are."""
    return model.kept() if hasattr(model, "kept") else model


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
        paths = "a pathway" if model.top_k == 1 else f"{model.top_k} of {model.num_experts} pathways"
        share = f"{100 * cost.router / cost.pathway:.0f} % of that"
        if cost.router > SMALL * cost.pathway and min(size[1:]) >= LARGE:
            share += "; a smaller network.router_width makes it cheaper"
        parts = f"{paths} {cost.pathway:.4f}, the router {cost.router:.4f}: {share}"
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


def published_table(networks: Iterable[tuple]) -> list[str]:
    """A Markdown table: what the published code counts for these keys of PUBLISHED, beside ours, without routers."""
    lines = []
    for arch, ratio, experts, num_classes, edge, stem in networks:
        theirs, pathway, executed = PUBLISHED[arch, ratio, experts, num_classes, edge, stem]
        keys = {"arch": arch, "ratio": ratio, "stem": stem}
        network = CNNMoE(num_classes, num_experts=experts, **keys) if experts else CNN(num_classes, **keys)
        cost = cost_of(network, (3, edge, edge))
        ours = cost.parameters - (parameters(network.router)[0] if experts else 0)
        lines.append([
            arch, f"E = {experts}" if experts else "plain", f"{ratio:g}", f"{edge}", f"{num_classes}",
            number(theirs), number(ours), f"{ours - theirs:+,}".replace(",", " "),
            f"{pathway:.4f}", f"{cost.pathway:.4f}", f"{executed:.4f}", f"{cost.executed - cost.router:.4f}",
        ])  # fmt: skip
    titles = [
        "network", "kind", "ratio", "px", "classes", "parameters published", "ours", "difference",
        "GMACs of a pathway published", "ours", "executed published", "ours",
    ]  # fmt: skip
    return markdown_table(titles, lines, left=2)


def main() -> None:
    """Prints the tables of docs/classifier_costs.md."""
    print("\n".join(["", "## Beside the published counts", "", *published_table(PUBLISHED)]))
    for num_classes, edge, stem in ((10, 32, "cifar"), (200, 64, "cifar"), (1000, 224, "imagenet")):
        title = f"{edge}x{edge}, {num_classes} classes, stem {stem}"
        print(
            "\n".join(["", f"## {title}", "", *cost_table(num_classes, (3, edge, edge), stem, 0.5, (2, 5))])
        )


if __name__ == "__main__":
    main()
