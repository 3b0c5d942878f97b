"""How figures look in Markdown and LaTeX."""

import math
from collections.abc import Iterable, Sequence


def percent(value: float) -> str:
    """A fraction in percent with two decimals; a dash for NaN."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def markdown_table(titles: Sequence[str], cells: Iterable[Sequence[str]], left: int) -> list[str]:
    """Lines of a Markdown table whose first `left` columns are left-aligned."""
    rule = ["---"] * left + ["---:"] * (len(titles) - left)
    escaped = [[str(cell).replace("|", r"\|") for cell in line] for line in (titles, *cells)]
    return ["| " + " | ".join(line) + " |" for line in (escaped[0], rule, *escaped[1:])]


def latex_escape(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, "\\" + character)
    return text


def number(value: float | int | None) -> str:
    """A count with thousands apart, or a float with two decimals; a dash for None."""
    if value is None:
        return "-"
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else f"{value:.2f}"
