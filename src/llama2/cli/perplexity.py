"""`llama2 perplexity`: how well a model predicts a text."""

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from llama2.cli import numbers, texts
from llama2.cli.args import option
from llama2.cli.loading import RunOptions, load, model_path
from llama2.errors import InputError

if TYPE_CHECKING:
    from llama2.evaluate.perplexity import Perplexity
    from llama2.evaluate.report import Row


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions(RunOptions):
    """Perplexity of a model on a text: exp of the mean negative log-likelihood per token, with its standard error over
    the windows. Lower is better; values compare only between models with the same tokenizer, window and stride, bits
    per byte also between tokenizers."""

    paths: tuple[str, ...] = option(
        (), "the text, UTF-8, - for the standard input; a model may stand before it", metavar="[MODEL] TEXT",
        positional=True,
    )  # fmt: skip
    file: str | None = option(None, "the same as TEXT", alias="-f", metavar="FILE")
    window: tuple[str, ...] = option((), "tokens read at once; several are swept (default: 512)", metavar="N,...")
    stride: int | None = option(
        None, "tokens between the starts of two windows; less than --window overlaps them (default: --window)"
    )
    json: bool = option(False, "the report that all measuring commands write, as JSON")
    md: bool = option(False, "that report as a Markdown table")


def run(options: PerplexityOptions) -> int:
    """Runs the command."""
    if options.json and options.md:
        raise InputError("--json and --md each say what is printed; give one of them")
    options, file = _places(options)
    windows = numbers.read("--window", options.window, 512, 2)
    if options.stride is not None and not 1 <= options.stride <= min(windows):
        raise InputError(f"stride is {options.stride}; it must be between 1 and the window, {min(windows)}")
    text = texts.read([file])
    model, tokenizer = load(options)
    ids = tokenizer(text, verbose=False)["input_ids"]  # longer than the context is what windows are for
    from llama2.evaluate.perplexity import check_sizes
    from llama2.evaluate.steps import make_steps

    for window in windows:
        check_sizes(model.config.max_position_embeddings, len(ids), window, options.stride or window)
    runner = make_steps(model, options.runner, options.cache_dtype, options.precision)
    found = {}
    for window in windows:
        found[window] = _measure(model, ids, window, options.stride, runner, len(text.encode()))
        if not (options.json or options.md):
            print(_text(found[window], window if len(windows) > 1 else None), flush=True)
    if options.json or options.md:
        from llama2.evaluate.report import EvaluationReport

        name = options.model or model_path(None)
        rows = [row for window, each in found.items() for row in report_rows(name, each, window)]
        settings = {"text": file, "windows": windows, "stride": options.stride, "precision": options.precision}
        made = EvaluationReport("perplexity", rows, settings, {name: {"path": name}})
        print(made.as_json() if options.json else made.as_markdown())
    return 0


def report_rows(name: str, result: "Perplexity", window: int) -> "list[Row]":
    """The rows of one window's size."""
    from llama2.evaluate.report import Row

    details = asdict(result) | {"window": window}
    rows = [
        Row(name, f"perplexity @ {window}", result.value, result.error, "", "lower", details=details),
        Row(name, f"nats per token @ {window}", result.nll, result.nll_error, "nats", "lower"),
        Row(
            name,
            f"first choices right @ {window}",
            100 * result.accuracy,
            _percent(result.accuracy_error),
            "%",
            "higher",
        ),
    ]
    if result.bits_per_byte is not None:
        test = f"bits per byte @ {window}"
        rows.append(Row(name, test, result.bits_per_byte, result.bits_per_byte_error, "bits", "lower"))
    return rows


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _places(options: PerplexityOptions) -> tuple[PerplexityOptions, str]:
    """The options with the model, and the text's file."""
    paths = [*options.paths, *([] if options.file is None else [options.file])]
    if not paths:
        raise InputError("no text was given; add TEXT or --file TEXT, or - for the standard input")
    if len(paths) > 2 or (len(paths) == 2 and options.model is not None):
        given = [*paths, *([] if options.model is None else [options.model])]
        raise InputError(f"perplexity takes a model and one text, but got {', '.join(given)}; give one of each")
    return (replace(options, model=paths[0]) if len(paths) == 2 else options), paths[-1]


def _text(found: "Perplexity", window: int | None) -> str:
    def with_error(value: float, error: float | None, digits: int) -> str:
        return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")

    place = "" if window is None else f" in windows of {window}"
    byte = (
        ""
        if found.bits_per_byte is None
        else f"; {with_error(found.bits_per_byte, found.bits_per_byte_error, 4)} bits per byte"
    )
    speed = found.tokens / found.seconds
    return (
        f"perplexity {with_error(found.value, found.error, 4)}{place}\n"
        f"{found.nll:.5f} nats a token over {found.tokens:,} tokens{byte}; {found.accuracy:.1%} are the first choice; "
        f"{found.seconds:.1f} s, {speed:.0f} tokens/s"
    )


def _measure(model: Any, ids: list[int], window: int, stride: int | None, runner: Any, size: int) -> "Perplexity":
    from llama2.evaluate.perplexity import perplexity

    with _progress() as bar:
        if bar is None:
            return perplexity(model, ids, window, stride, runner=runner, text_bytes=size)
        task = bar.add_task("perplexity", total=len(ids), value="")

        def show(done: int, total: int, value: float) -> None:
            bar.update(task, completed=done, value=f"{value:.3f}")

        return perplexity(model, ids, window, stride, show, runner, size)


def _progress() -> AbstractContextManager[Any]:
    """A progress bar on a terminal, None elsewhere."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("perplexity {task.fields[value]}"), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
