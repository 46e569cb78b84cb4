"""Messages to prompt ids, and functions that a model may call: told in the prompt, held to by a grammar.

Template text and message text are encoded apart, so nothing in a message becomes a control token, and the template
alone places BOS. A call is written as {"name": ..., "arguments": ...} in one fixed layout, which a model keeps because
it cannot write anything else.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from llama2.errors import TokenizerError
from llama2.serve.constraint import Constraint, style_of
from llama2.serve.errors import Refusal
from llama2.serve.numbers import FIRST_FAULT
from llama2.serve.proof import MAX_SOURCE
from llama2.serve.roles import legal, merged
from llama2.serve.served_model import ServedModel
from llama2.serve.validation import Body, Text
from llama2.tokenizer import marks

_PREFIX = re.compile(r'\s*\{"name": "([^"]+)", "arguments": ')
Choice = Literal["auto", "none", "required"]
MERGED = "the messages do not alternate as this model's template wants them, and were merged into a dialogue that does"
# What `apply_chat_template` takes that is no variable of the template.
_RESERVED = frozenset((
    "conversation", "chat", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "safe", "bos_token", "eos_token", "unk_token", "pad_token",
))  # fmt: skip


class Part(Body):
    """One part of a message: text."""

    open_ended: ClassVar[bool] = True
    type: str
    text: Text | None = None


class Message(Body):
    """One message. What clients send back of earlier answers beside its text and calls is ignored."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[Part], FIRST_FAULT] | None = None
    name: str | None = Field(None, max_length=256)
    tool_calls: Annotated[list[dict[str, Any]], FIRST_FAULT] | None = None
    tool_call_id: str | None = Field(None, max_length=256)

    def text(self) -> str:
        """Its text. Raises Refusal for a part that is not text."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        for part in self.content:
            if part.type != "text" or part.text is None:
                raise Refusal(
                    "validation", f"a message has a part of type {part.type[:40]!r}; this model reads text only"
                )
        return "\n".join(part.text or "" for part in self.content)


class Function(Body):
    """A function that the model may call."""

    model_config = ConfigDict(extra="ignore")
    name: str = Field(pattern=r"^[a-zA-Z0-9_.\-]{1,64}$")
    description: str | None = Field(None, max_length=8192)
    parameters: dict[str, Any] | None = None
    arguments: dict[str, Any] | None = None  # TGI's name for the parameters

    @property
    def takes(self) -> dict[str, Any]:
        """The JSON schema of its arguments."""
        return self.parameters or self.arguments or {"type": "object", "properties": {}}


class Tool(Body):
    """A tool; functions are the only ones."""

    type: Literal["function"]
    function: Function


@dataclass(frozen=True)
class Tools:
    """Functions and whether one must be called."""

    functions: tuple[Function, ...] = ()
    choice: Choice = "none"

    @property
    def active(self) -> bool:
        """Whether the answer may be a call."""
        return self.choice != "none" and bool(self.functions)

    def constraint(self) -> Constraint:
        """A grammar of exactly one call, or with "auto" also of any text that does not begin with a brace."""
        rules = [f"call: {' | '.join(f'call{i}' for i in range(len(self.functions)))}"]
        for i, function in enumerate(self.functions):
            before = json.dumps(f'{{"name": "{function.name}", "arguments": ')
            schema = json.dumps({**function.takes, "x-guidance": style_of(False)})
            rules += [f'call{i}: {before} arguments{i} "}}"', f"arguments{i}: %json {schema}"]
        start = "start: call"
        if self.choice == "auto":
            start += " | TEXT"
            rules.append(r"TEXT: /[ \n\t]*[^{ \n\t](.|\n)*/")
        source = "\n".join([start, *rules])
        if len(source) > MAX_SOURCE:
            raise Refusal(
                "tool", f"the tools have {len(source)} characters of schemas; {MAX_SOURCE} are the most", "tools"
            )
        return Constraint("lark", source)

    def instruction(self) -> str:
        """What tells a model whose template knows no tools."""
        told = [{"name": f.name, "description": f.description or "", "parameters": f.takes} for f in self.functions]
        rule = "Answer with nothing but" if self.choice == "required" else "To call one, answer with nothing but"
        return (
            f"You can call these functions:\n{json.dumps(told, ensure_ascii=False)}\n"
            f'{rule} JSON of the form {{"name": <function>, "arguments": <its arguments>}}.'
        )


def chosen(tools: Sequence[Tool] | None, choice: Any) -> Tools:
    """The tools of a request. choice: none, auto, required, a function's name, or an object that names one."""
    functions = tuple(tool.function for tool in tools or ())
    if isinstance(choice, Mapping):
        named = choice.get("function")
        choice = named.get("name") if isinstance(named, Mapping) else named
        if not isinstance(choice, str):
            raise Refusal("tool", "tool_choice must name a function: {'type': 'function', 'function': {'name': ...}}")
    if choice is None:
        return Tools(functions, "auto" if functions else "none")
    if choice in ("auto", "none"):
        return Tools(functions, choice)
    if not functions:
        raise Refusal("tool", f"tool_choice is {choice!r} but the request has no tools; add them", "tool_choice")
    if choice == "required":
        return Tools(functions, "required")
    picked = tuple(f for f in functions if f.name == choice)
    if not picked:
        known = ", ".join(f.name for f in functions)
        raise Refusal(
            "tool", f"tool_choice names {choice[:64]!r}, which is not among the tools: {known}", "tool_choice"
        )
    return Tools(picked, "required")


