"""Sections of a config: pydantic models that tell all mistakes at once and turn back into plain values."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from engine.components import Component, as_plain, bind, mistakes_of
from engine.errors import Mistake, Mistakes, wrong
from engine.yaml_source import Source, dump


class Section(BaseModel):
    """A mapping with fixed keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="wrap")
    @classmethod
    def _tell_all(cls, data: Any, handler: Callable) -> "Section":
        if isinstance(data, cls):
            return data
        if not isinstance(data, dict):
            raise Mistakes(wrong(data, f"a mapping of {', '.join(cls.fixed_keys())}"))
        mistakes: list[Mistake] = []
        section = None
        values = cls.bound(data, mistakes)
        try:
            section = handler(values)
        except ValidationError as error:
            mistakes += mistakes_of(error, fields=cls.fixed_keys())
        # A misspelt key counts as the one it was meant to be: it is told once, not again as a missing one.
        own = [mistake for mistake in mistakes if len(mistake.path) == 1]
        meant = {mistake.path[0]: mistake.meant for mistake in own if mistake.kind == "unknown"}
        again = [
            mistake for mistake in own if mistake.kind == "missing" and mistake.path[0] in meant.values()
        ]
        mistakes = [mistake for mistake in mistakes if mistake not in again]
        intended = {meant.get(key) or key: value for key, value in data.items() if value is not None}
        mistakes += cls.cross_checks(intended)
        if mistakes:
            raise Mistakes(*mistakes)
        return section

    @classmethod
    def fixed_keys(cls) -> dict[str, str]:
        """The keys that belong to the section itself -> their descriptions."""
        return {key: info.description for key, info in cls.model_fields.items() if key != "component"}

    @classmethod
    def bound(cls, data: dict, mistakes: list[Mistake]) -> dict:
        """What pydantic is to check of the mapping."""
        return data

    @classmethod
    def cross_checks(cls, data: dict) -> list[Mistake]:
        """What is wrong between keys. Data is as written, of any type, without nulls."""
        return []

    def plain(self) -> dict[str, Any]:
        """Plain values, defaults filled in, that give this section again."""
        return {key: as_plain(getattr(self, key)) for key in type(self).fixed_keys()}


class ComponentSection(Section):
    """A section that names a component too: the keys that are not its own are the component's arguments."""

    table: ClassVar[str]
    key: ClassVar[str]
    component: Annotated[Component, Field(description="the named component with its arguments")]

    @classmethod
    def bound(cls, data: dict, mistakes: list[Mistake]) -> dict:
        fixed = cls.fixed_keys()
        own = {key: value for key, value in data.items() if key in fixed}
        arguments = {key: value for key, value in data.items() if key not in fixed}
        try:
            named = bind(cls.table, cls.key, arguments, fixed)
        except Mistakes as error:
            mistakes += error.mistakes
            named = Component(cls.table, cls.key, "")
        return {**own, "component": named}

    @property
    def name(self) -> str:
        """The component's name in its table."""
        return self.component.name

    @property
    def args(self) -> dict[str, Any]:
        """The component's own arguments, defaults filled in."""
        return self.component.args

    def build(self, *args, **kwargs) -> Any:
        """Component.build."""
        return self.component.build(*args, **kwargs)

    def plain(self) -> dict[str, Any]:
        return {**self.component.plain(), **super().plain()}


class Config(Section):
    """The root of a config: what one YAML file says. Two are equal where their resolved values are."""

    _sources: dict[tuple, Source] = PrivateAttr(default_factory=dict)

    def resolved(self) -> dict[str, Any]:
        """A plain nested dict with all defaults; config.from_dict makes an equal config of it."""
        return self.plain()

    def render_with_sources(self) -> str:
        """YAML text with the file:line (or "default") that each value came from as a comment."""
        rows = _rows(self.resolved(), (), "")
        width = min(60, max(len(text) for text, _ in rows))
        return "".join(
            f"{text:<{width}}  # {self._sources.get(path, 'default')}\n" if path else f"{text}\n"
            for text, path in rows
        )

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.resolved() == other.resolved()


def _rows(mapping: dict, path: tuple, indent: str) -> list[tuple[str, tuple]]:
    """(line of YAML, path of its value) in order; the path is empty on a line that only opens a block."""
    rows: list[tuple[str, tuple]] = []
    for key, value in mapping.items():
        below = (*path, key)
        label = f"{indent}{dump(key, flow=True)}:"
        if isinstance(value, dict) and value:
            rows += [(label, ()), *_rows(value, below, indent + "  ")]
        elif isinstance(value, list) and value and all(item and isinstance(item, dict) for item in value):
            rows.append((label, ()))
            for index, item in enumerate(value):
                (first, source), *others = _rows(item, (*below, index), indent + "    ")
                rows += [(f"{indent}  - {first.lstrip()}", source), *others]
        else:
            rows.append((f"{label} {dump(value, flow=True)}", below))
    return rows
