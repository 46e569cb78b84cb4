"""Conversations as frontends send them, merged into what a template of strictly alternating turns takes.

Llama 2's template wants one system prompt in front and then user and assistant in turn. Frontends begin with a greeting
of the assistant's, put instructions in the middle or at the end, send two turns of one role. Nothing of such a
conversation is lost: turns of one role are joined, an instruction behind the first turn becomes text of the user's turn
at its place, and a greeting gets an empty turn in front of it.
"""

from collections.abc import Sequence
from typing import Any

from llama2.errors import TokenizerError

Chat = list[dict[str, Any]]
_TURN = {"role": "user", "content": "a"}
_PROBES: tuple[Chat, ...] = (  # what a template that takes turns as they come renders
    [{"role": "assistant", "content": "b"}, _TURN],
    [_TURN, _TURN],
    [_TURN, {"role": "system", "content": "c"}],
)


def alternates(tokenizer: Any) -> bool:
    """Whether the chat template refuses turns that do not alternate."""
    for chat in _PROBES:
        try:
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except TokenizerError:
            return True
        except Exception:  # of a template that fails at a message of so few fields: it says nothing of turns
            return False
    return False


def legal(chat: Sequence[dict[str, Any]]) -> bool:
    """Whether a conversation is one system message at most, then user and assistant in turn."""
    turns = [message["role"] for message in chat]
    turns = turns[1:] if turns[:1] == ["system"] else turns
    return all(role == ("user", "assistant")[i % 2] for i, role in enumerate(turns))


def merged(chat: Sequence[dict[str, Any]]) -> Chat:
    """The same conversation as a legal one."""
    front = next((i for i, message in enumerate(chat) if message["role"] != "system"), len(chat))
    found: Chat = []
    for i, message in enumerate(chat):
        role = "user" if message["role"] not in ("assistant", "system") or i >= front else message["role"]
        role = message["role"] if message["role"] == "assistant" else role
        if found and found[-1]["role"] == role:
            found[-1]["content"] = "\n\n".join(filter(None, (found[-1]["content"], message["content"])))
            continue
        if role == "assistant" and (not found or found[-1]["role"] == "system"):
            found.append({"role": "user", "content": ""})
        found.append({**message, "role": role})
    return found
