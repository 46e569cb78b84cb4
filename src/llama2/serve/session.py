"""One client's requests in the engine: the events of all its answers in one place, and their end when it goes.

The engine's thread hands events over in batches, with one call into the event loop for all that came since the last.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from llama2.engine.active_request import ActiveRequest
from llama2.engine.engine import Engine, EngineBusyError, EngineRequest, TokenEvent
from llama2.engine.request import Finish
from llama2.engine.sampler import SampledToken
from llama2.errors import InputError, Llama2Error
from llama2.serve.constraint import ConstraintError
from llama2.serve.errors import Refusal, kind_of

Told = tuple[int, TokenEvent]
PING_AFTER = 15.0


class Mailbox:
    """Events on their way from the engine's thread to the sessions of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._held, self._called = loop, deque[tuple["Session", int, TokenEvent]](), False

    def put(self, session: "Session", index: int, event: TokenEvent) -> None:
        """Called in the engine's thread."""
        self._held.append((session, index, event))
        if not self._called:
            self._called = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop has closed: nobody listens any more
                return

    def _deliver(self) -> None:
        self._called = False  # before the box is emptied: what comes now is delivered now or by a call of its own
        while self._held:
            session, index, event = self._held.popleft()
            session.arrive(index, event)


@dataclass
class Times:
    """When things happened to a session, on the monotonic clock; 0 for not yet."""

    came: float = field(default_factory=time.monotonic)
    checked: float = 0.0
    began: float = 0.0
    first: float = 0.0
    ended: float = 0.0


class Session:
    """Submits asks and tells their events. `close` ends what still runs, within one step of the engine."""

    def __init__(
        self,
        engine: Engine,
        mailbox: Mailbox,
        asks: int,
        times: Times,
        count: Callable[[int], None],
    ) -> None:
        """asks: how many will be submitted. count: receives new tokens."""
        self.times = times
        self.open, self.failed = asks, False
        self.reused, self.tokens, self.gaps = 0, 0, list[float]()
        self.shifted: set[int] = set()  # asks whose answer went on beyond the context
        self.model = ""  # its name
        self.owner, self._count = "", count
        self._engine, self._mailbox = engine, mailbox
        self._arrived, self._news = list[Told](), asyncio.Event()
        self._last = [0.0] * asks
        self._lives: list[ActiveRequest] = []
        self._ending, self._ends, self._closed = threading.Lock(), False, False

    def submit(self, make: Callable[..., Sequence[EngineRequest]], *args: Any) -> Sequence[EngineRequest]:
        """Makes the asks, make(*args), and gives them to the engine, once; returns them. In any thread: 256 of them
        take a tenth of a second. Raises Refusal where the engine does not take them all; then it has none of them."""
        asks = make(*args)
        self.times.checked = time.monotonic()
        put = self._mailbox.put
        try:
            lives = self._engine.accept([(ask, partial(put, self, i)) for i, ask in enumerate(asks)])
        except EngineBusyError as error:
            raise Refusal("busy", str(error), retry_after=error.retry_after) from None
        except InputError as error:
            raise Refusal(kind_of(error), str(error)) from None
        ends = False
        try:
            with self._ending:
                ends, self._lives = self._ends, [] if self._closed else lives  # known before the first event comes
        finally:  # also at a deadline: what is accepted has to begin
            self._engine.begin(lives)
        if ends:  # while they were made
            for live in lives:
                self._engine.cancel(live)
        return asks

    def arrive(self, index: int, event: TokenEvent) -> None:
        """Called in the event loop for each event; events after `close` are dropped."""
        if not self._lives:
            return
        now = time.monotonic()
        if event.token is not None:
            self.tokens += 1
            self._count(1)
            if self._last[index]:
                self.gaps.append(now - self._last[index])
            elif not self.times.first:
                self.times.first, self.times.began = now, self._lives[index].began
            self._last[index] = now
        if event.finish is not None:
            self.open -= 1
            self.failed = self.failed or event.finish in ("error", "cancelled")
            self.times.ended = now
            sequence = self._lives[index].sequence
            self.reused += sequence.reused
            self.shifted |= {index} if sequence.shifts else set()
        self._arrived.append((index, event))
        self._news.set()

    async def batches(self) -> AsyncIterator[list[Told]]:
        """All events since the last batch, with the number of their ask; ends when every ask has ended.

        An empty batch says that nothing has come for PING_AFTER seconds.

        Raises Refusal for an ask that failed. A caller that stops listening must call `close`.
        """
        while True:
            try:
                async with asyncio.timeout(PING_AFTER):
                    await self._news.wait()
            except TimeoutError:
                yield []
                continue
            self._news.clear()
            batch, self._arrived = self._arrived, []
            for _, event in batch:
                if event.error is not None:
                    raise _failed(event.error)
                if event.finish == "cancelled":
                    raise Refusal("closing", "the server is shutting down and cut this answer short", retry_after=5)
            if batch:
                yield batch
            if not self.open and not self._arrived:
                return

    def cancel(self) -> None:
        """Ends what still runs; `batches` tells the caller."""
        with self._ending:
            self._ends, lives = True, self._lives
        for live in lives:
            self._engine.cancel(live)

    def close(self) -> None:
        """Ends what still runs, and lets go of it: a request knows its session, which would keep the model."""
        self.cancel()
        with self._ending:
            self._closed, self._lives = True, []


def _failed(error: Exception) -> Refusal:
    if isinstance(error, ConstraintError):
        return Refusal("constraint", str(error))
    if isinstance(error, Llama2Error):
        return Refusal("generation", str(error))
    return Refusal("internal", f"the answer failed with {type(error).__name__}; the server's log tells more")


@dataclass
class Answer:
    """The result of one request: the fold of its events."""

    text: str = ""
    picked: list[SampledToken] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)  # the text that came with each token
    prompt: list[SampledToken] = field(default_factory=list)
    finish: Finish | None = None
    stop: str | None = None  # the stop string that ended it

    def add(self, event: TokenEvent) -> None:
        """Takes one event in."""
        self.prompt += event.prompt
        self.text += event.text
        if event.token is not None:
            self.picked.append(SampledToken(event.token, event.logprob, event.top))
            self.pieces.append(event.text)
        self.finish = event.finish or self.finish
        self.stop = event.stop or self.stop

    @property
    def mean_logprob(self) -> float:
        """The score by which best_of selects."""
        return sum(p.logprob or 0.0 for p in self.picked) / max(len(self.picked), 1)


async def fold(session: Session, count: int) -> list[Answer]:
    """Every answer, complete. Raises Refusal as `Session.batches`."""
    answers = [Answer() for _ in range(count)]
    async for batch in session.batches():
        for index, event in batch:
            answers[index].add(event)
    return answers
