"""Shapes of rows: which columns make one, and which text, completion or chat it means. No torch here.

`SHAPES` is the one table of shapes, `RULES` the one list of what becomes of the columns that any row may have. Where a
row holds a system prompt, earlier turns or tools, it is a chat, whatever its shape.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llama2.errors import InputError
from llama2.train.readers import Row

Message = dict[str, Any]
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{context}### Response:\n"
)
# What data sets call the speakers, and what chat templates do. Other names are left to the template.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_LONG = 20  # characters of a prompt that no answer repeats by chance
_SWITCHES = ("weight", "train", "training")  # of a message or a row: whether it is learnt


@dataclass(frozen=True)
class Text:
    """A text, every token of which is a target."""

    text: str


@dataclass(frozen=True)
class PromptCompletion:
    """Two texts that are continued without a break; the second is the target."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Chat:
    """Messages with "role" and "content", of which the assistant's from `first` on are targets unless in `silent`.

    variables: for the chat template besides tools. otherwise: what the row means for a tokenizer without a template,
    where nothing in it needs one.
    """

    messages: tuple[Message, ...]
    first: int = 0
    silent: frozenset[int] = frozenset()
    tools: tuple[Any, ...] = ()
    variables: Mapping[str, Any] | None = None
    otherwise: PromptCompletion | None = None


class Pair(NamedTuple):
    """Two answers to one prompt; notes: what a person should know about the row."""

    chosen: "PromptCompletion | Chat"
    rejected: "PromptCompletion | Chat"
    notes: tuple[str, ...] = ()


Content = Text | PromptCompletion | Chat


@dataclass(frozen=True)
class Shape:
    """needs: the columns that tell the shape, in the order in which `make` takes them; takes: others that it uses."""

    kind: str
    needs: tuple[str, ...]
    make: Callable[[Row, "Shape"], Content | Pair]
    takes: tuple[str, ...] = ()
    chats: bool = True  # whether the columns of CONTEXT have a place in it

    @property
    def columns(self) -> set[str]:
        """All columns that are used or obeyed."""
        return {*self.needs, *self.takes, *_SWITCHES, *(CONTEXT if self.chats else ())}


# -- messages ----------------------------------------------------------------------------------------------------


def messages_of(value: object, name: str = "messages") -> list[Message]:
    """Messages in either spelling (role and content, from and value) with texts as contents. A text is read as JSON.

    Raises InputError for what is no list of messages.
    """
    value = _from_json(value, name)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise InputError(f"{name} is not a list of messages")
    return [_message(number, message) for number, message in enumerate(value)]


def _message(number: int, message: object) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(f"message {number} has no role")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        raise InputError(f"message {number} has no role")
    made = {key: value for key, value in message.items() if key not in ("from", "value") and value is not None}
    content = message.get("content", message.get("value"))
    if role == "function_call":  # its content is the call
        role, made["tool_calls"], content = "assistant", _calls(content, number), None
    made["role"] = _ROLES.get(role, role)
    made["content"] = _content(number, content, bool(made.get("tool_calls")))
    return made


def _calls(content: object, number: int) -> list[dict[str, Any]]:
    calls = _from_json(content, f"message {number}")
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise InputError(f"message {number} is a function_call without a name and arguments")
    return [{"type": "function", "function": dict(call)} for call in calls]


def _content(number: int, content: object, calls: bool) -> str:
    """The text of a message: of parts {"type": "text", "text": ...} their texts joined."""
    if content is None:
        if calls:
            return ""
        raise InputError(f"message {number} has no content")
    parts = [content] if isinstance(content, Mapping) else content
    if isinstance(parts, Sequence) and not isinstance(parts, str):
        for part in parts:
            if not isinstance(part, str) and not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise InputError(f"message {number} has a part of the type {kind!r}, and only texts are supported")
        return "".join(part if isinstance(part, str) else part["text"] for part in parts)
    if not isinstance(content, str):
        raise InputError(f"the content of message {number} is a {type(content).__name__}, not a text")
    return content


