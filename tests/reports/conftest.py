"""A small evaluation: experts that are good at home, gates of both kinds, a control, ceilings, a floor."""

import numpy as np
import pytest

from evaluation.results import FLOOR, Protocol, Results, RowInfo

SUBSETS = ("highway", "urban", "fog")
FRAMES = tuple(subset for subset in SUBSETS for _ in range(4))


def counts(share):
    """Confusions [12, 2, 2] of 100 pixels a frame and class, of which `share[subset]` are right."""
    right = np.array([round(100 * share[subset]) for subset in FRAMES])
    return np.stack([np.stack([right, 100 - right], -1), np.stack([100 - right, right], -1)], 1).astype(
        np.int32
    )


def make_results(
    dataset="roadscenes", gate=0.85, experts=("highway", "urban"), gates=("simple", "classwise")
):
    """`gate`: share of right pixels of the gates on the training subsets."""
    shares = {"baseline": dict.fromkeys(SUBSETS, 0.8)}
    rows = [RowInfo("baseline", "baseline", home=("highway", "urban"))]
    for name in experts:
        shares[name] = {subset: 0.9 if subset == name else 0.5 for subset in SUBSETS}
        rows.append(RowInfo(name, "expert", home=(name,)))
    for kind in gates:
        shares[f"moe_{kind}"] = {"highway": gate, "urban": gate, "fog": 0.7}
        rows.append(RowInfo(f"moe_{kind}", "gate", tuple(experts)))
    if len(experts) > 1:
        shares["true subset"] = {"highway": 0.9, "urban": 0.9, "fog": 0}
        rows.append(RowInfo("true subset", "control", tuple(experts), subsets=tuple(experts)))
        for name in ("best gate, simple", "best gate, class-wise"):
            shares[name] = dict.fromkeys(SUBSETS, 0.95)
            rows.append(RowInfo(name, "ceiling"))
    matrices = np.stack([counts(share) for share in shares.values()])
    first = np.array([{"highway": 0.9, "urban": 0.2, "fog": 0.5}[subset] for subset in FRAMES])
    rest = np.repeat((1 - first)[:, None] / max(1, len(experts) - 1), max(0, len(experts) - 1), axis=1)
    simple = np.concatenate([first[:, None], rest], axis=1)[:, :, None].astype(np.float32)
    weights = {"moe_simple": simple, "moe_classwise": np.repeat(simple, 2, axis=2)}
    return Results(
        protocol=Protocol(dataset, "test", ("road", "sky"), ("highway", "urban"), (8, 12)),
        rows=(*rows, RowInfo(FLOOR, "floor")),
        images=tuple(f"frame{index}" for index in range(len(FRAMES))),
        subsets=FRAMES,
        blocks=FRAMES,
        matrices=matrices,
        truth=np.full((len(FRAMES), 2), 100),
        weights={f"moe_{kind}": weights[f"moe_{kind}"] for kind in gates},
        chosen=f"moe_{gates[-1]}" if gates else "",
    )


@pytest.fixture
def results_of():
    """make_results, for tests that need another evaluation than the usual one."""
    return make_results
