"""An answer as Markdown on a terminal, while it comes: a block is drawn anew until it is complete, and then stays."""

import re
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown

from llama2.cli import terminal

INTERVAL = 0.08  # seconds between two drawings of the block that still grows
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})", re.MULTILINE)


def split_blocks(text: str) -> tuple[str, str]:
    """Text up to its last blank line outside code fences, and the rest: what can no longer change, what can."""
    end = len(text)
    while (end := text.rfind("\n\n", 0, end)) >= 0:
        if not _open_fence(text[:end]):
            return text[: end + 2], text[end + 2 :]
    return "", text


def _open_fence(text: str) -> bool:
    fence = ""
    for match in _FENCE.finditer(text):
        mark = match[1]
        if not fence:
            fence = mark
        elif mark[0] == fence[0] and len(mark) >= len(fence):
            fence = ""
    return bool(fence)


class MarkdownWriter:
    """Takes pieces of text as they come; a context that ends with the answer."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop")
        self._text, self._drawn = "", 0.0

    def __enter__(self) -> "MarkdownWriter":
        self._live.start()
        return self

    def write(self, piece: str) -> None:
        """Adds a piece of text."""
        done, self._text = split_blocks(self._text + piece.translate(terminal.CONTROLS))
        if done.strip():
            self._console.print(Markdown(done))
            self._console.print()
        now = time.monotonic()
        if done or now - self._drawn >= INTERVAL:
            self._live.update(Markdown(self._text), refresh=True)
            self._drawn = now

    def __exit__(self, *error: Any) -> None:
        self._live.update("", refresh=True)
        self._live.stop()
        if self._text.strip():
            self._console.print(Markdown(self._text))
        self._text = ""
