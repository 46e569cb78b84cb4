"""/v1/chat/completions."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.responses import JSONResponse, Response

from llama2.engine.engine import TokenEvent
from llama2.engine.sampler import SampledToken
from llama2.serve import sse
from llama2.serve.chat import Function, Message, Tool, Tools, chosen, fitting_ids
from llama2.serve.common import Common
from llama2.serve.dialect import post
from llama2.serve.errors import Refusal
from llama2.serve.numbers import FIRST_FAULT, MaxTokens, Tops
from llama2.serve.openai import Head, OpenAI, OpenAIWriter, rated, usage
from llama2.serve.request import GenerationRequest, prompt_room
from llama2.serve.served_model import TextModel
from llama2.serve.service import RouteCall
from llama2.serve.session import Answer, Session, fold
from llama2.serve.turn import FunctionCall, ModelTurn

# What the `text-generation` client always sends, set or not; see `ChatBody.legacy`.
_LEGACY_FIELDS = {"model", "messages", "repetition_penalty", "logit_bias", "top_logprobs", "tool_choice", "seed", "n"}

OLDER_REASONS = {"tool_calls": "function_call"}


class ChatBody(Common):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], FIRST_FAULT] = Field(min_length=1)
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Tops | None = None
    tools: Annotated[list[Tool], FIRST_FAULT] | None = Field(None, max_length=1024)
    tool_choice: Annotated[str, Field(max_length=256)] | dict[str, Any] | None = None
    tool_prompt: str | None = Field(None, max_length=8192)
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Function], FIRST_FAULT] | None = Field(None, max_length=1024)
    function_call: Annotated[str, Field(max_length=256)] | dict[str, Any] | None = None
    reasoning_effort: Any = None
    verbosity: Any = None
    modalities: Annotated[list[Literal["text"]], FIRST_FAULT] | None = None
    prediction: Any = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=64)

    @property
    def legacy(self) -> bool:
        """Whether the `text-generation` client asks, which wants the role in every chunk, calls as one object and no
        [DONE]. It sends every field of its own, most of them null, and the model name "tgi"."""
        return self.model == "tgi" and self.model_fields_set >= _LEGACY_FIELDS

    @property
    def older(self) -> bool:
        """Whether functions are given as OpenAI's first API had them: one call an answer, as `function_call`."""
        return self.functions is not None

    def offered(self, model: TextModel) -> Tools:
        """Its tools, under whichever names it gives them. Raises Refusal."""
        if self.functions is None:
            if self.function_call is not None:
                raise Refusal("tool", "function_call needs functions; add them, or use tools", "function_call")
            return chosen(self.tools, self.tool_choice, self.parallel_tool_calls, model)
        if self.tools is not None or self.tool_choice is not None:
            raise Refusal("tool", "functions and tools were given; send one of them", "functions")
        tools = [Tool(type="function", function=function) for function in self.functions]
        return chosen(tools, self.function_call, False, model)

    @property
    def continues(self) -> bool:
        """Whether the answer goes on with the last message, as TGI does where that is the assistant's."""
        if self.continue_final_message is None:
            return self.messages[-1].role == "assistant" and not self.messages[-1].tool_calls
        return self.continue_final_message

    @property
    def tops(self) -> int:
        """Likeliest tokens to tell with each token."""
        return self.top_logprobs or 0


