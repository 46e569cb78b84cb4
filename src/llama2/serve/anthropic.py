"""Anthropic's Messages API: /v1/messages and its count of tokens.

A body becomes that of a chat. Turns of one role in a row are one turn; results of functions come before the rest of
their turn; a last turn of the assistant is gone on with. What thinking, caching, metadata and tiers say is read and
changes nothing here; tools that Anthropic's own servers run are left out, so that a model never calls one.
"""

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from starlette.responses import JSONResponse, Response

from llama2.engine.engine import TokenEvent
from llama2.serve import openai_chat, sse
from llama2.serve.dialect import Dialect, Route, post
from llama2.serve.errors import KINDS, Refusal
from llama2.serve.numbers import FIRST_FAULT, MAX_COUNT, PositiveShare, Temperature
from llama2.serve.request import GenerationRequest
from llama2.serve.service import RouteCall
from llama2.serve.session import Session
from llama2.serve.turn import FunctionCall, ModelTurn
from llama2.serve.validation import Body, Text, Texts

_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip
_OVERLOADED = ("busy", "starting", "closing")
_PER_REQUEST = "x-anthropic-billing-header"  # a block that is new in every request: nothing behind it could be cached
_TEXTLESS = ("thinking", "redacted_thinking")


class Block(Body):
    """One part of a message. What belongs to other types of parts is not looked at."""

    model_config = ConfigDict(extra="ignore")
    type: str = Field(max_length=64)
    text: Text | None = None
    id: str | None = Field(None, max_length=256)
    name: str | None = Field(None, max_length=256)
    input: dict[str, Any] | None = None
    tool_use_id: str | None = Field(None, max_length=256)
    content: Any = None
    is_error: bool | None = None


Blocks = Annotated[list[Block], FIRST_FAULT]
_BLOCKS: TypeAdapter[list[Block]] = TypeAdapter(Blocks)


class AnthropicMessage(Body):
    """One message."""

    role: str = Field(max_length=32)
    content: Text | Blocks


class AnthropicTool(Body):
    """A function, or a tool that Anthropic's servers run."""

    model_config = ConfigDict(extra="ignore")
    name: str = Field(max_length=256)
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class ToolChoice(Body):
    """tool_choice."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Body):
    """The form of an answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """output_config."""

    format: OutputFormat | None = None
    effort: str | None = None
    task_budget: Any = None


