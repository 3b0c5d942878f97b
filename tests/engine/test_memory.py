"""What is freed is used again without a way through the system."""

import subprocess
import sys

import pytest

PAGES = 40 * 2**20 // 4096  # of one tensor below
ROUNDS = """
import resource, torch
from engine.memory import keep_freed_memory
{call}
images = torch.ones(10 * 2**20)  # 40 MiB
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    answer = images
    for _ in range(6):
        answer = answer + 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(6):
    pages()
print(pages())
"""


def page_faults(call):
    done = subprocess.run([sys.executable, "-c", ROUNDS.format(call=call)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_kept():
    if page_faults("") < PAGES:
        pytest.skip("this malloc keeps it anyway, or its pages are large")
    assert page_faults("keep_freed_memory()") < PAGES / 4
