"""Progress on standard error: bars where that is a terminal, elsewhere a line every few seconds.

with Meter("converting") as meter: ...     bytes, with their rate
with Layers("quantising") as layers: ...   layers
with Steps("sft", every=10) as steps: ...  steps of a training, each `every` of them a line
with Waiting("loading NAME"): ...          what cannot say how far it is
"""

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

INTERVAL = 5.0  # seconds between two lines where there is no terminal


class Waiting:
    """A context that prints a line every INTERVAL seconds where standard error is no terminal: how long it has taken,
    and how far it is where `said` was told. Short work prints nothing."""

    def __init__(self, verb: str, quiet: bool = False) -> None:
        self.verb, self.quiet = verb, quiet
        self._said: str | Callable[[], str] = ""
        self._end, self._began = threading.Event(), time.perf_counter()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        if not self.quiet and not sys.stderr.isatty():
            self._thread = threading.Thread(target=self._tell, daemon=True)
            self._thread.start()
        return self

    def say(self, text: str | Callable[[], str]) -> None:
        """Sets the text of the next lines beside the time; a function is called for each."""
        self._said = text

    def _tell(self) -> None:
        while not self._end.wait(INTERVAL):
            seconds = time.perf_counter() - self._began
            said = self._said() if callable(self._said) else self._said
            shown = f"{said}, " if said else ""
            print(f"llama2: {self.verb}: {shown}{seconds:.0f} s so far", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()


class _Bar:
    """Base class of progress bars: a context whose value is called with (done, in all, what comes next)."""

    def __init__(self, verb: str, quiet: bool = False) -> None:
        self.verb, self.quiet, self._lines = verb, quiet, Waiting(verb, quiet)

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.progress import Progress, TextColumn

        console = Console(stderr=True)
        self._bar: Any = Progress(
            TextColumn(self.verb),
            *self._columns(),
            TextColumn("{task.fields[item]}"),
            console=console,
            transient=True,
            disable=self.quiet or not console.is_terminal,
        )
        self._bar.start()
        self._lines.__enter__()
        self._task: Any = None
        return self

    def _columns(self) -> list[Any]:
        raise NotImplementedError

    def _said(self, done: float, total: float, item: str) -> str:
        raise NotImplementedError

    def __call__(self, done: float, total: float, item: str) -> None:
        if self._task is None:  # what an earlier run has done does not count towards the rate
            self._task = self._bar.add_task("", total=total, completed=done, item=item)
        self._bar.update(self._task, completed=done, total=total, item=item)
        self._lines.say(self._said(done, total, item))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.__exit__(kind, error, trace)
        self._bar.stop()


class Meter(_Bar):
    """Called with (bytes done, bytes in all, what comes next)."""

    def _columns(self) -> list[Any]:
        from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

        return [BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]

    def _said(self, done: float, total: float, item: str) -> str:
        share = 100 * done / total if total else 100
        return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB ({share:.0f} %){f', {item}' if item else ''}"


class LayerBar(_Bar):
    """Called with (layers done, layers in all, what is under way)."""

    def _columns(self) -> list[Any]:
        from rich.progress import BarColumn, TimeElapsedColumn, TimeRemainingColumn

        return [BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()]

    def _said(self, done: float, total: float, item: str) -> str:
        return f"{done:.1f} of {total} layers, {item}"


class StepMeter:
    """A context whose value is called after each training step: a bar on a terminal, else a line every few steps; and a
    line every INTERVAL seconds until the first, while model and rows are loaded."""

    def __init__(self, verb: str, every: int) -> None:
        self.verb, self.every = verb, every
        self._loading: Waiting | None = Waiting(f"{verb}: loading")

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._loading is not None:
            self._loading.__enter__()
        self._console = Console(stderr=True, highlight=False)
        columns = (TextColumn(self.verb), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar: Any = Progress(
            *columns,
            TextColumn("{task.fields[item]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._bar.start()
        self._task: Any = None
        return self

    def __call__(self, entry: dict[str, Any]) -> None:
        self._loaded()
        if any(name.startswith("eval_") for name in entry):
            values = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
            found = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
            self._console.print(f"step {entry['step']}: held out, {found}")
            return
        seen = f"reward {entry['reward']:.4f}, " if "reward" in entry else ""
        item = f"{seen}loss {entry['loss']:.4f}, {entry['tokens_per_second']:,.0f} tokens/s"
        if not self._console.is_terminal:
            if entry["step"] % self.every == 0 or entry["step"] == entry["steps"]:
                self._console.print(f"step {entry['step']} of {entry['steps']}: {item}", soft_wrap=True)
            return
        if self._task is None:  # steps of an earlier run do not count towards the rate
            self._task = self._bar.add_task("", total=entry["steps"], completed=entry["step"], item=item)
        self._bar.update(self._task, completed=entry["step"], total=entry["steps"], item=item)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loaded()
        self._bar.stop()

    def _loaded(self) -> None:
        if self._loading is not None:
            self._loading.__exit__(None, None, None)
            self._loading = None
