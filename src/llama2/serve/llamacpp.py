"""The own routes of llama.cpp's server: /completion, /infill, /props, /slots, /apply-template, /embedding.

A body becomes that of a completion. What is left open comes from the checkpoint's generation settings, then from
llama.cpp's own defaults. /completions without `model` is this API's and with it OpenAI's, as llama.cpp's server and
OpenAI's client have it; /tokenize and /detokenize are in `tokenization`.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ConfigDict
from starlette.responses import JSONResponse, Response

from llama2.engine.request import Finish, TokenEvent
from llama2.engine.sampler import SampledToken
from llama2.serve import openai_chat, openai_completions, sse
from llama2.serve.dialect import Dialect, Route, get, post
from llama2.serve.errors import KINDS, Refusal
from llama2.serve.llamacpp_state import (
    DEFAULTS,
    NativeEmbeddingBody,
    apply_template,
    chain_settings,
    default_settings,
    embedding,
    lora_adapters,
    no_change,
    props,
    slots,
)
from llama2.serve.numbers import MAX_BIAS, MaxNew, Seed, Tops
from llama2.serve.openai import finite
from llama2.serve.request import GenerationRequest
from llama2.serve.served_model import TextModel
from llama2.serve.service import RouteCall
from llama2.serve.session import Answer, Session, fold
from llama2.serve.validation import Body, Text, Texts

_STOPS: Mapping[Finish, str] = {"eos": "eos", "length": "limit", "stop": "word"}
# Tokens that mark a gap to be filled, each model family's own, in this order: before, behind, the gap.
_GAP = (("▁<PRE>", "<PRE>", "<fim_prefix>", "<|fim_prefix|>"), ("▁<SUF>", "<SUF>", "<fim_suffix>", "<|fim_suffix|>"),
        ("▁<MID>", "<MID>", "<fim_middle>", "<|fim_middle|>"))  # fmt: skip
_OTHER_NAMES = {"repeat_penalty": "repetition_penalty", "typ_p": "typical_p", "n_cmpl": "n"}
# Where a request is kept and how much of its progress is told; both are decided here.
_WITHOUT_EFFECT = ("id_slot", "n_cache_reuse", "cache_prompt", "return_progress")


class NativeBody(Body):
    """The body of /completion. Samplers that are not named here are those of every completion, or refused there."""

    model_config = ConfigDict(extra="allow")
    open_ended = True
    prompt: Any = None
    n_predict: MaxNew | None = None
    max_tokens: MaxNew | None = None
    max_completion_tokens: MaxNew | None = None
    stream: bool | None = None
    stop: Text | Texts | None = None
    seed: Seed | None = None
    logit_bias: Any = None
    json_schema: dict[str, Any] | None = None
    grammar: Text | None = None
    n_probs: Tops | None = None
    logprobs: Tops | None = None
    post_sampling_probs: bool | None = None
    return_tokens: bool | None = None
    timings_per_token: bool | None = None
    response_fields: Texts | None = None
    lora: list[dict[str, Any]] | None = None

    @property
    def bound(self) -> int:
        """New tokens at most; below 0 for as many as there is room for."""
        given = (self.n_predict, self.max_completion_tokens, self.max_tokens)
        return next((value for value in given if value is not None), -1)

    @property
    def tops(self) -> int:
        """Likeliest tokens to tell with each token."""
        return self.n_probs or self.logprobs or 0

    def fields(self, model: TextModel, prompts: list[list[int]]) -> dict[str, Any]:
        """The body of a completion. Raises Refusal."""
        if self.post_sampling_probs:
            raise Refusal("unable", "post_sampling_probs is not supported: log-probabilities are the model's own")
        own = model.settings
        greedy = own.is_set("do_sample") and not own.value("do_sample")
        found: dict[str, Any] = {} if greedy else {k: v for k, v in DEFAULTS.items() if not own.is_set(k)}
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in _WITHOUT_EFFECT:
                found[_OTHER_NAMES.get(name, name)] = value
        found |= {"prompt": prompts, "max_tokens": max(self.bound, 1), "stream": bool(self.stream)}
        found |= {"stop": self.stop} if self.stop else {}
        found |= {"seed": self.seed} if self.seed is not None and self.seed >= 0 else {}
        found |= {"logprobs": self.tops} if self.tops else {}
        if self.grammar:
            found["grammar"] = self.grammar
        elif self.json_schema is not None:
            schema = {"name": "json_schema", "schema": self.json_schema}
            found["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.logit_bias:
            found["logit_bias"] = _biases(model, self.logit_bias)
        return found | ({"model": _adapter(model, self.lora)} if self.lora else {})


class InfillBody(NativeBody):
    """The body of /infill."""

    input_prefix: Text
    input_suffix: Text
    input_extra: list[dict[str, Any]] | None = None


def _biases(model: TextModel, given: Any) -> dict[str, float]:
    """Biases by id; a text's is that of each of its tokens, `false` forbids, and ids that do not exist are nobody's."""
    pairs = list(given.items()) if isinstance(given, dict) else given
    if not isinstance(pairs, list) or not all(isinstance(p, Sequence) and len(p) == 2 for p in pairs):
        raise Refusal(
            "validation", "logit_bias is no list of pairs and no object; give [[id, bias], ...]", "logit_bias"
        )
    found: dict[str, float] = {}
    for key, value in pairs:
        if value is True or not isinstance(value, bool | int | float):
            raise Refusal("validation", f"logit_bias has the bias {str(value)[:40]!r}; give a number or false")
        bias = -MAX_BIAS if value is False else min(max(float(value), -MAX_BIAS), MAX_BIAS)
        ids = [key] if isinstance(key, int) else None
        if ids is None and isinstance(given, dict) and str(key).isdecimal():
            ids = [int(key)]
        for token in ids if ids is not None else _pieces(model, str(key), True):
            if 0 <= token < len(model.tokenizer):
                found[str(token)] = bias
    return found


def _adapter(model: TextModel, given: list[dict[str, Any]]) -> str | None:
    active = [entry for entry in given if entry.get("scale")]
    if not active:
        return model.names[0]
    if len(active) > 1 or active[0].get("scale") != 1 or active[0].get("id") not in range(len(model.adapters)):
        raise Refusal("validation", f"lora takes one adapter of {len(model.adapters)}, with the scale 1", "lora")
    return model.adapters[active[0]["id"]]


def _pieces(model: TextModel, text: str, special: bool) -> list[int]:
    found: list[int] = model.tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=not special)[
        "input_ids"
    ]
    return found


def _prompts(model: TextModel, given: Any) -> tuple[list[list[int]], bool]:
    """The prompts as ids, and whether there is a list of them. Raises Refusal."""
    if isinstance(given, list) and not any(isinstance(item, int) for item in given):
        if not 1 <= len(given) <= model.bounds.max_client_batch_size:
            raise Refusal("validation", f"{len(given)} prompts; 1 to {model.bounds.max_client_batch_size} are taken")
        return [_prompt(model, item) for item in given], True
    return [_prompt(model, given)], False


def _prompt(model: TextModel, given: Any) -> list[int]:
    """One prompt: a text, ids, both in turn, or {"prompt_string"}. BOS comes before a text that it begins with."""
    if isinstance(given, dict):
        if given.get("multimodal_data"):
            raise Refusal("validation", "a prompt has multimodal_data; this model reads text only", "prompt")
        given = given.get("prompt_string")
    if isinstance(given, str):
        return list(openai_completions.encode(model.tokenizer, given, True))
    if not isinstance(given, list) or not given:
        raise Refusal("validation", 'prompt is missing; give a text, ids, or a list of both ("prompt")', "prompt")
    found: list[int] = []
    for i, part in enumerate(given):
        if isinstance(part, str):
            found += openai_completions.encode(model.tokenizer, part, True) if i == 0 else _pieces(model, part, True)
        elif isinstance(part, int) and not isinstance(part, bool):
            found.append(part)
        else:
            raise Refusal("validation", f"prompt has {str(part)[:40]!r}; its parts are texts and ids", "prompt")
    return found


# -- answers -----------------------------------------------------------------------------------------------------


class NativeReply:
    """The objects of one request."""

    def __init__(self, model: TextModel, body: NativeBody, request: GenerationRequest, prompts: Any) -> None:
        """prompts: as they were sent."""
        self.model, self.body, self.request, self.prompts = model, body, request, prompts
        self.answers = [Answer() for _ in range(request.answers)]

    def prompt(self, index: int) -> int:
        """The number of the prompt that an answer goes on from."""
        return index // self.request.best_of

    def chunk(self, index: int, event: TokenEvent, session: Session | None) -> dict[str, Any]:
        """Returns the chunk of one event."""
        answer = self.answers[index]
        picked = [] if event.token is None else [SampledToken(event.token, event.logprob, event.top)]
        found: dict[str, Any] = {
            "index": index,
            "content": event.text,
            "tokens": [p.token for p in picked],
            "stop": False,
            "id_slot": 0,
            "tokens_predicted": len(answer.picked),
            "tokens_evaluated": len(self.request.prompts[self.prompt(index)]),
        }
        found |= self.probabilities(picked)
        return found | ({"timings": self.timings(index, session)} if self.body.timings_per_token and session else {})

    def probabilities(self, picked: list[SampledToken]) -> dict[str, Any]:
        """Log-probabilities of tokens, where they were asked for."""
        if not self.body.tops:
            return {}
        return {"completion_probabilities": [self.rated(p) for p in picked]} if picked else {}

    def rated(self, picked: SampledToken) -> dict[str, Any]:
        """One token."""

        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            raw = self.model.tokenizer.token_bytes(token)
            told = {"id": token, "token": raw.decode("utf-8", "replace"), "bytes": list(raw)}
            return {**told, "logprob": finite(logprob)}

        best = [entry(token, logprob) for token, logprob in picked.top[: self.body.tops]]
        return {**entry(picked.token, picked.logprob), "top_logprobs": best}

    def final(self, index: int, session: Session, whole: bool) -> dict[str, Any]:
        """The last object of an answer; whole: its text is told here."""
        answer, prompt = self.answers[index], self.request.prompts[self.prompt(index)]
        silent = self.body.bound == 0
        text, picked = ("", []) if silent else (answer.text, answer.picked)
        found: dict[str, Any] = {
            "index": index,
            "content": text if whole else "",
            "tokens": [p.token for p in picked] if self.body.return_tokens and whole else [],
            "id_slot": 0,
            "stop": True,
            "model": self.model.names[0],
            "tokens_predicted": len(picked),
            "tokens_evaluated": len(prompt),
            "generation_settings": settings(self.request, self.body),
            "prompt": self.prompts[self.prompt(index)],
            "has_new_line": "\n" in text,
            "truncated": index in session.shifted,
            "stop_type": _STOPS.get(answer.finish or "length", "none"),
            "stopping_word": answer.stop or "",
            "tokens_cached": len(prompt) + len(picked),
            "timings": self.timings(index, session),
        }
        found |= self.probabilities(picked) if whole else {}
        return _chosen(found, self.body.response_fields)

    def timings(self, index: int, session: Session | None) -> dict[str, Any]:
        """Milliseconds and rates of prompt and answer, and the tokens that were not computed again."""
        prompt, made = len(self.request.prompts[self.prompt(index)]), len(self.answers[index].picked)
        times = session.times if session else None
        now = time.monotonic()
        first = (times.first if times else 0.0) or now
        began = (times.began if times else 0.0) or first
        cached = min(session.reused, prompt) if session else 0
        prompt_ms = max((first - began) * 1000, 1e-3)
        made_ms = max((((times.ended if times else 0.0) or now) - first) * 1000, 1e-3)
        computed = max(prompt - cached, 1)
        return {
            "cache_n": cached,
            "prompt_n": prompt - cached,
            "prompt_ms": prompt_ms,
            "prompt_per_token_ms": prompt_ms / computed,
            "prompt_per_second": computed * 1000 / prompt_ms,
            "predicted_n": made,
            "predicted_ms": made_ms,
            "predicted_per_token_ms": made_ms / max(made, 1),
            "predicted_per_second": made * 1000 / made_ms,
        }


def _chosen(found: dict[str, Any], names: list[str] | None) -> dict[str, Any]:
    """The fields that were asked for; a/b is b of a, told by its own name."""
    if not names:
        return found
    told = {}
    for name in names:
        value: Any = found
        for part in name.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            told[name.rpartition("/")[2]] = value
    return told


def settings(request: GenerationRequest, body: NativeBody) -> dict[str, Any]:
    """How tokens were chosen, under llama.cpp's names."""
    sampling = request.sampling
    return {
        **default_settings(),
        "n_predict": body.bound,
        "max_tokens": body.bound,
        "seed": request.seed,
        "temperature": sampling.temperature or 0.0,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "typical_p": sampling.typical_p,
        "repeat_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        **chain_settings(sampling.chain),
        "stop": list(request.stop),
        "ignore_eos": sampling.ignore_eos,
        "stream": request.stream,
        "n_probs": body.tops,
        "grammar": body.grammar or "",
    }


