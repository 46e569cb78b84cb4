"""The events of a request for a plain loop, and what became of several. No torch here."""

import queue
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llama2.engine.request import Completion, EngineRequest, TokenEvent

if TYPE_CHECKING:
    from llama2.engine.engine import Engine


class Stream:
    """The events of one request, for a plain loop, which raises its error; leaving the loop or `cancel` ends it."""

    def __init__(self, engine: "Engine", ask: EngineRequest) -> None:
        self._events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        self._engine = engine
        self._live = engine.submit(ask, self._events.put)

    def cancel(self) -> None:
        """Ends the request within one step."""
        self._engine.cancel(self._live)

    def __iter__(self) -> Iterator[TokenEvent]:
        try:
            while True:
                event = self._events.get()
                if event.error is not None:
                    raise event.error
                yield event
                if event.finish is not None:
                    return
        finally:
            self.cancel()


def complete(engine: "Engine", asks: Sequence[EngineRequest]) -> list[Completion]:
    """Runs several requests at once and returns their completions. Raises the error of one that fails, and ends the
    others."""
    streams = [Stream(engine, ask) for ask in asks]
    results = [Completion() for _ in streams]
    try:
        for result, stream in zip(results, streams, strict=True):
            for event in stream:
                result.add(event)
    finally:
        for stream in streams:
            stream.cancel()
    return results
