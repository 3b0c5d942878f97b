"""Suites of attacks with a stated cost: quick, standard, sea. `python -m evaluation.suites` prints what each costs.

Common members are the same for every network. Adaptive ones know what they attack: the gate of a mixture, the
members of an ensemble. A single network beside mixtures of E gets restarts until its attacks have taken as many steps,
counted in networks, as theirs: a step on a mixture runs E of them, forward and back, in the common members too.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from engine.checkpoints import file_sha256
from engine.command import run
from engine.config import Component, UserError, component
from engine.errors import no_choice
from evaluation.formats import aligned, number
from evaluation.stand_ins import CLASSES, Norm, count_passes, module_of
from evaluation.targets import Kind

TABLE = "attacks:ATTACKS"
# module of attacks that know what they attack -> what they are for, and the kinds of targets that are that
MADE_FOR: dict[str, tuple[str, tuple[Kind, ...]]] = {
    "attacks.routed": ("routed models", ("soft", "hard")),
    "attacks.change_route": ("routed models", ("soft", "hard")),
    "attacks.ensembles": ("ensembles", ("ensemble",)),
}
ALL: tuple[str, tuple[Kind, ...]] = ("all models", get_args(Kind))
FEW = 4  # networks that the adaptive steps below are enough for; more networks get more steps

# name -> attack; the steps of adaptive members are those of all their runs together
COMMON: dict[str, dict[str, dict]] = {
    "quick": {
        "pgd masked_ce": {"name": "pgd", "loss": "masked_ce", "steps": 20},
        "cospgd": {"name": "cospgd", "steps": 20},
    },
    "standard": {
        "apgd masked_ce": {"name": "apgd", "loss": "masked_ce", "steps": 100},
        "apgd balanced_masked_ce": {"name": "apgd", "loss": "balanced_masked_ce", "steps": 100},
        "apgd jensen_shannon": {"name": "apgd", "loss": "jensen_shannon", "steps": 100},
    },
    "sea": {
        "sea masked_ce": {"name": "apgd", "loss": "masked_ce", "steps": 300, "schedule": "red_eps"},
        "sea balanced_masked_ce": {
            "name": "apgd", "loss": "balanced_masked_ce", "steps": 300, "schedule": "red_eps",
        },
        "sea jensen_shannon": {"name": "apgd", "loss": "jensen_shannon", "steps": 300, "schedule": "red_eps"},
    },
}  # fmt: skip
# steps of those that know the gate, and of those that know the networks of an ensemble
ON_GATES: dict[str, dict[str, int]] = {
    "quick": {"soft_gate": 10, "route_first": 10},
    "standard": {
        "soft_gate": 20, "route_first": 20, "joint": 20, "stay_route": 10, "weakest_expert": 10,
        "all_to_one_wrong": 10, "gate_only": 5, "experts_only": 5,
    },
    "sea": {
        "soft_gate": 40, "route_first": 40, "joint": 40, "stay_route": 20, "weakest_expert": 20,
        "all_to_one_wrong": 20, "gate_only": 10, "experts_only": 10,
    },
}  # fmt: skip
ON_MEMBERS: dict[str, dict[str, int]] = {
    "quick": {"member_sum": 10, "each_member": 10},
    "standard": {
        "member_sum": 20, "mean_of_probabilities": 20, "each_member": 20, "members_to_one_wrong": 20,
        "smooth_ensemble vote": 10, "smooth_ensemble max": 10,
    },
    "sea": {
        "member_sum": 40, "mean_of_probabilities": 40, "each_member": 40, "members_to_one_wrong": 40,
        "smooth_ensemble vote": 20, "smooth_ensemble max": 20,
    },
}  # fmt: skip
SINGLE: dict[str, dict[str, dict]] = {  # each with as many restarts as parity asks for
    "quick": {"pgd segpgd": {"name": "pgd", "loss": "segpgd", "steps": 20}},
    "standard": {
        "apgd cospgd": {"name": "apgd", "loss": "cospgd", "steps": 50},
        "apgd segpgd": {"name": "apgd", "loss": "segpgd", "steps": 50},
    },
    "sea": {
        "apgd cospgd": {"name": "apgd", "loss": "cospgd", "steps": 100},
        "apgd segpgd": {"name": "apgd", "loss": "segpgd", "steps": 100},
    },
}
SUITES = ("none", *COMMON)


@dataclass(frozen=True)
class Member:
    """An attack of a suite and what it costs an image at one eps, at most: it may end sooner where no pixel is
    left. forwards: passes; backwards: those of them that go back to the image as well; network_passes: networks that
    run in all of them together."""

    name: str
    attack: Component
    column: Literal["common", "adaptive"]
    forwards: int
    backwards: int
    network_passes: int

    @property
    def passes(self) -> int:
        """Passes per image: forward ones, most with a backward one."""
        return self.forwards

    @property
    def version(self) -> int:
        """VERSION of the attack's module: raised when the attack does something else; 1 where it has none."""
        return getattr(module_of(self.attack), "VERSION", 1)

    @property
    def about(self) -> dict:
        """Everything that its records depend on, as JSON holds it; a file by its contents as well."""
        file = self.attack.args.get("file")
        content = {} if file is None else {"sha256": file_sha256(file)}
        return {
            "name": self.name,
            "column": self.column,
            "attack": {**self.attack.plain(), **content},
            "version": self.version,
            "forwards": self.forwards,
            "backwards": self.backwards,
            "network_passes": self.network_passes,
        }


