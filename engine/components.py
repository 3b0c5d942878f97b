"""Named components: a "module:object" bound to YAML keys by its signature, read without importing it."""

import ast
import importlib
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from textwrap import wrap
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import core_schema

from engine.errors import ConfigError, Mistake, Mistakes, closest, no_choice, unknown, wrong
from engine.values import ANNOTATIONS
from engine.yaml_source import expand


@dataclass(frozen=True)
class Component:
    """A named object of a table with its checked arguments, defaults filled in.

    table: "module:TABLE"; key: the YAML key that holds the name ("name" or "type").
    """

    table: str
    key: str
    name: str
    args: dict[str, Any] = field(default_factory=dict)

    def build(self, *args, **kwargs) -> Any:
        """Imports the object and calls it: positional arguments of the program, then those of the YAML."""
        module, name = table_of(self.table)[self.name].split(":")
        return getattr(importlib.import_module(module), name)(*args, **self.args, **kwargs)

    def plain(self) -> dict[str, Any]:
        """Plain values that give this component again."""
        return {self.key: self.name, **as_plain(self.args)}


def as_plain(value: Any) -> Any:
    """Sections and components as mappings, tuples as lists, at any depth: what YAML and JSON can hold."""
    if hasattr(value, "plain"):
        return value.plain()
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return value


@dataclass(frozen=True)
class Named:
    """Makes a pydantic field a component of a table: Annotated[Component, Named("networks:NETWORKS")].

    bare: the YAML holds the name alone, without arguments.
    """

    table: str
    key: str = "name"
    bare: bool = False

    def __get_pydantic_core_schema__(self, source, handler):
        return core_schema.no_info_plain_validator_function(self.validate)

    def validate(self, value: Any) -> Component:
        if isinstance(value, Component):
            return value
        names = table_of(self.table)
        if self.bare:
            if value not in list(names):
                raise Mistakes(no_choice(value, names))
            value = {self.key: value}
        if not isinstance(value, dict):
            raise Mistakes(wrong(value, f"a mapping such as {{{self.key}: {next(iter(names))}}}"))
        return bind(self.table, self.key, value)


def component(table: str, name: str, /, *, key: str = "name", **args) -> Component:
    """A component from the program. Raises ConfigError for what a YAML would be refused for."""
    try:
        return bind(table, key, {key: name, **args})
    except Mistakes as error:
        raise ConfigError([f"{name}: {mistake}" for mistake in error.mistakes]) from None


def table_of(table: str) -> dict[str, str]:
    """The dict that "module:TABLE" names. Tables live in modules that import nothing."""
    module, name = table.split(":")
    return getattr(importlib.import_module(module), name)


def bind(table: str, key: str, mapping: dict[str, Any], fixed: Iterable[str] = ()) -> Component:
    """Checks the name and the arguments of a component. Raises Mistakes with all that is wrong.

    fixed: keys of the same mapping that are no arguments, told among those that are allowed.
    """
    names = table_of(table)
    name = mapping.get(key)
    if name not in list(names):
        raise Mistakes(_wrong_name(key, mapping, names))
    signature = signature_of(names[name])
    allowed = [key, *signature.types, *fixed]
    mistakes = [
        unknown(other, allowed, f"unknown key of {name}") for other in mapping if other not in allowed
    ]
    # A misspelt argument is told once, not again as a missing one.
    meant = {mistake.meant for mistake in mistakes}
    values = {}
    for argument, adapter in signature.types.items():
        if argument not in mapping and argument not in signature.defaults:
            if argument not in meant:
                mistakes.append(Mistake((argument,), f"missing; {name} needs it", kind="missing"))
            continue
        default = signature.defaults.get(argument)
        value = mapping.get(argument, expand(default) if isinstance(default, str) else default)
        try:
            values[argument] = adapter.validate_python(value)
        except ValidationError as error:
            mistakes += mistakes_of(error, (argument,))
    if mistakes:
        raise Mistakes(*mistakes)
    return Component(table, key, name, values)


def _wrong_name(key: str, mapping: dict[str, Any], names: dict[str, str]) -> Mistake:
    if key in mapping:
        return no_choice(mapping[key], names).under((key,))
    misspelt = closest(key, mapping) or next((other for other in ("name", "type") if other in mapping), None)
    if misspelt:
        return Mistake((misspelt,), f"unknown key; allowed: {key}", key, "unknown")
    return Mistake((key,), f"missing; allowed: {', '.join(names)}", kind="missing")