class CountBody(Body):
    """The body of /v1/messages/count_tokens."""

    model: str = Field(max_length=512)
    messages: Annotated[list[AnthropicMessage], FIRST_FAULT] = Field(min_length=1)
    system: Text | Blocks | None = None
    tools: Annotated[list[AnthropicTool], FIRST_FAULT] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    thinking: Any = None
    cache_control: Any = None
    context_management: Any = None
    mcp_servers: Any = None

    def fields(self) -> dict[str, Any]:
        """The body of a chat. Raises Refusal."""
        found: dict[str, Any] = {"model": self.model, "messages": [*self._system(), *self._turns()]}
        form = (self.output_config.format if self.output_config else None) or self.output_format
        if form is not None:
            schema = {"name": "output", "schema": form.schema_}
            found["response_format"] = {"type": "json_schema", "json_schema": schema}
        functions = [tool for tool in self.tools or () if tool.type in (None, "custom")]
        if functions:
            found["tools"] = [_function(tool) for tool in functions]
        if (choice := self.tool_choice) is not None:
            named = {"type": "function", "function": {"name": choice.name}}
            found["tool_choice"] = {"any": "required", "tool": named}.get(choice.type, choice.type)
            if choice.disable_parallel_tool_use is not None and functions:
                found["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        return found

    def _system(self) -> list[dict[str, Any]]:
        if not self.system:
            return []
        blocks = [self.system] if isinstance(self.system, str) else [_text(block) for block in self.system]
        kept = [text for text in blocks if text and not text.startswith(_PER_REQUEST)]
        return [{"role": "system", "content": "\n\n".join(kept)}] if kept else []

    def _turns(self) -> list[dict[str, Any]]:
        names: dict[str, str] = {}
        found: list[dict[str, Any]] = []
        for message in self.messages:
            role = message.role if message.role in ("assistant", "system") else "user"
            for turn in _plain(role, message.content, names):
                before = found[-1] if found else {}
                merges = before.get("role") == turn["role"] in ("user", "assistant") and "tool_calls" not in before
                if merges:
                    before["content"] = "\n\n".join(text for text in (before["content"], turn["content"]) if text)
                    before |= {"tool_calls": turn["tool_calls"]} if "tool_calls" in turn else {}
                else:
                    found.append(turn)
        return found


class MessagesBody(CountBody):
    """The body of /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    stop_sequences: Texts | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: PositiveShare | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None
    metadata: Any = None
    service_tier: Any = None
    container: Any = None
    inference_geo: Any = None
    speed: Any = None

    def fields(self) -> dict[str, Any]:
        """The body of a chat. Raises Refusal."""
        found = super().fields() | {"max_tokens": self.max_tokens, "stream": bool(self.stream)}
        for name in ("temperature", "top_p", "top_k"):
            found |= {} if getattr(self, name) is None else {name: getattr(self, name)}
        return found | ({"stop": self.stop_sequences} if self.stop_sequences else {})


def _function(tool: AnthropicTool) -> dict[str, Any]:
    found: dict[str, Any] = {"name": tool.name}
    found |= {"description": tool.description} if tool.description else {}
    return {"type": "function", "function": found | ({"parameters": tool.input_schema} if tool.input_schema else {})}


def _text(block: Block) -> str:
    if block.type == "text" and block.text is not None:
        return block.text
    raise Refusal("validation", f"a part of type {block.type[:40]!r}; this model reads text only", "messages")


def _plain(role: str, content: str | list[Block], names: dict[str, str]) -> list[dict[str, Any]]:
    """One message as turns of OpenAI's; names: of the calls so far, by their ids. Raises Refusal."""
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    texts, calls, results = [], [], []
    for block in content:
        if block.type == "tool_use" and block.name:
            identity = block.id or f"toolu_{len(names)}"
            names[identity] = block.name
            function = {"name": block.name, "arguments": json.dumps(block.input or {})}
            calls.append({"id": identity, "type": "function", "function": function})
        elif block.type == "tool_result":
            identity = block.tool_use_id or ""
            result: dict[str, Any] = {"role": "tool", "tool_call_id": identity, "content": _result(block)}
            results.append(result | ({"name": names[identity]} if identity in names else {}))
        elif block.type not in _TEXTLESS:
            texts.append(_text(block))
    turn: dict[str, Any] = {"role": role, "content": "\n\n".join(texts)}
    if calls:
        turn["tool_calls"] = calls
    return [*results, turn] if texts or calls or not results else results


def _result(block: Block) -> str:
    content = block.content
    if isinstance(content, list):
        try:
            content = "\n".join(_text(part) for part in _BLOCKS.validate_python(content))
        except ValidationError:
            content = 0
    if content is not None and not isinstance(content, str):
        raise Refusal("validation", "the content of a tool_result is neither text nor a list of parts", "messages")
    return f"Error: {content or ''}" if block.is_error else content or ""


# -- answers -----------------------------------------------------------------------------------------------------


class MessageReply:
    """Base class of a full reply and a stream."""

    def __init__(self, begun: openai_chat.Begun) -> None:
        self.begun, self.id = begun, f"msg_{secrets.token_hex(12)}"

    def message(self, content: list[dict[str, Any]], ends: dict[str, Any], usage: dict[str, Any]) -> dict[str, Any]:
        """The object."""
        name = self.begun.body.model
        head = {"id": self.id, "type": "message", "role": "assistant", "model": name, "content": content}
        return {**head, **ends, "usage": usage}

    def ends(self, turn: ModelTurn) -> dict[str, Any]:
        """Why the model ended."""
        reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(turn.reason, "end_turn")
        stopped = turn.stop if turn.reason == "stop" and turn.stop in self.begun.generation.stop else None
        return {"stop_reason": "stop_sequence" if stopped else reason, "stop_sequence": stopped}

    def usage(self, session: Session | None) -> dict[str, int]:
        """Tokens; those of the prompt that were not computed again are told apart."""
        prompt = self.begun.prompt_tokens
        cached = min(session.reused, prompt) if session else 0
        return {
            "input_tokens": prompt - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": session.tokens if session else 0,
        }


def _use(call: FunctionCall) -> dict[str, Any] | None:
    """A call as a part of an answer; None where it was cut off."""
    try:
        given = json.loads(call.arguments or "{}")
    except ValueError:
        return None
    return {"type": "tool_use", "id": call.id.replace("call_", "toolu_", 1), "name": call.name, "input": given}


class MessageWriter(sse.Writer):
    """Named events: the message, then each block from its start to its stop, then why it ended."""

    ping = b'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(self, begun: openai_chat.Begun, request_id: str) -> None:
        self.reply, self.request_id = MessageReply(begun), request_id
        self.turn, self.blocks, self.open = ModelTurn(begun.tools), 0, ""  # the type of the block that is open

    def event(self, name: str, /, **more: Any) -> bytes:
        """One event."""
        return f"event: {name}\n".encode() + sse.data({"type": name, **more})

    def begin(self) -> bytes:
        """The message, empty."""
        none = {"stop_reason": None, "stop_sequence": None}
        return self.event("message_start", message=self.reply.message([], none, self.reply.usage(None)))

    def put(self, index: int, event: TokenEvent) -> bytes:
        """One token."""
        found = b""
        for piece in self.turn.put(event):
            if piece.call is None:
                if self.open != "text":
                    found += self.start({"type": "text", "text": ""})
                found += self.delta({"type": "text_delta", "text": piece.text})
            elif piece.begins:
                call = self.turn.calls[piece.call]
                found += self.start({**(_use(FunctionCall(call.name, "", call.id)) or {}), "input": {}})
            else:
                found += self.delta({"type": "input_json_delta", "partial_json": piece.arguments})
        return found

    def start(self, block: dict[str, Any]) -> bytes:
        """A new block, behind the end of the one before."""
        found = self.stop()
        self.open, self.blocks = block["type"], self.blocks + 1
        return found + self.event("content_block_start", index=self.blocks - 1, content_block=block)

    def delta(self, delta: dict[str, Any]) -> bytes:
        """More of the block that is open."""
        return self.event("content_block_delta", index=self.blocks - 1, delta=delta)

    def stop(self) -> bytes:
        """The end of the block that is open, if one is."""
        if not self.open:
            return b""
        self.open = ""
        return self.event("content_block_stop", index=self.blocks - 1)

    def end(self, session: Session) -> bytes:
        """Why it ended, and the tokens."""
        found = self.start({"type": "text", "text": ""}) if not self.blocks else b""
        found += self.stop()
        found += self.event("message_delta", delta=self.reply.ends(self.turn), usage=self.reply.usage(session))
        return found + self.event("message_stop")

    def fail(self, refusal: Refusal) -> bytes:
        """The error."""
        return b"event: error\n" + sse.data(DIALECT.error(refusal, self.request_id))


async def messages(call: RouteCall) -> Response:
    """/v1/messages."""
    body = await call.read(MessagesBody)
    begun = await openai_chat.begin(call, await call.translate(body.fields, to=openai_chat.ChatBody))
    if begun.generation.stream:
        return sse.EventStream(call, begun.session, MessageWriter(begun, call.id))
    ((turn, _),) = await begun.turns(call)
    reply = MessageReply(begun)
    used = [made for made in map(_use, turn.calls) if made is not None]
    content = [{"type": "text", "text": turn.text}] if turn.text or not used else []
    return JSONResponse(reply.message([*content, *used], reply.ends(turn), reply.usage(begun.session)))


async def count_tokens(call: RouteCall) -> Response:
    """/v1/messages/count_tokens: as the same body without `max_tokens` would be rendered."""
    body = await call.read(CountBody)
    read = await call.translate(body.fields, to=openai_chat.ChatBody)
    request: GenerationRequest
    request, _ = await call.parse(openai_chat.parse, call.model, read, call.owner)
    return JSONResponse({"input_tokens": len(request.prompts[0])})


class Anthropic(Dialect):
    """Anthropic's routes."""

    name, prefixes = "anthropic", ("/v1/messages",)
    routes: tuple[Route, ...] = tuple(
        route
        for base in ("/v1", "")
        for route in (
            post(f"{base}/messages", messages, MessagesBody, "Anthropic: answer a conversation", counted=True),
            post(f"{base}/messages/count_tokens", count_tokens, CountBody, "Anthropic: the tokens of a conversation"),
        )
    )

    def status(self, refusal: Refusal) -> int:
        """529 for a server that is full, starting or ending."""
        return 529 if refusal.kind in _OVERLOADED else KINDS[refusal.kind].status

    def error(self, refusal: Refusal, id: str = "") -> dict[str, Any]:
        """A type and a message."""
        status = self.status(refusal)
        kind = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": refusal.message}, "request_id": id}


DIALECT = Anthropic()
