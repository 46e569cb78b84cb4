"""The activations of all calibration sequences in a file, so that memory holds those of a few sequences only."""

import os
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from llama2.files import grown, sync


class States:
    """A matrix (sequences, T, width) on the disk, read and written a few sequences at a time.

    Plain reads and writes, not a memory map: what is mapped counts as the process's memory until the kernel drops it.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, new: bool = False) -> None:
        """Opens the file, or makes it (`new`), with the size that the shape needs."""
        self.path, self.shape, self.dtype = path, shape, dtype
        self._stride = shape[1] * shape[2] * dtype.itemsize
        size = shape[0] * self._stride
        self._file = grown(path, 0 if new else size)
        self._file.truncate(size)

    def read(self, start: int, stop: int) -> Tensor:
        """Sequences start to stop, (stop - start, T, width)."""
        out = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        view, at = _bytes(out), start * self._stride
        while view:
            count = os.preadv(self._file.fileno(), [view], at)
            if count == 0:
                raise EOFError(f"{self.path} is shorter than the {self.shape} it should hold; delete it to start anew")
            view, at = view[count:], at + count
        return out

    def write(self, start: int, values: Tensor) -> None:
        """Puts sequences (n, T, width) at `start`, converted to the file's dtype."""
        view, at = _bytes(values.to(self.dtype).contiguous()), start * self._stride
        while view:
            count = os.pwrite(self._file.fileno(), view, at)
            view, at = view[count:], at + count

    def sync(self) -> None:
        """Returns when every write is on the disk."""
        sync(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file; it stays."""
        self._file.close()


def _bytes(tensor: Tensor) -> memoryview:
    view: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return view
