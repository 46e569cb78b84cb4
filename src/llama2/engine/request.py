"""Input and output of the engine: a request, its token events, and their fold."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from llama2.engine.sampler import SampledToken
from llama2.errors import Llama2Error
from llama2.generation.config import GenerationConfig

Finish = Literal["length", "eos", "stop", "cancelled", "error"]


class EngineBusyError(Llama2Error, RuntimeError):
    """The queue is full, or the engine takes nothing new because it is closing.

    retry_after: seconds after which there is room at the latest, as the engine goes now.
    """

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Score(NamedTuple):
    """The log-probability of a token of the prompt, and whether it was the likeliest one."""

    logprob: float
    first: bool


@dataclass(frozen=True)
class TokenEvent:
    """One token of a request, or its end. The texts of a request's events joined are its whole text.

    token: None for an event that carries text that was held back, prompt tokens or the end only. logprob, top: see
    `SampledToken`. prompt: log-probabilities of the next tokens of the prompt, if requested. scores: those that
    `EngineRequest.score_from` requests, in the last event. finish: why the request ended, in its last event; error: the
    exception if that is "error"; stop: the stop string if that is "stop".
    """

    token: int | None = None
    text: str = ""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: Finish | None = None
    error: Exception | None = None
    prompt: tuple[SampledToken, ...] = ()
    scores: tuple[Score, ...] = ()
    stop: str | None = None

    def is_last(self) -> bool:
        """Whether the request ends with this event. Raises its error."""
        if self.error is not None:
            raise self.error
        return self.finish is not None


@dataclass(frozen=True)
class ContextShift:
    """How a text goes on that has filled its context: its first `keep` tokens stay, and of those behind them the newer
    half. What is left is computed anew, so that the next token is the one that follows that shorter text.

    window: tokens of the context, where the engine's is larger.
    """

    keep: int
    window: int


@dataclass(frozen=True)
class EngineRequest:
    """A request: a prompt of ids and how to continue it.

    config: settings of generate(), complete. stop: strings that end the text, left out of it unless keep_stop.
    logprobs: how many likeliest tokens each event tells, None for none; drawn: log-probabilities are those of the
    distribution that tokens are drawn from, after penalties, temperature and filters. tenant: requests of another
    tenant share no cached prefix. owner: whose share of the engine it takes, where several have requests. lookup:
    tokens to guess from earlier text and check in one step (prompt lookup), 0 for none.
    rate_prompt: tell the log-probability of each prompt token but the first, as events before the first new token.
    continues: the text goes on from the prompt, so its first space counts; else it stands by itself.
    score_from: nothing is generated; the prompt's tokens from this index on are scored, in one event, and so is each of
    `endings` in place of the last one. What stands before may come from the prefix cache, and the last token is not
    computed, so that a prompt may be one token longer than the context.
    shift: go on beyond the context, up to the number of new tokens; None to end there.
    """

    prompt: Sequence[int]
    config: GenerationConfig
    seed: int | None = None
    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    logprobs: int | None = None
    adapter: str | None = None
    tenant: str = ""
    lookup: int = 0
    processors: tuple[Any, ...] = ()
    skip_special_tokens: bool = True
    rate_prompt: bool = False
    continues: bool = False
    owner: str = ""
    score_from: int | None = None
    endings: tuple[int, ...] = ()
    shift: ContextShift | None = None
    drawn: bool = False


@dataclass
class Completion:
    """The result of a request."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None
    logprobs: list[float] = field(default_factory=list)

    def add(self, event: TokenEvent) -> None:
        """Takes one event in."""
        if event.token is not None:
            self.tokens.append(event.token)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
        self.text += event.text
        self.finish = event.finish or self.finish


def listed(value: str | Iterable[str] | None) -> list[str]:
    """Strings from one, several or None."""
    return [value] if isinstance(value, str) else list(value or ())


def is_ids(prompts: Sequence[Any]) -> bool:
    """Whether a sequence is one prompt of ids, and not several prompts."""
    return len(prompts) > 0 and all(isinstance(token, int) for token in prompts)


def hand_over(loop: asyncio.AbstractEventLoop, events: "asyncio.Queue[TokenEvent]", event: TokenEvent) -> None:
    """Puts an event into the queue of a loop of another thread; one that has closed receives nothing."""
    try:
        loop.call_soon_threadsafe(events.put_nowait, event)
    except RuntimeError:  # the loop has closed: nobody listens any more
        return
