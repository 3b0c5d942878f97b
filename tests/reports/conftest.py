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


def cases(experts):
    """Of 200 pixels a frame: agree, followed 120 (110 right); contradicted 10 (4, the experts 2); differ, the first
    one followed 60 (30 right, the others 15); own answer 10 (5 right, the experts none)."""
    found = np.zeros((len(FRAMES), 2, 5 + experts, 2 + experts), np.int32)
    found[:, 0, 0], found[:, 0, 1] = [120, *[110] * (1 + experts)], [10, 4, *[2] * experts]
    found[:, 0, 2] = found[:, 0, 5] = [60, 30, 30, *[15] * (experts - 1)]
    found[:, 0, 3] = [10, 5, *[0] * experts]
    return found


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
            rows.append(RowInfo(name, "ceiling", tuple(experts)))
    matrices = np.stack([counts(share) for share in shares.values()])
    first = np.array([{"highway": 0.9, "urban": 0.2, "fog": 0.5}[subset] for subset in FRAMES])
    rest = np.repeat((1 - first)[:, None] / max(1, len(experts) - 1), max(0, len(experts) - 1), axis=1)
    simple = np.concatenate([first[:, None], rest], axis=1)[:, :, None].astype(np.float32)
    weights = {"moe_simple": simple, "moe_classwise": np.repeat(simple, 2, axis=2)}
    luma = np.array([{"highway": 0.5, "urban": 0.3, "fog": 0.8}[subset] for subset in FRAMES])
    luma += np.tile([0.0, 0.01, 0.02, 0.03], len(SUBSETS))
    return Results(
        protocol=Protocol(dataset, "test", ("road", "sky"), ("highway", "urban"), (8, 12)),
        rows=(*rows, RowInfo(FLOOR, "floor")),
        images=tuple(f"frame{index}" for index in range(len(FRAMES))),
        subsets=FRAMES,
        blocks=FRAMES,
        matrices=matrices,
        truth=np.full((len(FRAMES), 2), 100),
        luma=luma,
        weights={f"moe_{kind}": weights[f"moe_{kind}"] for kind in gates},
        cases={f"moe_{kind}": cases(len(experts)) for kind in gates},
        scores={f"moe_{kind}": np.tile([[120, 30], [20, 30]], (len(FRAMES), 1, 1)) for kind in gates},
        chosen=f"moe_{gates[-1]}" if gates else "",
    )


@pytest.fixture
def results_of():
    """make_results, for tests that need another evaluation than the usual one."""
    return make_results
