"""OpenAI's Responses API: /v1/responses.

Nothing is stored: every request brings its whole conversation, and one that refers to an earlier response is refused. A
body becomes that of a chat. Tools that OpenAI's own servers run are left out, so that a model never calls one.
"""

import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from starlette.responses import JSONResponse, Response

from llama2.engine.engine import TokenEvent
from llama2.engine.sampler import SampledToken
from llama2.serve import openai_chat, sse
from llama2.serve.dialect import Route, get, post
from llama2.serve.errors import KINDS, Refusal
from llama2.serve.numbers import FIRST_FAULT, MAX_COUNT, PositiveShare, Temperature, Tops
from llama2.serve.openai import OpenAI, OpenAIWriter, rated
from llama2.serve.service import RouteCall
from llama2.serve.session import Answer, Session
from llama2.serve.turn import FunctionCall, ModelTurn
from llama2.serve.validation import Body, Text

_STORED = ("previous_response_id", "conversation", "background", "prompt")
_TEXT_PARTS = ("input_text", "output_text", "text")
_LOGPROBS = "message.output_text.logprobs"


class ResponsesItem(Body):
    """One item of an input: a message, a call, or its result. What other fields say is not looked at."""

    model_config = ConfigDict(extra="ignore")
    type: str | None = Field(None, max_length=64)
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Text | list[dict[str, Any]] | None = None
    id: str | None = None
    call_id: str | None = Field(None, max_length=256)
    name: str | None = Field(None, max_length=256)
    arguments: Text | None = None
    output: Text | list[dict[str, Any]] | None = None


