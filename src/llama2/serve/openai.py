"""Shared parts of OpenAI's dialects for text: heads, usage, log-probabilities."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from llama2.engine.request import Finish
from llama2.engine.sampler import SampledToken
from llama2.serve.dialect import Dialect, Route
from llama2.serve.errors import KINDS, Refusal
from llama2.serve.served_model import TextModel
from llama2.serve.session import Session
from llama2.serve.sse import Writer, data

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


class Head:
    """The common fields of all objects of one answer; the first has the warnings."""

    def __init__(
        self, model: TextModel, prefix: str, kind: str, name: str | None, warnings: Sequence[str] = ()
    ) -> None:
        self.fields: dict[str, Any] = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": name or model.names[0],
            "system_fingerprint": fingerprint(model),
        }
        self.warnings = list(warnings)

    def __call__(self, **more: Any) -> dict[str, Any]:
        warnings, self.warnings = self.warnings, []
        return {**self.fields, **more, **({"warnings": warnings} if warnings else {})}


def fingerprint(model: TextModel) -> str:
    """Identifies what produced an answer: the same string, the same seed and greedy settings give the same text."""
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


def rated(tokenizer: Any, picked: SampledToken, tops: int) -> dict[str, Any]:
    """One entry of a chat's logprobs."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(raw)}

    best = [entry(token, logprob) for token, logprob in picked.top[:tops]]
    return {**entry(picked.token, picked.logprob), "top_logprobs": best}
