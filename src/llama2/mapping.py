"""Files of weights in memory: mapped, or read whole where mapping is switched off.

A mapped file costs no memory of its own and is shared by all processes; but one that is cut while it is mapped ends the
process with SIGBUS at the next touch, which nobody can catch. Sizes are checked when a file is opened; what happens
afterwards, on a network file system above all, is the file system's. `reading_whole` is for those.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import IO

from llama2.errors import CheckpointError

_WHOLE: ContextVar[bool] = ContextVar("weights are read, not mapped", default=False)


@contextmanager
def reading_whole(asked: bool = True) -> Iterator[None]:
    """Within it files are read into memory instead of being mapped, if that is asked for here or further out."""
    token = _WHOLE.set(asked or _WHOLE.get())
    try:
        yield
    finally:
        _WHOLE.reset(token)


def reads_whole() -> bool:
    """Whether files are read instead of being mapped."""
    return _WHOLE.get()


def mapped(file: IO[bytes], access: int = mmap.ACCESS_COPY) -> mmap.mmap:
    """The bytes of an open file: its map, or memory of the same size and type. Raises CheckpointError where the file
    ends while it is read."""
    if not reads_whole():
        return mmap.mmap(file.fileno(), 0, access=access)
    size, at = os.fstat(file.fileno()).st_size, 0
    memory = mmap.mmap(-1, size)
    file.seek(0)
    with memoryview(memory) as view:
        while at < size:
            count = file.readinto(view[at:])  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(f"{file.name} was cut to {at} of its {size} bytes while it was read; try again")
            at += count
    return memory
