"""Many requests at once on one model: a thread plans, runs and commits steps; callers submit and receive events.

    engine = Engine(model, tokenizer)
    engine.generate(["The sky is", "Water boils at"], max_new_tokens=20)
    for event in engine.stream("Once upon a time", max_new_tokens=100): print(event.text, end="")
    async for event in engine.astream(...)

A request's tokens are those that generate() gives for the same seed, alone or among others.
"""

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np

from llama2.cpu import KvDtype
from llama2.cpu.model import CpuModel
from llama2.engine.active_request import ActiveRequest
from llama2.engine.blocks import BlockPool
from llama2.engine.draft import UNKNOWN, Drafter
from llama2.engine.fairness import STRETCH
from llama2.engine.plan_runners import PAGE, make_plan_runner
from llama2.engine.request import (
    Completion,
    EngineBusyError,
    EngineRequest,
    TokenEvent,
    hand_over,
    is_ids,
    listed,
)
from llama2.engine.scheduler import Chunk, Scheduler
from llama2.engine.scheduler import ScheduledSequence as Scheduled
from llama2.engine.scoring import scored_limit
from llama2.engine.stream import Stream, complete
from llama2.errors import ContextLengthError, InputError
from llama2.generation.call_settings import settings
from llama2.generation.config import GenerationConfig
from llama2.generation.drafts import adaptive_count, check_drafts, look_up
from llama2.protocols import CausalLM, TextTokenizer

DRAFTING = 8  # requests that run, above which a drafter rests


