"""`llama2 perplexity`: how well a model predicts a text."""

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama2.cli.args import option
from llama2.cli.loading import RunOptions, load
from llama2.errors import InputError

if TYPE_CHECKING:
    from llama2.evaluate.perplexity import Perplexity


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions(RunOptions):
    """Perplexity of a model on a text file: exp of the mean negative log-likelihood per token. Lower is better;
    values compare only between models with the same tokenizer, window and stride."""

    file: str | None = option(None, "the text, UTF-8; - is the standard input", alias="-f", metavar="FILE")
    window: int = option(512, "tokens read at once")
    stride: int | None = option(
        None, "tokens between the starts of two windows; less than --window overlaps them (default: --window)"
    )
    json: bool = option(False, "one JSON object instead of text")


def run(options: PerplexityOptions) -> int:
    """Runs the command."""
    text = _read(options.file)
    model, tokenizer = load(options)
    ids = tokenizer(text, verbose=False)["input_ids"]  # longer than the context is what windows are for
    result = _measure(model, ids, options)
    if options.json:
        import json

        print(json.dumps(asdict(result) | {"window": options.window, "stride": options.stride or options.window}))
    else:
        speed = result.tokens / result.seconds
        print(f"perplexity {result.value:.4f}")
        print(
            f"{result.nll:.5f} nats a token over {result.tokens:,} tokens; {result.seconds:.1f} s, {speed:.0f} tokens/s"
        )
    return 0


def _read(file: str | None) -> str:
    if file is None:
        raise InputError("no text was given; add --file TEXT, or --file - for the standard input")
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (byte {error.start}); convert it first") from error
    if not text.strip():
        raise InputError(f"{file} holds no text; perplexity needs at least two tokens")
    return text


def _measure(model: Any, ids: list[int], options: PerplexityOptions) -> "Perplexity":
    from llama2.evaluate.perplexity import perplexity
    from llama2.runners.contract import make_runner

    runner = make_runner(options.runner, model, cache_dtype=options.cache_dtype, precision=options.precision)
    with _progress() as bar:
        if bar is None:
            return perplexity(model, ids, options.window, options.stride, runner=runner)
        task = bar.add_task("perplexity", total=len(ids), value="")

        def show(done: int, total: int, value: float) -> None:
            bar.update(task, completed=done, value=f"{value:.3f}")

        return perplexity(model, ids, options.window, options.stride, show, runner)


def _progress() -> AbstractContextManager[Any]:
    """A progress bar on a terminal, None elsewhere."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("perplexity {task.fields[value]}"), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
