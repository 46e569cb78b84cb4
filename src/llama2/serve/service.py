"""State shared by all routes: the models with their engines, life and metrics; and one call on a route."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from llama2.engine.engine import Engine, EngineRequest
from llama2.errors import InputError
from llama2.serve import validation
from llama2.serve.auth import Keys
from llama2.serve.budget import Budget
from llama2.serve.chat import MERGED
from llama2.serve.constraint import Constraint
from llama2.serve.dialect import Dialect
from llama2.serve.errors import Refusal, kind_of
from llama2.serve.lifecycle import Life
from llama2.serve.metrics import Metrics
from llama2.serve.model_pool import ModelPool, Offer
from llama2.serve.numbers import seconds
from llama2.serve.policy import Policy
from llama2.serve.quota import Places, Rate
from llama2.serve.readers import LARGE, Readers
from llama2.serve.request import Bounds, GenerationRequest
from llama2.serve.served_model import ServedModel
from llama2.serve.session import Mailbox, Session, Times
from llama2.serve.workers import Workers

T = TypeVar("T")
M = TypeVar("M", bound=validation.Body)


class Service:
    """The server without its routes."""

    def __init__(
        self,
        policy: Policy | None = None,
        keys: Keys | None = None,
        life: Life | None = None,
        metrics_keys: Keys | None = None,
    ) -> None:
        policy = policy or Policy()
        self.policy, self.keys, self.life = policy, keys or Keys(), life or Life()
        self.metrics_keys = metrics_keys or Keys()
        self.metrics = Metrics()
        self.created = int(time.time())
        self.sessions: set[Session] = set()
        self.pool = ModelPool()
        self.unparsed = Budget("bodies that are not parsed yet", policy.max_unparsed_bytes)
        self.unread = Budget("answers that are not read yet", policy.max_unread_bytes)
        self.places = Places(policy.max_concurrent_requests, policy.max_requests_per_key)
        self.rate = Rate(policy.tokens_per_minute)
        self.check = Workers(policy.workers, policy.validation_timeout)  # parses, renders, tokenises
        self._compile, self._embed = Workers(1, 0), Workers(1, 0)  # bounded by their own means
        self.readers, self._prepare = Readers(policy.workers), Workers(1, 0)
        self._mailbox: Mailbox | None = None

    # -- the model -----------------------------------------------------------------------------------------------

    def open(self, engine: Engine, bounds: Bounds) -> None:
        """Takes in the one model of this server, which stays: from now on requests are served. Raises InputError for an
        engine without tokenizer."""
        self.pool.hold(ServedModel(engine, bounds, self.policy))
        self._watch()
        if self.life.state == "loading":
            self.life.state = "ready"

    def offer(self, pool: ModelPool) -> None:
        """Takes in models that come and go: from now on requests are served."""
        self.pool = pool
        pool.heard = self.metrics.model_event
        self._watch()
        if self.life.state == "loading":
            self.life.state = "ready"

    def _watch(self) -> None:
        pool, watch = self.pool, self.metrics.watch

        def each(read: Callable[[Engine], float]) -> Callable[[], float | dict[str, float]]:
            """Of the model that stays, or of each that is loaded by its name."""
            if pool.fixed:
                return lambda: read(self.engine)
            return lambda: {model.names[0]: read(model.engine) for model in pool.served}

        def all_of(read: Callable[[Engine], float]) -> Callable[[], float]:
            return lambda: sum(read(model.engine) for model in pool.served)

        watch("tgi_queue_size", "Requests that wait.", all_of(lambda e: max(e.waiting, 0)))
        watch("tgi_batch_current_size", "Requests that run.", all_of(lambda e: e.running))
        usage = "llama2_kv_usage_ratio"
        watch(usage, "Share of the cache's pages that are held.", each(lambda e: 1 - e.pool.free / e.pool.count))
        preemptions = "Requests put back into the queue for want of pages."
        watch("llama2_preemptions", preemptions, each(lambda e: e.preemptions))
        watch("llama2_steps", "Steps of the engine.", each(lambda e: e.steps))
        watch("llama2_guesses", "Tokens that were guessed and checked.", each(lambda e: e.tokens_proposed))
        watch("llama2_guesses_held", "Of these, those that held.", each(lambda e: e.tokens_guessed))
        watch("llama2_streams", "Answers being told.", lambda: len(self.sessions))
        if not pool.fixed:
            told = "Bytes that a loaded model claims, its cache included."
            watch("llama2_model_bytes", told, lambda: {offer.name: offer.claim for offer in pool.loaded})

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what is served."""
        return self.policy.names if self.pool.fixed else tuple(offer.name for offer in self.pool.offers)

    @property
    def model(self) -> ServedModel:
        """The model of a server of one. Raises Refusal while it is being loaded."""
        served = self.pool.served
        if not served or not self.pool.fixed:
            raise Refusal("starting", "the model is still being loaded; ask again in a few seconds", retry_after=2)
        return served[0]

    @property
    def engine(self) -> Engine:
        """The model's. Raises Refusal as `model`."""
        return self.model.engine

    @property
    def loaded(self) -> bool:
        """Whether there are models to ask."""
        return bool(self.pool.offers)

    @property
    def bounds(self) -> Bounds:
        """The bounds of a request. Raises Refusal as `model`."""
        return self.model.bounds

    @property
    def tokenizer(self) -> Any:
        """The model's. Raises Refusal as `model`."""
        return self.model.tokenizer

    def cut(self) -> None:
        """Ends everything that runs, and the wait for models that are being loaded."""
        self.pool.cut()
        for session in list(self.sessions):
            session.cancel()

    def alive(self) -> bool:
        """Whether the models that are loaded work."""
        return self.pool.alive()

    # -- work ----------------------------------------------------------------------------------------------------

    async def compiled(self, owner: str, model: ServedModel, constraint: Constraint) -> Any:
        """A constraint, compiled beside the event loop and apart from what others wait for. Raises Refusal."""
        if model.compiler is None:
            raise Refusal("unable", "this server was started without constrained answers; leave the format out")
        return await self._compile(owner, refusing, model.compiler.compiled, constraint, owner)

    async def apart(self, owner: str, task: Callable[..., T], *args: Any) -> T:
        """Calls a function of a module on a large body, in another process. Raises Refusal."""
        await self._prepare(owner, self.readers.prepare)
        return await self.check(owner, self.readers, task, *args)

    async def embedded(self, owner: str, task: Callable[..., T], *args: Any) -> T:
        """Runs a forward pass beside the event loop, one at a time. Raises Refusal."""
        return await self._embed(owner, refusing, task, *args)

    def session(self, model: ServedModel, request: GenerationRequest, times: Times) -> Session:
        """A place for a checked request, which is to be submitted; called in the event loop. Raises Refusal."""
        if self._mailbox is None:
            self._mailbox = Mailbox(asyncio.get_running_loop())
        owner, engine = request.owner, model.engine
        self.rate.check(owner)
        self.places.take(owner, lambda: engine.patience(owner))
        count = partial(self.rate.charge, owner)
        session = Session(engine, self._mailbox, request.answers, times, count)
        session.owner, session.model = owner, model.names[0]
        self.sessions.add(session)
        return session

    def submitted(self, session: Session, request: GenerationRequest, asks: Sequence[EngineRequest]) -> None:
        """Counts a request that the engine has."""
        prompt_tokens = sum(map(len, request.prompts))
        self.rate.charge(request.owner, prompt_tokens)
        self.metrics.taken(prompt_tokens, asks[0].config.max_new_tokens or 0, "" if self.pool.fixed else session.model)

    def leave(self, session: Session) -> bool:
        """Closes a session and gives its place back, once; whether it was open."""
        if session not in self.sessions:
            return False
        self.sessions.remove(session)
        self.places.leave(session.owner)
        session.close()
        return True

    def close(self) -> None:
        """Ends the engines; what runs is cancelled."""
        self.readers.close()
        self.pool.close()


