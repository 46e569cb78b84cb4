"""Messages to prompt ids, and functions that a model may call: told in the prompt, held to by a grammar.

Template text and message text are encoded apart, so nothing in a message becomes a control token, and the template
alone places BOS. A call is written as {"name": ..., "arguments": ...} in one fixed layout, which a model keeps because
it cannot write anything else.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from llama2.errors import TokenizerError
from llama2.serve.constraint import Constraint, style_of
from llama2.serve.errors import Refusal
from llama2.serve.numbers import FIRST_FAULT
from llama2.serve.proof import MAX_SOURCE
from llama2.serve.roles import legal, merged
from llama2.serve.schema import moved, prepared, without_notes
from llama2.serve.served_model import TextModel
from llama2.serve.tool_calls import JSON, LLAMA3, CallReader, ToolDialect, call_grammar, hidden_marks
from llama2.serve.validation import Body, Text
from llama2.tokenizer import marks

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

    @model_validator(mode="before")
    @classmethod
    def _older(cls, given: Any) -> Any:
        """A call as OpenAI's first API of functions has it, one a turn and without an id."""
        if isinstance(given, dict) and isinstance(call := given.get("function_call"), dict):
            calls = given.get("tool_calls") or [{"id": "call_0", "type": "function", "function": call}]
            return {**given, "tool_calls": calls}
        return given

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
    description: str | None = Field(None, max_length=65_536)
    strict: bool | None = None
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
    """Functions, whether one must be called, and how the model writes calls.

    several: whether an answer may hold more than one call. marks: ids of the dialect's marks that are control tokens.
    hidden: texts of control tokens that an answer shows none of, where the marks' have to be shown to be read.
    """

    functions: tuple[Function, ...] = ()
    choice: Choice = "none"
    dialect: ToolDialect = JSON
    several: bool = False
    marks: Mapping[str, int] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()

    @property
    def active(self) -> bool:
        """Whether the answer may be a call."""
        return self.choice != "none" and bool(self.functions)

    def reader(self) -> CallReader:
        """Reads one answer."""
        takes = {f.name: f.takes for f in self.functions}
        return CallReader(self.dialect, takes, self.hidden, takes)

    def constraint(self, form: Constraint | None = None) -> Constraint:
        """A grammar of calls, or with "auto" also of any other text, or of a form that other answers have."""
        functions, warnings = [], list[str]()
        for function in self.functions:
            strict = bool(function.strict)
            schema, told = prepared(without_notes(function.takes), strict)
            functions.append((function.name, json.dumps({**schema, "x-guidance": style_of(strict)})))
            warnings += [f"tool {function.name}: {warning}" for warning in told]
        rules = call_grammar(self.dialect, functions, self.several, dict(self.marks))
        if self.choice == "required":
            rules.insert(0, "start: calls")
        elif form is not None and form.kind == "json" and self.dialect.bare and self.dialect.form == "json":
            # One schema for both: a lexer that has read `{"` for a call does not go back to read it as a key.
            takes = [(name, json.loads(schema)) for name, schema in functions]
            rules = [f"start: %json {json.dumps(call_or_form(takes, self.dialect.key, json.loads(form.source)))}"]
            warnings += form.warnings
        elif form is not None:
            rules[:0] = ["start: calls | form", f"form: {_embedded(form)}"]
            warnings += form.warnings
        else:
            rules[:0] = self._free_text()
        source = "\n".join(rules)
        if len(source) > MAX_SOURCE:
            raise Refusal(
                "tool", f"the tools have {len(source)} characters of schemas; {MAX_SOURCE} are the most", "tools"
            )
        return Constraint("lark", source, warnings=tuple(warnings[:16]))

    def _free_text(self) -> list[str]:
        """Calls or any text that is none; in front of marks there may be text, too."""
        if self.dialect.bare:
            marked = "".join(f" | <[{token}]> calls" for mark, token in self.marks.items())
            first = "[" if self.dialect.form == "python" else "{"
            return [f"start: calls | TEXT{marked}", rf"TEXT: /[ \n\t]*[^{re.escape(first)} \n\t](.|\n)*/"]
        mark = self.dialect.opening[0]
        other = "" if mark in self.marks else rf" & ~/(.|\n)*{re.escape(mark)}(.|\n)*/"
        return ["start: TEXT | calls | TEXT calls", rf"TEXT: /(.|\n)+/{other}"]

    def instruction(self) -> str:
        """Returns the instruction for a model whose template knows no tools."""
        told = [{"name": f.name, "description": f.description or "", "parameters": f.takes} for f in self.functions]
        rule = "Answer with nothing but" if self.choice == "required" else "To call one, answer with nothing but"
        more = " Write one call per line." if self.several else ""
        return (
            f"You can call these functions:\n{json.dumps(told, ensure_ascii=False)}\n"
            f'{rule} JSON of the form {{"name": <function>, "arguments": <its arguments>}}.{more}'
        )


def call_or_form(functions: Sequence[tuple[str, Any]], key: str, form: Any) -> dict[str, Any]:
    """A schema of one call, or of what fits a form. functions: names and schemas of what they take."""
    parts = {f"f{i}": schema for i, (_, schema) in enumerate(functions)} | {"form": form}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, key: {"$ref": f"#/$defs/f{i}"}},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for i, (name, _) in enumerate(functions)
    ]
    defined = {name: moved(schema, f"#/$defs/{name}") for name, schema in parts.items()}
    return {"anyOf": [*calls, {"$ref": "#/$defs/form"}], "$defs": defined, "x-guidance": style_of(False)}


