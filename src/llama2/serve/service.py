"""What every route shares: the engine with its tokenizer, bounds, life and metrics; and one call on a route."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from llama2.engine.engine import Engine
from llama2.errors import InputError
from llama2.serve import validation
from llama2.serve.auth import Keys
from llama2.serve.budget import Budget
from llama2.serve.constraint import Compiler, Constraint
from llama2.serve.errors import Dialect, Refusal, kind_of
from llama2.serve.lifecycle import Life
from llama2.serve.metrics import Metrics
from llama2.serve.quota import Places, Rate
from llama2.serve.request import Bounds, Generation
from llama2.serve.session import Mailbox, Session, Times
from llama2.serve.workers import Workers

T = TypeVar("T")
M = TypeVar("M", bound=validation.Body)
ALIASES = ("tgi", "dummy", "default", "")  # what clients send that were given an address and no name


@dataclass(frozen=True)
class Policy:
    """Choices of whoever runs the server."""

    names: tuple[str, ...] = ("llama2",)
    revision: str | None = None
    unknown_fields: str = "refuse"
    parse_special: bool = True
    payload_limit: int = 2_000_000
    request_timeout: float = 0.0
    stall_timeout: float = 60.0
    cors_origins: tuple[str, ...] = ()
    public_metrics: bool = False
    allowed_hosts: tuple[str, ...] = ()
    workers: int = 2
    validation_timeout: float = 10.0
    body_timeout: float = 30.0
    max_unparsed_bytes: int = 64_000_000
    max_unread_bytes: int = 256_000_000
    max_concurrent_requests: int = 128
    max_requests_per_key: int | None = None
    tokens_per_minute: int | None = None


class Service:
    """The server without its routes."""

    def __init__(
        self,
        policy: Policy = Policy(),
        keys: Keys | None = None,
        life: Life | None = None,
        metrics_keys: Keys | None = None,
    ) -> None:
        self.policy, self.keys, self.life = policy, keys or Keys(), life or Life()
        self.metrics_keys = metrics_keys or Keys()
        self.metrics = Metrics()
        self.created = int(time.time())
        self.sessions: set[Session] = set()
        self._engine: Engine | None = None
        self._bounds: Bounds | None = None
        self._compiler: Compiler | None = None
        self.unparsed = Budget("bodies that are not parsed yet", policy.max_unparsed_bytes)
        self.unread = Budget("answers that are not read yet", policy.max_unread_bytes)
        self.places = Places(policy.max_concurrent_requests, policy.max_requests_per_key)
        self.rate = Rate(policy.tokens_per_minute)
        self.check = Workers(policy.workers, policy.validation_timeout)  # parses, renders, tokenises
        self._compile, self._embed = Workers(1, 0), Workers(1, 0)  # bounded by their own means
        self._mailbox: Mailbox | None = None

    # -- the model -----------------------------------------------------------------------------------------------

    def open(self, engine: Engine, bounds: Bounds) -> None:
        """Takes the engine in: from now on requests are served. Raises InputError for an engine without tokenizer."""
        tokenizer, config = engine.tokenizer, engine.model.config
        if tokenizer is None:
            raise InputError("a server needs the tokenizer: Engine(model, tokenizer)")
        eos = engine.model.generation_config.eos_token_ids
        self._compiler = Compiler(tokenizer, config.vocab_size, eos) if eos else None
        self._engine, self._bounds = engine, bounds
        self._watch(engine)
        if self.life.state == "loading":
            self.life.state = "ready"

    def _watch(self, engine: Engine) -> None:
        pool, watch = engine.pool, self.metrics.watch
        watch("tgi_queue_size", "Requests that wait.", lambda: max(engine.waiting, 0))
        watch("tgi_batch_current_size", "Requests that run.", lambda: engine.running)
        watch("llama2_kv_usage_ratio", "Share of the cache's pages that are held.", lambda: 1 - pool.free / pool.count)
        watch("llama2_preemptions", "Requests put back into the queue for want of pages.", lambda: engine.preemptions)
        watch("llama2_steps", "Steps of the engine.", lambda: engine.steps)
        watch("llama2_guesses", "Tokens that were guessed and checked.", lambda: engine.tokens_proposed)
        watch("llama2_guesses_held", "Of these, those that held.", lambda: engine.tokens_guessed)
        watch("llama2_streams", "Answers being told.", lambda: len(self.sessions))

    @property
    def engine(self) -> Engine:
        """Raises Refusal while the model is being loaded."""
        if self._engine is None:
            raise Refusal("starting", "the model is still being loaded; ask again in a few seconds", retry_after=2)
        return self._engine

    @property
    def loaded(self) -> bool:
        """Whether there is a model."""
        return self._engine is not None

    @property
    def bounds(self) -> Bounds:
        """What a request may ask for."""
        assert self._bounds is not None
        return self._bounds

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.engine.tokenizer

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that a request can choose."""
        return list(getattr(getattr(self.engine.runner, "weights", None), "adapters", ()))

    def adapter(self, name: str | None) -> str | None:
        """The adapter that a model name asks for; None for the model alone. Raises Refusal for another name."""
        if name is None or name in ALIASES or name in self.policy.names:
            own: str | None = getattr(self.engine.model, "adapter", None)
            return own
        if name in self.adapters:
            return name
        known = ", ".join((*self.policy.names, *self.adapters))
        raise Refusal("model", f"the model {name[:100]!r} is not served here; there is {known}", "model")

    def cut(self) -> None:
        """Ends everything that runs."""
        for session in list(self.sessions):
            session.close()

    def alive(self) -> bool:
        """Whether the engine is moving, or has nothing to do, and has not lost a process of its model."""
        engine = self._engine
        if engine is None:
            return True
        lost = getattr(engine.runner, "failed", None) is not None
        return not lost and (not engine.running or time.monotonic() - engine.beat < 120)

    # -- work ----------------------------------------------------------------------------------------------------

    async def compiled(self, owner: str, constraint: Constraint) -> Any:
        """A constraint, compiled beside the event loop and apart from what others wait for. Raises Refusal."""
        if self._compiler is None:
            raise Refusal("unable", "this server was started without constrained answers; leave the format out")
        return await self._compile(owner, refusing, self._compiler.compiled, constraint, owner)

    async def embedded(self, owner: str, task: Callable[..., T], *args: Any) -> T:
        """Runs a forward pass beside the event loop, one at a time. Raises Refusal."""
        return await self._embed(owner, refusing, task, *args)

    def session(self, generation: Generation, times: Times) -> Session:
        """Submits a checked generation; called in the event loop. Raises Refusal."""
        if self._mailbox is None:
            self._mailbox = Mailbox(asyncio.get_running_loop())
        owner, engine = generation.owner, self.engine
        self.rate.check(owner)
        self.places.take(owner, lambda: engine.patience(owner))
        asks = generation.prepared
        try:
            session = Session(engine, self._mailbox, asks, times, lambda tokens: self.rate.charge(owner, tokens))
        except Refusal:
            self.places.leave(owner)
            raise
        session.owner = owner
        self.sessions.add(session)
        held = sum(map(len, generation.prompts))
        self.rate.charge(owner, held)
        self.metrics.taken(held, asks[0].config.max_new_tokens or 0)
        return session

    def close(self) -> None:
        """Ends the engine; what runs is cancelled."""
        if self._compiler is not None:
            self._compiler.close()
        if self._engine is not None:
            self._engine.close(wait=False)


