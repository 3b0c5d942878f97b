"""What a script tells its user: one message, or every mistake of a config at once."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal


class UserError(Exception):
    """The user's mistake: scripts print the message and exit with 2, without a traceback."""


class Interrupted(Exception):
    """Stopped on request with the state saved; the message says how to go on. Scripts exit with 130."""


class ConfigError(UserError):
    """Every mistake of one config; `lines` holds one line for each."""

    def __init__(self, lines: list[str]):
        super().__init__("\n".join(lines))
        self.lines = lines


@contextmanager
def blaming(key: str) -> Iterator[None]:
    """A UserError of the block names the config's key that it comes from."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def collected(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """What each call returns, by name. ConfigError with the messages of all that raise a UserError."""
    results, lines = {}, []
    for name, call in calls.items():
        try:
            results[name] = call()
        except UserError as error:
            lines.append(str(error))
    if lines:
        raise ConfigError(lines)
    return results


def first_line(error: BaseException) -> str:
    """Of an error's message; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Mistake:
    """One mistake at a key; the path is relative to the section that found it.

    meant: the key or value that the user seems to have meant.
    kind: about the value, or about the key itself: "missing" or "unknown".
    """

    path: tuple[str | int, ...]
    message: str
    meant: str | None = None
    kind: Literal["value", "missing", "unknown"] = "value"

    def under(self, path: tuple[str | int, ...]) -> "Mistake":
        """The same mistake, seen from further up."""
        return replace(self, path=(*path, *self.path))

    def __str__(self) -> str:
        key = ".".join(map(str, self.path))
        return (
            (f"{key}: " if key else "")
            + self.message
            + (f"; did you mean '{self.meant}'?" if self.meant is not None else "")
        )


class Mistakes(ValueError):
    """Several mistakes of one section; a ValueError, so that pydantic hands it upwards."""

    def __init__(self, *mistakes: Mistake):
        super().__init__("; ".join(map(str, mistakes)))
        self.mistakes = mistakes


def closest(word: object, choices: Iterable[object]) -> str | None:
    """The choice that is spelled most like the word, None where none comes near."""
    near = get_close_matches(str(word), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return near[0] if near else None


def unknown(key: str, allowed: Iterable[str], what: str = "unknown key") -> Mistake:
    """The mistake of a key that is not among the allowed ones."""
    allowed = list(allowed)
    return Mistake((key,), f"{what}; allowed: {', '.join(allowed)}", closest(key, allowed), "unknown")


def wrong(value: Any, expected: str) -> Mistake:
    """The mistake of a value of the wrong type or range."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return Mistake((), f"{text if len(text) <= 60 else text[:57] + '...'} is wrong; expected {expected}")


def no_choice(value: Any, choices: Iterable[object]) -> Mistake:
    """The mistake of a value that is none of the choices."""
    choices = list(map(str, choices))
    text = json.dumps(value, default=str, ensure_ascii=False)
    return Mistake((), f"{text} is unknown; allowed: {', '.join(choices)}", closest(value, choices))