def parse(model: TextModel, body: ChatBody, owner: str) -> tuple[GenerationRequest, Tools]:
    """The body as a generation. Raises Refusal."""
    if len(body.messages) > model.bounds.max_messages:
        raise Refusal(
            "validation", f"{len(body.messages)} messages; {model.bounds.max_messages} are the most", "messages"
        )
    count = len(body.tools or body.functions or ())
    if count > model.bounds.max_tools:
        raise Refusal("tool", f"{count} tools; {model.bounds.max_tools} are the most", "tools")
    tools = body.offered(model)
    constraint = body.constraint()
    if tools.active:
        constraint = tools.constraint(constraint)
    if body.tops and not body.logprobs:
        raise Refusal("validation", "top_logprobs needs logprobs: true", "top_logprobs")
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if wanted == 0:
        raise Refusal("validation", "max_tokens is 0; ask for at least 1", "max_tokens")
    if body.chat_template is not None:
        raise Refusal("template", "requests cannot bring a chat template; the server's is used", "chat_template")
    n, warnings = body.n or 1, list[str]()
    if body.truncate_prompt_tokens is None:  # templates leave out much, but nothing that a user says
        model.check_texts(message.text() for message in body.messages if message.role == "user")
    room, overflow = None, body.overflow(model)
    if overflow != "refuse":
        beside = None if wanted is None or wanted < 0 or overflow == "shift" else wanted
        room = prompt_room(model.bounds.within(body.num_ctx), beside)
    ids = fitting_ids(model, body.messages, tools, body.continues, room, body.chat_template_kwargs, warnings)
    request = body.request(
        model,
        owner,
        (ids,),
        wanted,
        n=n,
        best_of=n,
        logprobs=body.tops if body.logprobs else None,
        continues=body.continues,
        constraint=constraint,
        warnings=warnings,
    )
    if tools.active and tools.marks:  # they are control tokens, and have to be seen to be read
        request = replace(request, skip_special_tokens=False)
    return request, tools


@dataclass(frozen=True)
class Begun:
    """A chat that the engine has: what it was read as, and the session that answers it."""

    body: ChatBody
    model: TextModel
    generation: GenerationRequest
    tools: Tools
    session: Session
    warnings: list[str] = field(default_factory=list)  # what of the body is not obeyed

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the rendered conversation."""
        return len(self.generation.prompts[0])

    async def turns(self, call: RouteCall) -> list[tuple[ModelTurn, Answer]]:
        """Every answer, complete. Raises Refusal, Gone."""
        answers = await call.until_gone(self.session, fold(self.session, self.generation.n))
        return [(ModelTurn.whole(self.tools, answer), answer) for answer in answers]


async def begin(call: RouteCall, body: ChatBody) -> Begun:
    """Submits a chat, for every dialect that has chats. Raises Refusal."""
    model = call.model
    generation, tools = await call.parse(parse, model, body, call.owner)
    return Begun(body, model, generation, tools, await call.begin(generation), call.warnings)


async def chat(call: RouteCall) -> Response:
    """Answers one request."""
    begun = await begin(call, await call.read(ChatBody))
    body, model = begun.body, begun.model
    if begun.generation.stream:
        writer = LegacyWriter if body.legacy else OlderWriter if body.older else ChatWriter
        return sse.EventStream(call, begun.session, writer(begun))
    turns = await begun.turns(call)
    choices = [_choice(begun, i, *turn) for i, turn in enumerate(turns)]
    head = Head(model, "chatcmpl", "chat.completion", body.model, call.warnings)
    return JSONResponse(head(choices=choices, usage=usage(begun.prompt_tokens, begun.session)))


def _choice(begun: Begun, index: int, turn: ModelTurn, answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": turn.text, "refusal": None}
    reason: str = turn.reason
    if turn.calls and begun.body.older:
        message |= {"content": turn.text or None, "function_call": _call(turn.calls[0])["function"]}
        reason = OLDER_REASONS.get(reason, reason)
    elif turn.calls:
        message |= {"content": turn.text or None, "tool_calls": [_call(call) for call in turn.calls]}
    logprobs = None
    if begun.body.logprobs:
        entries = [rated(begun.model.tokenizer, p, begun.body.tops) for p in answer.picked]
        logprobs = {"content": entries, "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def _call(call: FunctionCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


class ChatWriter(OpenAIWriter):
    """Chunks: the role, then text or a call piece by piece, then the reason, then the usage if asked, then [DONE]."""

    def __init__(self, begun: Begun) -> None:
        self.tokenizer, self.body, self.prompt = begun.model.tokenizer, begun.body, begun.prompt_tokens
        self.head = Head(begun.model, "chatcmpl", "chat.completion.chunk", begun.body.model, begun.warnings)
        self.turns = [ModelTurn(begun.tools) for _ in range(begun.generation.n)]

    def begin(self) -> bytes:
        """The role of every answer."""
        return b"".join(self.chunk(i, {"role": "assistant", "content": ""}) for i in range(len(self.turns)))

    def put(self, index: int, event: TokenEvent) -> bytes:
        """One token, and the end."""
        found, turn = b"", self.turns[index]
        logprobs = self.logprobs(event)
        for piece in turn.put(event):
            if piece.call is None:
                found += self.chunk(index, {"content": piece.text}, logprobs)
                logprobs = None
            elif piece.begins:
                found += self.chunk(index, self.call_delta(piece.call, turn.calls[piece.call]))
            else:
                found += self.chunk(
                    index, self.arguments_delta(piece.call, turn.calls[piece.call], piece.arguments), logprobs
                )
                logprobs = None
        if logprobs:  # of a token whose text is held back, or is none
            found += self.chunk(index, {"content": ""}, logprobs)
        if event.finish is not None:
            found += self.chunk(index, {}, None, turn.reason)
        return found

    def logprobs(self, event: TokenEvent) -> dict[str, Any] | None:
        """Those of an event's token, if asked for."""
        if not self.body.logprobs or event.token is None:
            return None
        return {"content": [rated(self.tokenizer, _picked(event), self.body.tops)], "refusal": None}

    def call_delta(self, number: int, call: FunctionCall) -> dict[str, Any]:
        """The begin of a call."""
        return {"tool_calls": [{"index": number, **_call(FunctionCall(call.name, "", call.id))}]}

    def arguments_delta(self, number: int, call: FunctionCall, arguments: str) -> dict[str, Any]:
        """More of its arguments."""
        return {"tool_calls": [{"index": number, "function": {"arguments": arguments}}]}

    def chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> bytes:
        """One event."""
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        more = {"usage": None} if self.body.usage else {}
        return sse.data(self.head(choices=[choice], **more))

    def end(self, session: Session) -> bytes:
        """Usage and [DONE]."""
        told = sse.data(self.head(choices=[], usage=usage(self.prompt, session))) if self.body.usage else b""
        return told + b"data: [DONE]\n\n"


