"""The terminal side of a chat: reading messages, Ctrl-C as a flag, dim notices, nothing but text into a pipe."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, Self

BLOCK = '"""'
# What a model says may hold terminal control codes; they are shown as U+FFFD, tab and newline as they are.
CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def write(text: str) -> None:
    """Text of the model to the standard output, at once."""
    sys.stdout.write(text.translate(CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def notice(text: str) -> None:
    """One line beside the conversation, on the standard error: dim on a terminal, plain elsewhere."""
    plain = not sys.stderr.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    print(text if plain else f"\x1b[2m{text}\x1b[0m", file=sys.stderr, flush=True)


def interactive() -> bool:
    """Whether a person sits at both ends."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def read_line(prompt: str) -> str:
    """One line, with editing and history at a terminal; elsewhere the line is shown behind the prompt, so that the
    output reads as a conversation. Raises EOFError at the end."""
    if interactive():
        return input(prompt)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    line = line.rstrip("\n")
    write(f"{prompt}{line}\n")
    return line


def read_message(read: Callable[[str], str]) -> str:
    r"""One message: a line; lines joined where one ends with a backslash; or everything between two lines \"\"\"."""
    line = read("> ")
    if line.strip() == BLOCK:
        lines = []
        while (line := read("| ")).strip() != BLOCK:
            lines.append(line)
        return "\n".join(lines)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read("| "))
    return "\n".join(lines)


class Interrupt:
    """While active, the first Ctrl-C sets `requested` and a second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Rows in columns, each as wide as its widest cell."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    padded = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)) for row in (head, *rows))
    return "\n".join(line.rstrip() for line in padded)
