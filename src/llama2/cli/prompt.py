"""The line at which a user types in a chat: history across starts, completion of commands and paths, several lines.

prompt_toolkit and not readline: a pasted text of many lines is one message, and lines above can be edited.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings

from llama2.cli import terminal
from llama2.cli.settings import user_folder


class CommandCompleter(Completer):
    """Completes /commands at the beginning of a line, and paths behind those that take one."""

    def __init__(self, commands: Sequence[str], with_paths: Sequence[str]) -> None:
        self._commands, self._with_paths = commands, with_paths
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: Any) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/"):
            return
        command, space, rest = text[1:].partition(" ")
        if not space:
            yield from (Completion(name, -len(command)) for name in self._commands if name.startswith(command))
        elif command in self._with_paths:
            yield from self._paths.get_completions(Document(rest, len(rest)), complete_event)


def line_reader(commands: Sequence[str], with_paths: Sequence[str]) -> Callable[[str], str]:
    """Returns a function that reads one message after a prompt. Alt-Enter begins a new line of it; Ctrl-C raises
    KeyboardInterrupt, Ctrl-D EOFError."""
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        history=_history(),
        completer=CommandCompleter(commands, with_paths),
        complete_while_typing=False,
        auto_suggest=AutoSuggestFromHistory(),
        key_bindings=keys,
    )
    return lambda prompt: session.prompt(prompt)


def _history() -> History:
    """The lines of earlier chats, in $XDG_STATE_HOME/llama2, by default ~/.local/state/llama2; kept in memory alone
    where the file cannot be written."""
    file = user_folder(os.environ, "XDG_STATE_HOME", "~/.local/state") / "history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        os.close(descriptor)
    except OSError as error:
        terminal.notice(f"llama2: lines are not kept for the next start: {file}: {error.strerror}")
        return InMemoryHistory()
    return FileHistory(str(file))
