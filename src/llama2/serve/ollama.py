"""Ollama's API: /api/chat, /api/generate, /api/embed, and what its clients ask about models.

A body becomes that of a chat or of a completion, and answers are lines of JSON. What is left open comes from the
checkpoint's generation settings, then from Ollama's own defaults. keep_alive is obeyed where models come and go: by a
server of several, or with --keep-alive.
"""

import json
import time
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from starlette.responses import JSONResponse, Response

from llama2.engine.engine import TokenEvent
from llama2.engine.sampler import SampledToken
from llama2.serve import openai_chat, openai_completions, sse
from llama2.serve.chat import Tools, prompt_ids
from llama2.serve.dialect import Dialect, Route, get, post
from llama2.serve.errors import KINDS, Refusal
from llama2.serve.facts import timestamp
from llama2.serve.numbers import FIRST_FAULT, Count, Ids, Tops, seconds
from llama2.serve.ollama_models import (
    EmbedBody,
    KeepAlive,
    Named,
    NamedOnly,
    OldEmbedBody,
    embed,
    json_line,
    old_embed,
    ps,
    pull,
    refuse_management,
    show,
    tags,
    version,
)
from llama2.serve.openai import rated
from llama2.serve.request import GenerationRequest
from llama2.serve.served_model import TextModel
from llama2.serve.service import RouteCall
from llama2.serve.session import Answer, Session, fold
from llama2.serve.turn import ModelTurn
from llama2.serve.validation import Body, Text

DEFAULTS: Mapping[str, float] = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
_RENAMED = {"repeat_penalty": "repetition_penalty", "num_keep": "n_keep"}
_AS_THEY_ARE = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "stop", "seed",
)  # fmt: skip
# How a model is loaded: decided when this server starts.
_LOADING = (
    "num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "use_mlock", "num_thread", "draft_num_predict", "numa",
    "low_vram", "f16_kv", "logits_all", "vocab_only", "embedding_only",
)  # fmt: skip


class Prompted(Named):
    """Base class of chats and completions."""

    format: str | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    keep_alive: KeepAlive | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: Tops | None = None
    truncate: bool | None = None
    shift: bool | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is asked but that the model comes or goes."""
        raise NotImplementedError

    @property
    def unloads(self) -> bool:
        """Whether it only asks that the model goes."""
        return self.empty and self.keep_alive is not None and seconds(self.keep_alive) == 0

    @property
    def needs_model(self) -> bool:
        """It is not loaded in order to go."""
        return not self.unloads

    @property
    def streams(self) -> bool:
        """Ollama streams where nothing is said."""
        return self.stream is not False

    def fields(self, model: TextModel) -> dict[str, Any]:
        """Sampling, form and model under OpenAI's names. Raises Refusal."""
        if self.think:
            raise Refusal("validation", f'"{self.asked}" does not support thinking', "think")
        own = model.settings
        greedy = own.is_set("do_sample") and not own.value("do_sample")
        found: dict[str, Any] = {} if greedy else {k: v for k, v in DEFAULTS.items() if not own.is_set(k)}
        for name, value in (self.options or {}).items():
            if value is None or name in _LOADING:
                continue
            if name == "seed" and isinstance(value, int) and value < 0:
                continue  # a new one
            if name == "num_predict":
                if not isinstance(value, int) or isinstance(value, bool):
                    raise Refusal("validation", f"option num_predict is {value!r}; give a number of tokens", "options")
                found |= {"max_tokens": value} if value > 0 else {}
            else:
                found[_RENAMED.get(name, name)] = value
        found |= {"model": self.asked, "stream": self.streams}
        found |= {"context_shift": self.shift} if self.shift is not None else {}
        if self.format:
            if isinstance(self.format, str) and self.format != "json":
                raise Refusal("validation", f'format is {self.format[:40]!r}; give "json" or a JSON schema', "format")
            schema = {"type": "json_schema", "json_schema": {"name": "format", "schema": self.format}}
            found["response_format"] = {"type": "json_object"} if self.format == "json" else schema
        return found

    @property
    def unbounded(self) -> bool:
        """Whether the answer may go on until the model ends it or the context is full."""
        bound = (self.options or {}).get("num_predict")
        return not isinstance(bound, int) or bound <= 0