class Engine:
    """Runs many requests on `model` (NativeModel or LlamaForCausalLM) in a thread of its own."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Any = None,
        *,
        cache_tokens: int = 16384,
        budget: int = 512,
        width: int = 64,
        waiting: int = 1024,
        prefix_cache: bool = True,
        runner: str = "auto",
        kv_cache: KvDtype | None = None,
        draft: CausalLM | None = None,
        guesses: int | None = None,
        each_waiting: int | None = None,
        each_running: int | None = None,
        each_tokens: int | None = None,
        stretch: float = STRETCH,
        precision: str = "fast",
    ) -> None:
        """cache_tokens: positions of all requests together that are kept. budget: tokens of one step at most. width:
        requests in one step at most. waiting: requests in the queue at most. kv_cache: dtype of keys and values in the
        native engine. draft: a smaller model that proposes up to `guesses` tokens per step, 4 if None, while few
        requests run; without one `guesses` is what requests look up in their own text. each_waiting, each_running,
        each_tokens: requests in the queue, requests in a step and positions of the cache of one owner at most. stretch:
        where several owners have requests, the time of a step at most, in that which equal shares would take; 0 for no
        bound. precision: of the native engine's activations, see `cpu.CpuRunner`. Raises InputError for sizes that hold
        nothing, and for a draft of another vocabulary."""
        if cache_tokens < PAGE:
            raise InputError(f"a cache of {cache_tokens} tokens is less than a page; give at least {PAGE}")
        if guesses is not None and guesses < 0:
            raise InputError(f"guesses is {guesses}; give 0 for none, or a small number")
        self.model, self.tokenizer, self.limit = model, tokenizer, int(model.config.max_position_embeddings)
        self.runner = make_plan_runner(model, -(-cache_tokens // PAGE), runner, kv_cache, precision)
        self.pool = BlockPool(self.runner.pages, PAGE, prefix_cache)
        self.drafter: Drafter | None = None
        if draft is not None:
            self.drafter = Drafter(model, draft, self.runner.pages, 4 if guesses is None else guesses, runner, kv_cache)
        self._lookup = 0 if draft is not None or guesses is None else guesses
        each_pages = None if each_tokens is None else max(each_tokens // PAGE, 1)
        self.scheduler = Scheduler(
            self.pool, budget, width, each_running=each_running, each_pages=each_pages, stretch=stretch
        )
        self.max_waiting, self.each_waiting = waiting, each_waiting
        self._step_seconds = 0.0  # of the last steps on average
        self._counts: Counter[str] = Counter()  # requests of each owner
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._live: dict[Scheduled, ActiveRequest] = {}
        self._count, self._lock = 0, threading.Lock()
        self._closing = self._stopping = False
        self.beat = time.monotonic()  # when the last step began
        self._thread: threading.Thread | None = None
        self.steps = self.tokens_out = self.tokens_reused = self.preemptions = 0
        self.tokens_proposed = self.tokens_guessed = 0  # guesses that were checked, and those that held

    # -- for callers ---------------------------------------------------------------------------------------------

    def ask(
        self,
        prompt: str | Sequence[int],
        generation_config: GenerationConfig | None = None,
        *,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        keep_stop: bool = False,
        logprobs: int | None = None,
        adapter: str | None = None,
        tenant: str = "",
        lookup: int | None = None,
        skip_special_tokens: bool = True,
        **kwargs: object,
    ) -> EngineRequest:
        """A checked request; further keywords are settings of generate(). Raises InputError for what cannot work."""
        ids: Sequence[int] = self._tokenizer()(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        config = settings(self.model, generation_config, kwargs)
        if config.value("num_beams") > 1:
            raise InputError(f"num_beams is {config.num_beams}; the engine samples, so use model.generate() for beams")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        stops += tuple(listed(config.stop_strings))
        if stops and self.tokenizer is None:
            raise InputError("stop strings need the tokenizer: Engine(model, tokenizer)")
        if not all(isinstance(s, str) and s for s in stops):
            raise InputError(f"stop is {stop!r}; give non-empty strings")
        if logprobs is not None and not 0 <= logprobs <= self.model.config.vocab_size:
            raise InputError(f"logprobs is {logprobs}; it must lie between 0 and the vocabulary")
        lookup = self._lookup if lookup is None else lookup
        return EngineRequest(
            list(ids), config, seed, stops, keep_stop, logprobs, adapter, tenant, lookup, (), skip_special_tokens
        )

    def generate(self, prompts: str | Sequence[Any], *args: GenerationConfig | None, **kwargs: Any) -> list[Completion]:
        """Continues one prompt or several (texts, or lists of ids), all at once; arguments as `ask`.

        An int seed s gives prompt i the seed s + i, as generate() gives its rows.
        """
        several = [prompts] if isinstance(prompts, str) or is_ids(prompts) else list(prompts)
        seed = kwargs.pop("seed", None)
        asks = [self.ask(p, *args, seed=None if seed is None else seed + i, **kwargs) for i, p in enumerate(several)]
        return complete(self, asks)

    def stream(self, prompt: str | Sequence[int], *args: GenerationConfig | None, **kwargs: Any) -> Stream:
        """The events of one request as they happen; arguments as `ask`."""
        return Stream(self, self.ask(prompt, *args, **kwargs))

    async def astream(self, ask: EngineRequest) -> AsyncIterator[TokenEvent]:
        """The events of a request in an event loop; raises its error. Leaving the loop ends the request."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[TokenEvent]()
        live = self.submit(ask, lambda event: hand_over(loop, events, event))
        last = False
        try:
            while not last:
                event = await events.get()
                last = event.is_last()
                yield event
        finally:
            self.cancel(live)

    def submit(self, ask: EngineRequest, sink: Callable[[TokenEvent], None]) -> ActiveRequest:
        """Puts a request in the queue; `sink` receives its events in the engine's thread and must return at once.

        Raises InputError where it cannot fit, EngineBusyError where the queue is full or the engine is closing.
        """
        return self.submit_together([(ask, sink)])[0]

    def submit_together(
        self, asks: Sequence[tuple[EngineRequest, Callable[[TokenEvent], None]]]
    ) -> list[ActiveRequest]:
        """As `submit` for requests that all begin in one step, or none where one is refused: an idle engine computes
        equal requests in equal company to the last bit."""
        lives = self.accept(asks)
        self.begin(lives)
        return lives

    def accept(self, asks: Sequence[tuple[EngineRequest, Callable[[TokenEvent], None]]]) -> list[ActiveRequest]:
        """The first half of `submit_together`: checks and counts requests, all or none. They wait for `begin`."""
        lives: list[ActiveRequest] = []
        try:
            lives.extend(self._accept(ask, sink) for ask, sink in asks)
        except BaseException:
            for live in lives:
                self._uncount(live)
            raise
        return lives

    def begin(self, lives: Sequence[ActiveRequest]) -> None:
        """The second half: lets accepted requests run. Each needs one call, also one that is cancelled behind it."""
        self._put(lambda: self._begin(lives))

    def _accept(self, ask: EngineRequest, sink: Callable[[TokenEvent], None]) -> ActiveRequest:
        """A request that is counted and will begin."""
        if ask.adapter is None and isinstance(self.model, CpuModel):  # the one that the model was loaded with
            ask = replace(ask, adapter=self.model.adapter)
        limit = self._limit(ask)
        decoder = None
        if self.tokenizer is not None and ask.score_from is None:
            decoder = self.tokenizer.stream_decoder(skip_special_tokens=ask.skip_special_tokens)
        live = ActiveRequest(ask, limit, decoder, sink, self._window(ask) if ask.shift is not None else None)
        self._check(live.sequence, ask)
        with self._lock:
            if self._closing:
                raise EngineBusyError("the engine is closing and takes no new requests; ask another replica")
            self._check_room(ask.owner)
            self._count += 1
            self._counts[ask.owner] += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="llama2-engine", daemon=True)
                self._thread.start()
        return live

    def _check_room(self, owner: str) -> None:
        """Raises EngineBusyError where the queue is full for this owner. One below its share of a full queue still gets
        in, so that nobody can lock the others out."""
        own, bound = self._counts[owner], self.max_waiting + self.scheduler.width
        fair = bound // max(len(self._counts) + (own == 0), 1)
        if self.each_waiting is not None and own >= self.each_waiting + self.scheduler.each_running:
            raise EngineBusyError(
                f"{own} requests of this key are waiting or running, which is the bound", self.patience(owner)
            )
        if self._count >= bound and (own >= fair or self._count >= 2 * bound):
            raise EngineBusyError(
                f"{self._count} requests are waiting or running, which is the bound; try again later",
                self.patience(owner),
            )

    def patience(self, owner: str = "") -> int:
        """Seconds after which a place is free at the latest, as the engine goes now: until the request that is nearest
        to its end has come there, of this owner if it has any."""
        running = list(self.scheduler.running)
        own = [s for s in running if s.owner == owner] or running
        steps = min((s.limit - len(s.tokens) for s in own), default=0)
        return min(max(math.ceil(steps * self._step_seconds), 1), 600)

    def cancel(self, live: ActiveRequest) -> None:
        """Ends a request within one step; one that has ended is left alone."""
        if not live.ended:
            self._put(lambda: self._end(live, TokenEvent(finish="cancelled")))

    def close(self, wait: bool = True) -> None:
        """Takes nothing new; with `wait` every accepted request is finished first, else all are cancelled."""
        with self._lock:
            self._closing = True
        if self._thread is not None:
            if not wait:
                self._put(self._cancel_all)
            self._put(self._stop)
            self._thread.join()
        self.runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close(wait=exc[0] is None)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return self._count - len(self.scheduler.running)

    @property
    def running(self) -> int:
        """Requests that run."""
        return len(self.scheduler.running)

    # -- checks --------------------------------------------------------------------------------------------------

    def _tokenizer(self) -> TextTokenizer:
        if self.tokenizer is None:
            raise InputError("the prompt is a text and the engine has no tokenizer: Engine(model, tokenizer)")
        return self.tokenizer

    def _limit(self, ask: EngineRequest) -> int:
        if ask.score_from is not None:
            return scored_limit(ask, min(self.limit, self.scheduler.capacity()))
        held, most = len(ask.prompt), min(self.limit, self.scheduler.capacity() + 1)
        new = ask.config.max_new_tokens
        if new is None and ask.config.is_set("max_length"):
            new = ask.config.value("max_length") - held
        if ask.shift is not None:
            most = self._window(ask)
        if held >= most:
            raise ContextLengthError(
                f"the prompt has {held} tokens, but context and cache hold {most} together with the answer; shorten it",
                held + 1,
                most,
            )
        return most if new is None else held + new

    def _window(self, ask: EngineRequest) -> int:
        """Tokens that a request with a shift holds. Raises InputError where what it keeps leaves no room."""
        assert ask.shift is not None
        window = min(self.limit, self.scheduler.capacity() + 1, ask.shift.window)
        if not 0 <= ask.shift.keep <= window - 2:
            raise InputError(
                f"keep is {ask.shift.keep} tokens of a context of {window}; it must be between 0 and {window - 2}"
            )
        return window

    def _check(self, sequence: Scheduled, ask: EngineRequest) -> None:
        size = self.model.config.vocab_size
        if bad := [token for token in (*ask.prompt, *ask.endings) if not 0 <= token < size]:
            raise InputError(f"the prompt contains id {bad[0]} but ids run from 0 to {size - 1}; is the tokenizer its?")
        if sequence.limit > self.limit and ask.score_from is None:
            raise ContextLengthError(
                f"{len(ask.prompt)} prompt and {sequence.limit - len(ask.prompt)} new tokens exceed the context of "
                f"{self.limit}; ask for fewer new tokens",
                sequence.limit,
                self.limit,
            )
        if ask.adapter is not None:
            weights = self.runner.weights
            if weights is None:
                raise InputError(f"adapter {ask.adapter!r} needs the native engine, and torch runs this model")
            weights.adapter(ask.adapter)
        self.scheduler.check(sequence)

    # -- the engine's thread -------------------------------------------------------------------------------------

    def _put(self, action: Callable[[], None]) -> None:
        self._inbox.put(action)
        self._wake.set()

    def _stop(self) -> None:
        self._stopping = True

    def _cancel_all(self) -> None:
        for live in list(self._live.values()):
            self._end(live, TokenEvent(finish="cancelled"))

    def _begin(self, lives: Sequence[ActiveRequest]) -> None:
        for live in lives:
            if not live.ended:
                self._live[live.sequence] = live
                self.scheduler.submit(live.sequence)

    def _end(self, live: ActiveRequest, event: TokenEvent | None = None) -> None:
        if event is not None:
            with contextlib.suppress(Exception):  # of whoever listens: the pages go back all the same
                live.tell(event)
        self.scheduler.finish(live.sequence)
        if self._live.pop(live.sequence, None) is not None:
            self.tokens_reused += live.sequence.reused
            self.preemptions += live.sequence.preemptions
            self._uncount(live)

    def _uncount(self, live: ActiveRequest) -> None:
        with self._lock:
            self._count -= 1
            self._counts[live.ask.owner] -= 1
            self._counts += Counter()  # drops those that have none

    def _loop(self) -> None:
        with self.runner.limit_openmp:
            while True:
                while not self._inbox.empty():
                    self._inbox.get()()
                if not self.scheduler.idle:
                    self._step()
                elif self._stopping:
                    return
                else:
                    self._wake.wait()
                    self._wake.clear()
                    self.beat = time.monotonic()

    def _step(self) -> None:
        self.beat = now = time.monotonic()
        planned = chunks = self.scheduler.plan()
        for chunk in chunks:
            live = self._live[chunk.sequence]
            live.began = live.began or now
        try:
            if self.drafter is not None:
                chunks = self.drafter.fill(chunks, lambda chunk: self._live[chunk.sequence].choice)
            rows = iter(self.runner.step(chunks, [self._live[c.sequence].ask.adapter for c in chunks]))
        except Exception as error:
            for chunk in chunks:
                self._end(self._live[chunk.sequence], TokenEvent(finish="error", error=error))
            return
        self.steps += 1
        for chunk in chunks:
            logits, live = next(rows) if chunk.wanted else None, self._live[chunk.sequence]
            try:
                if live.scoring is not None:
                    event = live.scoring.add(chunk, logits)
                    self.scheduler.commit(chunk, [live.ask.prompt[-1]] if chunk.sampled else ())
                    if event is not None:
                        self._end(live, event)
                    continue
                if chunk.whole and logits is not None:
                    live.rate(chunk, logits)
                if chunk.sampled and logits is not None:
                    self._advance(chunk, logits)
                else:
                    self.scheduler.commit(chunk)
            except Exception as error:  # of a processor or of whoever listens: it ends this request, not the others
                self._end(live, TokenEvent(finish="error", error=error))
        took = time.monotonic() - now
        self._step_seconds += (took - self._step_seconds) * (0.1 if self._step_seconds else 1.0)
        self.scheduler.ran(planned, took)

    def _advance(self, chunk: Chunk, logits: np.ndarray) -> None:
        """Picks the next token of a sequence, and those that its guesses have foreseen."""
        live = self._live[chunk.sequence]
        guesses = chunk.tokens[len(chunk.tokens) - chunk.drafted :]
        new: list[int] = []
        done = False

        def take(index: int, logits_V: np.ndarray) -> tuple[bool, bool]:
            nonlocal done
            picked = live.choice(logits_V)
            new.append(picked.token)
            done = live.take(picked)
            return picked.token == guesses[index] if index < len(guesses) else False, done

        check_drafts(chunk.drafted, logits[len(logits) - 1 - chunk.drafted :], take)
        self.tokens_out += len(new)
        self.tokens_proposed += chunk.drafted
        self.tokens_guessed += len(new) - 1
        self.scheduler.commit(chunk, new)
        if self.drafter is not None:
            self.drafter.settle(chunk, len(new) - 1)
        if done:
            self._end(live)
        elif live.ask.shift is not None and len(chunk.sequence.tokens) >= chunk.sequence.limit:
            self.scheduler.shift(chunk.sequence, live.ask.shift.keep)
        else:
            chunk.sequence.draft = self._proposed(live, chunk.drafted, len(new) - 1)

    def _proposed(self, live: ActiveRequest, drafted: int, held: int) -> list[int]:
        """Guesses for the next step, or places for those of the drafter; none where so many decode that their rows cost
        more than they save."""
        found = look_up(live.sequence.tokens, live.ask.lookup) if live.ask.lookup else []
        if found or self.drafter is None or len(self.scheduler.running) > DRAFTING:
            return found
        if drafted:
            live.guesses = adaptive_count(drafted, held, self.drafter.count)
        return [UNKNOWN] * (live.guesses or self.drafter.count)
