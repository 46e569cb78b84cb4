"""Why a request is not served, in words and in each dialect's status and error body."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llama2.errors import ContextLengthError, InputError, TokenizerError

Dialect = Literal["openai", "tgi"]


@dataclass(frozen=True)
class ErrorKind:
    """A reason: status, type and code for OpenAI's clients, status and type for TGI's."""

    status: int
    type: str
    code: str | None
    tgi_status: int
    tgi_type: str


_INVALID = "invalid_request_error"
KINDS: Mapping[str, ErrorKind] = {
    "malformed": ErrorKind(400, _INVALID, "malformed", 400, "validation"),
    "validation": ErrorKind(400, _INVALID, None, 422, "validation"),
    "context": ErrorKind(400, _INVALID, "context_length_exceeded", 422, "validation"),
    "template": ErrorKind(400, _INVALID, "template_error", 422, "template_error"),
    "tool": ErrorKind(400, _INVALID, "tool_error", 422, "tool_error"),
    "costly": ErrorKind(400, _INVALID, "request_too_costly", 422, "validation"),
    "key": ErrorKind(401, "authentication_error", "invalid_api_key", 401, "authentication"),
    "model": ErrorKind(404, "not_found_error", "model_not_found", 404, "not_found"),
    "route": ErrorKind(404, "not_found_error", "not_found", 404, "not_found"),
    "method": ErrorKind(405, _INVALID, "method_not_allowed", 405, "validation"),
    "host": ErrorKind(421, _INVALID, "misdirected_request", 421, "validation"),
    "size": ErrorKind(413, _INVALID, "request_too_large", 413, "validation"),
    "media": ErrorKind(415, _INVALID, "unsupported_media_type", 415, "validation"),
    "slow": ErrorKind(408, _INVALID, "request_timeout", 408, "validation"),
    "headers": ErrorKind(431, _INVALID, "headers_too_large", 431, "validation"),
    "busy": ErrorKind(429, "rate_limit_error", "overloaded", 429, "overloaded"),
    "rate": ErrorKind(429, "rate_limit_error", "rate_limit_exceeded", 429, "overloaded"),
    "starting": ErrorKind(503, "server_error", "model_loading", 503, "healthcheck"),
    "closing": ErrorKind(503, "server_error", "shutting_down", 503, "overloaded"),
    "unable": ErrorKind(501, "server_error", "not_implemented", 501, "validation"),
    "constraint": ErrorKind(400, _INVALID, "constraint_failed", 424, "generation"),
    "generation": ErrorKind(500, "server_error", "generation_failed", 424, "generation"),
    "deadline": ErrorKind(504, "server_error", "deadline_exceeded", 504, "incomplete_generation"),
    "internal": ErrorKind(500, "server_error", "internal_error", 500, "incomplete_generation"),
}

_ERRORS: dict[type[InputError], str] = {  # the first that fits
    ContextLengthError: "context",
    TokenizerError: "template",
    InputError: "validation",
}


def kind_of(error: InputError) -> str:
    """The kind of a refusal for one of the library's errors."""
    return next(kind for cls, kind in _ERRORS.items() if isinstance(error, cls))


class Refusal(Exception):
    """A request that gets an error. kind: a key of KINDS. param: the field to blame. retry_after: seconds."""

    def __init__(self, kind: str, message: str, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.kind, self.message, self.param, self.retry_after = kind, message, param, retry_after

    def status(self, dialect: Dialect) -> int:
        """The HTTP status."""
        kind = KINDS[self.kind]
        return kind.tgi_status if dialect == "tgi" else kind.status

    def body(self, dialect: Dialect) -> dict[str, Any]:
        """The error as JSON, on its own and as an event of a stream."""
        kind = KINDS[self.kind]
        if dialect == "tgi":
            return {"error": self.message, "error_type": kind.tgi_type}
        return {"error": {"message": self.message, "type": kind.type, "param": self.param, "code": kind.code}}

    def headers(self) -> dict[str, str]:
        """Retry-After, where waiting helps; WWW-Authenticate, where a key is missing."""
        found = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.kind == "key":
            found["www-authenticate"] = "Bearer"
        if self.kind in ("closing", "slow"):
            found["connection"] = "close"
        return found
