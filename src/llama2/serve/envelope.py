"""Outermost of all: bounds on headers, request ids, the log, and answers that nobody reads."""

import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama2.serve.dialect import Dialect
from llama2.serve.errors import Refusal
from llama2.serve.logs import logger
from llama2.serve.origin import check_host
from llama2.serve.service import RouteCall, Service

MAX_HEADERS, MAX_HEADER_BYTES = 128, 16_384
PROBES = ("/health", "/ping", "/ready")
PART = 65_536  # bytes of an answer that are handed to the connection at once


class Envelope:
    """Outermost: bounds on headers, a request id, a line in the log, and headers that every response has."""

    def __init__(self, app: ASGIApp, service: Service, dialect_at: Callable[[str], Dialect]) -> None:
        """dialect_at: who tells the errors of a path."""
        self.app, self.service, self.dialect_at = app, service, dialect_at

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope.get("http_version") == "1.0":
            send = _at_once(send)
        state: dict[str, Any] = scope.setdefault("state", {})
        headers = scope["headers"]
        state["id"], state["notes"] = _request_id(headers), {}
        id = state["id"].encode()
        stamp = (b"x-request-id", id), (b"request-id", id), (b"x-content-type-options", b"nosniff")
        began, status = time.monotonic(), 0

        start: Message | None = None  # sent with the first part of the body: until then it may become a refusal

        async def stamped(message: Message) -> None:
            nonlocal status, start
            if message["type"] == "http.response.start":
                start = {**message, "headers": [*message.get("headers", ()), *stamp]}
                return
            if start is not None:
                status, first, start = start["status"], start, None
                await send(first)
            await send(message)

        async def bounded(message: Message) -> None:
            """Answers of one large part, which nothing else holds back."""
            body = message.get("body", b"")
            if len(body) <= PART:
                await stamped(message)
                return
            try:
                self.service.unread.take(state.get("owner", ""), len(body))
            except Refusal as refusal:
                await self.dialect_at(scope["path"]).refuse(refusal, state["id"])(scope, receive, stamped)
                return
            try:
                for at in range(0, len(body), PART):
                    more = message.get("more_body", False) or at + PART < len(body)
                    await stamped({"type": "http.response.body", "body": body[at : at + PART], "more_body": more})
            finally:
                self.service.unread.give_back(state.get("owner", ""), len(body))

        try:
            if len(headers) > MAX_HEADERS or sum(len(k) + len(v) for k, v in headers) > MAX_HEADER_BYTES:
                raise Refusal("headers", "the headers are too many or too long")
            if scope["path"] not in PROBES:  # whoever watches a server knows it by its address
                host = next((value.decode("latin-1") for name, value in headers if name == b"host"), None)
                if host is not None or scope.get("http_version") != "1.0":  # which has no such header
                    check_host(host, self.service.policy.allowed_hosts)
        except Refusal as refusal:
            await self.dialect_at(scope["path"]).refuse(refusal, state["id"])(scope, receive, bounded)
        else:
            await self.app(scope, receive, bounded)
        self._log(scope, status, time.monotonic() - began)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        state = scope["state"]
        level = 10 if scope["path"] in (*PROBES, "/metrics") and status == 200 else 20
        if logger.isEnabledFor(level):
            fields = {
                "request_id": state["id"],
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "seconds": round(seconds, 4),
                **state["notes"],
            }
            logger.log(level, "request", extra={"fields": fields})


def _at_once(send: Send) -> Send:
    """Sends a stream in one piece with its length: HTTP/1.0 knows no chunks, in which it would go out."""
    start: Message | None = None
    parts: list[bytes] = []

    async def collected(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            start = message
            return
        parts.append(message.get("body", b""))
        if message.get("more_body", False) or start is None:
            return
        body = b"".join(parts)
        headers = [(k, v) for k, v in start.get("headers", ()) if k.lower() != b"content-length"]
        length = (b"content-length", str(len(body)).encode())
        # What answers HEAD or 304 has no body and may tell another length.
        kept = list(start.get("headers", ())) if not body else [*headers, length]
        await send({**start, "headers": kept})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    return collected


def _request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's own id where it is a plain one, else a new one. SageMaker lets its Inference-Id through only."""
    found = {name: value for name, value in headers if name in (b"x-request-id", b"x-amzn-sagemaker-inference-id")}
    for value in found.values():
        text = value.decode("latin-1")
        if 0 < len(text) <= 128 and text.isascii() and all(c.isalnum() or c in "-_.:" for c in text):
            return text
    return RouteCall.new_id()
