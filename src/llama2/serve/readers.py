"""The processes that read large bodies (`reader.py`): how many there are, and one call to one of them.

Parsing, rendering and tokenising keep the interpreter's lock, a fifth of a second for a million values. In the
server's process that would hold up every stream; in another it holds up nobody.
"""

import pickle
import select
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, TypeVar

from llama2.processes import end_process
from llama2.serve import reader
from llama2.serve.errors import Refusal

T = TypeVar("T")
LARGE = 16_384  # bytes of a body, from which on another process reads it; below, that would cost more than it saves
MOST_KEPT = 4  # models whose tokenizers a process keeps, tens of megabytes each
_GLANCE = 50  # milliseconds between two looks at whether the deadline has come


class ReaderError(RuntimeError):
    """A task failed in a reader process; holds the traceback from there."""


class _Reader:
    """One process."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", "-m", "llama2.serve.reader"]
        self._process = subprocess.Popen(command, stdin=-1, stdout=-1, process_group=0)
        self._kept: OrderedDict[int, None] = OrderedDict()  # numbers of the residents that it has, latest last
        self.close = weakref.finalize(self, end_process, self._process)

    def __call__(self, task: Callable[..., Any], args: tuple[Any, ...]) -> tuple[str, Any] | None:
        """Returns the outcome of the call; None if the process has ended."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            call, residents = reader.packed_call(task, args)
            for number, resident in residents.items():
                self._keep(process.stdin, number, resident)
            self._send(process.stdin, "call", 0, call)
            answered = select.poll()  # select() ends at 1,024 open files
            answered.register(process.stdout, select.POLLIN)
            while not answered.poll(_GLANCE):
                pass  # a deadline is an exception raised in this thread, which needs a moment of Python
            frame = reader.read(process.stdout)
        except OSError:
            return None
        return None if frame is None else pickle.loads(frame)

    def _keep(self, file: IO[bytes], number: int, resident: reader.Resident) -> None:
        if number not in self._kept:
            self._send(file, "keep", number, resident.pickled())
        self._kept[number] = None
        self._kept.move_to_end(number)
        while len(self._kept) > MOST_KEPT:
            oldest, _ = self._kept.popitem(last=False)
            self._send(file, "forget", oldest, b"")

    @staticmethod
    def _send(file: IO[bytes], kind: str, number: int, content: bytes) -> None:
        reader.write(file, pickle.dumps((kind, number, content), pickle.HIGHEST_PROTOCOL))


class Readers:
    """At most `most` processes, started when they are needed. Calls may come from any thread."""

    def __init__(self, most: int) -> None:
        self.calls = 0  # that were answered
        self._most, self._lock = most, threading.Lock()
        self._idle: list[_Reader] = []
        self._count = 0

    def prepare(self) -> None:
        """Starts a process where all are busy and one more is allowed, so that no deadline has to count its start."""
        with self._lock:
            if self._idle or self._count >= self._most:
                return
            self._count += 1
        made = _Reader()
        made(len, ((),))
        with self._lock:
            self._idle.append(made)

    def __call__(self, task: Callable[..., T], *args: Any) -> T:
        """task(*args), run in one of the processes; a function of a module, and arguments that can be pickled.

        Raises Refusal as the task does, and where the process ends; ReaderError for another exception of the task.
        """
        with self._lock:
            self._count += not self._idle
            mine = self._idle.pop() if self._idle else None
        mine = mine or _Reader()
        found = None
        try:
            found = mine(task, args)
        finally:  # also at a deadline
            with self._lock:
                if found is not None:
                    self.calls += 1
                    self._idle.append(mine)
                else:
                    self._count -= 1
            if found is None:
                mine.close()
        if found is None:
            raise Refusal("costly", "the process that read this body ended; send less")
        kind, value = found
        if kind == "refusal":
            raise Refusal(*value)
        if kind == "failure":
            raise ReaderError(value)
        result: T = value
        return result

    def close(self) -> None:
        """Ends the processes that are idle; one that is busy ends with its call's deadline, or with this process."""
        with self._lock:
            idle, self._idle, self._most = self._idle, [], 0
        for each in idle:
            each.close()