def _from_json(value: object, name: str) -> Any:
    """Lists and objects of a .csv file are JSON texts."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise InputError(f"{name} is not JSON ({error})") from error


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


# -- columns that any row may have -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Context:
    """The context of a row's turns."""

    turns: tuple[Message, ...] = ()
    tools: tuple[Any, ...] = ()
    variables: Mapping[str, Any] | None = None
    given: bool = False  # whether a column names any, be it an empty one

    @property
    def empty(self) -> bool:
        """Whether there is nothing that only a chat template could write."""
        return not (self.turns or self.tools or self.variables)


def _system(value: object) -> list[Message]:
    return [{"role": "system", "content": string(value, "system")}] if value else []


def _history(value: object) -> list[Message]:
    """Earlier turns: messages, or pairs of a question and its answer."""
    turns = _from_json(value, "history")
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise InputError("history is not a list of turns")
    if turns and isinstance(turns[0], Mapping):
        return messages_of(turns, "history")
    made = []
    for turn in turns:
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise InputError("a turn of history is no pair of a question and its answer")
        made += [_user(string(turn[0], "history")), _assistant(string(turn[1], "history"))]
    return made


# Column -> the messages that it puts before the row's own.
_TURNS: dict[str, Callable[[Any], list[Message]]] = {
    "system": _system,
    "system_prompt": _system,
    "history": _history,
}
CONTEXT = (*_TURNS, "tools", "chat_template_kwargs")


def _context(row: Row) -> Context:
    turns = [message for name, read in _TURNS.items() if row.get(name) is not None for message in read(row[name])]
    tools = _from_json(row.get("tools") or [], "tools")
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise InputError("tools is not a list of tools")
    variables = _from_json(row.get("chat_template_kwargs") or None, "chat_template_kwargs")
    if variables is not None and not isinstance(variables, Mapping):
        raise InputError("chat_template_kwargs is not an object")
    given = any(row.get(name) is not None for name in CONTEXT)
    return Context(tuple(turns), tuple(_from_json(tool, "tools") for tool in tools), variables, given)


def _learnt(value: object, name: str) -> bool:
    """Whether a switch is on. Raises InputError for a weight that is neither 0 nor 1: losses have no weights."""
    if value is None or value in (0, 1):
        return value is None or bool(value)
    if isinstance(value, str) and value.lower() in ("true", "false", "0", "1"):
        return value.lower() in ("true", "1")
    raise InputError(f"{name} is {value!r}, and only 0 and 1 are supported (not learnt, and learnt)")


def _is_verdict(value: object) -> bool:
    return value in (0, 1) or (isinstance(value, str) and value.lower() in ("true", "false"))


def _check_row(row: Row, shape: Shape) -> None:
    """Refuses a row whose other columns say something that cannot be obeyed."""
    for name in _SWITCHES:
        if not _learnt(row.get(name), name):
            raise InputError(f"its {name} is {row[name]!r}")
    if "label" not in shape.columns and shape.chats and row.get("label") is not None and _is_verdict(row["label"]):
        raise InputError(
            "a label beside one answer says whether that is good (KTO), which is not supported: keep the rows whose "
            "label is true without that column, or pair answers as chosen and rejected"
        )
    for name in ("images", "image", "audio", "audios", "video", "videos"):
        if row.get(name):
            raise InputError(f"it has {name}, and the models here read text alone")


# -- shapes ------------------------------------------------------------------------------------------------------


def string(value: object, name: str) -> str:
    """The value, if it is a text. Raises InputError."""
    if not isinstance(value, str):
        raise InputError(f"{name} is a {type(value).__name__}, not a text")
    return value


def alpaca(instruction: str, context: str = "") -> str:
    """The prompt of the Alpaca data set."""
    return _ALPACA.format(
        paired=", paired with an input that provides further context" if context else "",
        instruction=instruction,
        context=f"### Input:\n{context}\n\n" if context else "",
    )