class NativeWriter(sse.Writer):
    """Bare data lines: what each event adds, then the last object; no [DONE]."""

    def __init__(self, reply: NativeReply) -> None:
        self.reply = reply
        self.session: Session | None = None  # known once the stream begins

    def put(self, index: int, event: TokenEvent) -> bytes:
        """One token; the last object of an answer comes at its end, from `end`."""
        self.reply.answers[index].add(event)
        if self.reply.body.bound == 0 or (event.token is None and not event.text):
            return b""
        return sse.data(self.reply.chunk(index, event, self.session))

    def end(self, session: Session) -> bytes:
        """The last object of every answer."""
        found = (self.reply.final(i, session, False) for i in range(len(self.reply.answers)))
        return b"".join(map(sse.data, found))

    def fail(self, refusal: Refusal) -> bytes:
        """The error."""
        return sse.data(DIALECT.error(refusal))


async def completion(call: RouteCall) -> Response:
    """/completion."""
    call.dialect = DIALECT
    body = await call.read(NativeBody)
    prompts, listed = await call.parse(_prompts, call.model, body.prompt)
    shown = body.prompt if listed else [body.prompt]
    return await _answer(call, body, prompts, shown, listed)


async def _answer(call: RouteCall, body: NativeBody, prompts: list[list[int]], shown: Any, listed: bool) -> Response:
    read = await call.translate(body.fields, call.model, prompts, to=openai_completions.CompletionBody)
    bound = {"max_new_tokens": None} if body.bound < 0 else {}
    request, session = await openai_completions.begin(call, read, **bound)
    reply = NativeReply(call.model, body, request, shown)
    if request.stream:
        writer = NativeWriter(reply)
        writer.session = session
        return sse.EventStream(call, session, writer)
    reply.answers = await call.until_gone(session, fold(session, request.answers))
    found = [reply.final(i, session, True) for i in range(len(reply.answers))]
    return JSONResponse(found if listed or len(found) > 1 else found[0])


