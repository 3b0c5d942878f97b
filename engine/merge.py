"""One tree from a YAML file, the files it starts from (`_base_`), and overrides `a.b=c`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, UserError, closest
from engine.yaml_source import Node, Problem, Source, from_plain, parse


@dataclass(frozen=True)
class MergeRules:
    """What a merge must know of the schema. Paths are tuples of keys, "*" stands for any key.

    components: path -> (key of the name, keys that are no arguments). Another name drops the arguments.
    replaced: mappings that replace the base's as a whole, as lists do.
    dotted: mappings whose keys are dotted paths themselves.
    """

    components: Mapping[tuple, tuple[str, frozenset]] = field(default_factory=dict)
    replaced: Sequence[tuple] = ()
    dotted: Sequence[tuple] = ()


def read(path: str | Path, rules: MergeRules, problems: list[Problem], above: tuple[str, ...] = ()) -> Node:
    """The tree of a file, merged over the files that its `_base_` names (later ones win, itself last).

    Raises UserError for a file that can't be read, ConfigError for broken syntax and for a circle of bases.
    """
    path = os.path.normpath(path)
    if os.path.realpath(path) in map(os.path.realpath, above):
        raise ConfigError([f"{above[-1]}: _base_: goes in a circle: {' -> '.join((*above, path))}"])
    tree = parse(_text(path, above), path, problems)
    if not isinstance(tree.value, dict):
        raise ConfigError([f"{path}: expected a mapping of keys to values, found {_kind(tree.value)}"])
    base = tree.value.pop("_base_", None)
    if base is None:
        return tree
    names = [item.value for item in base.value] if isinstance(base.value, list) else [base.value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError([f"{base.source}: _base_: expected a file name or a list of file names"])
    merged = Node({}, tree.source)
    for name in names:
        below = os.path.join(os.path.dirname(path), name)
        merged = merge(merged, read(below, rules, problems, (*above, path)), rules)
    return merge(merged, tree, rules)


def _text(path: str, above: tuple[str, ...]) -> str:
    named = f"{above[-1]}: _base_: " if above else ""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{named}{path}: not a text file in UTF-8") from None
    except OSError as error:
        folder = Path(path).parent
        files = [file.name for file in folder.glob("*.yaml")] if not Path(path).exists() else []
        near = closest(Path(path).name, files)
        hint = f"; did you mean '{folder / near}'?" if near else ""
        raise UserError(f"{named}{path}: {error.strerror}{hint}") from None


def _kind(value: Any) -> str:
    return "nothing" if value is None else "a list" if isinstance(value, list) else f"only {value!r}"


def _matches(path: tuple, patterns: Sequence[tuple]) -> bool:
    return any(
        len(path) == len(pattern) and all(mine in (key, "*") for key, mine in zip(path, pattern, strict=True))
        for pattern in patterns
    )


def merge(base: Node, top: Node, rules: MergeRules, path: tuple = ()) -> Node:
    """Top over base: mappings key by key, everything else replaced."""
    if not (isinstance(base.value, dict) and isinstance(top.value, dict)) or _matches(path, rules.replaced):
        return top
    entries = dict(base.value)
    name, fixed = rules.components.get(path, ("", frozenset()))
    if name in base.value and name in top.value and base.value[name].value != top.value[name].value:
        entries = {key: node for key, node in entries.items() if key in fixed}
    for key, node in top.value.items():
        entries[key] = merge(entries[key], node, rules, (*path, key)) if key in entries else node
    return Node(entries, top.source)


def override(
    tree: Node,
    overrides: Sequence[str] | Mapping[str, Any],
    rules: MergeRules,
    origin: str,
    problems: list[Problem],
) -> None:
    """Sets `a.b=c` (or {"a.b": value}) in the tree, in order; a mapping replaces what was there."""
    for item in overrides.items() if isinstance(overrides, Mapping) else overrides:
        try:
            key, node = _assignment(item, origin, problems)
            _set(tree, tuple(key.split(".")), node, rules)
        except ConfigError as error:
            problems.append(Problem(Source(origin), error.lines[0].removeprefix(f"{origin}: ")))


def _assignment(item: str | tuple[str, Any], origin: str, problems: list[Problem]) -> tuple[str, Node]:
    if not isinstance(item, str):
        return item[0], from_plain(item[1], Source(origin))
    key, equals, text = item.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError([f"{item}: expected KEY=VALUE such as train.epochs=3"])
    found: list[Problem] = []
    try:
        node = parse(text, origin, found, numbered=False)
    except ConfigError as error:
        raise ConfigError([f"{key}: {error.lines[0].removeprefix(f'{origin}: ')}"]) from None
    problems += [problem._replace(message=f"{key}: {problem.message}") for problem in found]
    return key, node


def _set(tree: Node, keys: tuple[str, ...], node: Node, rules: MergeRules, path: tuple = ()) -> None:
    """Raises ConfigError where the path leads through a value that has no such entry."""
    entries, key = tree.value, keys[0]
    if _matches(path, rules.dotted):
        key, keys = ".".join(keys), (".".join(keys),)
    if isinstance(entries, list) and key.isdigit() and int(key) < len(entries):
        entry: str | int = int(key)
    elif isinstance(entries, dict):
        entry = key
    else:
        whole, place = ".".join(map(str, (*path, *keys))), ".".join(map(str, path))
        raise ConfigError([f"{whole}: {place} ({tree.source}) has no entry '{key}' to set"])
    if len(keys) > 1:
        if isinstance(entries, dict) and (entry not in entries or entries[entry].value is None):
            entries[entry] = Node({}, node.source)
        return _set(entries[entry], keys[1:], node, rules, (*path, entry))
    name, fixed = rules.components.get(path, ("", frozenset()))
    if entry == name and name in entries and entries[name].value != node.value:
        # Arguments of the old component go, those that the overrides themselves gave to the new one stay.
        for other in [key for key in entries if key not in fixed and entries[key].source != node.source]:
            del entries[other]
    entries[entry] = node