def _chat(
    context: Context, turns: Sequence[Message], first: int = 0, otherwise: PromptCompletion | None = None
) -> Chat:
    """A chat of the context's turns and a row's own; `first` counts the latter. Switches of messages are taken out."""
    before = list(context.turns)
    if before and turns and before[0]["role"] == turns[0]["role"] == "system":
        if before[0] != turns[0]:
            raise InputError("its column system and its messages have different system prompts")
        del before[0]
    kept, silent = [], set[int]()
    for number, message in enumerate([*before, *turns]):
        if not all(_learnt(message.get(name), f"{name} of message {number}") for name in _SWITCHES):
            silent.add(number)
        kept.append({key: value for key, value in message.items() if key not in _SWITCHES})
    start = len(before) + first if first else 0
    left = otherwise if context.empty else None
    return Chat(tuple(kept), start, frozenset(silent), context.tools, context.variables, left)


def _answered(
    row: Row, prompt: str | Sequence[Message], answer: object, name: str, text: str | None = None, alone: bool = False
) -> PromptCompletion | Chat:
    """One answer to a prompt: texts that continue each other, or a chat where either is messages or a context is given.

    text: the prompt as a text, where that is another than a user would say. alone: no answer of the history is learnt.
    """
    context = _context(row)
    spoken = _is_messages(answer)
    if isinstance(prompt, str) and not spoken:
        plain = PromptCompletion(prompt if text is None else text, string(answer, name))
        if not context.given:
            return plain
        return _chat(context, [_user(prompt), _assistant(plain.answer)], int(alone), plain)
    before = [_user(prompt)] if isinstance(prompt, str) else list(prompt)
    after = messages_of(answer, name) if spoken else [_assistant(string(answer, name))]
    return _chat(context, [*before, *after], len(before))