def prompt_ids(
    model: ServedModel,
    messages: Sequence[Message],
    tools: Tools,
    continues: bool,
    variables: Mapping[str, Any] | None = None,
    warnings: list[str] | None = None,
) -> tuple[int, ...]:
    """The ids of a conversation whose next words are the model's; with `continues` they go on with the last message.

    variables: further ones of the template. warnings: hears of what was changed. Raises Refusal where there is no
    template or it refuses the messages.
    """
    tokenizer = model.tokenizer
    if not messages:
        raise Refusal("validation", "messages is empty; give at least one", "messages")
    if all(message.role in ("system", "developer") for message in messages):
        raise Refusal(
            "validation", "messages has system messages only, which nobody has to answer; add a user's", "messages"
        )
    if tokenizer.chat_template is None:
        raise Refusal(
            "template", "this model has no chat template; use a completions route, or start with --chat-template llama2"
        )
    source = tokenizer.get_chat_template()
    native = tools.active and "tools" in source
    chat = _plain(messages, "tool_calls" in source)
    if tools.active and not native:
        chat = _instructed(chat, tools.instruction())
    told = [] if warnings is None else warnings
    if not model.policy.strict_roles and model.alternates and _mergeable(chat) and not legal(chat):
        chat = merged(chat)
        told.append(MERGED)
    shown = [{"type": "function", "function": f.model_dump(exclude_none=True)} for f in tools.functions]
    try:
        ids = tokenizer.apply_chat_template(
            chat,
            tools=shown if native else None,
            add_generation_prompt=not continues,
            continue_final_message=continues,
            return_dict=False,
            safe=True,
            truncation=False,
            **_variables(tokenizer, variables or {}),
        )
    except TokenizerError as error:
        raise Refusal("template", str(error), "messages") from None
    return tuple(ids)


def fitting_ids(
    model: ServedModel,
    messages: Sequence[Message],
    tools: Tools,
    continues: bool,
    room: int | None,
    variables: Mapping[str, Any] | None = None,
    warnings: list[str] | None = None,
) -> tuple[int, ...]:
    """As `prompt_ids`, without as many of the oldest turns as it takes to stay within `room` tokens; None for no bound.

    System messages and the last turn stay. Where that is still too much, so are the ids.
    """
    told = [] if warnings is None else warnings
    ids = prompt_ids(model, messages, tools, continues, variables, told)
    if room is None or len(ids) <= room:
        return ids
    starts = [i for i, message in enumerate(messages) if message.role == "user"][1:]  # where a chat may begin anew
    if not starts:
        return ids
    system = [message for message in messages if message.role in ("system", "developer")]

    def shorter(start: int) -> tuple[int, ...]:
        rest = [message for message in messages[start:] if message.role not in ("system", "developer")]
        return prompt_ids(model, [*system, *rest], tools, continues, variables)

    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(shorter(starts[middle])) <= room else (middle + 1, high)
    told.append(f"the conversation was too long; its oldest {starts[low]} messages were left out")
    return shorter(starts[low])