class Gone(Exception):
    """The client has left."""


@dataclass
class RouteCall:
    """One request on a route, its body read."""

    service: Service
    request: Request
    data: bytes
    owner: str = ""
    dialect: Dialect = "openai"
    id: str = ""
    times: Times = field(default_factory=Times)
    notes: dict[str, Any] = field(default_factory=dict)  # for the log
    held: int = 0  # bytes of the body that are counted

    def hold(self, size: int) -> None:
        """Counts bytes of the body. Raises Refusal where there is no room."""
        self.service.unparsed.take(self.owner, size)
        self.held += size

    def forget(self) -> None:
        """Drops the body, which has been parsed or is not wanted."""
        self.service.unparsed.give_back(self.owner, self.held)
        self.held, self.data = 0, b""

    @staticmethod
    def new_id() -> str:
        """A request id."""
        return secrets.token_hex(12)

    async def read(self, model: type[M]) -> M:
        """The body as a checked model. Raises Refusal."""
        unknown = self.service.policy.unknown_fields
        try:
            if len(self.data) < 16_384:
                return validation.read(model, self.data, unknown)
            return await self.service.check(self.owner, validation.read, model, self.data, unknown)
        finally:
            self.forget()

    async def parse(self, task: Callable[..., T], *args: Any) -> T:
        """Runs a dialect's parser beside the event loop. Raises Refusal, also for the library's own errors."""
        return await self.service.check(self.owner, refusing, task, *args)

    async def begin(self, generation: Generation) -> Session:
        """Checks and submits. Raises Refusal."""
        await self.parse(_check, self.service, generation)
        compiled = None
        if generation.constraint is not None:
            compiled = await self.service.compiled(self.owner, generation.constraint)
        await self.parse(_prepare, self.service, generation, compiled)
        session = self.service.session(generation, self.times)
        self.notes |= {"prompt_tokens": sum(map(len, generation.prompts)), "answers": len(generation.prepared)}
        return session

    async def until_gone(self, session: Session, answer: Coroutine[Any, Any, T]) -> T:
        """The answer, unless the client leaves first: then raises Gone. Raises Refusal at the deadline."""
        task = asyncio.ensure_future(answer)
        watch = asyncio.ensure_future(self.left())
        try:
            await asyncio.wait({task, watch}, return_when="FIRST_COMPLETED", timeout=self.timeout)
            if task.done():
                return task.result()
            raise Gone if watch.done() else late(self.service.policy)
        finally:
            for each in (task, watch):
                each.cancel()
            with contextlib.suppress(BaseException):
                await asyncio.gather(task, watch, return_exceptions=True)
            self.finish(session)

    @property
    def timeout(self) -> float | None:
        """Seconds that are left for this call; None without a bound."""
        allowed = self.service.policy.request_timeout
        return max(allowed - (time.monotonic() - self.times.came), 0.0) if allowed else None

    async def left(self) -> None:
        """Waits until the client has closed its connection."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    def finish(self, session: Session) -> None:
        """Closes a session and counts it."""
        if session in self.service.sessions:
            self.service.sessions.remove(session)
            self.service.places.leave(session.owner)
            session.close()
            self.service.metrics.done(session, ended=not (session.open or session.failed))
            self.notes |= {"tokens": session.tokens, "cached_tokens": session.reused}
            if session.times.first:
                self.notes["first_token_s"] = round(session.times.first - self.times.came, 4)


def late(policy: Policy) -> Refusal:
    """The refusal at the deadline."""
    return Refusal("deadline", f"the answer took longer than {policy.request_timeout:g} s (request_timeout)")


def refusing(task: Callable[..., T], *args: Any) -> T:
    """Runs a task. Raises Refusal for the library's own errors."""
    try:
        return task(*args)
    except InputError as error:
        raise Refusal(kind_of(error), str(error)) from None


def _check(service: Service, generation: Generation) -> None:
    generation.check(service.bounds, service.engine.model.config.vocab_size)


def _prepare(service: Service, generation: Generation, compiled: Any) -> None:
    compiler = service._compiler
    processor = None
    if compiled is not None and compiler is not None:
        processor = partial(compiler.processor, compiled)
    generation.prepared.extend(generation.asks(service.engine, service.bounds, processor))
