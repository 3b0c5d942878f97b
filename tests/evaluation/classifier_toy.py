"""Tiny classifiers with known behaviour, and a harness that kills evaluations of them:
python -m tests.evaluation.classifier_toy FOLDER"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from attacks import autoattack
from evaluation.classifier_autoattack import AUTOATTACK
from evaluation.classifier_clean import About, Clean
from evaluation.classifier_tables import SUITE, write_classifier_tables
from evaluation.classifiers import answers
from evaluation.ledger import Ledger
from evaluation.plan import Scene, Setup
from evaluation.robust import attack_all
from evaluation.suites import member
from evaluation.targets import PATH, target_of

CLASSES, SHAPE, IMAGES, EXPERTS = 5, (1, 5, 5), 6, 2
EPS = (0.01, 0.04)
ABOUT = About("toy", 10, 5, 0.1, 0.1, 0.0, "standard", None)
STEPS = {"name": "pgd", "steps": 3}


class Plain(nn.Module):
    """A linear classifier."""

    def __init__(self, seed=0, classes=CLASSES):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(25, classes)

    def forward(self, images):
        return 4 * self.linear((images - 0.5).flatten(1))


class Mixture(nn.Module):
    """Linear pathways and a linear router with a straight-through gradient."""

    num_experts, routing, granularity, conditional = EXPERTS, "hard", "model", True

    def __init__(self, seed=1, classes=CLASSES):
        super().__init__()
        self.paths = nn.ModuleList(Plain(seed + expert, classes) for expert in range(EXPERTS))
        self.router = nn.Linear(25, EXPERTS, bias=False)

    def gate_logits(self, images):
        return self.router((images - 0.5).flatten(1))[None, :, :, None, None, None]

    def route(self, gate_logits):
        shares = gate_logits.softmax(dim=2)
        best = gate_logits.argmax(dim=2, keepdim=True)
        return torch.zeros_like(shares).scatter(2, best, 1.0) + (shares - shares.detach())

    def forward_given(self, images, weights):
        each = torch.stack([path(images) for path in self.paths], dim=1)
        return (each * weights.reshape(-1, EXPERTS, 1)).sum(dim=1)

    def forward(self, images):
        return self.forward_given(images, self.route(self.gate_logits(images)))

    def pathway(self, expert):
        return self.paths[expert]


def images(count=IMAGES):
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(3))


def targets():
    mixture = Mixture()
    return [
        target_of("moe", mixture, role="cnn_moe"),
        *(target_of(f"moe{PATH}{one}", mixture.pathway(one), role="pathway") for one in range(EXPERTS)),
        target_of("plain", Plain(), role="cnn"),
    ]


def labels():
    """What the mixture says, but for the last image."""
    with torch.no_grad():
        said = Mixture()(images()).argmax(dim=1)
    said[-1] = (said[-1] + 1) % CLASSES
    return said


def names():
    return [f"image_{place}" for place in range(IMAGES)]


def scenes(size=3):
    shown, wanted = images(), labels()
    parts = [slice(start, start + size) for start in range(0, IMAGES, size)]
    return [Scene(shown[one], wanted[one], tuple(names()[one]), tuple(names()[one])) for one in parts]


def members_of(target):
    adaptive = {"name": "gate_only", "steps": 3} if target.kind == "hard" else {**STEPS, "loss": "margin"}
    each = [("pgd", STEPS, "common"), ("own", adaptive, "adaptive")]
    return [member(*one, target.kind, target.num_experts, active=target.active) for one in each]


def auto_of(target):
    paths = range(EXPERTS if target.kind == "hard" else 0)
    each = [(AUTOATTACK, {"name": "autoattack"}, "common")]
    each += [(f"{AUTOATTACK}{PATH}{e}", {"name": "autoattack", "pathway": e}, "adaptive") for e in paths]
    return [member(*one, target.kind, target.num_experts, active=target.active) for one in each]


def setup(eps, suite, **about):
    about = {"dataset": "toy", **about}
    return Setup(tuple("abcde"), eps, suite, "linf", 1, -1, "test", about=about)


def run(folder, auto=True):
    """Both ledgers and the tables."""
    attacked, folder = targets(), Path(folder)
    own = {one.name: members_of(one) for one in attacked}
    ledgers = {SUITE: folder / "ledger"}
    assert attack_all(ledgers[SUITE], scenes(), attacked, own, setup(EPS, "quick"), log=str)
    whole = [attacked[0], attacked[-1]]
    if auto:
        ledgers[AUTOATTACK] = folder / "ledger_autoattack"
        own = {one.name: auto_of(one) for one in whole}
        asked = setup(EPS[-1:], AUTOATTACK, batch=3)
        assert attack_all(ledgers[AUTOATTACK], scenes(), whole, own, asked, log=str)
    write(folder, ledgers, whole)
    return ledgers


def clean(whole):
    found = {one.name: answers(one.model.eval(), [(images(), 0)], torch.device("cpu")) for one in whole}
    return Clean(np.array(names()), labels().numpy(), tuple("abcde"), found, "test")


def write(folder, ledgers, whole):
    write_classifier_tables(folder, clean(whole), {one.name: ABOUT for one in whole}, "toy", ledgers)


def kill_at(what, count):
    """This process ends by SIGKILL as the unit or the pass of an AutoAttack of that number begins."""
    owner, name = (Ledger, "add") if what == "unit" else (autoattack.Counting, "forward")
    before, seen = getattr(owner, name), []

    def counted(*args, **kwargs):
        seen.append(1)
        if len(seen) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(*args, **kwargs)

    setattr(owner, name, counted)


def ends(folder, *kill):
    """The signal by which a process of its own ended that evaluated, 0 where it ended by itself."""
    child = os.fork()
    if not child:
        if kill:
            kill_at(*kill)
        run(folder)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def main(folder):
    """Kills between units, and within AutoAttack, then lets it end. Prints the signals."""
    torch.set_num_threads(1)
    assert ends(f"{folder}/whole") == 0
    kills = [("unit", 3), ("unit", 30), ("pass", 40), ("unit", 2), ("pass", 300), ("unit", 2), ("pass", 20)]
    print([ends(f"{folder}/killed", *kill) for kill in kills], ends(f"{folder}/killed"))


if __name__ == "__main__":
    main(sys.argv[1])