class TextFormat(Body):
    """text.format: flat, unlike the response_format of a chat."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def response_format(self) -> dict[str, Any]:
        """As a chat has it."""
        if self.type != "json_schema":
            return {"type": self.type}
        inner = self.model_dump(exclude_none=True, exclude={"type"}, by_alias=True)
        return {"type": "json_schema", "json_schema": inner}


class TextSettings(Body):
    """text."""

    format: TextFormat | None = None
    verbosity: str | None = None


class InputBody(Body):
    """The body of /v1/responses/input_tokens: what is rendered."""

    model: str | None = Field(None, max_length=512)
    input: Text | Annotated[list[ResponsesItem], FIRST_FAULT] | None = None
    instructions: Text | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: Any = None
    truncation: Literal["auto", "disabled"] | None = None
    previous_response_id: str | None = None
    conversation: Any = None

    def fields(self) -> dict[str, Any]:
        """The body of a chat. Raises Refusal."""
        for name in _STORED:
            if getattr(self, name, None):
                raise Refusal(
                    "validation", f"{name} needs stored responses, and nothing is stored here; send the input", name
                )
        found: dict[str, Any] = {"messages": self._messages()}
        found |= {"model": self.model} if self.model is not None else {}
        if self.text is not None and self.text.format is not None:
            found["response_format"] = self.text.format.response_format()
        tools, choice = _tools(self.tools or [], self.tool_choice)
        if tools:
            found["tools"] = tools
            if self.parallel_tool_calls is not None:
                found["parallel_tool_calls"] = self.parallel_tool_calls
        return found | ({"tool_choice": choice} if choice is not None else {})

    def _messages(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if self.instructions:
            found.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*found, {"role": "user", "content": self.input}]
        names: dict[str, str] = {}
        for item in self.input or ():
            _add(found, item, names)
        if not found:
            raise Refusal("validation", "input is missing; give a text or items", "input")
        return found


class ResponsesBody(InputBody):
    """The body of /v1/responses."""

    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: PositiveShare | None = None
    top_logprobs: Tops | None = None
    include: list[str] | None = None
    background: bool | None = None
    prompt: Any = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    stream_options: Any = None
    max_tool_calls: Any = None
    user: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    def fields(self) -> dict[str, Any]:
        """The body of a chat. Raises Refusal."""
        found = super().fields() | {"stream": bool(self.stream)}
        for name, ours in (("max_output_tokens", "max_tokens"), ("temperature", "temperature"), ("top_p", "top_p")):
            found |= {} if getattr(self, name) is None else {ours: getattr(self, name)}
        if _LOGPROBS in (self.include or ()):
            found |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        return found


def _add(found: list[dict[str, Any]], item: ResponsesItem, names: dict[str, str]) -> None:
    """Puts an item behind the messages so far; names: of the calls so far, by their ids. Raises Refusal."""
    last = found[-1] if found else {}
    if item.type in (None, "message") and item.role is not None:
        role = "system" if item.role == "developer" else item.role
        text = _text(item.content)
        if role == "system" == last.get("role"):
            last["content"] += f"\n\n{text}"
        else:
            found.append({"role": role, "content": text})
    elif item.type == "function_call" and item.name and item.call_id:
        names[item.call_id] = item.name
        function = {"name": item.name, "arguments": item.arguments or "{}"}
        if last.get("role") != "assistant":
            last = {"role": "assistant", "content": ""}
            found.append(last)
        last.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
    elif item.type == "function_call_output" and item.call_id:
        result = {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
        found.append(result | ({"name": names[item.call_id]} if item.call_id in names else {}))
    elif item.type == "item_reference":
        raise Refusal("validation", "an item refers to another, and nothing is stored here; send the item", "input")
    elif item.type != "reasoning":
        raise Refusal("validation", f"an item of type {str(item.type)[:40]!r} is incomplete or not known", "input")


def _text(content: str | list[dict[str, Any]] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        kind, text = part.get("type"), part.get("text", part.get("refusal"))
        if kind not in (*_TEXT_PARTS, "refusal") or not isinstance(text, str):
            raise Refusal("validation", f"a part of type {str(kind)[:40]!r}; this model reads text only", "input")
        texts.append(text)
    return "\n".join(texts)


def _tools(given: list[dict[str, Any]], choice: Any) -> tuple[list[dict[str, Any]], Any]:
    """Functions and the choice among them, as a chat has them."""
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = [tool.get("name") for tool in choice.get("tools") or () if isinstance(tool, dict)]
        given = [tool for tool in given if tool.get("name") in allowed]
        choice = choice.get("mode", "auto")
    functions = [
        {
            "type": "function",
            "function": {k: v for k, v in tool.items() if k not in ("type", "strict") and v is not None},
        }
        for tool in given
        if tool.get("type") == "function"
    ]
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    return functions, choice


# -- answers -----------------------------------------------------------------------------------------------------


class ResponseReply:
    """Base class of a full reply and a stream."""

    def __init__(self, begun: openai_chat.Begun, body: ResponsesBody) -> None:
        self.begun, self.body = begun, body
        self.id, self.created = f"resp_{secrets.token_hex(24)}", int(time.time())
        self.message_id = f"msg_{secrets.token_hex(24)}"

    def response(self, status: str, output: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The object."""
        body, sampling = self.body, self.begun.generation.sampling
        form = body.text.format if body.text and body.text.format else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": body.model or self.begun.model.names[0],
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": sampling.temperature or 0.0,
            "text": {"format": form.model_dump(exclude_none=True, by_alias=True) if form else {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "metadata": body.metadata or {},
            "usage": None,
            **more,
        }

    def final(self, turn: ModelTurn, session: Session, output: list[dict[str, Any]]) -> dict[str, Any]:
        """The object of a complete answer."""
        more: dict[str, Any] = {"usage": self.usage(session)}
        if turn.reason == "length":
            return self.response("incomplete", output, incomplete_details={"reason": "max_output_tokens"}, **more)
        return self.response("completed", output, completed_at=int(time.time()), **more)

    def usage(self, session: Session) -> dict[str, Any]:
        """Tokens."""
        prompt = self.begun.prompt_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": min(session.reused, prompt), "cache_write_tokens": 0},
            "output_tokens": session.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + session.tokens,
        }

    def said(self, text: str, logprobs: list[Any], status: str) -> dict[str, Any]:
        """A message item."""
        content = [] if status == "in_progress" else [self.part(text, logprobs)]
        head = {"type": "message", "id": self.message_id, "status": status, "role": "assistant"}
        return {**head, "content": content}

    def part(self, text: str, logprobs: list[Any]) -> dict[str, Any]:
        """The text of a message."""
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def called(self, call: FunctionCall, status: str, arguments: str | None = None) -> dict[str, Any]:
        """A call item."""
        return {
            "type": "function_call",
            "id": call.id.replace("call_", "fc_", 1),
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments if arguments is None else arguments,
            "status": status,
        }

    def rated(self, picked: list[SampledToken]) -> list[Any]:
        """Log-probabilities, where they were asked for."""
        if not self.begun.body.logprobs:
            return []
        return [rated(self.begun.model.tokenizer, p, self.begun.body.tops) for p in picked]


def _output(reply: ResponseReply, turn: ModelTurn, answer: Answer) -> list[dict[str, Any]]:
    status = "incomplete" if turn.reason == "length" else "completed"
    said = [reply.said(turn.text, reply.rated(answer.picked), status)] if turn.text or not turn.calls else []
    return [*said, *(reply.called(call, status) for call in turn.calls)]


