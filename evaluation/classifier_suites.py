"""Suites of attacks on classifiers with a stated cost: quick, standard. `python -m evaluation.suites` prints them too.

Common members are the same for every network; through a hard router they go by its straight-through gradient, where
the network has one. Adaptive members know the router: they keep its clean route, force each pathway, change the route
first, or go for both at several weights. A single network beside mixtures gets restarts until it has taken as many
network passes as they have.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from engine.config import UserError
from evaluation.suites import Member, member
from evaluation.targets import Kind


@dataclass(frozen=True)
class Suite:
    """common, single: name -> attack; those of single networks with restarts. routed: name -> runs of an attack on E
    experts, each of `steps` steps."""

    steps: int
    common: dict[str, dict]
    single: dict[str, dict]
    routed: dict[str, str | int]


EACH = "each expert"  # as many runs as there are experts
STEPS_EACH = (
    "change_route",
)  # steps of a restart; those of other attacks on mixtures are of all restarts together

SUITES = {
    "quick": Suite(
        10,
        {"pgd ce": {"name": "pgd", "steps": 20}, "apgd dlr": {"name": "apgd", "loss": "dlr", "steps": 20}},
        {"apgd ce": {"name": "apgd", "steps": 20}},
        {"stay_route": 1, "each_path": EACH, "route_first": EACH, "change_route": 1},
    ),
    "standard": Suite(
        50,
        {
            "pgd ce": {"name": "pgd", "steps": 50},
            "apgd ce": {"name": "apgd", "steps": 50},
            "apgd dlr": {"name": "apgd", "loss": "dlr", "steps": 50},
        },
        {
            "apgd ce again": {"name": "apgd", "steps": 50},
            "apgd dlr again": {"name": "apgd", "loss": "dlr", "steps": 50},
        },
        {
            "stay_route": 1, "experts_only": 1, "each_path": EACH, "route_first": EACH, "joint": 3, "soft_gate": 1,
            "gate_only": 1, "change_route": 1,
        },
    ),
}  # fmt: skip
NAMES = ("none", *SUITES)


def classifier_members(
    suite: str, kind: Kind, num_experts: int = 1, active: int = 0, beside: int = 0, restarts: int = 1
) -> list[Member]:
    """The members of a suite for a kind of target, the common ones first; none for suite none.

    active: as in Target. beside: network passes of the whole suite of the mixtures that a single network stands
    beside, which it is to have as well, in more restarts. restarts: times that each attack begins, with all its steps.
    UserError for an unknown suite, and for ensembles."""
    if suite not in NAMES:
        raise UserError(f"suite: {suite!r} is unknown; allowed: {', '.join(NAMES)}")
    if suite == "none":
        return []
    if kind == "ensemble":
        raise UserError(
            f"suite: {suite} has no members for ensembles of classifiers; attack their networks one by one, or with "
            "attacks: and suite: none"
        )
    own = SUITES[suite]
    common = [
        member(name, {**one, "restarts": restarts}, "common", kind, num_experts, active=active)
        for name, one in own.common.items()
    ]
    if kind == "single":
        once = [member(name, one, "adaptive", kind, 1) for name, one in own.single.items()]
        restarts = max(restarts, -(-(beside - passes_of(common)) // passes_of(once)))
        found = [
            member(name, {**one, "restarts": restarts}, "adaptive", kind, 1)
            for name, one in own.single.items()
        ]
        known = [
            one.about["attack"] for one in common
        ]  # begun as often, some of these would be the same again
        return common + [one for one in found if one.about["attack"] not in known]
    routed = {name: own.steps * runs_of(runs, num_experts) for name, runs in own.routed.items()}
    return common + [
        member(
            name,
            {"name": name, "steps": steps * (1 if name in STEPS_EACH else restarts), "restarts": restarts},
            "adaptive", kind, num_experts, active=active,
        )
        for name, steps in routed.items()
    ]  # fmt: skip


def passes_of(members: Iterable[Member]) -> int:
    """Network passes of all of them together."""
    return sum(one.network_passes for one in members)


def runs_of(runs: str | int, num_experts: int) -> int:
    return num_experts if runs == EACH else int(runs)


def shown() -> dict[str, dict[str, list[Member]]]:
    """suite -> (kind of network -> members), for the tables that are printed."""
    found = {}
    for suite in SUITES:
        hard = classifier_members(suite, "hard", 2, active=1)
        whole = passes_of(hard)
        found[suite] = {
            "single": classifier_members(suite, "single"),
            "single beside E 2": classifier_members(suite, "single", beside=whole),
            "E 2": hard,
            "E 5": classifier_members(suite, "hard", 5, active=1),
        }
    return found
