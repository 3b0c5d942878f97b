"""Nested mappings as flat ones by dotted keys, and what differs between two of them."""

from collections.abc import Iterator, Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], into_lists: bool = False) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}. Lists stay whole; into_lists: but for lists of mappings, whose entries stand
    under their "name"."""
    return dict(_pairs(tree, "", into_lists))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of all keys whose values differ; a missing one has the value None."""
    return [
        (key, before.get(key), now.get(key)) for key in {**before, **now} if before.get(key) != now.get(key)
    ]


def _pairs(value: Any, prefix: str, into_lists: bool) -> Iterator[tuple[str, Any]]:
    if into_lists and isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        value = {item.get("name", index): item for index, item in enumerate(value)}
    if not isinstance(value, Mapping) or not value:
        yield prefix, value
        return
    for key, item in value.items():
        yield from _pairs(item, f"{prefix}.{key}" if prefix else str(key), into_lists)
