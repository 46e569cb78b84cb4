"""Control of the page cache for files that are read, or written, once from front to back.

Left alone it keeps every page of source and target until memory is full, then evicts what other programs use, and
gathers gigabytes of unwritten pages for which the next fsync waits. All of this is advice: where a system does not
know it, nothing changes but speed and memory.
"""

import ctypes
import mmap
import os
import sys

import torch
from torch import Tensor

_PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4; pages that another process maps too stay
_PIECE = 64 << 20  # so few elements are summed at once that torch uses no threads of its own
_madvise = ctypes.CDLL(None).madvise if sys.platform == "linux" else None


def fetch(mapped: Tensor) -> None:
    """Returns when the pages of a contiguous tensor in a mapped file are in memory, by reading a byte of each."""
    if not mapped.is_contiguous():
        return
    data = mapped.view(-1).view(torch.uint8)
    for start in range(0, len(data), _PIECE):
        data[start : start + _PIECE : mmap.PAGESIZE].sum()


def release(mapped: Tensor) -> None:
    """Lets the kernel drop the pages of a contiguous tensor in a mapped file; a later reader fetches them again.

    Harmless for memory that is no file's: it is swapped at most, never lost.
    """
    if _madvise is not None and mapped.is_contiguous():
        start = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = mapped.data_ptr() + mapped.nbytes - start
        if size > 0:
            _madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _PAGEOUT)


def pass_on(descriptor: int, start: int, stop: int) -> None:
    """Of these bytes of a file, what is not yet on the disk begins to be written, and what is leaves the memory."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)
