"""YAML -> typed config, one of KINDS, every mistake told at once. Imports no heavy library."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError

from engine.classifier_schema import (
    Classification,
    ClassifierEvaluate,
    ClassifierEvaluation,
    ClassifierTrain,
    ImageData,
    RouterTraining,
)
from engine.components import Component, Named, component, listing, mistakes_of, signature_of, table_of
from engine.errors import ConfigError, Interrupted, Mistake, UserError, first_line
from engine.merge import MergeRules, override, read
from engine.schema import (
    Adversarial,
    Augment,
    Data,
    Evaluate,
    Evaluation,
    Gate,
    Pipeline,
    Run,
    Stage,
    Train,
    references,
)
from engine.sections import ComponentSection, Config, Section
from engine.values import (
    DEVICE_NAMES,
    IGNORE,
    ClassId,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Positives,
    Probability,
    Several,
    Share,
    Size,
)
from engine.yaml_source import Node, Problem, Source, dump, from_plain, to_plain

__all__ = [
    "DEVICE_NAMES",
    "IGNORE",
    "Adversarial",
    "Augment",
    "Classification",
    "ClassifierEvaluate",
    "ClassifierEvaluation",
    "ClassifierTrain",
    "ClassId",
    "Component",
    "Config",
    "ConfigError",
    "Data",
    "Evaluate",
    "Evaluation",
    "Gate",
    "ImageData",
    "Interrupted",
    "NonNegative",
    "NonNegativeInt",
    "Pipeline",
    "Positive",
    "Several",
    "Share",
    "PositiveInt",
    "Positives",
    "Probability",
    "RouterTraining",
    "Run",
    "Size",
    "Stage",
    "Train",
    "UserError",
    "component",
    "dump",
    "first_line",
    "from_dict",
    "listing",
    "load",
    "references",
    "signature_of",
    "table_of",
]

KINDS: dict[str, type[Config]] = {
    "run": Run,
    "evaluation": Evaluation,
    "pipeline": Pipeline,
    "classification": Classification,
    "classifier_evaluation": ClassifierEvaluation,
}


def load(
    path: str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    kind: str | None = None,
    origin: str = "command line",
) -> Config:
    """The config of a YAML file with overrides on top: ["a.b=c", ...] or {"a.b": value}; a mapping replaces.

    kind: a key of KINDS, told by the file's keys where None. origin: the source that is shown for overrides.
    Raises ConfigError with every mistake, UserError for a file that can't be read.
    """
    problems: list[Problem] = []
    tree = read(path, RULES, problems)
    override(tree, overrides, RULES, origin, problems)
    _anchor_stages(tree)
    return _validated(tree, kind, problems)


def from_dict(mapping: Mapping[str, Any], kind: str | None = None, origin: str = "stored config") -> Config:
    """The config of a resolved mapping, such as the one in a checkpoint; origin names it in messages."""
    return _validated(from_plain(mapping, Source(origin)), kind, [])


def _validated(tree: Node, kind: str | None, problems: list[Problem]) -> Any:
    plain, sources = to_plain(tree)
    config = None
    try:
        config = KINDS[kind or _kind(plain)].model_validate(plain)
    except ValidationError as error:
        problems = [*problems, *(_placed(mistake, sources) for mistake in mistakes_of(error))]
    if problems:
        ordered = sorted(problems, key=lambda problem: (not problem.source.line, problem.source))
        raise ConfigError([f"{problem.source}: {problem.message}" for problem in dict.fromkeys(ordered)])
    config._sources.update(sources)
    return config


def _kind(plain: dict) -> str:
    if "stages" in plain:
        return "pipeline"
    network = plain.get("network")
    if isinstance(network, dict) and str(network.get("name")) in table_of("networks:CLASSIFIERS"):
        return "classification"
    if isinstance(plain.get("train"), dict) and "method" in plain["train"]:
        return "classification"
    if "models" in plain:
        return "classifier_evaluation"
    if {"baselines", "ensembles"} & set(plain):
        return "evaluation"
    gates = plain.get("gates")  # trained ones, or null: run folders; to be trained: a section each
    to_train = isinstance(gates, dict) and any(isinstance(gate, dict) for gate in gates.values())
    return "run" if gates is None or to_train else "evaluation"


def _placed(mistake: Mistake, sources: dict[tuple, Source]) -> Problem:
    """With the line of its key, or of the section around it where the key is missing."""
    path = mistake.path
    while path not in sources:
        path = path[:-1]
    return Problem(sources[path], str(mistake))


def _anchor_stages(tree: Node) -> None:
    """Takes a stage's file from beside the file that names it; one of the command line stays as it is."""
    stages = tree.value.get("stages")
    for stage in stages.value.values() if stages and isinstance(stages.value, dict) else ():
        config = stage.value.get("config") if isinstance(stage.value, dict) else None
        if config and isinstance(config.value, str) and config.source.line:
            config.value = os.path.normpath(Path(config.source.file).parent / config.value)


def _component_paths(section: type[Section], above: tuple = ()) -> dict[tuple, tuple[str, frozenset]]:
    """Where named components stand: path -> (key of the name, keys that are no arguments)."""
    found: dict[tuple, tuple[str, frozenset]] = {}
    for name, field in section.model_fields.items():
        path, annotation = (*above, name), field.annotation
        for part in get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,):
            for mark in (*field.metadata, *get_args(part)):
                if isinstance(mark, Named):
                    found[path] = (mark.key, frozenset())
            if isinstance(part, type) and issubclass(part, ComponentSection):
                found[path] = (part.key, frozenset(part.fixed_keys()))
            elif isinstance(part, type) and issubclass(part, Section):
                found |= _component_paths(part, path)
    return found


def _all_component_paths(*sections: type[Section]) -> dict[tuple, tuple[str, frozenset]]:
    """Those of several roots; where a path is in more than one, the keys of all are no arguments."""
    found: dict[tuple, tuple[str, frozenset]] = {}
    for section in sections:
        for path, (key, fixed) in _component_paths(section).items():
            found[path] = key, fixed | found.get(path, (key, frozenset()))[1]
    return found


RULES = MergeRules(
    components=_all_component_paths(Run, Classification),
    # These name runs as a list would: a file that names its own experts does not want its base's as well.
    replaced=(("experts",), ("baselines",), ("gates",), ("models",)),
    dotted=(("set",), ("stages", "*", "set")),
)
