"""The models that one server offers: each is loaded at its first request, and unloaded when it is idle for long or when
another one needs its memory.

A request takes its model before it is read further and gives it back with the last byte of its answer: a model that
somebody has is never unloaded. What a model will need is known before it is loaded, so that loading one is refused
where it does not fit, and what is loaded stays as it is. Everything here but loading and unloading themselves, which
have threads, runs in the event loop.
"""

import asyncio
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from llama2.errors import InputError, Llama2Error
from llama2.serve.errors import Refusal
from llama2.serve.facts import Facts, facts_of, measured
from llama2.serve.logs import logger
from llama2.serve.names import ALIASES, ANY, answers_to
from llama2.serve.served_model import ServedModel

T = TypeVar("T")
GIB = 2**30
FOREVER = math.inf


class Offer:
    """A model that can be asked for."""

    def __init__(
        self,
        names: tuple[str, ...],
        aliases: tuple[str, ...] = (),
        load: Callable[[], ServedModel] | None = None,
        describe: Callable[[], Facts] | None = None,
        key: object = None,
    ) -> None:
        """load, describe: what takes long, called in threads; None of a model that is there and stays. key: tells
        whether two offers are of the same files."""
        self.names, self.aliases, self.load, self.describe, self.key = names, aliases, load, describe, key
        self.served: ServedModel | None = None
        self.facts: Facts | None = None
        self.trouble: Refusal | None = None  # with its files, until they are changed
        self.users = 0  # requests that have the model, or wait for it
        self.used = 0.0  # when the last of them ended, on the monotonic clock
        self.keep = FOREVER  # seconds that it stays behind its last request
        self.loading: asyncio.Future[None] | None = None  # done once it is loaded, or refused
        self.timer: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        """The name that it is shown under first."""
        return self.names[0]

    @property
    def claim(self) -> int:
        """Bytes that it takes, or will."""
        return 0 if self.facts is None else self.facts.needs

    @property
    def expires(self) -> float:
        """Seconds until it is unloaded, if no request comes."""
        return self.keep if self.users else max(self.used + self.keep - time.monotonic(), 0.0)


Catalog = Callable[[], Sequence[Offer]]
Heard = Callable[[Offer, str, float], None]


