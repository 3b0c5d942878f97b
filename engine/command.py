"""How a command of this project begins and ends: its arguments, its exit code, one message for the user's mistake."""

import sys
from collections.abc import Callable, Sequence

from engine.config import Interrupted, UserError
from engine.memory import keep_freed_memory


def run(command: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> int:
    """The exit code of a command on these arguments (None: those of the process): what it returns, 2 for the user's
    mistake, 130 where it was interrupted.

    Any other exception is a bug and passes through, so that Python prints its traceback and exits with 1.
    """
    keep_freed_memory()
    try:
        return command(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Interrupted) as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130
