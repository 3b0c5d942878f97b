"""Memory of the process."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
LARGEST = (1 << 30, 32 << 20)  # bytes; older versions refuse more than 32 MiB
NEVER = -1


def keep_freed_memory() -> None:
    """Has glibc keep what tensors free for the next ones, up to a GiB each. Left alone it returns every block above
    32 MiB to the system and fetches it again, page by page, at each step. No effect on systems without mallopt.

    The process holds what it needed at its peak until it ends."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # A threshold for trimming alone would end glibc's own adaptation to the sizes that it sees.
    if mallopt is not None and any(mallopt(MMAP_THRESHOLD, size) for size in LARGEST):
        mallopt(TRIM_THRESHOLD, NEVER)