async def completions(call: RouteCall) -> Response:
    """/completions: with `model` OpenAI's, without it llama.cpp's own."""
    call.dialect = DIALECT
    if "model" in await call.peek() and "n_predict" not in await call.peek():
        call.dialect = openai_completions.DIALECT
        return await openai_completions.completions(call)
    return await completion(call)


async def infill(call: RouteCall) -> Response:
    """/infill: what belongs between two texts, where the tokenizer has the marks of a gap."""
    body = await call.read(InfillBody)
    prompt = await call.parse(_gap, call.model, body)
    return await _answer(call, body, [prompt], [body.prompt or ""], False)


def _gap(model: TextModel, body: InfillBody) -> list[int]:
    marks = []
    for names in _GAP:
        ids = [token for token in map(model.tokenizer.convert_tokens_to_ids, names) if token is not None]
        known = [token for token in ids if token != model.tokenizer.unk_token_id]
        if not known:
            raise Refusal("unable", f"infill needs the token {names[0]!r} or another of its kind; this model has none")
        marks.append(known[0])
    extra = "".join(f"{e.get('filename', '')}\n{e.get('text', '')}\n" for e in body.input_extra or ())
    bos = [model.tokenizer.bos_token_id] if model.tokenizer.bos_token_id is not None else []
    before, behind = _pieces(model, extra + body.input_prefix, False), _pieces(model, body.input_suffix, False)
    middle = _pieces(model, body.prompt, False) if isinstance(body.prompt, str) and body.prompt else []
    return [*bos, marks[0], *before, marks[1], *behind, marks[2], *middle]


