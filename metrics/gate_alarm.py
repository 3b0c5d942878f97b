"""The alarm of a gate that gives nearly all of its weight to one expert, whatever it sees."""

from collections.abc import Sequence

import numpy as np

from metrics.gate import COLLAPSE, GateStatistics


def collapse_warning(
    gate: str, statistics: GateStatistics, experts: Sequence[str], classes: Sequence[str]
) -> str:
    """One sentence that names the gate, the expert and, with a weight for each class, the classes; "" of a
    gate that has not collapsed. experts: names of E; classes: names of all classes."""
    found = np.flatnonzero(statistics.collapsed)
    chosen = statistics.mean.argmax(axis=0)  # [K]
    share = f"more than {100 * COLLAPSE:.0f} % of the weight over {statistics.images} images"
    if not len(found):
        return ""
    if len(chosen) == 1:
        return f"gate {gate} has collapsed: {share} goes to expert {experts[chosen[0]]}"
    parts = [
        f"to expert {experts[expert]} for {', '.join(classes[k] for k in found if chosen[k] == expert)}"
        for expert in np.unique(chosen[found])
    ]
    return (
        f"gate {gate} has collapsed in {len(found)} of {len(chosen)} classes: {share} goes {'; '.join(parts)}"
    )
