"""Work beside the event loop: a few places, shared fairly by key, and a deadline on every task.

A task runs in a thread of its own. At its deadline an exception is raised inside it, which ends anything that runs as
Python, such as a template that loops; a thread that does not end even then is given up and its place is free again.
The threads end with the process: none of them can keep it alive.
"""

import _thread
import asyncio
import contextlib
import ctypes
import os
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, TypeVar

from llama2.serve.errors import Refusal

T = TypeVar("T")
YIELDS = 10  # how nice such work is to the engine's threads, where the system has that for threads
GRACE = 1.0  # seconds that a task has to end once it was told to
MAX_LOST = 16  # threads given up that still run; with more of them nothing new is begun


def _give_way() -> None:
    """Lets the calling thread run when those of the engine leave time for it."""
    if sys.platform == "linux":  # elsewhere the number is one of the whole process
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), YIELDS)


class TooLongError(BaseException):
    """Raised inside a task at its deadline. No Exception: nothing that handles failures of a task may handle it."""


class Gate:
    """Some places for tasks. Owners that wait take turns, one task each, in the order in which they came."""

    def __init__(self, places: int) -> None:
        self.free = places
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def enter(self, owner: str) -> None:
        """Waits for a place; its holder calls `leave` once."""
        if self.free and not self._waiting:
            self.free -= 1
            return
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self.leave()  # the place was given in the very moment in which the waiting ended
            raise

    def leave(self) -> None:
        """Gives a place back, or on to the next owner."""
        self.free += 1
        while self._waiting and self.free:
            owner, queue = self._waiting.popitem(last=False)
            mine = queue.popleft()
            while mine.done() and queue:  # cancelled while it waited
                mine = queue.popleft()
            if queue:
                self._waiting[owner] = queue  # at the end: the others come first
            if not mine.done():
                self.free -= 1
                mine.set_result(None)


class _Task:
    """One task in its thread."""

    def __init__(self, done: Callable[["_Task"], None], task: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._done, self._work = done, [(task, args)]
        self._lock, self._over, self._ident = threading.Lock(), False, 0
        # Thread.start() would wait until the new thread has run, which on a busy machine holds up the event loop.
        _thread.start_new_thread(self._run, ())

    def _run(self) -> None:
        _give_way()
        self._ident = threading.get_ident()
        task, args = self._work.pop()  # timers keep this object, and would keep what it worked on
        try:
            try:
                self.result = task(*args)
            except BaseException as error:
                self.error = error
            finally:
                with self._lock:
                    self._over = True
        except TooLongError as error:  # it came when the task was over already
            self.error = self.error or error
        self._done(self)

    def interrupt(self) -> None:
        """Raises TooLongError inside the task, where it still runs."""
        with self._lock:
            if not self._over:
                ident = ctypes.c_ulong(self._ident)  # 0, which is no thread, where it has not even begun
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(TooLongError))


class Workers:
    """Runs tasks in threads, at most `places` at once, each for at most `deadline` seconds; 0 for no deadline."""

    def __init__(self, places: int, deadline: float) -> None:
        self.deadline, self.lost = deadline, 0
        self._gate = Gate(places)

    async def __call__(self, owner: str, task: Callable[..., T], *args: Any) -> T:
        """The result of task(*args). Raises what it raises, and Refusal at the deadline."""
        if self.lost >= MAX_LOST:
            raise Refusal("busy", f"{self.lost} requests that were given up still run; try again later", retry_after=30)
        await self._gate.enter(owner)
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[_Task] = loop.create_future()
        state = {"held": True, "lost": False}

        def leave() -> None:
            if state["held"]:
                state["held"] = False
                self._gate.leave()

        def over(running: _Task) -> None:
            leave()
            self.lost -= state["lost"]
            if not ended.done():
                ended.set_result(running)

        def give_up() -> None:
            if state["held"]:
                state["lost"] = True
                self.lost += 1
                leave()
                if not ended.done():
                    ended.set_exception(self._late())

        def late() -> None:
            if state["held"]:
                running.interrupt()
                loop.call_later(GRACE, give_up)

        running = _Task(lambda done: _tell(loop, over, done), task, args)
        timer = loop.call_later(self.deadline, late) if self.deadline else None
        try:
            await asyncio.wait({ended})
        finally:
            if timer is not None and ended.done():
                timer.cancel()
        found = ended.result()
        if isinstance(found.error, TooLongError):
            raise self._late()
        if found.error is not None:
            failure, found.error = found.error, None  # its traceback has this frame: a circle that keeps all arguments
            try:
                raise failure
            finally:
                del failure
        result: T = found.result
        return result

    def _late(self) -> Refusal:
        return Refusal(
            "costly",
            f"checking this request took longer than {self.deadline:g} s (validation_timeout); make it smaller",
        )


def _tell(loop: asyncio.AbstractEventLoop, over: Callable[[_Task], None], done: _Task) -> None:
    try:
        loop.call_soon_threadsafe(over, done)
    except RuntimeError:  # the loop has closed: nobody listens any more
        return
