"""What classifiers cost, against counts by hand, and the page that tells it."""

from pathlib import Path

import pytest
import torch

from networks.cnn_moe.model import CNN, CNNMoE
from networks.cnn_moe.sparse import SparseCNN
from pipelines import classifier_costs
from pipelines.classifier_costs import PUBLISHED, cost_of, cost_table, describe_costs, published_table

ROOT = Path(__file__).resolve().parents[2]


def vgg_macs(widths, edge):
    """Of VGG-16 with these channels behind the stem's 64 and the image of 3, and its classifier for 10."""
    macs, before, pools = 27 * 64 * edge**2, 64, {1, 3, 6, 9}  # layers that a pooling stands before
    for place, width in enumerate(widths):
        edge //= 2 if place in pools else 1
        macs += 9 * before * width * edge**2
        before = width
    return macs + 4 * before * 256 + 256 * 256 + 256 * 10


def test_every_part_stays_in_its_mode():
    model = CNNMoE(10, arch="resnet18", ratio=0.1)
    model.train().router.eval()
    before = {name: module.training for name, module in model.named_modules()}
    cost_of(model, (3, 32, 32))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert {True, False} == set(before.values())


DENSE = [64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]


@pytest.mark.parametrize(("ratio", "widths"), [(0.5, [width // 2 for width in DENSE]), (1.0, DENSE)])
def test_a_sparse_network_costs_the_filters_that_it_keeps(ratio, widths):
    cost = cost_of(SparseCNN(10, arch="vgg16", ratio=ratio), (3, 32, 32))
    assert cost.pathway == cost.executed == vgg_macs(widths, 32) / 1e9 and cost.router == 0
    assert cost.parameters == cost.active < 15_307_595 * (1 if ratio == 1 else 0.3)
    whole = cost_of(CNN(10, arch="vgg16"), (3, 32, 32))
    assert (cost == whole) == (ratio == 1)


def test_sums_of_a_residual_network_keep_their_channels():
    """resnet18 on 32x32, half the filters: the first convolution of a block reads all channels, the second half."""
    macs, before, edge = 27 * 64 * 32**2 + 512 * 10, 64, 32
    for width in (64, 128, 256, 512):
        half, changes = width // 2, width != before
        edge //= 2 if changes else 1
        for place in range(2):
            shortcut = before * half if changes and not place else 0
            macs += (9 * before * half + 9 * half * half + shortcut) * edge**2
            before = width
    cost = cost_of(SparseCNN(10, arch="resnet18", ratio=0.5), (3, 32, 32))
    assert cost.executed == macs / 1e9


@pytest.mark.parametrize("granularity", ["model", "stage", "layer"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_mixture_of_the_k_best_costs_k_experts_and_what_they_share_once(top_k, granularity):
    keys = {"arch": "resnet18", "ratio": 0.1, "num_experts": 4, "granularity": granularity, "top_k": top_k}
    model = CNNMoE(10, **keys)
    cost, whole = cost_of(model, (1, 16, 16)), sum(one.numel() for one in model.parameters())
    unused = sum(conv.weight.numel() for conv in model.body.expert_convs()) * (4 - top_k) // 4
    assert cost.parameters == whole and cost.active == whole - unused
    assert cost.pathway + cost.router == pytest.approx(cost.executed, rel=1e-12)
    alone = cost_of(model.pathway(0), (1, 16, 16)).executed
    stem = 27 * 6 * 16**2 / 1e9  # and the classifier of 51 features, which is shared as well
    assert cost.pathway == pytest.approx(top_k * alone - (top_k - 1) * (stem + 51 * 10 / 1e9), rel=1e-9)
    told = "a pathway" if top_k == 1 else f"{top_k} of 4 pathways"
    line = describe_costs(model, (1, 16, 16))[1]
    assert f"({told} {cost.pathway:.4f}, the router {cost.router:.4f}: " in line
    assert line.endswith(f": {100 * cost.router / cost.pathway:.0f} % of that)")


def test_a_router_that_is_large_beside_its_pathways_is_told_of_large_images():
    def told(edge, width):
        model = CNNMoE(10, arch="resnet18", ratio=0.1, stem="imagenet", router_width=width)
        return describe_costs(model, (3, edge, edge))[1].endswith(
            "a smaller network.router_width makes it cheaper)"
        )

    assert told(224, 1.0) and not told(224, 0.25) and not told(32, 1.0)


def test_counting_leaves_a_network_as_it_is():
    network = SparseCNN(10, arch="densenet", ratio=0.5).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    told = describe_costs(network, (1, 32, 32))
    assert "what is left of 176,122 without pruned filters" in told[0] and "GMACs per image" in told[1]
    after = network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()) and network.training
    mixture = CNNMoE(10, arch="densenet", ratio=0.5)
    assert "of them active for an image" in describe_costs(mixture, (3, 32, 32))[0]


def test_the_page_is_what_the_command_prints(monkeypatch):
    """One architecture of the table; each has its rows."""
    page = (ROOT / "docs/classifier_costs.md").read_text()
    kinds = 5
    rows = 3 * kinds * len(classifier_costs.ARCHITECTURES) + len(PUBLISHED)
    assert page.count("\n| ") == rows + 2 * 4  # titles of four tables and the lines below them
    monkeypatch.setattr(classifier_costs, "ARCHITECTURES", {"densenet": None})
    for num_classes, edge, stem in ((10, 32, "cifar"), (200, 64, "cifar")):
        lines = cost_table(num_classes, (3, edge, edge), stem, 0.5, (2, 5))
        section = page.split(f"## {edge}x{edge}, {num_classes} classes")[1].split("\n## ")[0]
        assert len(lines) == 2 + kinds and all(f"\n{line}\n" in section for line in lines)


@pytest.mark.parametrize(
    ("network", "difference"),
    [
        (("wrn_28_4", 0.5, 2, 10, 32, "cifar"), "+0"),
        (("vgg16_bn", 0.5, 5, 10, 32, "cifar"), "+0"),
        (
            ("resnet18", 0.5, 2, 10, 32, "cifar"),
            "+21 536",
        ),  # 43,008 - 928 - 2,112 - 2 x 9,216, told on the page
    ],
)
def test_ours_beside_the_published_counts(network, difference):
    page = (ROOT / "docs/classifier_costs.md").read_text()
    _, _, row = published_table([network])
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[7] == difference
    assert f"\n{row}\n" in page
