"""Why a request is not served, in words; each dialect has its own body for it."""

from collections.abc import Mapping
from dataclasses import dataclass

from llama2.errors import ContextLengthError, InputError, TokenizerError


@dataclass(frozen=True)
class ErrorKind:
    """A reason: HTTP status, type and code as OpenAI names them. Dialects with other names map the kind or status."""

    status: int
    type: str
    code: str | None


_INVALID = "invalid_request_error"
KINDS: Mapping[str, ErrorKind] = {
    "malformed": ErrorKind(400, _INVALID, "malformed"),
    "validation": ErrorKind(400, _INVALID, None),
    "context": ErrorKind(400, _INVALID, "context_length_exceeded"),
    "template": ErrorKind(400, _INVALID, "template_error"),
    "tool": ErrorKind(400, _INVALID, "tool_error"),
    "costly": ErrorKind(400, _INVALID, "request_too_costly"),
    "key": ErrorKind(401, "authentication_error", "invalid_api_key"),
    "model": ErrorKind(404, "not_found_error", "model_not_found"),
    "route": ErrorKind(404, "not_found_error", "not_found"),
    "method": ErrorKind(405, _INVALID, "method_not_allowed"),
    "host": ErrorKind(421, _INVALID, "misdirected_request"),
    "size": ErrorKind(413, _INVALID, "request_too_large"),
    "media": ErrorKind(415, _INVALID, "unsupported_media_type"),
    "slow": ErrorKind(408, _INVALID, "request_timeout"),
    "headers": ErrorKind(431, _INVALID, "headers_too_large"),
    "busy": ErrorKind(429, "rate_limit_error", "overloaded"),
    "rate": ErrorKind(429, "rate_limit_error", "rate_limit_exceeded"),
    "starting": ErrorKind(503, "server_error", "model_loading"),
    "load": ErrorKind(500, "server_error", "model_not_loaded"),
    "memory": ErrorKind(503, "server_error", "out_of_memory"),
    "closing": ErrorKind(503, "server_error", "shutting_down"),
    "unable": ErrorKind(501, "server_error", "not_implemented"),
    "constraint": ErrorKind(400, _INVALID, "constraint_failed"),
    "generation": ErrorKind(500, "server_error", "generation_failed"),
    "deadline": ErrorKind(504, "server_error", "deadline_exceeded"),
    "internal": ErrorKind(500, "server_error", "internal_error"),
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

    def headers(self) -> dict[str, str]:
        """Retry-After, where waiting helps; WWW-Authenticate, where a key is missing."""
        found = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.kind == "key":
            found["www-authenticate"] = "Bearer"
        if self.kind in ("closing", "slow"):
            found["connection"] = "close"
        return found
