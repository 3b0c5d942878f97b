"""The Markdown that our own tables are written in, as HTML: headings, lists, tables, paragraphs and nothing else."""

from markupsafe import Markup, escape

LIST, TABLE = "- ", "| "


def to_html(text: str, level: int = 2) -> Markup:
    """level: of the HTML heading that "#" becomes; "##" is one below."""
    blocks = [block.splitlines() for block in text.strip().split("\n\n")]
    return Markup("\n").join(_block(lines, level) for lines in blocks if lines)


def _block(lines: list[str], level: int) -> Markup:
    first = lines[0]
    if first.startswith("#"):
        marks, _, title = first.partition(" ")
        heading = Markup("<h{0}>{1}</h{0}>").format(level + len(marks) - 1, title)
        return heading + _block(lines[1:], level) if lines[1:] else heading
    if all(line.startswith(LIST) for line in lines):
        items = (Markup("<li>{}</li>").format(line.removeprefix(LIST)) for line in lines)
        return Markup('<ul class="fine">{}</ul>').format(Markup("").join(items))
    if all(line.startswith(TABLE) for line in lines) and len(lines) > 1:
        return _table(lines)
    return Markup("<p>{}</p>").format(Markup("<br>").join(map(escape, lines)))


def _table(lines: list[str]) -> Markup:
    titles, rule, *rows = (_cells(line) for line in lines)
    left = [cell == "---" for cell in rule]
    head = Markup("").join(_cell("th", title, left[place]) for place, title in enumerate(titles))
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(
            Markup("").join(
                _cell("td" if place else "th", cell, left[place]) for place, cell in enumerate(row)
            )
        )
        for row in rows
    )
    table = '<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    return Markup(table).format(head, body)


def _cell(tag: str, text: str, left: bool) -> Markup:
    """An interval, [low, high], stands below its figure."""
    figure, bracket, interval = text.partition(" [")
    small = Markup('<small class="interval">[{}</small>').format(interval) if bracket else ""
    return Markup("<{0}{1}>{2}{3}</{0}>").format(tag, Markup(' class="left"') if left else "", figure, small)


def _cells(line: str) -> list[str]:
    """Of a line of a table; an escaped bar is part of its cell."""
    inside = line.strip()[1:-1].replace(r"\|", "\0")
    return [cell.strip().replace("\0", "|") for cell in inside.split("|")]
