"""Operating systems that fail: `Faulty` stands for the module `os` in llama2.files and fails at the N-th call."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llama2 import files

CALLS = ("open", "write", "ftruncate", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


class Faulty:
    """Every call of CALLS counts; number `at` raises, and with `lasting` all that follow it."""

    def __init__(self, at: int = 0, lasting: bool = False, code: int = errno.EIO) -> None:
        self.at, self.lasting, self.code = at, lasting, code
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(os, name)
        return self._counted(name, found) if name in CALLS else found

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if self.at and (len(self.calls) == self.at or (self.lasting and len(self.calls) > self.at)):
                raise OSError(self.code, os.strerror(self.code), f"call {self.at} ({name})")
            return call(*args, **kwargs)

        return counted


@contextmanager
def failing(patch: pytest.MonkeyPatch, system: Faulty) -> Iterator[Faulty]:
    """llama2.files runs on `system` in this block."""
    with patch.context() as inner:
        inner.setattr(files, "os", system)
        yield system


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
