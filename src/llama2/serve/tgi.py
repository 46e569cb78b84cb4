"""text-generation-inference's dialect: /, /generate, /generate_stream, /info, /tokenize, /chat_tokenize.

Kept: names, defaults, statuses, error bodies, the shape of streams. Mended, as docs/serving.md lists: top_p 1.0, stops
exact across tokens, errors before the first byte with their status, log-probabilities of the model's own logits.
"""

import time
from typing import Any, Literal

from pydantic import Field
from starlette.responses import JSONResponse, Response

from llama2.engine.request import Finish, TokenEvent
from llama2.engine.sampler import SampledToken
from llama2.serve import sse
from llama2.serve.chat import prompt_ids
from llama2.serve.common import LEAST_TOP_P, drawn, salt
from llama2.serve.constraint import Constraint, any_json, json_schema
from llama2.serve.dialect import Dialect, Route, post
from llama2.serve.errors import KINDS, Refusal
from llama2.serve.forms import as_object
from llama2.serve.json_response import answer
from llama2.serve.numbers import (
    Answers,
    Count,
    CountPenalty,
    MaxTokens,
    Positive,
    PositiveShare,
    RepetitionPenalty,
    Share,
    Temperature,
    Tops,
    UnsignedSeed,
)  # fmt: skip
from llama2.serve.openai import finite
from llama2.serve.openai_chat import ChatBody
from llama2.serve.openai_completions import encode
from llama2.serve.request import GenerationRequest, Sampling, placed
from llama2.serve.served_model import ServedModel, TextModel
from llama2.serve.service import RouteCall
from llama2.serve.session import Answer, Session, fold
from llama2.serve.validation import Body, Text, Texts

REASONS: dict[Finish, str] = {"length": "length", "eos": "eos_token", "stop": "stop_sequence"}

# Status and type of the kinds that TGI tells in its own way; the others keep their status and are "validation".
_ERRORS: dict[str, tuple[int, str]] = {
    **dict.fromkeys(("validation", "context", "costly"), (422, "validation")),
    "template": (422, "template_error"),
    "tool": (422, "tool_error"),
    "key": (401, "authentication"),
    "model": (404, "not_found"),
    "route": (404, "not_found"),
    "busy": (429, "overloaded"),
    "rate": (429, "overloaded"),
    "starting": (503, "healthcheck"),
    "closing": (503, "overloaded"),
    "constraint": (424, "generation"),
    "generation": (424, "generation"),
    "deadline": (504, "incomplete_generation"),
    "internal": (500, "incomplete_generation"),
}


class Grammar(Body):
    """grammar."""

    type: Literal["json", "json_object", "json_schema", "regex"]
    value: Text | dict[str, Any] | None = None

    def constraint(self) -> Constraint:
        """Returns the constraint on the answer. Raises Refusal."""
        if self.type == "regex":
            if not isinstance(self.value, str) or not self.value:
                raise Refusal("validation", "a grammar of type regex needs an expression in `value`", "grammar")
            return Constraint("regex", self.value)
        schema = as_object(self.value) if isinstance(self.value, str) else self.value
        if schema is None:
            if self.type != "json_object":
                raise Refusal("validation", f"a grammar of type {self.type} needs a schema in `value`", "grammar")
            return any_json()
        if "properties" not in schema and isinstance(schema.get("schema"), dict):
            schema = schema["schema"]
        return json_schema(schema)


