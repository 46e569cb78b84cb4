"""Reads large bodies in a process of its own: the server's process, which holds every stream, does not wait for them.

Run as a script (`readers` starts it): frames of pickles come in over the standard input, one for each call, and go out
over the standard output. No torch.
"""

import os
import pickle
import resource
import struct
import sys
from typing import IO, Any

from llama2.serve.errors import Refusal

MEMORY = 2**30  # bytes of the process's own data; a body of megabytes takes a tenth of it
_LENGTH = struct.Struct("<Q")


def write(file: IO[bytes], content: Any) -> None:
    """Sends a frame."""
    data = pickle.dumps(content, pickle.HIGHEST_PROTOCOL)
    file.write(_LENGTH.pack(len(data)))
    file.write(data)
    file.flush()


def read(file: IO[bytes]) -> Any:
    """The next frame; None at the end of the file."""
    head = file.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(head)
    data = file.read(size)
    return pickle.loads(data) if len(data) == size else None


def outcome(task: Any, args: tuple[Any, ...]) -> tuple[str, Any]:
    """The outcome of a call: its result, or the refusal that it raised."""
    try:
        return "result", task(*args)
    except Refusal as refusal:
        return "refusal", (refusal.kind, refusal.message, refusal.param, refusal.retry_after)
    except MemoryError:
        return "refusal", ("costly", "reading this body takes more memory than is allowed; send less", None, None)


def main() -> None:
    """Serves calls until the standard input ends."""
    os.nice(10)  # the engine's threads come first
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY if hard < 0 else min(MEMORY, hard), hard))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed is no answer
    while (call := read(sys.stdin.buffer)) is not None:
        write(answers, outcome(*call))


if __name__ == "__main__":
    main()