def _is_messages(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _text(row: Row, shape: Shape) -> Content:
    return Text(string(row[shape.needs[0]], shape.needs[0]))


def _messages(row: Row, shape: Shape) -> Content:
    return _chat(_context(row), messages_of(row[shape.needs[0]], shape.needs[0]))


def _completion(row: Row, shape: Shape) -> Content:
    prompt, answer = shape.needs
    asked = row[prompt]
    return _answered(
        row, messages_of(asked, prompt) if _is_messages(asked) else string(asked, prompt), row[answer], answer
    )


def _instruction(row: Row, shape: Shape) -> Content:
    asked, answer = shape.needs
    said, text = _instructed(row, asked, shape.takes)
    return _answered(row, said, row[answer], answer, text)


def _instructed(row: Row, asked: str, contexts: Sequence[str]) -> tuple[str, str]:
    """An instruction with its context as a user says it, and as Alpaca's prompt."""
    instruction = string(row[asked], asked)
    context = next((string(row[name], name) for name in contexts if row.get(name)), "")
    return f"{instruction}\n\n{context}" if context else instruction, alpaca(instruction, context)


_ASKED = ("question", "instruction")  # of a preference, in place of prompt


def _preference(row: Row, shape: Shape) -> Pair:
    given = [_from_json(row[name], name) for name in shape.needs]
    notes: tuple[str, ...] = ()
    if all(isinstance(answer, str) for answer in given):
        prompt, text = _asked(row)
        if prompt is None:
            prompt = _shared_text(*given)
            given = [answer[len(prompt) :] for answer in given]
        elif isinstance(prompt, str) and len(prompt) >= _LONG and all(answer.startswith(prompt) for answer in given):
            notes = ("both answers begin with the prompt, which is then there twice: leave that column out if so",)
    elif all(_is_messages(answer) for answer in given):
        said = [messages_of(answer, name) for answer, name in zip(given, shape.needs, strict=True)]
        prompt, text = _asked(row)
        prompt, given, notes = _without_prompt(prompt, said)
    else:
        kinds = " and ".join(type(answer).__name__ for answer in given)
        raise InputError(f"chosen and rejected are {kinds}, not both texts or both lists of messages")
    chosen, rejected = (
        _answered(row, prompt, answer, name, text, True) for answer, name in zip(given, shape.needs, strict=True)
    )
    return Pair(chosen, rejected, notes)


def _asked(row: Row) -> tuple[str | list[Message] | None, str | None]:
    """The prompt of a preference, and its text where that is another than a user would say."""
    prompt = _from_json(row.get("prompt"), "prompt")
    if _is_messages(prompt):
        return (messages_of(prompt, "prompt") if prompt else []), None
    if prompt is not None:
        return string(prompt, "prompt"), None
    asked = next((name for name in _ASKED if row.get(name) is not None), None)
    return (None, None) if asked is None else _instructed(row, asked, ("input", "context"))


def _without_prompt(
    prompt: str | list[Message] | None, said: list[list[Message]]
) -> tuple[list[Message], list[list[Message]], tuple[str, ...]]:
    """Prompt and answers of two lists of messages, which may hold the prompt as well (TRL's implicit prompt)."""
    asked = [_user(prompt)] if isinstance(prompt, str) and prompt else list(prompt or ())
    if asked and all(one[: len(asked)] == asked and len(one) > len(asked) for one in said):
        return asked, [one[len(asked) :] for one in said], ()
    if said[0][0]["role"] == "assistant" or (asked and asked[-1]["role"] == "assistant"):
        return asked, said, ()
    most = min(map(len, said)) - 1
    shared = next((i for i in range(most) if said[0][i] != said[1][i]), most)
    if shared == 0:
        raise InputError("chosen and rejected are conversations that begin differently, so they have no common prompt")
    before = said[0][:shared]
    texts = {message["content"].strip() for message in before}
    notes = ("prompt is not used: chosen and rejected are conversations that begin with another one",)
    known = texts.issuperset(message["content"].strip() for message in asked)
    return before, [one[shared:] for one in said], () if known else notes


def _shared_text(one: str, other: str) -> str:
    """Returns the common beginning of both texts, up to the space before the first difference."""
    count = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[: count - 1 if one[count - 1 : count] == " " else count]


# The first shape whose columns a row has, and that the task takes, is its shape.
SHAPES = (
    Shape("preference", ("chosen", "rejected"), _preference, ("prompt", *_ASKED, "input", "context")),
    Shape("messages", ("messages",), _messages),
    Shape("conversations", ("conversations",), _messages),
    Shape("conversation", ("conversation",), _messages),
    Shape("completion", ("prompt", "completion"), _completion),
    Shape("response", ("prompt", "response"), _completion),
    Shape("instruction", ("instruction", "output"), _instruction, ("input", "context")),
    Shape("dolly", ("instruction", "response"), _instruction, ("context", "input")),
    Shape("question", ("question", "answer"), _instruction, ("context",)),
    Shape("question and response", ("question", "response"), _instruction, ("context",)),
    Shape("query", ("query", "response"), _instruction),
    Shape("input", ("input", "output"), _instruction),
    Shape("classification", ("text", "label"), _text, chats=False),
    Shape("text", ("text",), _text, chats=False),
)
PREFERENCE, CLASSIFICATION, TEXT = "preference", "classification", "text"
CONTINUED = frozenset(shape.kind for shape in SHAPES) - {PREFERENCE, CLASSIFICATION}


def shape_of(row: Row, kinds: Collection[str] | None = None) -> Shape:
    """The shape of a row, of those of `kinds` if given. Raises InputError naming the columns of one that has none."""
    possible = [shape for shape in SHAPES if kinds is None or shape.kind in kinds]
    filled = {name for name, value in row.items() if value is not None}
    for columns in (filled, set(row)):
        for shape in possible:
            if columns.issuperset(shape.needs):
                return shape
    others = next((shape.kind for shape in SHAPES if filled.issuperset(shape.needs)), None)
    hint = f"is a {others} row, which is for another task" if others else "is of no known shape"
    known = ", ".join(" + ".join(shape.needs) for shape in possible)
    raise InputError(
        f"a row with the keys {sorted(row)} {hint}; known are {known} (columns= or --columns maps other names to these)"
    )


def content_of(row: Row, shape: Shape) -> Content | Pair:
    """Parses a row of this shape. Raises InputError where it cannot be used, or says what cannot be obeyed."""
    _check_row(row, shape)
    if not shape.chats and (lost := [name for name in CONTEXT if row.get(name)]):
        raise InputError(f"it has {lost[0]} beside a text, where that has no place")
    return shape.make(row, shape)