class OlderWriter(ChatWriter):
    """Chunks for requests with `functions`: the one call of an answer is `function_call`, without index and id."""

    def call_delta(self, number: int, call: FunctionCall) -> dict[str, Any]:
        """The begin of a call."""
        return {"function_call": {"name": call.name, "arguments": ""}} if not number else {}

    def arguments_delta(self, number: int, call: FunctionCall, arguments: str) -> dict[str, Any]:
        """More of its arguments."""
        return {"function_call": {"arguments": arguments}} if not number else {}

    def chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> bytes:
        """One event."""
        return super().chunk(index, delta, logprobs, OLDER_REASONS.get(reason or "", reason))


class LegacyWriter(ChatWriter):
    """Chunks as TGI wrote them for its own client: role and call in every one of them, nothing behind the last."""

    def begin(self) -> bytes:
        """Nothing: the role comes with the text."""
        return b""

    def call_delta(self, number: int, call: FunctionCall) -> dict[str, Any]:
        """The begin of a call."""
        return self.arguments_delta(number, call, "")

    def arguments_delta(self, number: int, call: FunctionCall, arguments: str) -> dict[str, Any]:
        """More of its arguments."""
        function = {"name": call.name, "arguments": arguments}
        return {"tool_calls": {"index": number, "id": call.id, "type": "function", "function": function}}

    def chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> bytes:
        """One event."""
        return super().chunk(
            index, {"role": "assistant", "content": None, "tool_calls": None} | delta, logprobs, reason
        )

    def end(self, session: Session) -> bytes:
        """Nothing: its client takes every data line for JSON of one kind."""
        return b""


def _picked(event: TokenEvent) -> SampledToken:
    return SampledToken(event.token or 0, event.logprob, event.top)


DIALECT = OpenAI(
    "openai chat",
    *(post(f"{base}/chat/completions", chat, ChatBody, "answer a conversation", counted=True) for base in ("/v1", "")),
)
