"""Progress bars on standard error where that is a terminal: of bytes with their rate, of layers, of training steps."""

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


class Steps:
    """A context whose value hears of the steps of a training: a bar on a terminal, else a line every few steps."""

    def __init__(self, verb: str, every: int) -> None:
        self.verb, self.every = verb, every

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
        if "eval_loss" in entry:
            values = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
            found = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
            self._console.print(f"step {entry['step']}: held out, {found}")
            return
        item = f"loss {entry['loss']:.4f}, {entry['tokens_per_second']:,.0f} tokens/s"
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
        self._bar.stop()
