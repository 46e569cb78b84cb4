"""OpenAI's bodies, and what both of its dialects for text share: fields, sampling, usage, log-probabilities."""

import json
import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import Field

from llama2.engine.engine import Finish
from llama2.engine.sampler import Picked
from llama2.serve.constraint import Constraint, any_json, json_schema
from llama2.serve.dialect import Dialect, Route
from llama2.serve.errors import KINDS, Refusal
from llama2.serve.numbers import (
    FIRST_FAULT,
    MAX_COUNT,
    Answers,
    Bias,
    Biases,
    Count,
    CountPenalty,
    PositiveShare,
    RepetitionPenalty,
    Seed,
    Share,
    StopIds,
    Temperature,
)  # fmt: skip
from llama2.serve.request import SEED_BITS, Sampling
from llama2.serve.served_model import ServedModel
from llama2.serve.session import Session
from llama2.serve.sse import Writer, data
from llama2.serve.validation import Body, Text, Texts

REASONS: dict[Finish, str] = {"length": "length", "eos": "stop", "stop": "stop"}


class OpenAI(Dialect):
    """Some of OpenAI's routes: each API of theirs is a file, and all of them tell errors alike."""

    def __init__(self, name: str, *routes: Route, prefixes: tuple[str, ...] = ()) -> None:
        self.name, self.routes, self.prefixes = name, routes, prefixes

    def error(self, refusal: Refusal, id: str = "") -> dict[str, Any]:
        """Message, type, param and code."""
        kind = KINDS[refusal.kind]
        told = {"message": refusal.message, "type": kind.type, "param": refusal.param, "code": kind.code}
        return {"error": told}


class OpenAIWriter(Writer):
    """Writers whose streams end in an OpenAI error where they fail."""

    def fail(self, refusal: Refusal) -> bytes:
        """The error as one event."""
        return data(ERRORS.error(refusal))


ERRORS = OpenAI("openai")


class StreamOptions(Body):
    """stream_options."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class SchemaFormat(Body):
    """json_schema of a response_format."""

    name: str | None = Field(None, max_length=256)
    description: str | None = Field(None, max_length=8192)
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """response_format, in OpenAI's form and in TGI's (`value`)."""

    type: Literal["text", "json_object", "json_schema", "json", "regex", "grammar"]
    json_schema: SchemaFormat | None = None
    value: dict[str, Any] | Text | None = None

    def constraint(self) -> Constraint | None:
        """What the answer must look like. Raises Refusal where a schema or expression is missing."""
        if self.type == "text":
            return None
        if self.type in ("regex", "grammar"):
            if not isinstance(self.value, str) or not self.value:
                raise Refusal("validation", f"response_format of type {self.type} needs its text in `value`")
            return Constraint("regex" if self.type == "regex" else "lark", self.value)
        if self.json_schema is not None:
            schema = self.json_schema.schema_
        else:  # TGI's way; its value may hold the schema with a name beside it
            schema = as_object(self.value) if isinstance(self.value, str) else self.value
            if schema is not None and "properties" not in schema and isinstance(schema.get("schema"), dict):
                schema = schema["schema"]
        if schema is None and self.type == "json_schema":
            raise Refusal(
                "validation", "response_format of type json_schema needs json_schema.schema", "response_format"
            )
        return any_json() if schema is None else json_schema(schema)


class Common(Body):
    """What chat and completions have in common; the second half are settings that vLLM's and TGI's users send."""

    model: str | None = Field(None, max_length=512)
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: PositiveShare | None = None
    n: Answers | None = None
    stop: Text | Texts | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Seed | None = None
    presence_penalty: CountPenalty | None = None
    frequency_penalty: CountPenalty | None = None
    logit_bias: Biases | Annotated[list[Bias], FIRST_FAULT, Field(max_length=200_000)] | None = None
    user: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_COUNT)] | None = None
    min_p: Share | None = None
    typical_p: PositiveShare | None = None
    repetition_penalty: RepetitionPenalty | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: StopIds | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    cache_salt: str | None = Field(None, max_length=256)

    def sampling(self, model: ServedModel) -> Sampling:
        """How to choose tokens. What is not given comes from the checkpoint's generation_config.json."""
        own = model.engine.model.generation_config

        def value(name: str, neutral: float) -> Any:
            given = getattr(self, name)
            if given is not None:
                return given
            kept = own.value(name) if own.is_set(name) else None
            return neutral if kept is None else kept

        temperature = self.temperature
        if temperature is None:
            temperature = (
                float(value("temperature", 1.0)) if own.value("do_sample") or not own.is_set("do_sample") else 0.0
            )
        return Sampling(
            temperature=temperature if temperature >= 1e-5 else None,
            top_k=max(value("top_k", 0), 0),
            top_p=value("top_p", 1.0),
            min_p=value("min_p", 0.0),
            typical_p=value("typical_p", 1.0),
            repetition_penalty=value("repetition_penalty", 1.0),
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            bias=self._bias(),
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            stop_ids=tuple(self.stop_token_ids or ()),
        )

    def _bias(self) -> dict[int, float]:
        if isinstance(self.logit_bias, list):
            return {i: value for i, value in enumerate(self.logit_bias) if value}
        return {int(token): value for token, value in (self.logit_bias or {}).items()}

    @property
    def stops(self) -> tuple[str, ...]:
        """Its stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


def as_object(text: str) -> dict[str, Any]:
    """A JSON object written as a string. Raises Refusal."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Refusal("validation", "the schema is a text that is not a JSON object")
    return found


def drawn(seed: int | None) -> int:
    """The seed in the engine's range, or a new one."""
    return secrets.randbits(62) if seed is None else seed & SEED_BITS


def salt(owner: str, given: str | None) -> str:
    """Whose cached prefixes a request shares: those of the same key and the same cache_salt."""
    return f"{owner}\0{given or ''}"


class Head:
    """What every object of one answer begins with."""

    def __init__(self, model: ServedModel, prefix: str, kind: str, name: str | None) -> None:
        self.fields: dict[str, Any] = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": name or model.names[0],
            "system_fingerprint": fingerprint(model),
        }

    def __call__(self, **more: Any) -> dict[str, Any]:
        return {**self.fields, **more}


def fingerprint(model: ServedModel) -> str:
    """What produced an answer: the same string, the same seed and greedy settings give the same text."""
    return f"llama2-{model.policy.revision or 'native'}"


def usage(prompt: int, session: Session) -> dict[str, Any]:
    """The usage of an answer; cached tokens are prompt tokens that were not computed again."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": session.tokens,
        "total_tokens": prompt + session.tokens,
        "prompt_tokens_details": {"cached_tokens": min(session.reused, prompt)},
    }


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token; bytes that are no characters by themselves show as U+FFFD."""
    raw: bytes = tokenizer.token_bytes(token)
    return raw.decode("utf-8", "replace")


def finite(logprob: float | None) -> float:
    """JSON has no -inf."""
    return max(-9999.0 if logprob is None or logprob != logprob else logprob, -9999.0)


def rated(tokenizer: Any, picked: Picked, tops: int) -> dict[str, Any]:
    """One entry of a chat's logprobs."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(raw)}

    best = [entry(token, logprob) for token, logprob in picked.top[:tops]]
    return {**entry(picked.token, picked.logprob), "top_logprobs": best}
