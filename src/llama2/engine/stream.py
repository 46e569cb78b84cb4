"""The events of a request for a plain loop, and what became of several. No torch here."""

from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING

from llama2.engine.request import Completion, EngineRequest, TokenEvent

if TYPE_CHECKING:
    from llama2.engine.engine import Engine


class Stream:
    """The events of one request, for a plain loop, which raises its error; leaving the loop or `cancel` ends it."""

    def __init__(self, engine: "Engine", ask: EngineRequest) -> None:
        self._events: SimpleQueue[TokenEvent] = SimpleQueue()
        self._engine = engine
        self._live = engine.submit(ask, self._events.put)

    def cancel(self) -> None:
        """Ends the request within one step."""
        self._engine.cancel(self._live)

    def __iter__(self) -> Iterator[TokenEvent]:
        try:
            yield from _until_end(self._events)
        finally:
            self.cancel()


def _until_end(events: SimpleQueue[TokenEvent]) -> Iterator[TokenEvent]:
    """The events of one request; raises its error."""
    last = False
    while not last:
        event = events.get()
        last = event.is_last()
        yield event


def complete(engine: "Engine", asks: Sequence[EngineRequest]) -> list[Completion]:
    """Runs several requests at once and returns their completions. Raises the error of one that fails, and ends the
    others; where one is refused, none begins."""
    received = [SimpleQueue[TokenEvent]() for _ in asks]
    results = [Completion() for _ in asks]
    lives = engine.submit_together([(ask, events.put) for ask, events in zip(asks, received, strict=True)])
    try:
        for result, events in zip(results, received, strict=True):
            for event in _until_end(events):
                result.add(event)
    finally:
        for live in lives:
            engine.cancel(live)
    return results
