"""Answers as streams: server-sent events or lines, pings, an end when the client goes or stops reading."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llama2.engine.engine import TokenEvent
from llama2.serve.errors import Refusal
from llama2.serve.service import Gone, RouteCall, late
from llama2.serve.session import Session

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Writer(Protocol):
    """A dialect's way to tell events. ping: what keeps a quiet connection open; may be empty."""

    media_type: str = "text/event-stream; charset=utf-8"
    ping: bytes = b": ping\n\n"

    def begin(self) -> bytes:
        """Returns the bytes before the first event."""
        return b""

    def put(self, index: int, event: TokenEvent) -> bytes:
        """An event of the answer `index`; may be empty."""

    def end(self, session: Session) -> bytes:
        """Returns the bytes after the last event."""
        return b""

    def fail(self, refusal: Refusal) -> bytes:
        """Returns the bytes that end a stream with an error."""


def data(content: Any) -> bytes:
    """One event, in ASCII: clients that split lines as Python does would end one at U+0085 or U+2028 too."""
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Tells a session's events through a writer. An error before the first byte has an HTTP status of its own."""

    def __init__(
        self, call: RouteCall, session: Session, writer: Writer, headers: dict[str, str] | None = None
    ) -> None:
        self.call, self.session, self.writer = call, session, writer
        self.status_code, self.background = 200, None
        self.init_headers({**HEADERS, "content-type": writer.media_type, **(headers or {})})
        self.leave: Callable[[], None] | None = None  # called once the last byte is out
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the response."""
        task = asyncio.current_task()
        assert task is not None
        gone = asyncio.ensure_future(self.call.left())
        gone.add_done_callback(lambda done: None if done.cancelled() else task.cancel())
        try:
            async with asyncio.timeout(self.call.timeout):
                await self._tell(send)
        except TimeoutError:
            await self._fail(late(self.call.service.policy), scope, receive, send)
        except Refusal as refusal:
            await self._fail(refusal, scope, receive, send)
        except asyncio.CancelledError:
            if not gone.done():
                raise
            task.uncancel()
            self._left()
        except Gone:
            self._left()
        finally:
            gone.cancel()
            self.call.finish(self.session)
            if self.leave is not None:
                self.leave()

    def _left(self) -> None:
        self.call.notes["error"] = "gone"
        self.call.service.metrics.failed("gone")

    async def _tell(self, send: Send) -> None:
        text = self.writer.begin()
        async for batch in self.session.batches():
            for index, event in batch:
                text += self.writer.put(index, event)
            if text or not batch:
                await self._send(send, text or self.writer.ping)
            text = b""
        await self._send(send, text + self.writer.end(self.session), more=False)

    async def _send(self, send: Send, content: bytes, more: bool = True) -> None:
        """Raises Gone where the client has not read for too long."""
        try:
            async with asyncio.timeout(self.call.service.policy.stall_timeout):
                if not self._begun:
                    self._begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": content, "more_body": more})
        except TimeoutError:
            raise Gone from None

    async def _fail(self, refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
        self.call.notes["error"] = refusal.kind
        self.call.service.metrics.failed(refusal.kind)
        if self._begun:
            await self._send(send, self.writer.fail(refusal), more=False)
        else:
            await self.call.dialect.refuse(refusal, self.call.id)(scope, receive, send)
