"""What the commands of this folder (python -m dataloaders.NAME) have in common."""

import sys
from collections.abc import Callable, Iterable, Sequence

from engine.config import UserError


def run(command: Callable[[Sequence[str]], int]) -> None:
    """Runs a command on sys.argv and leaves with its exit code: 2 with one message for the user's mistake."""
    try:
        code = command(sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    first, *others = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *values in cells:
        aligned = [value.rjust(width) for value, width in zip(values, others, strict=True)]
        lines.append("  ".join([name.ljust(first), *aligned]))
    return "\n".join(lines)
