"""Memory of the process."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
LARGEST, NEVER = 1 << 30, 2**31 - 1  # bytes


def keep_freed_memory() -> None:
    """Has glibc keep what tensors free for the next ones, up to a GiB each. Left alone it returns every block above
    32 MiB to the system and fetches it again, page by page, at each step. No effect on systems without mallopt."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGEST)
        mallopt(TRIM_THRESHOLD, NEVER)
