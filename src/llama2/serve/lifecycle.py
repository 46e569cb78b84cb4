"""A server's life: loading, ready, draining, gone; and the uvicorn server whose SIGTERM drains.

SIGTERM     or SIGHUP: not ready any more, at once; still accepting for `drain_delay`, while load balancers notice;
            then new requests get 503 with Retry-After, bodies that are still coming too, and the running ones their
            time to finish
timeout     what still runs is cut short with an error that says so
SIGTERM again, or twice Ctrl-C     now
"""

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator
from types import FrameType
from typing import Any, Literal

import uvicorn

from llama2.serve.connection import Guarded, Seldom
from llama2.serve.errors import Refusal

State = Literal["loading", "ready", "draining", "closed"]


class Life:
    """State of the server, and the number of requests in progress."""

    def __init__(self, drain_delay: float = 0.0, timeout: float = 25.0) -> None:
        """Seconds. The default timeout ends before SageMaker's and Kubernetes' SIGKILL after 30."""
        self.state: State = "loading"
        self.drain_delay, self.timeout = drain_delay, timeout
        self.inside = 0
        self.failure: Exception | None = None
        self._empty = asyncio.Event()
        self._reading: set[asyncio.Timeout] = set()

    @property
    def ready(self) -> bool:
        """Whether new requests should be sent here."""
        return self.state == "ready"

    def check(self) -> None:
        """Raises Refusal where no request is taken."""
        if self.state == "loading":
            raise Refusal("starting", "the model is still being loaded; ask again in a few seconds", retry_after=2)
        if self.state == "closed":
            raise Refusal("closing", "the server is shutting down; ask another replica", retry_after=5)

    def enter(self) -> None:
        """Counts a request in. Raises Refusal where none is taken."""
        self.check()
        self.inside += 1

    @contextlib.asynccontextmanager
    async def reading(self, seconds: float) -> AsyncIterator[None]:
        """Bounds the reading of a body, which a shutdown ends at once. Raises Refusal."""
        try:
            async with asyncio.timeout(seconds or None) as deadline:
                self._reading.add(deadline)
                try:
                    yield
                finally:
                    self._reading.discard(deadline)
        except TimeoutError:
            self.check()
            raise Refusal("slow", f"the body took longer than {seconds:g} s to arrive (body_timeout)") from None

    def leave(self) -> None:
        """Counts it out."""
        self.inside -= 1
        if not self.inside:
            self._empty.set()

    async def drain(self, cut: Callable[[], None]) -> None:
        """Waits until no request is inside, at most `timeout` seconds; then `cut` ends what is."""
        self.state = "draining"
        await asyncio.sleep(self.drain_delay)
        self.state = "closed"
        for deadline in self._reading:  # half a body is no request yet
            deadline.reschedule(asyncio.get_running_loop().time())
        for seconds, last in ((self.timeout, False), (2.0, True)):
            self._empty.clear()
            if self.inside:
                try:
                    await asyncio.wait_for(self._empty.wait(), seconds)
                except TimeoutError:
                    if not last:
                        cut()


class Server(uvicorn.Server):
    """uvicorn, with a drain before its own shutdown."""

    def __init__(self, config: uvicorn.Config, life: Life, cut: Callable[[], None]) -> None:
        """cut: ends what still runs."""
        super().__init__(config)
        self._trouble = Seldom()
        self._life, self._cut = life, cut
        self._draining: asyncio.Task[None] | None = None
        self.listening: Callable[[str], None] = lambda address: None  # called with the URL once requests are let in

    async def startup(self, sockets: Any = None) -> None:
        """Listens. What the event loop complains of, such as file descriptors that have run out, is logged seldom."""
        asyncio.get_running_loop().set_exception_handler(self._complained)
        await super().startup(sockets)
        if self.started and self.servers and self.servers[0].sockets:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            self.listening(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")

    def _complained(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self._trouble(str(context.get("message", "trouble"))[:200], error=repr(error)[:200])

    async def on_tick(self, counter: int) -> bool:
        """Called ten times per second."""
        if counter % 5 == 0:
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Guarded):
                    connection.sweep(now)
        ends: bool = await super().on_tick(counter)
        return ends

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """uvicorn's signals, and SIGHUP where nothing ignores it (nohup does)."""
        with super().capture_signals():
            main = threading.current_thread() is threading.main_thread()
            if main and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
                signal.signal(signal.SIGHUP, self.handle_exit)
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second stops."""
        asyncio.get_running_loop().call_soon_threadsafe(self._signalled, sig)

    def _signalled(self, sig: int) -> None:
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            self._cut()
            self.force_exit = sig == signal.SIGINT
            self.should_exit = True

    async def _drain(self) -> None:
        await self._life.drain(self._cut)
        self.should_exit = True