class CalledFunction(Body):
    """The function of a call; arguments are an object."""

    name: str
    arguments: dict[str, Any] | None = None
    index: Count | None = None
    description: str | None = None


class ToolCall(Body):
    """A call in an earlier turn of the model."""

    function: CalledFunction
    id: str | None = None
    type: str | None = None


class ChatMessage(Body):
    """One message."""

    role: str = Field(max_length=32)
    content: Text | None = None
    thinking: Text | None = None
    images: list[Any] | None = None
    tool_calls: Annotated[list[ToolCall], FIRST_FAULT] | None = None
    tool_name: str | None = Field(None, max_length=256)
    tool_call_id: str | None = Field(None, max_length=256)

    def plain(self) -> dict[str, Any]:
        """As OpenAI has it. Raises Refusal for images."""
        if self.images:
            raise Refusal("validation", "a message has images; this model reads text only", "messages")
        found: dict[str, Any] = {"role": self.role.lower(), "content": self.content or ""}
        if self.tool_calls:
            found["tool_calls"] = [
                {
                    "id": call.id or f"call_{i}",
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": json.dumps(call.function.arguments or {})},
                }
                for i, call in enumerate(self.tool_calls)
            ]
        found |= {"name": self.tool_name} if self.tool_name else {}
        return found | ({"tool_call_id": self.tool_call_id} if self.tool_call_id else {})


class OllamaChatBody(Prompted):
    """The body of /api/chat."""

    messages: Annotated[list[ChatMessage], FIRST_FAULT] | None = None
    tools: list[dict[str, Any]] | None = None

    @property
    def empty(self) -> bool:
        """Whether there is no message."""
        return not self.messages


class OllamaGenerateBody(Prompted):
    """The body of /api/generate."""

    prompt: Text | None = None
    suffix: Text | None = None
    system: Text | None = None
    template: Text | None = None
    context: Ids | None = None
    raw: bool | None = None
    images: list[Any] | None = None
    width: Count | None = None
    height: Count | None = None
    steps: Count | None = None

    @property
    def empty(self) -> bool:
        """Whether there is no prompt."""
        return not self.prompt and not self.system

    def check(self) -> None:
        """Raises Refusal for what this model cannot do."""
        for name in ("template", "images", "suffix", "width", "height", "steps"):
            if getattr(self, name):
                told = {
                    "template": "a request's own template is not run; set raw and send the rendered prompt",
                    "suffix": f'"{self.asked}" does not support insert',
                }
                raise Refusal("validation", told.get(name, f"{name} is given; this model reads text only"), name)
        if self.raw and (self.system or self.context):
            raise Refusal("validation", "raw mode does not support template, system, or context", "raw")


