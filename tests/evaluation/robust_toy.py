"""Tiny targets with known behaviour, and a harness that kills evaluations of them:
python -m tests.evaluation.robust_toy FOLDER WORLD_SIZE KILLS"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from evaluation.plan import Scene, Setup
from evaluation.robust import attack_all
from evaluation.robust_tables import write_robust
from evaluation.suites import member
from evaluation.targets import target_of

CLASSES, SIZE, IMAGES = 4, (6, 8), 12
EPS = (2 / 255, 6 / 255)


class Net(nn.Module):
    """One convolution."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, CLASSES, 3, padding=1)

    def forward(self, images):
        return 8 * self.conv(images)


class Ensemble(nn.Module):
    def __init__(self, *networks):
        super().__init__()
        self.networks, self.num_experts = nn.ModuleList(networks), len(networks)

    def expert_logits(self, images):
        return torch.stack([network(images) for network in self.networks], dim=1)

    def combine(self, expert_logits):
        return expert_logits.mean(dim=1)

    def forward(self, images):
        return self.combine(self.expert_logits(images))


class Mixture(Ensemble):
    """The gate looks at the mean colour of the image."""

    def __init__(self, *networks, routing="soft"):
        super().__init__(*networks)
        self.routing = routing
        self.gate = nn.Linear(3, len(networks), bias=False)

    def gate_logits(self, images):
        return 40 * self.gate(images.mean(dim=(2, 3)) - 0.5)[None, :, :, None, None, None]

    def route(self, gate_logits):
        if self.routing == "soft":
            return gate_logits.softmax(dim=2)
        return torch.zeros_like(gate_logits).scatter(2, gate_logits.argmax(dim=2, keepdim=True), 1.0)

    def forward_given(self, images, weights):
        return (self.expert_logits(images) * weights[0]).sum(dim=1)

    def forward(self, images):
        return self.forward_given(images, self.route(self.gate_logits(images)))


def scenes(batch_size=4, images=IMAGES):
    """Images of bytes; labels are what the first network says, but for a tenth of the pixels; some ignored."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (images, 3, *SIZE), generator=generator).float() / 255
    with torch.no_grad():
        labels = Net(0)(pixels).argmax(dim=1)
    noise = torch.rand(labels.shape, generator=generator)
    labels[noise < 0.1] = 0
    labels[noise > 0.95] = 255
    names = tuple(f"frame_{place}" for place in range(images))
    return [
        Scene(pixels[part], labels[part], names[part], names[part])
        for part in (slice(start, start + batch_size) for start in range(0, images, batch_size))
    ]


def targets():
    first, second = Net(0), Net(1)
    return [
        target_of("first", first, role="expert", class_pixels=[40, 30, 20, 10]),
        target_of("mean", Ensemble(first, second), role="ensemble"),
        target_of("gate", Mixture(first, second, routing="hard"), role="gate"),
    ]


def members():
    """Three each, of 3 steps: two common ones and one that knows the gate or the networks."""
    kinds = {target.name: (target.kind, target.num_experts) for target in targets()}
    own = {
        "first": {"name": "pgd", "loss": "margin", "steps": 3},
        "mean": {"name": "member_sum", "steps": 3},
        "gate": {"name": "gate_only", "steps": 3},
    }
    common = {"pgd": {"name": "pgd", "steps": 3}, "masked": {"name": "pgd", "loss": "masked_ce", "steps": 3}}
    return {
        target: [
            *(member(name, attack, "common", *kind) for name, attack in common.items()),
            member("own", own[target], "adaptive", *kind),
        ]
        for target, kind in kinds.items()
    }


def setup(**changes):
    return Setup(**{"classes": tuple("abcd"), "eps": EPS, "seed": 1, "about": {"dataset": "toy"}, **changes})


def run(folder, log=str, **changes):
    return attack_all(Path(folder) / "ledger", scenes(), targets(), members(), setup(**changes), log=log)


def run_to_tables(folder):
    if run(folder):
        write_robust(folder, Path(folder) / "ledger")


def start(folder, rank, world):
    """A process of its own that works on the ledger; its id."""
    child = os.fork()
    if child:
        return child
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    run_to_tables(folder)
    os._exit(0)


def killed_by(child):
    """The signal that ended a process, 0 where it ended by itself without a mistake."""
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def main(folder, world, kills):
    """Kills as many times at random moments, then lets it end. Prints how many processes were killed."""
    torch.set_num_threads(1)
    begun, hit, dice = time.monotonic(), 0, random.Random(kills)
    assert killed_by(start(f"{folder}/whole", 0, 1)) == 0
    whole = time.monotonic() - begun
    for _ in range(kills):
        children = [start(f"{folder}/killed", rank, world) for rank in range(world)]
        time.sleep(dice.uniform(0, 2 * whole / world / kills))
        for child in children:
            os.kill(child, signal.SIGKILL)
        hit += sum(killed_by(child) == signal.SIGKILL for child in children)
    children = [start(f"{folder}/killed", rank, world) for rank in range(world)]
    assert [killed_by(child) for child in children] == [0] * world
    print(hit)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