class ModelPool:
    """All models of a server. `hold` makes it one of a single model that stays."""

    def __init__(
        self,
        catalog: Catalog | None = None,
        *,
        most: int = 4,
        keep: float = 300.0,
        memory: int = 0,
        room: Callable[[], int] | None = None,
        heard: Heard | None = None,
    ) -> None:
        """catalog: the models there are, asked in a thread whenever they are listed. most: models loaded at once.
        keep: seconds that an idle one stays. memory: bytes that all loaded ones may claim together. room: bytes that
        are free now. heard: is told of "loaded", "failed" and "unloaded", with the seconds that it took."""
        self._catalog, self.most, self.keep, self.memory = catalog, most, keep, memory
        self._room = room or (lambda: sys.maxsize)
        self.heard: Heard = heard or (lambda offer, event, seconds: None)
        self.offers: list[Offer] = []
        self._lock: asyncio.Lock | None = None
        self._loads = set[asyncio.Task[None]]()

    @property
    def fixed(self) -> bool:
        """Whether there is one model that stays."""
        return self._catalog is None

    @property
    def loaded(self) -> list[Offer]:
        """The models that are loaded."""
        return [offer for offer in self.offers if offer.served is not None]

    @property
    def served(self) -> list[ServedModel]:
        """The same, as what answers."""
        return [offer.served for offer in self.offers if offer.served is not None]

    def hold(self, served: ServedModel) -> None:
        """Takes in a model that stays."""
        offer = Offer(served.names, served.aliases)
        offer.served, offer.facts = served, facts_of(served, time.time())
        self.offers = [offer]

    # -- which model -----------------------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Asks the catalog again. Of files that are still there everything stays as it is."""
        if self._catalog is not None:
            self.put(await beside(self._catalog))

    def put(self, offers: Sequence[Offer]) -> None:
        """Takes in what the catalog says. A model that is loaded or in use stays until it is unloaded."""
        known = {(offer.name, offer.key): offer for offer in self.offers}
        found = [known.get((offer.name, offer.key), offer) for offer in offers]
        kept = [o for o in self.offers if o not in found and (o.served is not None or o.users)]
        names = {offer.name for offer in kept}
        self.offers = [*(offer for offer in found if offer.name not in names), *kept]

    async def find(self, name: str | None) -> Offer:
        """The model that a name asks for; without a name the first one. Raises Refusal where there is none."""
        found = self._find(name)
        if found is None and self._catalog is not None:
            await self.refresh()
            found = self._find(name)
        if found is None and not self.offers and self.fixed:
            raise Refusal("starting", "the model is still being loaded; ask again in a few seconds", retry_after=2)
        if found is None:
            known = ", ".join(offer.name for offer in self.offers[:32]) or "none yet"
            raise Refusal("model", f"the model {(name or '')[:100]!r} is not served here; there is {known}", "model")
        return found

    def _find(self, name: str | None) -> Offer | None:
        if not self.offers:
            return None
        if self.fixed or name is None or name in ALIASES:  # an adapter's name, or a wrong one, is the model's to judge
            return self.offers[0]
        exact = next((o for o in self.offers if name.removesuffix(":latest") in o.names), None)
        if exact is not None:
            return exact
        named = ((o, [n for n in (*o.names, *o.aliases) if n != ANY]) for o in self.offers)
        fits = next((offer for offer, names in named if answers_to(name, names)), None)
        return fits or next((o for o in self.offers if ANY in (*o.names, *o.aliases)), None)

    async def facts(self, offer: Offer) -> Facts:
        """Returns the facts about a model. Raises Refusal for files that cannot be read."""
        if offer.trouble is not None:
            raise offer.trouble
        if offer.facts is None:
            assert offer.describe is not None
            try:
                offer.facts = await beside(offer.describe)
            except Exception as error:
                offer.trouble = _failure(offer, "described", error)
                raise offer.trouble from None
        return offer.facts

    async def listed(self) -> list[tuple[str, Offer, Facts]]:
        """Every name that is shown, adapters included, with its model and what is told of it. What cannot be read is
        left out. Raises Refusal while the one model of a server is being loaded."""
        await self.refresh()
        if self.fixed:
            await self.find(None)
        found: list[tuple[str, Offer, Facts]] = []
        for offer in list(self.offers):
            try:
                facts = await self.facts(offer)
            except Refusal:
                continue
            adapters = () if offer.served is None else offer.served.adapters
            found += [(name, offer, facts) for name in (*offer.names, *adapters)]
        return found

    # -- having it -------------------------------------------------------------------------------------------------

    async def take(self, name: str | None = None) -> Offer:
        """The model that a name asks for, loaded; its holder calls `give_back` once. Raises Refusal.

        The first requests of a model load it once, together.
        """
        offer = await self.find(name)
        offer.users += 1
        if offer.timer is not None:
            offer.timer.cancel()
            offer.timer = None
        try:
            if offer.served is None:
                await asyncio.shield(offer.loading or self._begin(offer))
        except BaseException:
            self.give_back(offer)
            raise
        return offer

    def give_back(self, offer: Offer, keep: float | None = None) -> None:
        """Ends the use of a model. keep: seconds that it stays behind its last request from now on."""
        offer.users -= 1
        offer.used = time.monotonic()
        if keep is not None:
            offer.keep = keep
        self._time(offer)

    def _time(self, offer: Offer) -> None:
        if offer.timer is not None:
            offer.timer.cancel()
            offer.timer = None
        if not self.fixed and not offer.users and offer.served is not None and offer.keep < FOREVER:
            loop = asyncio.get_running_loop()
            offer.timer = loop.call_later(offer.keep, lambda: asyncio.ensure_future(self.unload(offer)))

    async def unload(self, offer: Offer) -> bool:
        """Unloads a model that nobody has; whether it was."""
        served = offer.served
        if self.fixed or served is None or offer.users:
            return False
        offer.served, offer.loading = None, None
        if offer.timer is not None:
            offer.timer.cancel()
            offer.timer = None
        began = time.monotonic()
        closing = [served]
        del served
        await beside(_end, closing)
        took = time.monotonic() - began
        logger.info("model unloaded", extra={"fields": {"model": offer.name, "seconds": round(took, 3)}})
        self.heard(offer, "unloaded", took)
        return True

    def _begin(self, offer: Offer) -> "asyncio.Future[None]":
        """Begins to load a model, in a task that no request can cancel."""
        offer.keep = self.keep
        offer.loading = told = asyncio.get_running_loop().create_future()
        told.add_done_callback(lambda done: done.exception())  # heard even where every request has gone
        task = asyncio.ensure_future(self._load(offer, told))
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)
        return told

    async def _load(self, offer: Offer, told: "asyncio.Future[None]") -> None:
        """Loads a model, one at a time, and says so, or the Refusal; then nothing has changed."""
        self._lock = self._lock or asyncio.Lock()
        failure: Refusal | None = None
        served: ServedModel | None = None
        async with self._lock:
            began = time.monotonic()
            try:
                await self._make_room(offer, await self.facts(offer))
                began = time.monotonic()
                assert offer.load is not None
                served = await beside(offer.load)
                offer.facts = measured(await self.facts(offer), served)
            except Refusal as refusal:
                failure = refusal
            except Exception as error:
                failure = _failure(offer, "loaded", error)
            offer.loading = None
            if told.done() and served is not None:  # the server is shutting down
                closing, served = [served], None
                await beside(_end, closing)
                return
            offer.served = served if failure is None else None
        took = time.monotonic() - began
        if failure is None:
            logger.info("model loaded", extra={"fields": {"model": offer.name, "seconds": round(took, 3)}})
        self.heard(offer, "loaded" if failure is None else "failed", took)
        if not told.done():
            told.set_result(None) if failure is None else told.set_exception(failure)

    async def _make_room(self, offer: Offer, facts: Facts) -> None:
        """Unloads idle models, the one that has been idle longest first, until this one fits. Raises Refusal."""
        if facts.needs > self.memory:
            raise Refusal(
                "memory",
                f"the model {offer.name!r} needs {_gib(facts.needs)} with its cache, and {_gib(self.memory)} are there "
                "for models; serve a smaller or a quantised one, or lower --max-batch-total-tokens",
            )
        while True:
            others = [o for o in self.loaded if o is not offer]
            free = min(self.memory - sum(o.claim for o in others), self._room())
            if facts.needs <= free and len(others) < self.most:
                return
            idle = min((o for o in others if not o.users), key=lambda o: o.used, default=None)
            if idle is not None:
                await self.unload(idle)
                continue
            told = f"the model {offer.name!r} needs {_gib(facts.needs)} with its cache, {_gib(max(free, 0))} are free"
            if len(others) >= self.most:
                told = f"{len(others)} models are loaded, which is the bound (--max-models)"
            names = ", ".join(o.name for o in others)
            if not others:
                raise Refusal("memory", f"{told}; other programs have the rest, so end one of them, or ask later")
            raise Refusal("busy", f"{told}, and {names} are answering; ask again when they are idle", retry_after=5)

    def cut(self) -> None:
        """Ends the wait of requests whose model is being loaded."""
        for offer in self.offers:
            if offer.loading is not None and not offer.loading.done():
                refusal = Refusal("closing", "the server is shutting down; ask another replica", retry_after=5)
                offer.loading.set_exception(refusal)

    def alive(self) -> bool:
        """Whether all that is loaded works."""
        return all(served.alive() for served in self.served)

    def close(self) -> None:
        """Ends all engines; what runs is cancelled."""
        for served in self.served:
            served.close()