class _Lines(sse.Writer):
    """A stream of JSON lines. An empty line would be no JSON, so nothing is sent to keep a quiet stream open."""

    media_type = "application/x-ndjson"
    ping = b""

    def __init__(self, call: RouteCall, name: str, model: TextModel, request: GenerationRequest, tools: Tools) -> None:
        self.name, self.model, self.request, self.came = name, model, request, call.times.came
        self.turn, self.finish = ModelTurn(tools), "stop"

    def said(self, text: str, calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Returns the model's text, under the names of a route."""
        raise NotImplementedError

    def line(self, said: dict[str, Any], done: bool = False, **more: Any) -> dict[str, Any]:
        """One object."""
        return {"model": self.name, "created_at": timestamp(time.time()), **said, "done": done, **more}

    def put(self, index: int, event: TokenEvent) -> bytes:
        """One token."""
        text = "".join(piece.text for piece in self.turn.put(event) if piece.call is None)
        logprobs = self.logprobs(
            [SampledToken(event.token, event.logprob, event.top)] if event.token is not None else []
        )
        if event.finish is not None:
            self.finish = "length" if event.finish == "length" else "stop"
        found = json_line(self.line(self.said(text), **logprobs)) if text or logprobs else b""
        if event.finish is not None and self.turn.calls:
            found += json_line(self.line(self.said("", self.calls(self.turn))))
        return found

    def logprobs(self, picked: list[SampledToken]) -> dict[str, Any]:
        """Those of some tokens, where they were asked for."""
        if self.request.logprobs is None or not picked:
            return {}
        return {"logprobs": [rated(self.model.tokenizer, p, self.request.logprobs) for p in picked]}

    def calls(self, turn: ModelTurn) -> list[dict[str, Any]]:
        """Calls, whose arguments are an object; those that are cut off are none."""
        found: list[dict[str, Any]] = []
        for call in turn.calls:
            try:
                arguments = json.loads(call.arguments or "{}")
            except ValueError:
                continue
            function = {"index": len(found), "name": call.name, "arguments": arguments}
            found.append({"id": call.id, "function": function})
        return found

    def numbers(self, session: Session) -> dict[str, Any]:
        """Returns the fields of the last object: the finish reason, and durations in nanoseconds."""
        times, now = session.times, time.monotonic()

        def ns(seconds: float) -> int:
            return max(int(seconds * 1e9), 0)

        first = times.first or times.ended or now
        return {
            "done_reason": self.finish,
            "total_duration": ns(now - self.came),
            "load_duration": ns((times.began or first) - self.came),
            "prompt_eval_count": len(self.request.prompts[0]),
            "prompt_eval_duration": ns(first - (times.began or first)),
            "eval_count": session.tokens,
            "eval_duration": ns((times.ended or now) - first),
        }

    def end(self, session: Session) -> bytes:
        """The numbers."""
        return json_line(self.line(self.said(""), True, **self.numbers(session), **self.after()))

    def after(self) -> dict[str, Any]:
        """Returns further fields of the last object."""
        return {}

    def whole(self, session: Session, answer: Answer) -> dict[str, Any]:
        """The complete answer as one object."""
        self.turn.put(TokenEvent(text=answer.text, finish=answer.finish, stop=answer.stop))
        self.finish = "length" if answer.finish == "length" else "stop"
        said = self.said(self.turn.text, self.calls(self.turn))
        return self.line(said, True, **self.logprobs(answer.picked), **self.numbers(session), **self.after())

    def fail(self, refusal: Refusal) -> bytes:
        """The error as a line."""
        return json_line(DIALECT.error(refusal))


class _ChatLines(_Lines):
    def said(self, text: str, calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}}


