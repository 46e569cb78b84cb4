"""Progress bars on standard error where that is a terminal: of bytes with their rate, and of layers."""

from types import TracebackType
from typing import Any, Self


class Meter:
    """A context whose value is called with (bytes done, bytes in all, what comes next)."""

    def __init__(self, verb: str, quiet: bool = False) -> None:
        self.verb, self.quiet = verb, quiet

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Speed

        console = Console(stderr=True)
        self._bar: Any = Progress(
            TextColumn(self.verb),
            BarColumn(),
            DownloadColumn(),
            Speed(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[item]}"),
            console=console,
            transient=True,
            disable=self.quiet or not console.is_terminal,
        )
        self._bar.start()
        self._task: Any = None
        return self

    def __call__(self, done: int, total: int, item: str) -> None:
        if self._task is None:  # what an earlier run has written does not count towards the rate
            self._task = self._bar.add_task("", total=total, completed=done, item=item)
        self._bar.update(self._task, completed=done, total=total, item=item)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class Layers:
    """As Meter, called with (layers done, layers in all, what is under way)."""

    def __init__(self, verb: str, quiet: bool = False) -> None:
        self.verb, self.quiet = verb, quiet

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn(self.verb), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar: Any = Progress(
            *columns,
            TextColumn("{task.fields[item]}"),
            console=console,
            transient=True,
            disable=self.quiet or not console.is_terminal,
        )
        self._bar.start()
        self._task: Any = None
        return self

    def __call__(self, done: float, total: int, item: str) -> None:
        if self._task is None:  # layers of an earlier run do not count towards the rate
            self._task = self._bar.add_task("", total=total, completed=done, item=item)
        self._bar.update(self._task, completed=done, total=total, item=item)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
