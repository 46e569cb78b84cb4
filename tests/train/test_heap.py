"""Memory that a step gives back and the next one wants again."""

import platform

import pytest
import torch

from llama2.train.heap import kept


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of glibc alone is told")
def test_freed_memory_stays_until_it_is_returned() -> None:
    size = 100 << 20
    with kept() as returned:
        before = resident()
        x = torch.ones(size // 4)
        del x
        assert resident() - before > size * 0.9
        returned()
        assert resident() - before < size * 0.5
        x = torch.ones(size // 4)
        del x
        assert resident() - before > size * 0.9
    assert resident() - before < size * 0.5
    x = torch.ones(3 * size // 4)  # more than the hole that the others may have left
    del x
    assert resident() - before < size * 0.5, "as without it: large pieces go back at once"