class LlamaCpp(Dialect):
    """llama.cpp's routes."""

    name, prefixes = "llama.cpp", ("/slots", "/lora-adapters", "/completion", "/infill")
    routes: tuple[Route, ...] = (
        post("/completion", completion, NativeBody, "llama.cpp: continue a prompt", counted=True, any_type=True),
        post("/completions", completions, NativeBody, "llama.cpp's, or OpenAI's", counted=True, any_type=True),
        post("/infill", infill, InfillBody, "llama.cpp: fill a gap", counted=True, any_type=True),
        post("/embedding", embedding, NativeEmbeddingBody, "llama.cpp: vectors of texts", any_type=True),
        post("/embeddings", embedding, NativeEmbeddingBody, "llama.cpp's, or OpenAI's", any_type=True),
        post(
            "/apply-template", apply_template, openai_chat.ChatBody, "llama.cpp: a rendered conversation", any_type=True
        ),
        get("/props", props, "llama.cpp: the model and the defaults"),
        post("/props", no_change, None, "llama.cpp: refused", any_type=True),
        get("/slots", slots, "llama.cpp: the places of a step"),
        post("/slots/{id}", no_change, None, "llama.cpp: refused", any_type=True),
        get("/lora-adapters", lora_adapters, "llama.cpp: the adapters"),
        post("/lora-adapters", no_change, None, "llama.cpp: refused", any_type=True),
    )

    def status(self, refusal: Refusal) -> int:
        """503 for a full server."""
        return 503 if refusal.kind == "busy" else KINDS[refusal.kind].status

    def error(self, refusal: Refusal, id: str = "") -> dict[str, Any]:
        """A code, a message and a type."""
        own = {"context": "exceed_context_size_error", "unable": "not_supported_error"}
        status = self.status(refusal)
        kind = own.get(refusal.kind, "unavailable_error" if status == 503 else KINDS[refusal.kind].type)
        return {"error": {"code": status, "message": refusal.message, "type": kind}}


DIALECT = LlamaCpp()