def mistakes_of(
    error: ValidationError, above: tuple = (), fields: dict[str, str] | None = None
) -> list[Mistake]:
    """Pydantic's errors in our words; those that carry our own mistakes are unpacked.

    fields: the keys of the section (name -> description), for missing and unknown ones.
    """
    found: list[Mistake] = []
    for detail in error.errors():
        path = (*above, *(key for key in detail["loc"] if key != "[key]"))
        value, kind, context = detail["input"], detail["type"], detail.get("ctx", {})
        if kind == "default_factory_not_called":
            continue  # what it depends on is wrong, and told of
        if isinstance(context.get("error"), Mistakes):
            found += [mistake.under(path) for mistake in context["error"].mistakes]
        elif kind == "missing" and isinstance(path[-1], int):
            found.append(wrong(value, "more entries").under(path[:-1]))
        elif kind == "missing":
            found.append(Mistake(path, f"missing; {fields[path[-1]]}", kind="missing"))
        elif kind == "extra_forbidden":
            found.append(unknown(path[-1], fields).under(path[:-1]))
        elif kind == "literal_error":
            choices = [
                text or number for text, number in re.findall(r"'([^']*)'|(-?\d+)", context["expected"])
            ]
            found.append(no_choice(value, choices).under(path))
        else:
            expected = _EXPECTED[kind].format(**context) if kind in _EXPECTED else detail["msg"]
            found.append(wrong(value, expected).under(path))
    return found


_EXPECTED = {
    "list_type": "a list such as [a, b]",
    "tuple_type": "a list such as [1, 2]",
    "dict_type": "a mapping such as {{key: value}}",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
}


@dataclass(frozen=True)
class Signature:
    """Keyword-only parameters (name -> type), the defaults of those that have one, and the docstrings."""

    types: dict[str, TypeAdapter]
    defaults: dict[str, Any]
    docstring: str


@cache
def signature_of(spec: str) -> Signature:
    """The keyword-only parameters of "module:object", read by ast.

    Raises TypeError for what no config can check: an annotation beyond values.ANNOTATIONS, a default that is
    no literal, an object that isn't there.
    """
    module, name = spec.split(":")
    tree = _source(module)
    if tree is None:
        raise TypeError(f"{spec}: there is no module {module}")
    objects = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    if name not in objects:
        raise TypeError(f"{spec}: {module} defines no function or class {name}")
    function, docstring = _function(objects, name)
    aliases = _aliases(module)
    parameters = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True) if function else ()
    types, defaults = {}, {}
    for parameter, default in parameters:
        try:
            types[parameter.arg] = TypeAdapter(_type(parameter.annotation, aliases))
            if default is not None:
                defaults[parameter.arg] = ast.literal_eval(default)
        except (NameError, TypeError, ValueError, AttributeError) as error:
            raise TypeError(
                f"{spec}: no YAML key can be made of parameter {parameter.arg}: {error}"
            ) from None
    return Signature(types, defaults, docstring)


def _function(objects: dict[str, ast.AST], name: str) -> tuple[ast.FunctionDef | None, str]:
    """The function, or the __init__ of the class or of its bases in the same module, and the docstrings."""
    found = objects.get(name)
    if not isinstance(found, ast.ClassDef):
        return found, (ast.get_docstring(found) or "") if found else ""
    text = ast.get_docstring(found) or ""
    for node in found.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return node, f"{text}\n{ast.get_docstring(node) or ''}"
    for base in found.bases:
        function, inherited = _function(objects, ast.unparse(base))
        if function is not None:
            return function, f"{text}\n{inherited}"
    return None, text


@cache
def _source(module: str) -> ast.Module | None:
    """The syntax tree of a module, which is not imported; None where there is no such file."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        return None
    return ast.parse(Path(found.origin).read_text(encoding="utf-8"))


@cache
def _aliases(module: str) -> dict[str, ast.expr]:
    """Names for choices, `Name = Literal[...]`, of a module and of those of its package that it takes them from."""
    found = {}
    for node in _source(module).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == module.split(".")[0]:
            theirs = _aliases(node.module) if _source(node.module) else {}
            found |= {one.asname or one.name: theirs[one.name] for one in node.names if one.name in theirs}
        elif isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Literal["):
            found[ast.unparse(node.targets[0])] = node.value
    return found


def _type(annotation: ast.expr | None, aliases: Mapping[str, ast.expr]) -> Any:
    """The type of an annotation; its names mean what ANNOTATIONS and the aliases say, the module is not imported."""
    if annotation is None:
        raise TypeError("it has no annotation")
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    code = compile(ast.Expression(annotation), "annotation", "eval")
    named = {name: _type(value, {}) for name, value in aliases.items()}
    return eval(code, {"__builtins__": {}}, {**ANNOTATIONS, **named})


def listing(names: dict[str, str]) -> list[str]:
    """What a table holds, as lines: names with the first line of their docstring, and each YAML key with its default
    and description."""
    lines = []
    for name, spec in names.items():
        signature = signature_of(spec)
        lines.append(f"  {name:<16} {signature.docstring.splitlines()[0]}")
        for key in signature.types:
            default = f" = {json.dumps(signature.defaults[key])}" if key in signature.defaults else ""
            text = description(signature.docstring, key)
            lines += wrap(text, 110, initial_indent=f"      {key + default:<26} ", subsequent_indent=" " * 33)
    return lines


def description(docstring: str, key: str) -> str:
    """What the docstring's Args say about a key, in one line."""
    found = re.search(rf"^( *){key}: (.*(?:\n\1 {{4}}.*)*)", docstring, re.MULTILINE)
    return " ".join(found[2].split()) if found else ""