class Parameters(Body):
    """parameters."""

    best_of: Answers | None = None
    temperature: Temperature | None = None
    repetition_penalty: RepetitionPenalty | None = None
    frequency_penalty: CountPenalty | None = None
    presence_penalty: CountPenalty | None = None
    top_k: Count | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    typical_p: PositiveShare | None = None
    do_sample: bool | None = None
    max_new_tokens: MaxTokens | None = None
    return_full_text: bool | None = None
    stop: Text | Texts | None = None
    stop_sequences: Texts | None = None
    truncate: Positive | None = None
    watermark: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    seed: UnsignedSeed | None = None
    top_n_tokens: Tops | None = None
    grammar: Grammar | None = None
    adapter_id: str | None = Field(None, max_length=512)
    parse_special: bool | None = None
    cache_salt: str | None = Field(None, max_length=256)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn: asked for, or anything set that shapes a draw, but for a temperature of 0."""
        if self.temperature is not None and self.temperature < 1e-5:
            return False
        shaping = (self.temperature, self.top_k, self.top_p, self.typical_p, self.min_p)
        return bool(self.do_sample) or any(value is not None for value in shaping)

    def sampling(self) -> Sampling:
        """How to choose tokens."""
        return Sampling(
            temperature=(self.temperature or 1.0) if self.samples else None,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else max(self.top_p, LEAST_TOP_P),
            min_p=self.min_p or 0.0,
            typical_p=1.0 if self.typical_p is None else self.typical_p,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            watermark=bool(self.watermark),
        )


class GenerateBody(Body):
    """The body of /generate and, with `stream`, of /."""

    inputs: Text
    model: str | None = Field(None, max_length=512)
    parameters: Parameters | None = None
    stream: bool | None = None

    @property
    def given(self) -> Parameters:
        """Its parameters, or the defaults."""
        return self.parameters or Parameters.model_validate({})


def parse(model: TextModel, body: GenerateBody, owner: str, stream: bool) -> GenerationRequest:
    """The body as a generation. Raises Refusal."""
    given, best_of = body.given, body.given.best_of or 1
    if not body.inputs:
        raise Refusal("validation", "inputs is empty; give some text", "inputs")
    if best_of > 1 and given.seed is not None:
        raise Refusal("validation", "best_of above 1 draws several seeds, so seed cannot be given; drop one", "seed")
    if stream and best_of > 1:
        raise Refusal("validation", f"best_of is {best_of} but a stream has one answer; set it to 1", "best_of")
    if stream and given.decoder_input_details:
        raise Refusal(
            "validation", "decoder_input_details needs the whole answer; do not stream", "decoder_input_details"
        )
    special = model.policy.parse_special if given.parse_special is None else given.parse_special
    if not given.truncate:
        model.check_texts((body.inputs,))
    ids = encode(model.tokenizer, body.inputs, special)
    if given.max_new_tokens == 0:
        raise Refusal("validation", "max_new_tokens is 0; ask for at least 1", "max_new_tokens")
    wanted = None if given.max_new_tokens is None or given.max_new_tokens < 0 else given.max_new_tokens
    cut = ids[-given.truncate :] if given.truncate else ids
    prompts, warnings = placed((cut,), model.bounds, wanted, model.policy.context_overflow)
    stops = (given.stop,) if isinstance(given.stop, str) else tuple(given.stop or ())
    stops += tuple(given.stop_sequences or ())
    if "" in stops:
        warnings.append("a stop string is empty, which every text contains; it is ignored")
    return GenerationRequest(
        prompts=prompts,
        sampling=given.sampling(),
        max_new_tokens=wanted,
        best_of=best_of,
        seed=drawn(given.seed),
        stop=tuple(filter(None, stops)),
        keep_stop=True,
        logprobs=given.top_n_tokens or 0 if _wants_details(given) or stream else None,
        prompt_logprobs=bool(given.decoder_input_details),
        continues=True,
        constraint=given.grammar.constraint() if given.grammar else None,
        adapter=model.adapter(given.adapter_id),
        salt=salt(owner, given.cache_salt),
        owner=owner,
        stream=stream,
        warnings=tuple(warnings),
    )


def _wants_details(given: Parameters) -> bool:
    return bool(given.details or given.decoder_input_details)


async def generate(call: RouteCall) -> Response:
    """/generate."""
    return await whole(call, await call.read(GenerateBody))


async def generate_stream(call: RouteCall) -> Response:
    """/generate_stream."""
    return await streamed(call, await call.read(GenerateBody))


async def compat(call: RouteCall) -> Response:
    """/: one or the other, and a list around the whole answer."""
    body = await call.read(GenerateBody)
    full = body.given.return_full_text
    if full is None:
        body = body.model_copy(update={"parameters": body.given.model_copy(update={"return_full_text": True})})
    return await streamed(call, body) if body.stream else await whole(call, body, listed=True)


async def whole(call: RouteCall, body: GenerateBody, listed: bool = False) -> Response:
    """The complete answer."""
    generation = await call.parse(parse, call.model, body, call.owner, False)
    session = await call.begin(generation)
    answers = await call.until_gone(session, fold(session, generation.best_of))
    order = sorted(range(len(answers)), key=lambda i: -answers[i].mean_logprob) if len(answers) > 1 else [0]
    before = _full_text(call.model, body, generation)
    told = [_sequence(call.model, body, generation, answers[i], i, before) for i in order]
    found: dict[str, Any] = {"generated_text": told[0]["generated_text"]}
    if _wants_details(body.given):
        found["details"] = {name: value for name, value in told[0].items() if name != "generated_text"}
        found["details"]["prefill"] = _prefill(call.model, generation, answers[0])
        if len(told) > 1:
            found["details"]["best_of_sequences"] = told[1:]
    if call.warnings:
        found["warnings"] = call.warnings
    headers = _headers(session, len(generation.prompts[0]), len(body.inputs))
    return JSONResponse([found] if listed else found, headers=headers)


async def streamed(call: RouteCall, body: GenerateBody) -> Response:
    """The answer token by token."""
    generation = await call.parse(parse, call.model, body, call.owner, True)
    session = await call.begin(generation)
    writer = TokenWriter(call.model, body, generation, call.warnings)
    headers = {"x-compute-type": _compute_type(call.model), "x-compute-characters": str(len(body.inputs))}
    return sse.EventStream(call, session, writer, headers)


def _full_text(model: TextModel, body: GenerateBody, generation: GenerationRequest) -> str:
    if not body.given.return_full_text:
        return ""
    if not body.given.truncate:
        return body.inputs
    text: str = model.tokenizer.decode(list(generation.prompts[0]), skip_special_tokens=True)
    return text


def _sequence(
    model: TextModel, body: GenerateBody, generation: GenerationRequest, answer: Answer, index: int, before: str
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "generated_text": before + answer.text,
        "finish_reason": REASONS[answer.finish or "length"],
        "generated_tokens": len(answer.picked),
        "seed": generation.seed + index if body.given.samples else None,
        "prefill": [],
        "tokens": [
            token(model, p.token, p.logprob, piece or None)
            for p, piece in zip(answer.picked, answer.pieces, strict=True)
        ],
    }
    if body.given.top_n_tokens:
        found["top_tokens"] = [[token(model, i, logprob) for i, logprob in p.top] for p in answer.picked]
    return found


def _prefill(model: TextModel, generation: GenerationRequest, answer: Answer) -> list[dict[str, Any]]:
    if not generation.prompt_logprobs:
        return []
    rows = [SampledToken(generation.prompts[0][0]), *answer.prompt]
    return [
        {"id": p.token, "text": _text(model, p.token), "logprob": None if p.logprob is None else finite(p.logprob)}
        for p in rows
    ]


def token(model: TextModel, token_id: int, logprob: float | None, text: str | None = None) -> dict[str, Any]:
    """A token as TGI tells it; text: what it added, where that is known."""
    special = token_id in model.tokenizer.special_ids
    told = _text(model, token_id) if text is None else text
    return {"id": token_id, "text": told, "logprob": finite(logprob), "special": special}


def _text(model: TextModel, token_id: int) -> str:
    raw: bytes = model.tokenizer.token_bytes(token_id)
    return raw.decode("utf-8", "replace")


class TokenWriter(sse.Writer):
    """One event a token; the last one carries the whole text. Special tokens have no text: clients join it."""

    def __init__(
        self, model: TextModel, body: GenerateBody, generation: GenerationRequest, warnings: list[str]
    ) -> None:
        self.model, self.body, self.generation, self.warnings = model, body, generation, warnings
        self.answer = Answer()

    def put(self, index: int, event: TokenEvent) -> bytes:
        """One token, and the end."""
        self.answer.add(event)
        if event.token is None:
            return b""
        told: dict[str, Any] = {
            "index": len(self.answer.picked),
            "token": token(self.model, event.token, event.logprob, event.text),
        }
        if self.body.given.top_n_tokens:
            told["top_tokens"] = [token(self.model, i, logprob) for i, logprob in event.top]
        if self.warnings:
            told["warnings"], self.warnings = self.warnings, []
        return sse.data(told | {"generated_text": None, "details": None} | self._last(event))

    def _last(self, event: TokenEvent) -> dict[str, Any]:
        if event.finish is None:
            return {}
        given = self.body.given
        details = {
            "finish_reason": REASONS[event.finish],
            "generated_tokens": len(self.answer.picked),
            "seed": self.generation.seed if given.samples else None,
            "input_length": len(self.generation.prompts[0]),
        }
        before = _full_text(self.model, self.body, self.generation)
        return {"generated_text": before + self.answer.text, "details": details if given.details else None}

    def fail(self, refusal: Refusal) -> bytes:
        """The error as one event."""
        return sse.data(DIALECT.error(refusal))


def _compute_type(model: ServedModel) -> str:
    return "cpu+optimized" if model.engine.runner.weights is not None else str(model.engine.model.device.type)


def _headers(session: Session, prompt: int, characters: int) -> dict[str, str]:
    times = session.times
    total = time.monotonic() - times.came

    def ms(seconds: float) -> str:
        return str(round(max(seconds, 0.0) * 1000))

    return {
        "x-compute-type": "cpu+optimized",
        "x-compute-time": f"{total:.6f}",
        "x-compute-characters": str(characters),
        "x-total-time": ms(total),
        "x-validation-time": ms(times.checked - times.came),
        "x-queue-time": ms(times.began - times.checked),
        "x-inference-time": ms(times.ended - times.began),
        "x-time-per-token": ms((times.ended - times.began) / max(session.tokens, 1)),
        "x-prompt-tokens": str(prompt),
        "x-generated-tokens": str(session.tokens),
    }


async def tokenize(call: RouteCall) -> Response:
    """/tokenize: the ids of a prompt with their places in it."""
    body = await call.read(GenerateBody)
    return await call.parse(answer, pieces, call.model, body.inputs)


def check_bytes(model: TextModel, texts: list[str]) -> None:
    """Each byte may become a token, and each token an object of the answer."""
    held, most = sum(len(text.encode()) for text in texts), model.bounds.max_tokenize_bytes
    if held > most:
        raise Refusal("size", f"{held} bytes of text; {most} are the most that are tokenised at once, so send parts")


def pieces(model: TextModel, text: str) -> list[dict[str, Any]]:
    """The ids that a prompt becomes, each with its text and place. A BOS that the tokenizer adds has none."""
    check_bytes(model, [text])
    tokenizer, special = model.tokenizer, model.policy.parse_special
    ids = encode(tokenizer, text, special)
    found = tokenizer(text, return_offsets_mapping=True, verbose=False, split_special_tokens=not special)
    rows = list(zip(found["input_ids"], found["offset_mapping"], strict=True))
    extra = len(rows) - len(ids)  # the BOS that was in the text already
    places = [place for _, place in rows[extra:]] if extra >= 0 else [(0, 0)] * -extra + [place for _, place in rows]
    return [
        {"id": i, "text": text[a:b] or tokenizer.token_bytes(i).decode("utf-8", "replace"), "start": a, "stop": b}
        for i, (a, b) in zip(ids, places, strict=True)
    ]


async def chat_tokenize(call: RouteCall) -> Response:
    """/chat_tokenize: the ids and the text of a rendered conversation."""
    body = await call.read(ChatBody)
    return await call.parse(answer, _rendered, call.model, body)


def _rendered(model: TextModel, body: ChatBody) -> dict[str, Any]:
    check_bytes(model, [message.text() for message in body.messages])
    tokenizer = model.tokenizer
    tools = body.offered(model)
    ids = prompt_ids(model, body.messages, tools, body.continues, body.chat_template_kwargs)
    found, text = [], ""
    for i in ids:
        piece = tokenizer.token_bytes(i).decode("utf-8", "replace")
        found.append({"id": i, "text": piece, "start": len(text), "stop": len(text) + len(piece)})
        text += piece
    return {"tokenize_response": found, "templated_text": tokenizer.decode(list(ids))}


class TGI(Dialect):
    """Routes whose errors are text-generation-inference's."""

    def __init__(self, name: str, *routes: Route, prefixes: tuple[str, ...] = ()) -> None:
        self.name, self.routes, self.prefixes = name, routes, prefixes

    def status(self, refusal: Refusal) -> int:
        """422 for what does not validate, 424 for what fails in the model."""
        return _ERRORS[refusal.kind][0] if refusal.kind in _ERRORS else KINDS[refusal.kind].status

    def error(self, refusal: Refusal, id: str = "") -> dict[str, Any]:
        """A message and a type."""
        return {"error": refusal.message, "error_type": _ERRORS.get(refusal.kind, (0, "validation"))[1]}


DIALECT = TGI(
    "tgi",
    post("/", compat, GenerateBody, "continue a prompt: /generate in a list, or its stream", counted=True),
    post("/generate", generate, GenerateBody, "continue a prompt", counted=True),
    post("/generate_stream", generate_stream, GenerateBody, "continue a prompt, token by token", counted=True),
    post("/chat_tokenize", chat_tokenize, ChatBody, "the ids of a conversation"),
    prefixes=("/",),
)
