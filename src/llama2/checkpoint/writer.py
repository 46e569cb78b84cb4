"""The writer interface: files that only grow, filled tensor by tensor. One `Target` a format, one engine for all.

A target knows the size of everything before the first byte. It asks the source for a block of rows at a time, so
memory stays at a few blocks whatever the model's size.
"""

import hashlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2.checkpoint import Checkpoint
from llama2.checkpoint.page_cache import pass_on
from llama2.config import LlamaConfig
from llama2.files import grown, sync

BLOCK_BYTES = 16 << 20  # of float32 or stored rows; larger blocks were not faster
WINDOW_BYTES = 16 << 20  # written between two calls of `pass_on`
_PENDING = 4  # blocks that wait for their hash
_LAG = 2  # windows until one has reached the disk


class Appender:
    """A growing file and its sha256. Hashing runs on `pool` beside the next block's work."""

    def __init__(self, path: Path, size: int, pool: Executor) -> None:
        """Opens `path` new (size 0), or cut back to `size` bytes, whose hash is taken first."""
        self.path, self.size, self._pool = path, size, pool
        self._digest, self._pending = hashlib.sha256(), deque[Future[None]]()
        self._file = grown(path, size)
        left = size
        while left:
            piece = self._file.read(min(left, BLOCK_BYTES))
            self._digest.update(piece)
            left -= len(piece)
        self._file.seek(size)
        self._passed = size

    def _pass_on(self) -> None:
        """The last window goes to the disk, and those before it, which should be there by now, out of memory."""
        self._file.flush()
        pass_on(self._file.fileno(), self._passed, self.size)
        pass_on(self._file.fileno(), max(0, self._passed - _LAG * WINDOW_BYTES), self._passed)
        self._passed = self.size

    def write(self, data: Tensor | bytes) -> None:
        """Appends bytes, or the values of a tensor in row order."""
        view: Any = data
        if isinstance(data, Tensor):
            if data.numel() == 0:
                return
            view = data.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._file.write(view)
        self.size += len(view)
        if self.size - self._passed >= WINDOW_BYTES:
            self._pass_on()
        self._pending.append(self._pool.submit(self._digest.update, view))
        if len(self._pending) > _PENDING:
            self._pending.popleft().result()

    def sync(self) -> None:
        """Returns when every byte so far is on the disk."""
        sync(self._file)

    def close(self) -> None:
        """Closes the file; what was written stays."""
        self._file.close()

    def hexdigest(self) -> str:
        """The sha256 of the file so far."""
        while self._pending:
            self._pending.popleft().result()
        return self._digest.hexdigest()


class Target(ABC):
    """One checkpoint to be written."""

    format: str
    config: LlamaConfig  # of the result
    files: list[str]  # the weight files
    steps: list[str]  # tensors by Hugging Face name, in the order they are written
    size: int  # bytes of all weight files, a little more where the format adds trailers

    def begin(self, out: Sequence[Appender]) -> None:  # noqa: B027 - not every format has a header
        """Writes what stands before the first tensor."""

    @abstractmethod
    def write(self, name: str, source: Checkpoint, out: Sequence[Appender]) -> None:
        """Appends one tensor to the file or files it belongs in."""

    def end(self, out: Sequence[Appender]) -> None:  # noqa: B027 - not every format has a trailer
        """Writes what stands behind the last tensor."""

    def describe(self, folder: Path) -> str | None:  # noqa: B027 - a GGUF file describes itself
        """Writes the small files; returns the one without which no reader takes the folder for a checkpoint."""

    @property
    def state(self) -> Any:
        """Returns the state that `end` needs, JSON-ready: an interrupted conversion hands it to `restore`."""
        return None

    def restore(self, state: Any) -> None:  # noqa: B027 - only formats with a state need it
        """Takes up the state of an interrupted conversion."""


def row_blocks(source: Checkpoint, name: str, head_dim: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of a tensor in blocks of whole heads; a vector comes as one block."""
    shape = source.tensors[name].shape
    if len(shape) < 2:
        yield 0, source.read(name)
        return
    for start, stop in row_ranges(shape, head_dim):
        yield start, source.read_rows(name, start, stop)


def row_ranges(shape: tuple[int, ...], head_dim: int) -> list[tuple[int, int]]:
    """Where the blocks of a matrix begin and end: whole heads, BLOCK_BYTES of float32."""
    step = max(1, BLOCK_BYTES // (4 * shape[1]) // head_dim) * head_dim
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
