"""Which files of the package call which while something runs: what tests hold the paths of docs/how-it-works.md to."""

import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "llama2"


class Walk:
    """Calls from one file of the package into another, of the threads that began within `walked`, and its own."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.entered: list[str] = []  # in the order of the first call
        self._prefix, self._running = f"{PACKAGE}/", set[FrameType]()

    def _file(self, frame: FrameType) -> str | None:
        name = frame.f_code.co_filename
        return name[len(self._prefix) :] if name.startswith(self._prefix) else None

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """The profile function: notes a call whose nearest caller of the package is in another file."""
        own = self._file(frame) if event == "call" else None
        if own is None or frame in self._running or frame.f_code.co_name == "<module>":
            return
        if frame.f_code.co_flags & 0x2A0:  # a generator or coroutine: going on with it is no call
            self._running.add(frame)
        caller = frame.f_back
        while caller is not None and self._file(caller) is None:
            caller = caller.f_back
        source = "" if caller is None else self._file(caller) or ""
        if source != own:
            self.calls[source, own] += 1
            if own not in self.entered:
                self.entered.append(own)

    def forget(self) -> None:
        """Begins anew."""
        self.calls.clear()
        self.entered.clear()

    def rooms(self, path: Sequence[str]) -> list[str]:
        """The rooms of a path in the order in which they were entered."""
        return list(dict.fromkeys(room for file in self.entered if (room := room_of(file, path)) is not None))

    def backward(self, path: Sequence[str]) -> set[tuple[str, str]]:
        """Calls from a room of the path into an earlier one."""
        pairs = {(room_of(a, path), room_of(b, path)) for a, b in self.calls}
        return {(a, b) for a, b in pairs if a is not None and b is not None and path.index(a) > path.index(b)}

    def beside(self, path: Sequence[str]) -> set[str]:
        """Files that were called and belong to no room of the path."""
        return {file for file in self.entered if room_of(file, path) is None}


def room_of(file: str, path: Sequence[str]) -> str | None:
    """The room of a path, a file or a folder with a slash at its end, that a file is in."""
    return next((room for room in path if file == room or (room.endswith("/") and file.startswith(room))), None)


@contextmanager
def walked() -> Iterator[Walk]:
    """Notes calls while it lasts, also those of threads that begin meanwhile."""
    walk = Walk()
    threading.setprofile(walk)
    sys.setprofile(walk)
    try:
        yield walk
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