def _embedded(form: Constraint) -> str:
    """The right side of a rule for a form. Raises Refusal for a grammar of several rules."""
    if form.kind == "json":
        return f"%json {json.dumps({**json.loads(form.source), 'x-guidance': style_of(form.strict)})}"
    if form.kind == "regex":
        return "/" + re.sub(r"(?<!\\)/", r"\/", form.source) + "/"
    if form.source.startswith("start:") and "\n" not in form.source:
        return form.source.removeprefix("start:").strip()
    raise Refusal("tool", "tools and a grammar of several rules exclude each other; send one of them", "tools")


def chosen(
    tools: Sequence[Tool] | None, choice: Any, parallel: bool | None = None, model: TextModel | None = None
) -> Tools:
    """The tools of a request. choice: none, auto, required, a function's name, or an object that names one or several.

    parallel: whether an answer may hold several calls; None leaves that to the model where its template knows tools.
    """
    functions = tuple(tool.function for tool in tools or ())
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        functions, choice = _allowed(functions, choice)
    elif isinstance(choice, Mapping):
        named = choice.get("function")
        choice = named.get("name") if isinstance(named, Mapping) else named or choice.get("name")
        if not isinstance(choice, str):
            raise Refusal("tool", "tool_choice must name a function: {'type': 'function', 'function': {'name': ...}}")
    choice = ("auto" if functions else "none") if choice is None else "required" if choice == "any" else choice
    dialect, marks, hidden = JSON, dict[str, int](), ()
    if model is not None and functions:
        dialect = model.tool_dialect
        marks = hidden_marks(model.tokenizer, dialect)
        hidden = tuple(model.tokenizer.special_contents) if marks else ()
    several = dialect is not JSON if parallel is None else parallel
    if choice in ("auto", "none"):
        return Tools(functions, choice, dialect, several, marks, hidden)
    if not functions:
        raise Refusal("tool", f"tool_choice is {choice!r} but the request has no tools; add them", "tool_choice")
    if choice == "required":
        return Tools(functions, "required", dialect, several, marks, hidden)
    picked = tuple(f for f in functions if f.name == choice)
    if not picked:
        known = ", ".join(f.name for f in functions)
        raise Refusal(
            "tool", f"tool_choice names {choice[:64]!r}, which is not among the tools: {known[:500]}", "tool_choice"
        )
    return Tools(picked, "required", dialect, False, marks, hidden)


def _allowed(functions: tuple[Function, ...], choice: Mapping[str, Any]) -> tuple[tuple[Function, ...], str]:
    """The functions that tool_choice allows, and its mode. Raises Refusal for one that is not among the tools."""
    inner = choice.get("allowed_tools")
    given = inner if isinstance(inner, Mapping) else choice
    names = []
    for tool in given.get("tools") or ():
        function = tool.get("function") if isinstance(tool, Mapping) else None
        names.append(function.get("name") if isinstance(function, Mapping) else dict(tool).get("name"))
    mode = given.get("mode", "auto")
    known = {function.name for function in functions}
    if wrong := [name for name in names if name not in known]:
        raise Refusal("tool", f"tool_choice allows {str(wrong[0])[:64]!r}, which is not among the tools", "tool_choice")
    if not names or mode not in ("auto", "required"):
        raise Refusal("tool", "allowed_tools needs tools and a mode, auto or required", "tool_choice")
    return tuple(f for f in functions if f.name in names), mode


def prompt_ids(
    model: TextModel,
    messages: Sequence[Message],
    tools: Tools,
    continues: bool,
    variables: Mapping[str, Any] | None = None,
    warnings: list[str] | None = None,
) -> tuple[int, ...]:
    """The ids of a conversation whose next words are the model's; with `continues` they go on with the last message.

    variables: further ones of the template. warnings: receives what was changed. Raises Refusal where there is no
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
    if model.tool_dialect is LLAMA3:
        chat = _one_call_a_turn(chat)
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
    model: TextModel,
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
            entry: dict[str, Any] = {"role": "tool" if role == "function" else role, "content": text}
            entry |= {"tool_calls": [_as_mapping(call) for call in message.tool_calls]} if message.tool_calls else {}
            entry |= {"tool_call_id": message.tool_call_id} if message.tool_call_id else {}
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


def _as_mapping(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call as templates take it: its arguments a mapping, where a client has them as JSON text."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(text := function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}}


def _one_call_a_turn(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A chat in which every turn has one call, with its result behind it, for templates that take no more."""
    found, waiting = list[dict[str, Any]](), list[dict[str, Any]]()
    for message in chat:
        if message["role"] in ("tool", "function", "ipython") and waiting:
            found += [waiting.pop(0), message]
            continue
        found += waiting
        calls = message.get("tool_calls") or ()
        if len(calls) > 1:
            waiting = [{**message, "content": message["content"] if not i else "", "tool_calls": [call]}
                       for i, call in enumerate(calls)]  # fmt: skip
        else:
            waiting = []
            found.append(message)
    return found + waiting


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