def _mergeable(chat: Sequence[Mapping[str, Any]]) -> bool:
    """Whether turns are text only: calls and their results have rules of their own."""
    return all(message["role"] in ("system", "user", "assistant") and "tool_calls" not in message for message in chat)


def _variables(tokenizer: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of the template that a request may set. Raises Refusal for those that could become control tokens."""
    risky = marks.risky(tokenizer.special_contents)
    for name, value in given.items():
        if not name.isidentifier() or name in _RESERVED:
            raise Refusal("template", f"chat_template_kwargs may not set {name[:40]!r}", "chat_template_kwargs")
        if any(risky(text) for text in marks.strings(value)):
            raise Refusal(
                "template", f"chat_template_kwargs.{name[:40]} holds a control token of this model; drop it",
                "chat_template_kwargs",
            )  # fmt: skip
    return dict(given)


def _plain(messages: Sequence[Message], knows_calls: bool) -> list[dict[str, Any]]:
    """Messages as templates take them; for one that knows no calls, calls and their results become text."""
    found: list[dict[str, Any]] = []
    joins = False  # what comes next to the result of a call: one turn
    for message in messages:
        role, text = message.role, message.text()
        role = "system" if role == "developer" else role
        if knows_calls:
            entry: dict[str, Any] = {"role": role, "content": text}
            entry |= {"tool_calls": message.tool_calls} if message.tool_calls else {}
            found.append(entry | ({"name": message.name} if message.name else {}))
            continue
        if message.tool_calls:
            text = "\n".join([*([text] if text else []), *map(_call_text, message.tool_calls)])
        is_result = role in ("tool", "function")
        if is_result:
            role, text = "user", f"Result of the function{f' {message.name}' if message.name else ''}:\n{text}"
        if found and role == found[-1]["role"] == "user" and (joins or is_result):
            found[-1]["content"] += f"\n\n{text}"
        else:
            found.append({"role": role, "content": text})
        joins = is_result
    return found


def _call_text(call: Mapping[str, Any]) -> str:
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise Refusal("tool", "a tool call in messages has no function; send it back as it was answered", "messages")
    arguments = function.get("arguments", "{}")
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'{{"name": {json.dumps(function.get("name"))}, "arguments": {arguments}}}'


def _instructed(chat: list[dict[str, Any]], instruction: str) -> list[dict[str, Any]]:
    if chat and chat[0]["role"] == "system":
        return [{**chat[0], "content": f"{chat[0]['content']}\n\n{instruction}"}, *chat[1:]]
    return [{"role": "system", "content": instruction}, *chat]


class CallReader:
    """Splits an answer's text, as it comes, into what is said and the call that is made."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._text, self._held, self._called = False, "", False

    def put(self, piece: str) -> tuple[str, str]:
        """The text to say and the arguments to add; `name` is set once a call has begun."""
        if self._text:
            return piece, ""
        self._held += piece
        if self.name is None:
            found = _PREFIX.match(self._held)
            if found is None:
                return self._undecided()
            self.name, self._held = found[1], self._held[found.end() :]
        told, self._held = self._held[:-1], self._held[-1:]  # the last brace closes the call, not its arguments
        return "", told

    def _undecided(self) -> tuple[str, str]:
        start = self._held.lstrip()
        if not start or start.startswith("{"):
            return "", ""
        self._text, held, self._held = True, self._held, ""
        return held, ""

    def finish(self, complete: bool) -> tuple[str, str]:
        """What was held back, at the end; complete: whether the model ended by itself."""
        held, self._held = self._held, ""
        if self.name is None:
            return held, ""
        return "", "" if complete else held