async def beside(task: Callable[..., T], *args: Any) -> T:
    """The result of a task that runs in a thread of its own, which ends with the process. Raises what it raises."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(result: Any, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)

    def run() -> None:
        result: Any = None
        failure: BaseException | None = None
        try:
            result = task(*args)
        except BaseException as error:
            failure = error
        try:
            loop.call_soon_threadsafe(tell, result, failure)
        except RuntimeError:  # the loop has closed: nobody listens any more
            return

    threading.Thread(target=run, name="llama2-model", daemon=True).start()
    return await done


def _end(closing: list[ServedModel]) -> None:
    """Closes a model and gives its memory back; the list is emptied, so that nothing here keeps the model.

    Nothing is collected: that holds the interpreter's lock for 0.2 s, in which no stream gets a token. What a request
    leaves behind does not keep its model, which a test shows.
    """
    closing.pop().close()
    torch: Any = sys.modules.get("torch")  # what has not been imported holds nothing
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _failure(offer: Offer, what: str, error: Exception) -> Refusal:
    """The refusal for a model that failed; where its files lie is for the log."""
    reason = error.args[0] if isinstance(error, Llama2Error | InputError) and error.args else type(error).__name__
    logger.error("model not %s", what, extra={"fields": {"model": offer.name, "reason": str(error)[:500]}})
    place = str(offer.key[0]) if isinstance(offer.key, tuple) and offer.key else ""
    told = str(reason).replace(place, offer.name) if place else str(reason)
    return Refusal("load", f"the model {offer.name!r} could not be loaded: {told[:500]}")


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"
