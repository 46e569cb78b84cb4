"""A conversation: who said what, as messages, as token ids that fit the context, as a file. No torch, no terminal."""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama2.cli.args import option
from llama2.cli.settings import user_folder
from llama2.errors import InputError
from llama2.files import write_text

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class TemplateOptions:
    """how messages become a prompt."""

    system: str | None = option(None, "the system message")
    chat_template: str | None = option(
        None, "a file with a Jinja template, or llama2 (default: the one the model ships)", metavar="FILE"
    )

    def install(self, tokenizer: Any) -> None:
        """Puts the chosen template into the tokenizer. Raises InputError where there is none at all."""
        if self.chat_template == "llama2":
            from llama2.tokenizer import LLAMA2_CHAT_TEMPLATE

            tokenizer.chat_template = LLAMA2_CHAT_TEMPLATE
        elif self.chat_template is not None:
            tokenizer.chat_template = Path(self.chat_template).read_text(encoding="utf-8")
        if tokenizer.chat_template is None:
            raise InputError(
                "this model has no chat template: it continues text and was probably not trained to answer. Use "
                "`llama2 generate` without --chat, or give --chat-template llama2 or a file"
            )


def render(tokenizer: Any, messages: list[Message]) -> list[int]:
    """The ids of a conversation whose next words are the model's. Control tokens written in a message are text."""
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, safe=True)
    return ids


@dataclass
class Turn:
    """A user message and, once complete, its answer."""

    user: str
    answer: str | None = None


@dataclass
class Conversation:
    """Turns under an optional system prompt. Only the last turn may lack its answer."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """As chat templates take them."""
        found = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            found.append({"role": "user", "content": turn.user})
            if turn.answer is not None:
                found.append({"role": "assistant", "content": turn.answer})
        return found

    def fit(self, tokenizer: Any, context: int | None, reserve: int) -> tuple[list[int], int]:
        """The ids of all messages, and how many of the oldest turns were dropped to leave `reserve` tokens free.

        Once turns must go, enough go to leave a quarter free: else the next message would drop one again, and each
        drop costs the cache everything behind the system prompt. The last turn always stays.
        """
        ids, dropped = render(tokenizer, self.messages), 0
        room = None if context is None else context - reserve
        if room is None or len(ids) <= room:
            return ids, 0
        while len(ids) > room * 3 // 4 and len(self.turns) > 1:
            del self.turns[0]
            dropped += 1
            ids = render(tokenizer, self.messages)
        return ids, dropped

    def save(self, path: Path) -> None:
        """Writes the messages as JSON. Raises InputError where another file than a saved conversation is there."""
        if path.exists():
            Conversation.load(path)
        write_text(path, json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n")

    def keep(self, path: Path) -> None:
        """Writes the messages to a file that only this user reads, in a folder that is made."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_text(path, json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Conversation":
        """Reads what `save` wrote. Raises InputError for anything else, OSError where there is no file."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is not a saved conversation ({error}); /save writes one") from error
        return cls.from_messages(content, str(path))

    @classmethod
    def from_messages(cls, messages: Any, where: str) -> "Conversation":
        """The conversation of a list of messages: [system], then user and assistant in turn, ending with either."""
        good = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not good:
            raise InputError(f'{where} must hold a JSON list of {{"role": ..., "content": ...}} with texts in both')
        rest = list(messages)
        conversation = cls(rest.pop(0)["content"] if rest and rest[0]["role"] == "system" else None)
        for i, message in enumerate(rest):
            wanted = ("user", "assistant")[i % 2]
            if message["role"] != wanted:
                raise InputError(
                    f"{where}: message {i + 1} behind the system prompt is by {message['role']!r}; "
                    f"user and assistant alternate, so it must be by {wanted!r}"
                )
            if wanted == "user":
                conversation.turns.append(Turn(message["content"]))
            else:
                conversation.turns[-1].answer = message["content"]
        return conversation


def kept_folder() -> Path:
    """Where chats at a terminal are kept: $XDG_DATA_HOME/llama2/chats, by default ~/.local/share/llama2/chats."""
    return user_folder(os.environ, "XDG_DATA_HOME", "~/.local/share") / "chats"


def new_kept() -> Path:
    """The file of a conversation that begins now."""
    return kept_folder() / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{os.getpid()}.json"


def newest_kept() -> Path:
    """The file of the last conversation. Raises InputError where none was kept."""
    files = sorted(kept_folder().glob("*.json"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise InputError(f"--resume: no conversation was kept in {kept_folder()}; chat first, or give --load FILE")
    return files[-1]
