"""What is freed is used again without a way through the system."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from engine import memory

PAGES = 40 * 2**20 // 4096  # of one tensor below
ROUNDS = """
import resource, statistics, torch
{call}
images = torch.ones(10 * 2**20)  # 40 MiB
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    answer = images
    for _ in range(6):
        answer = answer + 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(statistics.median(pages() for _ in range(16)))
"""


def page_faults(call):
    """Of the usual one of 16 rounds: how many the heap takes to settle depends on where the system puts it."""
    done = subprocess.run([sys.executable, "-c", ROUNDS.format(call=call)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
@pytest.mark.parametrize(
    "call",
    [
        "from engine.command import run; run(lambda arguments: 0, [])",
        "from pipelines.workers import prepare; prepare(1)",
    ],
    ids=["a command", "a process of a pipeline"],
)
def test_freed_memory_is_kept(call):
    asked = "import ctypes, sys; sys.exit(ctypes.CDLL(None).mallopt(-3, 1 << 30) != 1)"
    if subprocess.run([sys.executable, "-c", asked], capture_output=True).returncode:
        pytest.skip("this malloc keeps blocks of at most 32 MiB")
    if page_faults("") < PAGES:
        pytest.skip("this malloc keeps it anyway, or its pages are large")
    assert page_faults(call) < PAGES / 4


def test_older_versions_get_what_they_take(monkeypatch):
    """A refused threshold for large blocks is followed by a smaller one; if that is refused, nothing else is set."""
    for taken, expected in (
        ((1 << 30, 32 << 20), [(-3, 1 << 30), (-1, -1)]),
        ((32 << 20,), [(-3, 1 << 30), (-3, 32 << 20), (-1, -1)]),
        ((), [(-3, 1 << 30), (-3, 32 << 20)]),
    ):
        calls = []

        def mallopt(name, value, calls=calls, taken=taken):
            calls.append((name, value))
            return int(name == -1 or value in taken)

        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(
            memory.ctypes, "CDLL", lambda name, mallopt=mallopt: SimpleNamespace(mallopt=mallopt)
        )
        memory.keep_freed_memory()
        assert calls == expected
