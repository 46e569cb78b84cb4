"""Reads large bodies in a process of its own: the server's process, which holds every stream, does not wait for them.

Run as a script (`readers` starts it): frames of pickles come in over the standard input, and one goes out over the
standard output for each call. An object that many calls need, such as a model's tokenizer, comes once (`Resident`) and
is named from then on. No torch.
"""

import io
import itertools
import os
import pickle
import resource
import struct
import sys
import traceback
from typing import IO, Any, ClassVar

from llama2.serve.errors import Refusal

MEMORY = 2**30  # bytes of the process's own data; a body of megabytes takes a tenth of it
_LENGTH = struct.Struct("<Q")


class Resident:
    """An argument of calls that stays in the process it was sent to. What it is there, `pickled` tells."""

    _numbers: ClassVar[Any] = itertools.count(1)

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self._pickled: bytes | None = None

    def pickled(self) -> bytes:
        """The object as another process has it; made once."""
        if self._pickled is None:
            self._pickled = pickle.dumps(self.sent(), pickle.HIGHEST_PROTOCOL)
        return self._pickled

    def sent(self) -> Any:
        """Returns the part of it that is sent."""
        raise NotImplementedError


class _CallPickler(pickle.Pickler):
    """Pickles a call; residents become their numbers, and are listed."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.residents: dict[int, Resident] = {}

    def persistent_id(self, thing: Any) -> int | None:
        if not isinstance(thing, Resident):
            return None
        self.residents[thing.number] = thing
        return thing.number


class _CallUnpickler(pickle.Unpickler):
    """Reads what `_CallPickler` wrote."""

    def __init__(self, file: IO[bytes], residents: dict[int, Any]) -> None:
        super().__init__(file)
        self._residents = residents

    def persistent_load(self, number: int) -> Any:
        return self._residents[number]


def packed_call(task: Any, args: tuple[Any, ...]) -> tuple[bytes, dict[int, Resident]]:
    """A call as the content of a frame, and the residents that it names."""
    file = io.BytesIO()
    pickler = _CallPickler(file)
    pickler.dump((task, args))
    return file.getvalue(), pickler.residents


def write(file: IO[bytes], data: bytes) -> None:
    """Sends a frame."""
    file.write(_LENGTH.pack(len(data)))
    file.write(data)
    file.flush()


def read(file: IO[bytes]) -> bytes | None:
    """The next frame; None at the end of the file."""
    head = file.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(head)
    data = file.read(size)
    return data if len(data) == size else None


def outcome(call: bytes, residents: dict[int, Any]) -> tuple[str, Any]:
    """The outcome of a call: its result, the refusal that it raised, or the traceback of another exception."""
    try:
        task, args = _CallUnpickler(io.BytesIO(call), residents).load()
        return "result", task(*args)
    except Refusal as refusal:
        return "refusal", (refusal.kind, refusal.message, refusal.param, refusal.retry_after)
    except MemoryError:
        return "refusal", ("costly", "reading this body takes more memory than is allowed; send less", None, None)
    except Exception:
        return "failure", traceback.format_exc()


def main() -> None:
    """Serves frames until the standard input ends: an object to keep, a number to forget, or a call."""
    os.nice(10)  # the engine's threads come first
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY if hard < 0 else min(MEMORY, hard), hard))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed is no answer
    residents: dict[int, Any] = {}
    while (frame := read(sys.stdin.buffer)) is not None:
        kind, number, content = pickle.loads(frame)
        if kind == "keep":
            residents[number] = pickle.loads(content)
        elif kind == "forget":
            residents.pop(number, None)
        else:
            try:
                reply = pickle.dumps(outcome(content, residents), pickle.HIGHEST_PROTOCOL)
            except Exception:  # a result that is no data
                reply = pickle.dumps(("failure", traceback.format_exc()))
            write(answers, reply)


if __name__ == "__main__":
    main()