class Gone(Exception):
    """The client has left."""


@dataclass
class RouteCall:
    """One request on a route, its body read."""

    service: Service
    request: Request
    data: bytes
    dialect: Dialect
    owner: str = ""
    id: str = ""
    times: Times = field(default_factory=Times)
    notes: dict[str, Any] = field(default_factory=dict)  # for the log
    warnings: list[str] = field(default_factory=list)  # what of the body is not obeyed
    headers: dict[str, str] = field(default_factory=dict)  # of the response, beside its own
    held: int = 0  # bytes of the body that are counted
    offer: Offer | None = None  # the model that this call has
    large: bool = False  # whether the body is read in another process
    keep: float | None = None  # seconds that the model stays behind this call, where the body says so

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

    async def look(self, task: Callable[[bytes], T]) -> T:
        """Calls a function of a module on the body. Raises Refusal."""
        if len(self.data) < LARGE:
            return task(self.data)
        return await self.service.apart(self.owner, task, self.data)

    async def read(self, model: type[M]) -> M:
        """The body, checked, and with it the model that it asks for: `model`. Raises Refusal."""
        body = await self._read(model)
        if body.needs_model:
            await self.use(body.asked_model)
        return body

    async def use(self, name: str | None = None) -> ServedModel:
        """Takes the model that a name asks for, once, and loads it where it is not there. Raises Refusal."""
        if self.offer is None:
            self.offer = await self.service.pool.take(name)
        return self.model

    async def shown(self) -> ServedModel:
        """The model that a route without a body tells of: that of the query's `model`, else one that is loaded, else
        the first. Raises Refusal."""
        name, loaded = self.request.query_params.get("model"), self.service.pool.loaded
        if name is None and loaded:
            name = max(loaded, key=lambda offer: (offer.users > 0, offer.used)).name
        return await self.use(name)

    def release(self) -> None:
        """Gives the model back."""
        if self.offer is not None:
            self.service.pool.give_back(self.offer, self.keep)
            self.offer = None

    async def _read(self, model: type[M]) -> M:
        body = await self._checked(model)
        keep = getattr(body, "keep_alive", None) if "keep_alive" in model.model_fields else None
        if keep is not None:
            self.keep = seconds(keep)
            if self.service.pool.fixed:
                self.warnings.append("keep_alive has no effect: this server keeps its model (--keep-alive lets it go)")
        return body

    async def _checked(self, model: type[M]) -> M:
        unknown = self.service.policy.unknown_fields
        try:
            self.large = self.large or len(self.data) >= LARGE
            if not self.large:
                return validation.read(model, self.data, unknown, self.warnings)
            body, warnings = await self.service.apart(self.owner, validation.read_apart, model, self.data, unknown)
            self.warnings += warnings
            return body
        finally:
            self.forget()

    async def peek(self) -> frozenset[str]:
        """The names of the body's fields, for routes that two APIs share. Raises Refusal for what is no object."""
        return await self.look(validation.names)

    async def translate(self, convert: Callable[..., dict[str, Any]], *args: Any, to: type[M]) -> M:
        """Another dialect's body as one of OpenAI's: what `convert` makes is read as if it had been sent."""
        self.data = await self.parse(_dumped, convert, *args)
        return await self._read(to)

    async def parse(self, task: Callable[..., T], *args: Any) -> T:
        """Runs a dialect's parser beside the event loop, for a large body in another process: a function of a module
        then, on what can be pickled and on the model. Raises Refusal, also for the library's own errors."""
        if self.large:
            return await self.service.apart(self.owner, refusing, task, *args)
        return await self.beside(task, *args)

    async def beside(self, task: Callable[..., T], *args: Any) -> T:
        """As `parse`, always in a thread of this process: for what needs the engine. Raises Refusal."""
        return await self.service.check(self.owner, refusing, task, *args)

    @property
    def model(self) -> ServedModel:
        """The model that answers. Raises Refusal while there is none."""
        if self.offer is not None and self.offer.served is not None:
            return self.offer.served
        return self.service.model

    async def begin(self, request: GenerationRequest) -> Session:
        """Checks and submits. Raises Refusal."""
        model, compiled = self.model, None
        await self.beside(model.check, request)
        if request.constraint is not None:
            compiled = await self.service.compiled(self.owner, model, request.constraint)
        if MERGED in request.warnings:
            self.headers["x-llama2-roles"] = "merged"
        self.warnings += (*request.warnings, *(compiled.warnings if compiled is not None else ()))
        session = self.service.session(model, request, self.times)
        try:
            asks = await self.beside(session.submit, model.engine_requests, request, compiled)
        except BaseException:
            self.service.leave(session)
            raise
        self.service.submitted(session, request, asks)
        self.notes |= {"prompt_tokens": sum(map(len, request.prompts)), "answers": len(asks)}
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
        if self.service.leave(session):
            several = "" if self.service.pool.fixed else session.model
            self.service.metrics.done(session, ended=not (session.open or session.failed), model=several)
            self.notes |= {"tokens": session.tokens, "cached_tokens": session.reused}
            if session.times.first:
                self.notes["first_token_s"] = round(session.times.first - self.times.came, 4)


def _dumped(convert: Callable[..., dict[str, Any]], *args: Any) -> bytes:
    return json.dumps(convert(*args)).encode()


def late(policy: Policy) -> Refusal:
    """The refusal at the deadline."""
    return Refusal("deadline", f"the answer took longer than {policy.request_timeout:g} s (request_timeout)")


def refusing(task: Callable[..., T], *args: Any) -> T:
    """Runs a task. Raises Refusal for the library's own errors."""
    try:
        return task(*args)
    except InputError as error:
        raise Refusal(kind_of(error), str(error)) from None
