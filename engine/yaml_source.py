"""YAML text as trees of values that know the file and line they came from. Knows no config key by name."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from engine.errors import ConfigError


class Source(NamedTuple):
    """Where a value came from; line 0 means that there is no line to show."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


class Problem(NamedTuple):
    """One line for the user, with the place it is about."""

    source: Source
    message: str


@dataclass
class Node:
    """A value with its source: a dict of nodes, a list of nodes, or a scalar."""

    value: Any
    source: Source


# What a bare word is: (pattern, first characters, conversion), as in YAML 1.2: 1e-4 is a number, yes is text.
_SCALARS = {
    "null": (r"null|~|", ["n", "~", ""], lambda text: None),
    "bool": (r"true|false", ["t", "f"], lambda text: text == "true"),
    "int": (r"[-+]?[0-9]+", list("-+0123456789"), int),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789"), float),
}
DIGITS = 18  # of a whole number: all of them fit into 64 bits
_PREFIX = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {}

    def ignore_aliases(self, data):
        return True


for _kind, (_pattern, _first, _) in _SCALARS.items():
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(_PREFIX + _kind, re.compile(rf"(?:{_pattern})\Z"), _first)


def dump(value: Any, flow: bool = False) -> str:
    """YAML text that reads back as the same value; flow: on one line, without the line's end."""
    style = True if flow else None
    text = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=style, width=10**6, allow_unicode=True
    )
    return text.removesuffix("...\n").removesuffix("\n") if flow else text


def expand(text: str) -> str:
    """Replaces ${VAR:-default} and ${VAR}. Raises KeyError(VAR) for an unset variable without a default."""

    def value(match: re.Match) -> str:
        found = os.environ.get(match[1]) or match[2]
        if found is None:
            raise KeyError(match[1])
        return found

    return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}", value, text)


def parse(text: str, file: str, problems: list[Problem], numbered: bool = True) -> Node:
    """The one YAML document in text; what is wrong goes to problems. Raises ConfigError on broken syntax.

    numbered: False for text without lines of its own, such as a value on the command line.
    """
    reader = _Reader(file, problems, numbered)
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = reader.source(mark.line) if mark else Source(file)
        braces = mark and "${" in (text.splitlines() or [""])[min(mark.line, text.count("\n") - 1)]
        hint = '; inside {...} a "${VAR}" stands in quotes' if braces else ""
        raise ConfigError([f"{place}: not YAML: {error.problem or error.context}{hint}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{file}: not YAML: {' '.join(str(error).split())}"]) from None
    except RecursionError:
        raise ConfigError([f"{file}: lists and mappings are nested too deeply"]) from None
    return Node(None, reader.source(0)) if root is None else reader.node(root, root.start_mark.line, ())


@dataclass
class _Reader:
    """Turns PyYAML's nodes into ours. The entry of a mapping has the line of its key."""

    file: str
    problems: list[Problem] = field(default_factory=list)
    numbered: bool = True

    def source(self, line: int) -> Source:
        return Source(self.file, line + 1 if self.numbered else 0)

    def problem(self, line: int, message: str) -> None:
        self.problems.append(Problem(self.source(line), message))

    def node(self, node: yaml.Node, line: int, above: tuple) -> Node:
        if node in above:
            self.problem(line, "an alias that contains itself")
            return Node(None, self.source(line))
        if isinstance(node, yaml.MappingNode):
            value = self.mapping(node, (*above, node))
        elif isinstance(node, yaml.SequenceNode):
            value = [self.node(item, item.start_mark.line, (*above, node)) for item in node.value]
        else:
            value = self.scalar(node)
        return Node(value, self.source(line))

    def mapping(self, node: yaml.MappingNode, above: tuple) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        for key, value in node.value:
            line = key.start_mark.line
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                self.problem(line, "a key must be one word; to take over another file write _base_: FILE")
            elif key.value in entries:
                self.problem(line, f"{key.value}: given twice, first at {entries[key.value].source}")
            else:
                entries[key.value] = self.node(value, line, above)
        return entries

    def scalar(self, node: yaml.ScalarNode) -> Any:
        line, kind = node.start_mark.line, node.tag.removeprefix(_PREFIX)
        digits = len(node.value.lstrip("+-"))
        if kind == "int" and digits > DIGITS:
            told = f"{node.value[:DIGITS]}... has {digits} digits; allowed: {DIGITS}, or text in quotes"
            self.problem(line, told)
            return 1  # any number will do, so that the same mistake is not told twice
        if kind in _SCALARS and re.fullmatch(_SCALARS[kind][0], node.value):
            return _SCALARS[kind][2](node.value)
        if kind != "str":
            self.problem(line, f"the tag {node.tag} is not allowed here; write the bare value")
        try:
            return expand(node.value)
        except KeyError as unset:
            name = unset.args[0]
            self.problem(
                line, f"{node.value}: the variable {name} is not set; set it, or write ${{{name}:-default}}"
            )
            return name  # any text will do, so that the same mistake is not told twice


def from_plain(value: Any, source: Source) -> Node:
    """Nodes over plain values, all from one source."""
    if isinstance(value, Mapping):
        return Node({str(key): from_plain(item, source) for key, item in value.items()}, source)
    if isinstance(value, list | tuple):
        return Node([from_plain(item, source) for item in value], source)
    return Node(value, source)


def to_plain(node: Node) -> tuple[Any, dict[tuple, Source]]:
    """The plain value, and the source of every path in it."""
    sources: dict[tuple, Source] = {}

    def walk(node: Node, path: tuple) -> Any:
        sources[path] = node.source
        if isinstance(node.value, dict):
            return {key: walk(item, (*path, key)) for key, item in node.value.items()}
        if isinstance(node.value, list):
            return [walk(item, (*path, index)) for index, item in enumerate(node.value)]
        return node.value

    return walk(node, ()), sources
