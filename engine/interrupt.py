"""Ctrl-C and SIGTERM as a wish that the training grants after the running step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StopRequest:
    """A context: the first signal sets `requested`; the same one again raises KeyboardInterrupt at once. Another one is
    the same wish, as of a worker that is told to end, and then that its pipeline has ended."""

    def __init__(self):
        self.requested = 0  # number of the signal
        self.immediate = False

    def __enter__(self) -> "StopRequest":
        here = threading.current_thread() is threading.main_thread()  # only there can signals be caught
        signals = (signal.SIGINT, signal.SIGTERM) if here else ()
        self.before = {number: signal.signal(number, self._receive) for number in signals}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside the block the first signal raises KeyboardInterrupt too: for work that can be lost."""
        self.immediate = True
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self.immediate = False

    def _receive(self, number, frame) -> None:
        if self.immediate or number == self.requested:
            raise KeyboardInterrupt
        self.requested = self.requested or number
