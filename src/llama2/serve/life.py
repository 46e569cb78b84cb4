"""A server's life: loading, ready, draining, gone; and the uvicorn server whose SIGTERM drains.

SIGTERM     not ready any more, at once; still accepting for `drain_delay`, while load balancers notice; then new
            requests get 503 with Retry-After, and the running ones their time to finish
timeout     what still runs is cut short with an error that says so
SIGTERM again, or twice Ctrl-C     now
"""

import asyncio
import signal
from collections.abc import Callable
from types import FrameType
from typing import Literal

import uvicorn

from llama2.serve.refusal import Refusal

State = Literal["loading", "ready", "draining", "closed"]


class Life:
    """What the server may do now, and how many requests are inside."""

    def __init__(self, drain_delay: float = 0.0, timeout: float = 25.0) -> None:
        """Seconds. The default timeout ends before SageMaker's and Kubernetes' SIGKILL after 30."""
        self.state: State = "loading"
        self.drain_delay, self.timeout = drain_delay, timeout
        self.inside = 0
        self.failure: Exception | None = None
        self._empty = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether new requests should be sent here."""
        return self.state == "ready"

    def enter(self) -> None:
        """Counts a request in. Raises Refusal where none is taken."""
        if self.state == "loading":
            raise Refusal("starting", "the model is still being loaded; ask again in a few seconds", retry_after=2)
        if self.state == "closed":
            raise Refusal("closing", "the server is shutting down; ask another replica", retry_after=5)
        self.inside += 1

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
        for seconds, last in ((self.timeout, False), (5.0, True)):
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
        self._life, self._cut = life, cut
        self._draining: asyncio.Task[None] | None = None

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
