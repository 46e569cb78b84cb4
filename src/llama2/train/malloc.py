"""Memory of the processor that a step gives back and the next one wants again."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# mallopt(3)
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 64 << 20}
# The C library's own thresholds grow to these once tensors are freed, and stay; a number that was set cannot be unset.
_USUAL = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 64 << 20, _TOP_PAD: 128 << 10, _MMAP_THRESHOLD: 32 << 20}


@contextmanager
def kept() -> Iterator[Callable[[], None]]:
    """Within it freed memory stays with the process, with glibc; elsewhere nothing happens. Gives what returns it once.

    A step frees gigabytes of activations and gradients piece by piece. malloc hands large pieces back to the system,
    which clears every page before it hands it out again: a tenth of a step of full fine-tuning. What is kept has the
    holes of how it was used first, though: loading leaves some, and so does the first step, in the midst of which the
    moments are made. Returned after both, later steps find one layout and stay with it.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):  # musl has neither
        yield lambda: None
        return
    libc.malloc_trim(0)
    for name, value in _KEEP.items():
        libc.mallopt(name, value)
    try:
        yield lambda: libc.malloc_trim(0)
    finally:
        for name, value in _USUAL.items():
            libc.mallopt(name, value)
        libc.malloc_trim(0)