def members(suite: str, kind: Kind, num_experts: int, parity: int = 1) -> list[Member]:
    """The members of a suite for a kind of target, the common ones first; none for suite none.

    parity: E of the mixtures that a single network stands beside; with 1 each restarting member begins once.
    UserError for an unknown suite."""
    if suite not in SUITES:
        raise UserError(f"suite: {suite!r} is unknown; allowed: {', '.join(SUITES)}")
    if suite == "none":
        return []
    common = [member(name, one, "common", kind, num_experts) for name, one in COMMON[suite].items()]
    if kind == "single":
        first, own = (sum(one["steps"] for one in group[suite].values()) for group in (COMMON, SINGLE))
        whole = parity * (first + scale(parity) * own)  # steps of the mixtures, counted in networks
        restarts = -(-(whole - first) // own)
        own = {name: {**one, "restarts": restarts} for name, one in SINGLE[suite].items()}
    else:
        own = {}
        for name, steps in (ON_MEMBERS if kind == "ensemble" else ON_GATES)[suite].items():
            attack, _, rule = name.partition(" ")
            own[name] = {
                "name": attack,
                "steps": scale(num_experts) * steps,
                **({"rule": rule} if rule else {}),
            }
    return common + [member(name, one, "adaptive", kind, num_experts) for name, one in own.items()]


def extra_members(
    attacks: Sequence[Component],
    kind: Kind,
    num_experts: int,
    size: tuple[int, ...],
    num_classes: int,
    taken: Sequence[Member] = (),
    active: int = 0,
    norm: Norm = "linf",
) -> list[Member]:
    """Attacks of a config as further members: adaptive ones that are for a kind of target (see `attacks_for`), common
    ones else; `clean` is there anyway. A second one of a name has its settings in it. size: (height, width) of the
    images, or (channels, height, width); norm: of the threat, which one from a file has to be made for. UserError for
    an attack that the target has nothing for, and for a class that it hasn't."""
    found, names = [], [one.name for one in taken]
    for attack in attacks:
        if attack.name == "clean":
            continue
        settings = ", ".join(f"{key} {value}" for key, value in attack.args.items())
        name = attack.name if attack.name not in names else f"{attack.name} ({settings})"
        if name in names:
            raise UserError(f"evaluate.attacks: {name} stands there twice")
        names.append(name)
        whole = size if "file" in attack.args else None  # made for images of one size, and one norm
        ball = norm if whole else "linf"
        column = "common" if made_for(attack) == ALL else "adaptive"
        found.append(member(name, attack, column, kind, num_experts, whole, active, num_classes, ball))
    return found


def by_number(attacks: Iterable[Component], classes: Sequence[str], key: str) -> list[Component]:
    """The attacks with the number of the class that they name, as ledgers have it. UserError for a name that is none
    of the classes, naming the key of the config that it is from."""
    found = []
    for attack in attacks:
        named = attack.args.get("class_id")
        if isinstance(named, str):
            if named not in classes:
                raise UserError(f"{key}: {attack.name}: {no_choice(named, classes).under(('class_id',))}")
            attack = replace(attack, args={**attack.args, "class_id": list(classes).index(named)})
        found.append(attack)
    return found


def made_for(attack: Component) -> tuple[str, tuple[Kind, ...]]:
    """What an attack is for in words, and the kinds of targets that are that."""
    return MADE_FOR.get(module_of(attack).__name__, ALL)


def refuse_for_label_maps(attacks: Iterable[Component], key: str) -> None:
    """UserError for an attack that is for classifiers alone, naming the key of the config that it is from."""
    for attack in attacks:
        if getattr(module_of(attack), "FOR_CLASSIFIERS", False):
            raise UserError(f"{key}: {attack.name} is for classifiers; label maps have apgd and square")


def refuse_for_classifiers(attacks: Iterable[Component], key: str) -> None:
    """UserError for an attack that is for label maps alone."""
    for attack in attacks:
        if getattr(module_of(attack), "FOR_LABEL_MAPS", False):
            raise UserError(f"{key}: {attack.name} is for label maps, and these are classifiers")


def attacks_for(attacks: Sequence[Component], kinds: Mapping[str, Kind]) -> dict[str, list[Component]]:
    """The attacks of a config that each target takes; kinds: of the targets, by their names. UserError for an attack
    that none of them takes."""
    for attack in attacks:
        words, own = made_for(attack)
        if not set(own) & set(kinds.values()):
            raise UserError(
                f"evaluate.attacks: {attack.name} is for {words}, and none of {', '.join(kinds)} is one"
            )
    return {name: [one for one in attacks if kind in made_for(one)[1]] for name, kind in kinds.items()}


def needs_class_weights(one: Member) -> bool:
    """Whether it can't run without the class pixels of its target."""
    return one.attack.args.get("loss") == "balanced_masked_ce"


def scale(num_experts: int) -> int:
    """Times the adaptive steps of FEW networks that E networks get: runs for each expert share them."""
    return -(-num_experts // FEW)


def member(
    name: str,
    attack: Component | Mapping,
    column: str,
    kind: Kind,
    num_experts: int,
    size: tuple[int, ...] | None = None,
    active: int = 0,
    num_classes: int = CLASSES,
    norm: Norm = "linf",
) -> Member:
    """A member with its cost, which is counted by running it on a stand-in; size of its image, where that matters."""
    if not isinstance(attack, Component):
        attack = component(TABLE, attack["name"], **{key: attack[key] for key in attack if key != "name"})
    passes = count_passes(attack, kind, num_experts, size, active, num_classes, norm)
    return Member(name, attack, column, *passes)


CLEAN = Member("clean", component(TABLE, "clean"), "common", 1, 0, 1)

# columns of the printed tables: title, kind, networks, parity
SHOWN = (
    ("single", "single", 1, 1),
    ("single beside 2", "single", 1, 2),
    ("soft 2", "soft", 2, 1),
    ("hard 2", "hard", 2, 1),
    ("ensemble 2", "ensemble", 2, 1),
)


def describe(suite: str) -> list[str]:
    """A table of the suite's members: what each does and how many passes it takes of each kind of target."""
    return table({title: members(suite, kind, experts, parity) for title, kind, experts, parity in SHOWN})


def table(kinds: Mapping[str, Sequence[Member]]) -> list[str]:
    """Lines of a table of the members of several kinds of targets."""
    rows = dict.fromkeys((one.name, one.column, effort(one)) for own in kinds.values() for one in own)
    lines = [["member", "column", "steps x restarts", *kinds]]
    for row in rows:
        passes = [
            [one.passes for one in own if (one.name, one.column, effort(one)) == row]
            for own in kinds.values()
        ]
        lines.append([*row, *(number(found[0]) if found else "-" for found in passes)])
    for column in ("common", "adaptive"):
        sums = [sum(one.passes for one in own if one.column == column) for own in kinds.values()]
        lines.append([f"passes, {column}", "", "", *map(number, sums)])
    whole = [sum(one.passes for one in own) for own in kinds.values()]
    lines.append(["passes", "", "", *map(number, whole)])
    backwards = [sum(one.backwards for one in own) for own in kinds.values()]
    lines.append(["of these with a backward pass", "", "", *map(number, backwards)])
    networks = [sum(one.network_passes for one in own) for own in kinds.values()]
    lines.append(["network passes", "", "", *map(number, networks)])
    return aligned(lines, left=3)


def effort(one: Member) -> str:
    """steps x restarts of a member; the steps of adaptive ones are those of all their runs together."""
    args = one.attack.args
    return f"{args.get('steps', one.backwards)} x {args.get('restarts', 1)}"


def main(argv: Sequence[str]) -> int:
    argparse.ArgumentParser(
        prog="python -m evaluation.suites",
        description="Prints every suite of attacks, what it does and what it costs. Takes no arguments.",
        allow_abbrev=False,
    ).parse_args(argv)
    print(
        "Passes per image at one eps. A pass is one forward pass, nearly always with a backward pass, through every\n"
        "network of the target. single: a network by itself, or beside mixtures and ensembles of 2 networks, where it\n"
        "gets restarts for as many steps, counted in networks; soft 2, hard 2: mixtures of 2 experts; ensemble 2: of 2."
    )
    for suite in COMMON:
        print("\n".join(["", suite, "", *describe(suite)]))
    from evaluation.classifier_suites import shown

    print(
        "\nClassifiers: a pass of a mixture with a hard router runs the one pathway that an image takes; attacks on\n"
        "pathways run further ones, as the network passes count. E 2, E 5: mixtures of so many pathways."
    )
    for suite, kinds in shown().items():
        print("\n".join(["", f"{suite} (classifiers)", "", *table(kinds)]))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
