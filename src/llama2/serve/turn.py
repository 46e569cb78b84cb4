"""The model's turn in a chat, as it comes: what it says, and which functions it calls with what.

Every dialect that has chats renders these pieces. How a call is told apart from text is `tool_calls.CallReader`'s.
"""

import secrets
from dataclasses import dataclass, field
from typing import Literal

from llama2.engine.request import Finish, TokenEvent
from llama2.serve.chat import Tools
from llama2.serve.session import Answer

Reason = Literal["stop", "length", "tool_calls"]


def call_id() -> str:
    """A new id of a call."""
    return f"call_{secrets.token_hex(12)}"


@dataclass
class FunctionCall:
    """A call; arguments: JSON text, complete once the turn has ended."""

    name: str
    arguments: str = ""
    id: str = field(default_factory=call_id)


@dataclass(frozen=True)
class Piece:
    """The part of a turn that one event adds: text that is said, or arguments of call number `call`, which may begin
    here."""

    text: str = ""
    call: int | None = None
    begins: bool = False
    arguments: str = ""


class ModelTurn:
    """One answer. Its pieces joined are its text and its calls."""

    def __init__(self, tools: Tools) -> None:
        self.text, self.calls = "", list[FunctionCall]()
        self.finish: Finish | None = None
        self.stop: str | None = None
        self._reader = tools.reader() if tools.active else None

    @classmethod
    def whole(cls, tools: Tools, answer: Answer) -> "ModelTurn":
        """The turn of a complete answer."""
        turn = cls(tools)
        turn.put(TokenEvent(text=answer.text, finish=answer.finish, stop=answer.stop))
        return turn

    @property
    def reason(self) -> Reason:
        """Why it ended, as OpenAI names it."""
        if self.finish == "length" or self.finish is None:
            return "length"
        return "tool_calls" if self.calls else "stop"

    def put(self, event: TokenEvent) -> list[Piece]:
        """The pieces that an event adds."""
        self.finish, self.stop = event.finish or self.finish, event.stop or self.stop
        if self._reader is None:
            self.text += event.text
            return [Piece(event.text)] if event.text else []
        said = self._reader.put(event.text)
        if event.finish is not None:
            said += self._reader.finish()
        found = []
        for piece in said:
            if piece.name is not None:
                self.calls.append(FunctionCall(piece.name))
                found.append(Piece(call=len(self.calls) - 1, begins=True))
            elif piece.arguments:
                self.calls[-1].arguments += piece.arguments
                found.append(Piece(call=len(self.calls) - 1, arguments=piece.arguments))
            else:
                self.text += piece.text
                found.append(Piece(piece.text))
        return found
