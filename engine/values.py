"""The types of config values: strict (nothing is converted silently), each able to say what is allowed."""

import math
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

from engine.errors import Mistakes, wrong

DEVICE_NAMES = r"auto|cpu|cuda(:\d+)?"  # of --device, a regular expression
IGNORE = 255  # label of pixels that count nowhere

_FRACTION = re.compile(r"([-+]?[0-9.]+(?:e[-+]?[0-9]+)?)\s*/\s*([0-9.]+)", re.IGNORECASE)
_BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(KB|MB|GB|TB)", re.IGNORECASE)
NAME_TOLD = "a name of letters, digits and _ - . /, a letter or a digit first in each part"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*(/[A-Za-z0-9][A-Za-z0-9_.\-]*)*")


def _number(value: Any) -> float:
    """A finite float from a number or from a fraction such as "8/255"; ValueError otherwise."""
    if isinstance(value, str) and (match := _FRACTION.fullmatch(value.strip())):
        value = float(match[1]) / float(match[2])
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(value)
    return float(value)


def number_or_none(value: Any) -> float | None:
    """A number as YAML may have it, None for anything else: a mistake that is told elsewhere."""
    try:
        return _number(value)
    except (ValueError, ArithmeticError):
        return None


def byte_count(text: str) -> int:
    """Bytes of a size such as "40GB", in powers of 1000; ValueError for anything else."""
    match = _BYTES.fullmatch(text)
    if not match:
        raise ValueError(text)
    return round(float(match[1]) * 1000 ** (1 + ("KB", "MB", "GB", "TB").index(match[2].upper())))


def _size(value: Any) -> tuple[int, int]:
    height, width = (_exactly(int)(item) for item in value) if isinstance(value, list | tuple) else ()
    return height, width


def _exactly(kind: type) -> Callable[[Any], Any]:
    """type() and not isinstance: true is no whole number."""

    def convert(value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(value)
        return value

    return convert


def _typed(expected: str, convert: Callable, holds: Callable = lambda value: True) -> BeforeValidator:
    def validate(value: Any) -> Any:
        try:
            converted = convert(value)
            if holds(converted):
                return converted
        except (ValueError, ArithmeticError):
            pass
        raise Mistakes(wrong(value, expected))

    return BeforeValidator(validate)


def _class(value: Any) -> int | str:
    if type(value) is int and value >= 0 or isinstance(value, str) and value:
        return value
    raise Mistakes(wrong(value, "a class by its number, 0 or more, or by its name"))


def _each_once(values: list[str]) -> list[str]:
    if not values or len(set(values)) < len(values):
        raise Mistakes(wrong(values, "at least one entry, each only once"))
    return values


Bool = Annotated[bool, _typed("true or false", _exactly(bool))]
Text = Annotated[str, _typed("text (a number or true in quotes)", _exactly(str), bool)]
Name = Annotated[
    str,
    _typed(
        "a name of letters, digits and _ - . /, a letter or a digit first in each part",
        _exactly(str),
        _NAME.fullmatch,
    ),
]
Subsets = Rows = Annotated[list[Text], AfterValidator(_each_once)]
Bytes = Annotated[str, _typed("a size such as 40GB or 500MB", _exactly(str), byte_count)]

Int = Annotated[int, _typed("a whole number", _exactly(int))]
PositiveInt = Annotated[int, _typed("a whole number above 0", _exactly(int), lambda number: number > 0)]
NonNegativeInt = Annotated[
    int, _typed("a whole number, 0 or more", _exactly(int), lambda number: number >= 0)
]

Several = Annotated[int, _typed("a whole number, 2 or more", _exactly(int), lambda number: number > 1)]

Float = Annotated[float, _typed("a number such as 1e-4 or 8/255", _number)]
Positive = Annotated[float, _typed("a number above 0", _number, lambda number: number > 0)]
Positives = Annotated[tuple[Positive, ...], Field(min_length=1)]
NonNegative = Annotated[float, _typed("a number, 0 or more", _number, lambda number: number >= 0)]
Probability = Annotated[float, _typed("a number from 0 to 1", _number, lambda number: 0 <= number <= 1)]
Share = Annotated[float, _typed("a number above 0, at most 1", _number, lambda number: 0 < number <= 1)]
Decay = Annotated[float, _typed("a number from 0, below 1", _number, lambda number: 0 <= number < 1)]

ClassId = Annotated[int | str, PlainValidator(_class)]
Size = Annotated[
    tuple[int, int],
    _typed("[height, width], two whole numbers above 0", _size, lambda size: min(size) > 0),
]

# What the annotation of a component's keyword-only parameter may be made of.
ANNOTATIONS = {
    "bool": Bool,
    "str": Text,
    "int": Int,
    "float": Float,
    "tuple": tuple,
    "list": list,
    "dict": dict,
    "Literal": Literal,
    "PositiveInt": PositiveInt,
    "NonNegativeInt": NonNegativeInt,
    "Positive": Positive,
    "Positives": Positives,
    "ClassId": ClassId,
    "NonNegative": NonNegative,
    "Probability": Probability,
    "Size": Size,
    "Share": Share,
    "Several": Several,
}
