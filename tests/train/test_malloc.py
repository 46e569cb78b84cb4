"""Memory that a step gives back and the next one wants again."""

import platform
import subprocess
import sys

import pytest

# A process of its own: what another test left in the heap decides where a piece goes, and with it what is returned.
PROGRAM = """
import torch
from llama2.train.malloc import kept

SIZE = 100 << 20


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def touched(size: int) -> int:
    before = resident()
    x = torch.ones(size // 4)
    del x
    return resident() - before


torch.ones(SIZE // 4)  # threads and allocator are there
with kept() as returned:
    start = resident()
    touched(SIZE)
    print("kept", resident() - start)
    returned()
    print("returned", resident() - start)
    touched(SIZE)
    print("kept again", resident() - start)
print("ended", resident() - start)
touched(3 * SIZE)  # more than the hole that the others may have left
print("as before", resident() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of glibc alone is told")
def test_freed_memory_stays_until_it_is_returned() -> None:
    size = 100 << 20
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    found = {name: int(n) for name, n in (line.rsplit(" ", 1) for line in result.stdout.splitlines())}
    assert found["kept"] > size * 0.9
    assert found["returned"] < size * 0.5
    assert found["kept again"] > size * 0.9
    assert found["ended"] < size * 0.5
    assert found["as before"] < size * 0.5, "as without it: large pieces go back at once"