class ResponseWriter(OpenAIWriter):
    """Numbered events: the response, then each item from its begin to its end, then the response again, complete."""

    def __init__(self, begun: openai_chat.Begun, body: ResponsesBody) -> None:
        self.reply, self.turn, self.number = ResponseReply(begun, body), ModelTurn(begun.tools), 0
        self.output: list[dict[str, Any]] = []
        self.open: FunctionCall | Literal["text"] | None = None
        self.text, self.logprobs, self.untold = "", list[Any](), list[Any]()

    def event(self, name: str, /, **more: Any) -> bytes:
        """One event."""
        content = {"type": name, "sequence_number": self.number, **more}
        self.number += 1
        return f"event: {name}\n".encode() + sse.data(content)

    def begin(self) -> bytes:
        """The response, empty."""
        response = self.reply.response("in_progress", [])
        names = ("response.created", "response.in_progress")
        return b"".join(self.event(name, response=response) for name in names)

    def put(self, index: int, event: TokenEvent) -> bytes:
        """One token."""
        found = b""
        if event.token is not None:
            self.untold += self.reply.rated([SampledToken(event.token, event.logprob, event.top)])
        for piece in self.turn.put(event):
            if piece.call is None:
                found += self.say(piece.text)
            elif piece.begins:
                found += self.close("completed") + self.call(self.turn.calls[piece.call])
            else:
                item = self.reply.called(self.turn.calls[piece.call], "in_progress")["id"]
                told = {"item_id": item, "output_index": len(self.output), "delta": piece.arguments}
                found += self.event("response.function_call_arguments.delta", **told)
        return found

    def where(self) -> dict[str, Any]:
        """The text that is open."""
        return {"item_id": self.reply.message_id, "output_index": len(self.output), "content_index": 0}

    def say(self, text: str) -> bytes:
        """Text; its item begins with the first of it."""
        found = b""
        if self.open != "text":
            found += self.close("completed")
            self.open = "text"
            item = self.reply.said("", [], "in_progress")
            found += self.event("response.output_item.added", output_index=len(self.output), item=item)
            found += self.event("response.content_part.added", **self.where(), part=self.reply.part("", []))
        self.text += text
        self.logprobs += self.untold
        told, self.untold = self.untold, []
        return found + self.event("response.output_text.delta", **self.where(), delta=text, logprobs=told)

    def call(self, call: FunctionCall) -> bytes:
        """The begin of a call."""
        self.open = call
        item = self.reply.called(call, "in_progress", "")
        return self.event("response.output_item.added", output_index=len(self.output), item=item)

    def close(self, status: str) -> bytes:
        """The end of the item that is open, if one is."""
        if self.open is None:
            return b""
        if isinstance(self.open, FunctionCall):
            item = self.reply.called(self.open, status)
            told = {"item_id": item["id"], "output_index": len(self.output), "name": item["name"]}
            found = self.event("response.function_call_arguments.done", **told, arguments=item["arguments"])
        else:
            logprobs = self.logprobs + self.untold
            item = self.reply.said(self.text, logprobs, status)
            found = self.event("response.output_text.done", **self.where(), text=self.text, logprobs=logprobs)
            found += self.event("response.content_part.done", **self.where(), part=item["content"][0])
        found += self.event("response.output_item.done", output_index=len(self.output), item=item)
        self.output.append(item)
        self.open = None
        return found

    def end(self, session: Session) -> bytes:
        """The response, complete."""
        found = self.say("") if self.open is None and not self.output else b""
        found += self.close("incomplete" if self.turn.reason == "length" else "completed")
        response = self.reply.final(self.turn, session, self.output)
        return found + self.event(f"response.{response['status']}", response=response)

    def fail(self, refusal: Refusal) -> bytes:
        """The response, failed."""
        error = {"code": KINDS[refusal.kind].code or "server_error", "message": refusal.message}
        return self.event("response.failed", response=self.reply.response("failed", self.output, error=error))


async def responses(call: RouteCall) -> Response:
    """/v1/responses."""
    body = await call.read(ResponsesBody)
    begun = await openai_chat.begin(call, await call.translate(body.fields, to=openai_chat.ChatBody))
    if begun.generation.stream:
        return sse.EventStream(call, begun.session, ResponseWriter(begun, body))
    ((turn, answer),) = await begun.turns(call)
    reply = ResponseReply(begun, body)
    return JSONResponse(reply.final(turn, begun.session, _output(reply, turn, answer)))


async def input_tokens(call: RouteCall) -> Response:
    """/v1/responses/input_tokens."""
    body = await call.read(InputBody)
    read = await call.translate(body.fields, to=openai_chat.ChatBody)
    request, _ = await call.parse(openai_chat.parse, call.model, read, call.owner)
    return JSONResponse({"object": "response.input_tokens", "input_tokens": len(request.prompts[0])})


async def stored(call: RouteCall) -> Response:
    """Refuses requests for an earlier response."""
    raise Refusal("route", f"there is no response {call.request.path_params['id'][:100]!r}: nothing is stored here")


def _routes(base: str) -> tuple[Route, ...]:
    one = f"{base}/responses/{{id}}"
    return (
        post(f"{base}/responses", responses, ResponsesBody, "OpenAI responses: answer a conversation", counted=True),
        post(f"{base}/responses/input_tokens", input_tokens, InputBody, "OpenAI responses: the tokens of an input"),
        get(one, stored, "OpenAI responses: refused, nothing is stored"),
        get(f"{one}/input_items", stored, "OpenAI responses: refused, nothing is stored"),
        Route("POST", f"{one}/cancel", stored, "OpenAI responses: refused, nothing is stored", any_type=True),
        Route("DELETE", one, stored, "OpenAI responses: refused, nothing is stored", any_type=True),
    )


DIALECT = OpenAI("openai responses", *_routes("/v1"), *_routes(""), prefixes=("/v1/responses",))
