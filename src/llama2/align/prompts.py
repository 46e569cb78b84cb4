"""Rows of prompts: what is asked, as token ids and as reward functions and reward models see it. No torch here."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from llama2.errors import InputError, Llama2Error
from llama2.protocols import TokenizerLike
from llama2.train.data import DataReport, Row
from llama2.train.shapes import Message, messages_of, string

SAFETY = "safety"  # the column that tags a prompt as one where safety counts
_CHATS = ("messages", "conversations", "conversation")
_ANSWERS = ("completion", "response", "chosen", "rejected", "output", "answer")


class PromptRow(NamedTuple):
    """ids: what the model continues. content: a text, or messages. tagged: judged by its safety alone. columns: the
    row's other columns, for reward functions."""

    ids: list[int]
    content: str | list[Message]
    tagged: bool
    columns: dict[str, Any]

    def answered(self, text: str) -> dict[str, Any]:
        """The row of this prompt with an answer, as `finetune sft` and reward models take it."""
        if isinstance(self.content, str):
            return {"prompt": self.content, "completion": text}
        return {"messages": [*self.content, {"role": "assistant", "content": text}]}

    def said(self, text: str) -> str | list[Message]:
        """An answer as TRL gives it to reward functions: a text, or for a chat a list of one message."""
        return text if isinstance(self.content, str) else [{"role": "assistant", "content": text}]


def prompt_of(row: Row, tokenizer: TokenizerLike, chat: bool = False) -> PromptRow:
    """The prompt of a row {"prompt"}: a text that is continued or messages, or {"messages"}, whose last answer is left
    out. chat: texts are what a user says. Raises InputError for a row without one, or for which there is no template.
    """
    name = next((name for name in ("prompt", *_CHATS) if row.get(name) is not None), None)
    if name is None:
        raise InputError(f"a row with the keys {sorted(row)} has no prompt; give a column prompt, or messages")
    content: str | list[Message]
    if name == "prompt" and isinstance(row[name], str):
        content = [{"role": "user", "content": row[name]}] if chat or row.get("system") else row[name]
    else:
        content = messages_of(row[name], name)
        while content and content[-1]["role"] == "assistant":
            content.pop()
    if isinstance(content, list):
        if row.get("system"):
            content = [{"role": "system", "content": string(row["system"], "system")}, *content]
        if not content:
            raise InputError("its messages hold no prompt, only an answer")
        ids = _chat_ids(content, tokenizer)
    else:
        ids = list(tokenizer(content)["input_ids"])
    if not ids:
        raise InputError("its prompt is empty")
    used = {name, "system", SAFETY, *_CHATS, *_ANSWERS}
    return PromptRow(ids, content, _flag(row.get(SAFETY)), {k: v for k, v in row.items() if k not in used})


def _chat_ids(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    if tokenizer.chat_template is None:
        raise InputError("it is a chat, and the tokenizer has no chat template; give one, or prompts as texts")
    encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def _flag(value: object) -> bool:
    if value in (None, 0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in ("true", "false", "1", "0", ""):
        return value.lower() in ("true", "1")
    raise InputError(f"{SAFETY} is {value!r}; it must be true or false")


def prompts_of(
    rows: Iterable[Row], tokenizer: TokenizerLike, room: int, longest: int | None = None, chat: bool = False
) -> tuple[list[PromptRow], DataReport]:
    """The prompts of rows, and the report. room: tokens that the context leaves beside the longest answer; longest:
    rows with more tokens are left out.

    Raises InputError where a prompt that is not left out is longer than the room.
    """
    report, made, beyond = DataReport(max_length=longest), list[PromptRow](), dict[int, int]()
    for number, row in enumerate(rows):
        report.rows += 1
        try:
            prompt = prompt_of(row, tokenizer, chat)
        except Llama2Error as error:
            report.problems[number] = str(error).partition(";")[0]
            continue
        report.kinds["text" if isinstance(prompt.content, str) else "chat"] += 1
        if longest is not None and len(prompt.ids) > longest:
            report.problems[number] = f"the prompt is longer than {longest} tokens (max_prompt_length)"
            continue
        if len(prompt.ids) > room:
            beyond[number] = len(prompt.ids)
        made.append(prompt)
        report.tokens += len(prompt.ids)
    if beyond:
        first, length = next(iter(beyond.items()))
        raise InputError(
            f"the prompt of row {first} has {length} tokens, and the context leaves {room} beside the longest answer "
            f"({len(beyond)} such rows of {report.rows}); shorten it or the answers (max_completion_length), or leave "
            "such rows out (max_prompt_length)"
        )
    return made, report


def columns_of(prompts: Sequence[PromptRow]) -> Mapping[str, list[Any]]:
    """The other columns of rows, each a list with None where a row has none."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
