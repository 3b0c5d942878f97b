"""An evaluation config as networks that run and rows that read what they said."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product

from dataloaders.frames import FrameIndex
from engine.config import Component, Evaluation, Run, UserError, from_dict
from engine.errors import collected
from evaluation.rows import (
    Row,
    constant_row,
    ensemble_row,
    gate_row,
    network_row,
    random_gate_row,
    simplex,
    subset_routing_row,
)
from evaluation.tables import Cost
from networks.complexity import gmacs
from networks.ensemble import mean
from networks.moe import ExpertOutputs
from pipelines.models import (
    Trained,
    load_gate,
    load_network,
    require_classes,
    require_home,
    tell_other_frames,
)

RANDOM_GATE_SEED = 0
CONSTANT, TRUE_SUBSET, RANDOM = "constant weights", "true subset", "random weights"
BASELINES_MEAN = "mean of baselines"


def subsets_of(config: Evaluation) -> list[str]:
    """Subsets that are evaluated: those asked for; else those of the data, and all of them together."""
    own = config.data.subsets
    return config.evaluate.subsets or [*own, *(["all"] if len(own) > 1 else [])]


@dataclass(frozen=True)
class Zoo:
    """The trained networks of an evaluation. `networks` run, once per image; the rest names them.

    `gates`: row -> (mixture, names of its experts among the networks, in the gate's own order)."""

    networks: dict[str, Trained]
    baselines: tuple[str, ...]
    experts: tuple[str, ...]
    ensembles: dict[str, object] = field(default_factory=dict)
    gates: dict[str, tuple[Trained, tuple[str, ...]]] = field(default_factory=dict)

    @cached_property
    def learned_gates(self) -> tuple[str, ...]:
        """Gates that route; one of type uniform is a control that only trains a convolution."""
        return tuple(
            name for name, (trained, _) in self.gates.items() if trained.metadata["gate"]["type"] != "uniform"
        )

    @cached_property
    def decoders(self) -> tuple[str, ...]:
        """Experts that came with a mixture, in one run: they have rows beside it."""
        return tuple(
            name for trained, experts in self.gates.values() if is_whole(trained) for name in experts
        )

    def rows(self, controls: bool, constant: Sequence[float] | None = None) -> list[Row]:
        """All rows but ceilings and floor; constant: the weights that were picked on the validation split."""
        rows = [network_row(name, "baseline", name, self.home(name)) for name in self.baselines]
        rows += [
            network_row(name, "expert", name, self.home(name)) for name in (*self.experts, *self.decoders)
        ]
        rows += [
            ensemble_row(f"ensemble {name}", self.experts, combine)
            for name, combine in self.ensembles.items()
        ]
        rows += [self.gate_row(name) for name in self.learned_gates]
        return rows + self.control_rows(constant) if controls else rows

    @cached_property
    def paper_rows(self) -> list[str]:
        """The rows of the published table that are here, in its order: baseline, experts, ensembles mean and max,
        gates simple and class-wise, each without and with a convolution."""
        rows = [*self.baselines[:1], *self.experts]
        rows += [f"ensemble {name}" for name in ("mean", "max") if name in self.ensembles]
        settings = {
            name: trained.metadata["gate"]
            for name, (trained, _) in self.gates.items()
            if not is_whole(trained)
        }
        for kind in product(("simple", "classwise"), (False, True)):
            rows += [name for name, gate in settings.items() if (gate["type"], gate["conv"]) == kind][:1]
        return rows

    def gate_row(self, name: str) -> Row:
        trained, experts = self.gates[name]
        mixture = trained.network
        kind = "gate" if name in self.learned_gates else "control"
        full_size = mixture.conv_at == "full"

        def mix(*outputs):
            return (mixture.combine if full_size else mixture.mix)(ExpertOutputs(*outputs))

        def dead(*outputs):
            return mixture.gate.dead_share(mixture.gate_inputs(ExpertOutputs(*outputs)))

        return gate_row(name, experts, mix, kind, full_size, dead)

    def control_rows(self, constant: Sequence[float] | None) -> list[Row]:
        """What a gate has to beat: rows that know less, or that know the subset, or have the same convolution."""
        rows = [self.gate_row(name) for name in self.gates if name not in self.learned_gates]
        if len(self.baselines) > 1:
            rows.append(ensemble_row(BASELINES_MEAN, self.baselines, mean, "control"))
        if len(self.experts) > 1:
            rows.append(subset_routing_row(TRUE_SUBSET, self.experts))
            rows.append(random_gate_row(RANDOM, self.experts, RANDOM_GATE_SEED))
            if constant is not None:
                rows.append(constant_row(CONSTANT, self.experts, constant))
        return rows

    def home(self, name: str) -> list[str]:
        return self.networks[name].metadata["subsets"]

    def costs(self, rows: Sequence[Row], size: tuple[int, int]) -> dict[str, Cost]:
        """What each row costs: every network that it runs, and what was trained for it alone."""
        networks = {name: cost_of(trained, size) for name, trained in self.networks.items()}
        costs = {}
        for row in rows:
            if row.name in self.networks:
                costs[row.name] = networks[row.name]
            elif row.name in self.gates:
                trained, experts = self.gates[row.name]
                own = cost_of(trained, size)
                parts = [] if is_whole(trained) else [networks[name] for name in experts]
                costs[row.name] = Cost(
                    own.parameters,
                    own.trained_parameters,
                    own.gmacs,
                    total(part.images_seen for part in (own, *parts)),
                    total(part.steps for part in (own, *parts)),
                )
            else:
                parts = [networks[name] for name in row.experts]
                costs[row.name] = Cost(
                    sum(part.parameters for part in parts),
                    0,
                    sum(part.gmacs for part in parts),
                    total(part.images_seen for part in parts),
                    total(part.steps for part in parts),
                )
        return costs


def is_whole(trained: Trained) -> bool:
    """Whether a mixture was trained in one run with its experts."""
    return "shared_encoder" in trained.metadata


def total(counts: Iterable[int | None]) -> int | None:
    """The sum, None where one of them is not known."""
    counts = list(counts)
    return None if None in counts else sum(counts)


def cost_of(trained: Trained, size: tuple[int, int]) -> Cost:
    about = trained.metadata
    budget = about["budget"]
    return Cost(
        about["parameters"],
        about["trained_parameters"],
        gmacs(trained.network, size),
        budget["images"],
        budget["steps"],
    )


def load_zoo(config: Evaluation, index: FrameIndex) -> Zoo:
    """Loads every run that the config names. Experts of its gates that it doesn't name run without a row; the
    decoders of a shared encoder are experts GATE:SUBSET with a row each.

    Raises UserError for what isn't trained, is damaged, has other classes, or isn't the gate's expert, and where an
    expert of a gate is another network than the config's of that name."""

    def network(group: str, name: str, source: str | Component) -> Trained:
        trained = load_network(source, f"{group}.{name}", index.classes)
        require_classes(trained, index.classes, f"{group}.{name}", f"of data {index.name}")
        if group == "experts":
            require_home(trained, name, index)
        tell_other_frames(trained, f"{group}.{name}", config.data)
        return trained

    def gate(name: str, path: str) -> tuple[Trained, tuple[str, ...]]:
        trained, experts = load_gate(path, f"gates.{name}", networks)
        require_classes(trained, index.classes, f"gates.{name}", f"of data {index.name}")
        if not is_whole(trained):
            require_experts(f"gates.{name}", experts, {role: networks[role] for role in config.experts})
        return trained, tuple(
            name_among(networks, expert, f"{name}:{role}") for role, expert in experts.items()
        )

    runs = {"baselines": config.baselines, "experts": config.experts}
    networks = collected(
        {
            name: partial(network, group, name, source)
            for group in runs
            for name, source in runs[group].items()
        }
    )
    gates = collected({name: partial(gate, name, path) for name, path in config.gates.items()})
    ensembles = {rule.name: rule.build for rule in config.ensembles}
    return Zoo(networks, tuple(config.baselines), tuple(config.experts), ensembles, gates)


def require_experts(key: str, own: Mapping[str, Trained], named: Mapping[str, Trained]) -> None:
    """UserError where an expert of a gate has the name of one of the config's and is another network: ensembles,
    ceilings and differences beside the gate would be of experts that it doesn't weigh."""
    for role, expert in own.items():
        if role in named and named[role].sha256 != expert.sha256:
            raise UserError(
                f"{key}: its expert {role} is {expert.file}, experts.{role} is {named[role].file}, another network; "
                "name the gate's own, or give the other one another name"
            )


def name_among(networks: dict[str, Trained], trained: Trained, otherwise: str) -> str:
    """The name of the network with these tensors; one that isn't there is added."""
    for name, known in networks.items():
        if known.sha256 == trained.sha256:
            return name
    networks[otherwise] = trained
    return otherwise


def constant_candidates(zoo: Zoo) -> dict[str, tuple[float, ...]]:
    """Row name -> constant weights to choose from; at most a few hundred, whatever the number of experts."""
    steps = {2: 20, 3: 10}.get(len(zoo.experts), 4)
    return {f"constant {weights}": weights for weights in simplex(len(zoo.experts), steps)}


def as_evaluation(config: Run) -> Evaluation:
    """The evaluation of one run: the network alone, or a gate or ensemble beside its experts."""
    folder, row = f"{config.output}/{config.name}", config.name.split("/")[-1]
    whole = config.resolved()
    experts = whole["experts"]
    models: Mapping
    if config.gate:
        models = {"experts": experts, "gates": {row: folder}}
    elif config.gates:
        models = {"experts": experts, "gates": {name: f"{folder}/{name}" for name in config.gates}}
    elif config.ensemble:
        models = {"experts": experts, "ensembles": [config.ensemble.name]}
    elif config.network.name == "external" and config.train is None:
        models = {"baselines": {row: config.network.plain()}}
    else:
        alone = len(config.data.subsets) == 1 and config.data.subsets != ["all"]
        models = {"experts" if alone else "baselines": {row: folder}}
    shared = {key: whole[key] for key in ("name", "output", "data", "evaluate")}
    if "eps" not in config.evaluate.model_fields_set:
        del shared["evaluate"]["eps"]  # what stands for it depends on the networks
    return from_dict({**shared, **models}, "evaluation", origin=config.name)
