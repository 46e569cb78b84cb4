"""Connections: how many, how large their headers, and how long each may be silent or not read.

uvicorn bounds none of these. Times are looked at twice a second for all connections at once (`Server` in life.py).
"""

import logging
import time
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

logger = logging.getLogger("llama2.serve")


@dataclass(frozen=True)
class Connections:
    """Bounds on connections; times in seconds."""

    most: int = 512
    header_bytes: int = 16_384  # of the request line and the headers of one request
    pipelined: int = 8  # requests sent before the first of them is answered
    header_timeout: float = 10.0  # for the headers of a request, and for a connection that sends none
    stall_timeout: float = 60.0  # without a byte being read of what was sent


class Seldom:
    """Something that is logged once a second at most, with how often it happened since."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds, self._last, self._count = seconds, -1e9, 0

    def __call__(self, event: str, **fields: Any) -> None:
        """Logs, or counts for the next time."""
        self._count += 1
        now = time.monotonic()
        if now - self._last >= self.seconds:
            logger.warning(event, extra={"fields": {**fields, "times": self._count}})
            self._last, self._count = now, 0


def _answer(status: str, message: str, more: str = "") -> bytes:
    body = f'{{"error": {{"message": "{message}", "type": "server_error", "param": null, "code": null}}}}'
    return (
        f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{more}"
        f"connection: close\r\n\r\n{body}"
    ).encode()


_TOO_MANY = _answer("503 Service Unavailable", "too many connections are open; try again later", "retry-after: 1\r\n")
_LATE = _answer("408 Request Timeout", "the request took too long to arrive")
_TOO_LARGE = _answer("431 Request Header Fields Too Large", "the headers are too many or too long")


class Guarded(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol within the bounds of `limits`, which `guarded` sets."""

    limits = Connections()
    refusals = Seldom()

    def connection_made(self, transport: Any) -> None:
        """Takes a connection, or refuses it where there are too many."""
        super().connection_made(transport)
        self._head, self._begun, self._whole, self._ended = 0, False, False, False
        self._since = self._moved = time.monotonic()
        self._unsent = 0
        if len(self.connections) > self.limits.most:
            self.refusals("too many connections", open=len(self.connections))
            self._end(_TOO_MANY)

    def data_received(self, data: bytes) -> None:
        """Feeds the parser, and ends a connection whose headers do not end."""
        if self._ended:
            return
        busy = self._busy
        self._head += len(data)
        super().data_received(data)
        if self.parser is None or self.transport.is_closing():
            return
        if not self._begun:
            self._head = 0
            if busy and not self._busy:
                self._since = time.monotonic()
        elif self._head > self.limits.header_bytes:
            self._end(_TOO_LARGE)
        if len(self.pipeline) > self.limits.pipelined:
            self._end(_TOO_LARGE)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._begun, self._whole, self._since = True, False, time.monotonic()

    def on_headers_complete(self) -> None:
        """The last byte of its headers."""
        self._begun, self._head = False, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The last byte of a request."""
        self._whole = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The last byte of an answer: from here on the connection is idle, or sends a body that nobody wants."""
        self._since = time.monotonic()
        super().on_response_complete()

    @property
    def _busy(self) -> bool:
        """Whether an answer is being made."""
        return self.cycle is not None and not self.cycle.response_complete

    def sweep(self, now: float) -> None:
        """Ends the connection where it has been silent, or has not been read from, for too long."""
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent < self._unsent:
            self._moved = now
        self._unsent = unsent
        if unsent and now - self._moved > self.limits.stall_timeout:
            self.transport.abort()
        elif self.transport.is_closing() or (self._busy and not self._begun):
            return
        elif now - self._since > self._patience:
            self._end(_LATE if self._begun else b"")

    @property
    def _patience(self) -> float:
        """Seconds: less where the client owes bytes of headers, of a body that was refused, or of a first request."""
        return self.config.timeout_keep_alive + 1 if self._whole else self.limits.header_timeout

    def resume_writing(self) -> None:
        """The client has read."""
        self._moved = time.monotonic()
        super().resume_writing()

    def _end(self, last: bytes) -> None:
        self._ended = True
        if last and not self._busy:
            self.transport.write(last)
        self.transport.close()


def guarded(limits: Connections) -> type[Guarded]:
    """The protocol within these bounds."""
    return type("Guarded", (Guarded,), {"limits": limits, "refusals": Seldom()})