class _GenerateLines(_Lines):
    """context: the ids so far, where a further request may go on from them."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.ids: list[int] | None = list(self.request.prompts[0])

    def said(self, text: str, calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        return {"response": text}

    def put(self, index: int, event: TokenEvent) -> bytes:
        if self.ids is not None and event.token is not None:
            self.ids.append(event.token)
        return super().put(index, event)

    def whole(self, session: Session, answer: Answer) -> dict[str, Any]:
        if self.ids is not None:
            self.ids += [p.token for p in answer.picked]
        return super().whole(session, answer)

    def after(self) -> dict[str, Any]:
        return {} if self.ids is None else {"context": self.ids}


async def _answer(call: RouteCall, session: Session, lines: _Lines, streams: bool) -> Response:
    if streams:
        return sse.EventStream(call, session, lines)
    (answer,) = await call.until_gone(session, fold(session, 1))
    return JSONResponse(lines.whole(session, answer))


async def chat(call: RouteCall) -> Response:
    """/api/chat; without messages it only asks for the model."""
    body = await call.read(OllamaChatBody)
    if body.empty:
        return await _loaded(call, body, {"message": {"role": "assistant", "content": ""}})
    read = await call.translate(_chat_fields, call.model, body, to=openai_chat.ChatBody)
    begun = await openai_chat.begin(call, read)
    name = body.model or body.name or body.asked
    lines = _ChatLines(call, name, begun.model, begun.generation, begun.tools)
    return await _answer(call, begun.session, lines, body.streams)


def _chat_fields(model: TextModel, body: OllamaChatBody) -> dict[str, Any]:
    found = body.fields(model) | {"messages": [message.plain() for message in body.messages or ()]}
    found |= {"tools": body.tools} if body.tools else {}
    return found | ({"logprobs": True, "top_logprobs": body.top_logprobs or 0} if body.logprobs else {})


async def generate(call: RouteCall) -> Response:
    """/api/generate: one turn of a chat, or with `raw`, or where the model has no chat template, a raw prompt."""
    body = await call.read(OllamaGenerateBody)
    body.check()
    if body.empty:
        return await _loaded(call, body, {"response": ""})
    name = body.model or body.name or body.asked
    if body.raw or body.context or call.model.tokenizer.chat_template is None:
        read = await call.translate(_raw_fields, call.model, body, to=openai_completions.CompletionBody)
        more = {"max_new_tokens": None} if body.unbounded else {}
        request, session = await openai_completions.begin(call, read, **more)
        lines = _GenerateLines(call, name, call.model, request, Tools())
        lines.ids = None if body.raw else lines.ids
        return await _answer(call, session, lines, body.streams)
    chat = await call.translate(_turn_fields, call.model, body, to=openai_chat.ChatBody)
    begun = await openai_chat.begin(call, chat)
    lines = _GenerateLines(call, name, begun.model, begun.generation, begun.tools)
    return await _answer(call, begun.session, lines, body.streams)


def _turn_fields(model: TextModel, body: OllamaGenerateBody) -> dict[str, Any]:
    system = [{"role": "system", "content": body.system}] if body.system else []
    found = body.fields(model) | {"messages": [*system, {"role": "user", "content": body.prompt or ""}]}
    return found | ({"logprobs": True, "top_logprobs": body.top_logprobs or 0} if body.logprobs else {})


def _raw_fields(model: TextModel, body: OllamaGenerateBody) -> dict[str, Any]:
    found = body.fields(model) | ({"logprobs": body.top_logprobs or 0} if body.logprobs else {})
    prompt = body.prompt or ""
    if body.raw:
        return found | {"prompt": prompt}
    if model.tokenizer.chat_template is None:
        text = f"{body.system}\n\n{prompt}" if body.system else prompt
        ids = list(openai_completions.encode(model.tokenizer, text, False))
    else:
        messages = _turn_fields(model, body)["messages"]
        ids = list(prompt_ids(model, [openai_chat.Message(**m) for m in messages], Tools(), False))
    if body.context and ids[:1] == [model.tokenizer.bos_token_id]:
        ids = ids[1:]  # the text so far has one
    return found | {"prompt": [*(body.context or ()), *ids]}


async def _loaded(call: RouteCall, body: Prompted, said: dict[str, Any]) -> Response:
    """A model that was only asked to come, or to go: at once, or with the last answer that it is giving."""
    if body.unloads:
        offer, pool = await call.service.pool.find(body.asked), call.service.pool
        if offer.served is not None:
            offer.served.adapter(body.asked)
            offer.keep = offer.keep if pool.fixed else 0.0
            await pool.unload(offer)
    else:
        call.model.adapter(body.asked)
    told = {"model": body.model or body.name, "created_at": timestamp(time.time()), **said}
    return JSONResponse(told | {"done": True, "done_reason": "unload" if body.unloads else "load"})


class Ollama(Dialect):
    """Ollama's routes."""

    name, prefixes = "ollama", ("/api/",)
    routes: tuple[Route, ...] = (
        post("/api/chat", chat, OllamaChatBody, "Ollama: answer a conversation", counted=True, any_type=True),
        post("/api/generate", generate, OllamaGenerateBody, "Ollama: answer a prompt", counted=True, any_type=True),
        post("/api/embed", embed, EmbedBody, "Ollama: vectors of texts", any_type=True),
        post("/api/embeddings", old_embed, OldEmbedBody, "Ollama: the vector of a text", any_type=True),
        post("/api/show", show, NamedOnly, "Ollama: one model", any_type=True),
        post("/api/pull", pull, NamedOnly, "Ollama: whether a model is here", any_type=True),
        *(
            post(f"/api/{name}", refuse_management, None, "Ollama: refused", any_type=True)
            for name in ("create", "copy", "push")
        ),
        Route("DELETE", "/api/delete", refuse_management, "Ollama: refused", any_type=True),
        get("/api/tags", tags, "Ollama: the models"),
        get("/api/ps", ps, "Ollama: the models in memory"),
        get("/api/version", version, "Ollama: the version of its API", "open"),
    )

    def status(self, refusal: Refusal) -> int:
        """503 for a full server."""
        return 503 if refusal.kind == "busy" else KINDS[refusal.kind].status

    def error(self, refusal: Refusal, id: str = "") -> dict[str, Any]:
        """A text."""
        before = "model not found: " if refusal.kind == "model" else ""
        return {"error": before + refusal.message}


DIALECT = Ollama()
