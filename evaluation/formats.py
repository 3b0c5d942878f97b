"""How figures look in Markdown, LaTeX and CSV, and on a terminal."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence


def percent(value: float) -> str:
    """A fraction in percent with two decimals; a dash for NaN."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def in_brackets(low: float | None, high: float | None) -> str:
    """An interval of fractions in percent with one decimal, behind a blank; nothing for NaN or None."""
    return "" if low is None or math.isnan(low) else f" [{100 * low:.1f}, {100 * high:.1f}]"


def points(difference: float) -> str:
    """A difference of fractions in percentage points with its sign."""
    return f"{100 * difference:+.2f}"


def eps_text(eps: float) -> str:
    """As a fraction of 255 where it is one of two decimals."""
    levels = eps * 255
    return f"{levels:.4g}/255" if abs(levels * 100 - round(levels * 100)) < 1e-6 else f"{eps:.4g}"


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


def aligned(lines: Iterable[Sequence[str]], left: int) -> list[str]:
    """Lines of cells in columns for a terminal, the first `left` columns to the left, the others to the right."""
    lines = [list(map(str, line)) for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for line in lines:
        cells = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        texts.append("  ".join(cells).rstrip())
    return texts


def csv_text(columns: Sequence[str], rows: Iterable[Mapping]) -> str:
    """CSV with all digits; missing values, None and NaN are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if value is None or value != value else value for key, value in row.items()})
    return text.getvalue()
