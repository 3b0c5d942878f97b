"""What the numbers of an evaluation say, in sentences. Every number and every verdict is computed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.results import Results, best_row
from metrics.gate import gate_statistics


@dataclass(frozen=True)
class Finding:
    """One statement: a headline and what stands behind it."""

    headline: str
    detail: str


def findings(results: Results, subsets: Sequence[str]) -> list[Finding]:
    """About experts at home and abroad, the chosen gate against the rest, its regret, and gates' weights.

    mIoU_common compares subsets, mIoU compares rows on one subset; both as in the matrix, in percent."""
    return [
        *home_and_abroad(results, subsets),
        *gate_against(results, subsets),
        *regret(results, subsets),
        *weights(results, subsets),
    ]


def main_subset(subsets: Sequence[str]) -> str:
    """The subset that rows are compared on: "all" where it is there."""
    return "all" if "all" in subsets else subsets[0]


def chosen_gate(results: Results) -> str:
    """The gate picked on the validation split, else the first; "" without gates."""
    return results.chosen or next(iter(results.names("gate")), "")


def home_and_abroad(results: Results, subsets: Sequence[str]) -> list[Finding]:
    """Every expert on the subsets that it alone was trained on, against the best of the other experts."""
    found = []
    experts = results.names("expert")
    for expert in experts:
        for subset in (home for home in results.row(expert).home if home in subsets):
            others = [name for name in experts if subset not in results.row(name).home]
            if not others:
                continue
            at_home = results.miou_common(expert, subset, subsets)
            rival = max(others, key=lambda name: results.miou_common(name, subset, subsets))
            abroad = results.miou_common(rival, subset, subsets)
            found.append(
                Finding(
                    f"On {subset} the {expert} expert is {_distance(at_home - abroad)} the {rival} expert.",
                    f"mIoU_common {100 * at_home:.2f} at home against {100 * abroad:.2f}.",
                )
            )
    return found


def gate_against(results: Results, subsets: Sequence[str]) -> list[Finding]:
    """The chosen gate against the best of each other kind, on the main subset."""
    gate, subset = chosen_gate(results), main_subset(subsets)
    if not gate:
        return []
    own = results.miou(gate, subset)
    rivals = []
    for kind in ("expert", "baseline", "ensemble", "control"):
        names = [name for name in results.names(kind) if results.defined(name, subset)]
        if names:
            rival = best_row(results, names, subset)
            rivals.append((kind, rival, own - results.miou(rival, subset)))
    if not rivals:
        return []
    beaten = sum(margin > 0 for _, _, margin in rivals)
    how = "the gate chosen on the validation split" if gate == results.chosen else "the first gate"
    compared = "; ".join(f"{_distance(margin)} the best {kind} ({rival})" for kind, rival, margin in rivals)
    headline = f"On {subset} the MoE {gate} reaches {100 * own:.2f} mIoU"
    verdict = "above the best row of every other kind" if beaten == len(rivals) else (
        f"above the best of {beaten} of {len(rivals)} other kinds of rows"
    )  # fmt: skip
    return [Finding(f"{headline}, {verdict}.", f"It is {how}: {compared}.")]


def regret(results: Results, subsets: Sequence[str]) -> list[Finding]:
    """How far the chosen gate stays below the best gate of its kind."""
    gate, subset = chosen_gate(results), main_subset(subsets)
    if not gate:
        return []
    ceiling = "best gate, simple" if results.weights[gate].shape[2] == 1 else "best gate, class-wise"
    if ceiling not in results.by_name:
        return []
    best, own = results.miou(ceiling, subset), results.miou(gate, subset)
    return [
        Finding(
            f"A perfect gate of its kind would reach {100 * best:.2f} mIoU on {subset}: "
            f"a regret of {100 * (best - own):.2f} points.",
            "Perfect means told the label of every pixel; it bounds gates without a convolution.",
        )
    ]


def weights(results: Results, subsets: Sequence[str]) -> list[Finding]:
    """Per gate: the mean weight that differs most between training subsets, and the collapse alarm."""
    trained = [subset for subset in subsets if subset in results.protocol.training_subsets]
    found = []
    for gate in results.names("gate"):
        per_image = results.weights[gate].mean(axis=2)  # [N, E]
        if len(trained) > 1:
            means = np.stack([per_image[results.mask(subset)].mean(axis=0) for subset in trained])  # [S, E]
            expert = int(np.ptp(means, axis=0).argmax())
            high, low = trained[means[:, expert].argmax()], trained[means[:, expert].argmin()]
            values = means[:, expert].max(), means[:, expert].min()
            name = results.row(gate).experts[expert]
            found.append(
                Finding(
                    f"{gate} tells the subsets apart by {values[0] - values[1]:.2f}.",
                    f"Its mean weight for {name} is {values[0]:.2f} on {high} and {values[1]:.2f} on {low}.",
                )
            )
        together = per_image[np.isin(results.subsets, results.protocol.training_subsets)]
        if len(together) and gate_statistics(together[:, :, None]).collapsed.any():
            text = "One expert has nearly all the weight whatever the image."
            found.append(Finding(f"{gate} has collapsed.", text))
    return found


def _distance(margin: float) -> str:
    points = f"{abs(100 * margin):.2f} points"
    return "level with" if points == "0.00 points" else f"{points} {'above' if margin > 0 else 'below'}"
