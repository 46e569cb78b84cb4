"""`llama2 batch`: a file of requests, answered line by line."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2.cli import terminal
from llama2.cli.args import option
from llama2.cli.loading import RunOptions, model_path
from llama2.cli.serve import EngineOptions, need_server, open_model
from llama2.errors import InputError
from llama2.files import grown, locked


@dataclass(frozen=True, kw_only=True)
class BatchOptions(EngineOptions, RunOptions):
    """Answer every line of IN.jsonl in OUT.jsonl, many at once. Run again after an interruption, it goes on.

    A line is a body of the server's routes, {"prompt": ...}, {"messages": ...} or {"inputs": ...}, or OpenAI's batch
    shape {"custom_id": ..., "url": "/v1/chat/completions", "body": ...}. Answers have its custom_id, or "line-N"."""

    paths: tuple[str, ...] = option((), "the requests and the answers", metavar="IN.jsonl OUT.jsonl", positional=True)
    chat_template: str | None = option(
        None, "a file with a Jinja template, or llama2 (default: the one the model ships)", metavar="FILE"
    )
    overwrite: bool = option(False, "begin anew, and lose what OUT.jsonl holds")
    quiet: bool = option(False, "no progress")


def run(options: BatchOptions) -> int:
    """Runs the command."""
    if len(options.paths) != 2:
        raise InputError(f"batch takes two files, the requests and the answers, but {len(options.paths)} were given")
    need_server()
    from llama2.serve import batch

    source, target = Path(options.paths[0]), Path(options.paths[1]).resolve()
    lines = batch.read_lines(source)
    if target.exists() and target.samefile(source):
        raise InputError(f"{target} is the file of the requests; give another one for the answers")
    with locked(target):
        known, size = (set[str](), 0) if options.overwrite else batch.answered(target)
        rest = [line for line in lines if line.id not in known]
        if len(rest) < len(lines):
            terminal.notice(f"llama2: {len(lines) - len(rest)} of {len(lines)} lines are answered already")
        done, refused = _answer(options, rest, target, size) if rest else (0, 0)
    terminal.notice(
        f"llama2: {done} lines answered in {target}" + (f", {refused} of them with an error" if refused else "")
    )
    return 1 if refused else 0


def _answer(options: BatchOptions, lines: list[Any], target: Path, size: int) -> tuple[int, int]:
    import asyncio

    from llama2.serve import batch
    from llama2.serve.app import make_app
    from llama2.serve.policy import Policy
    from llama2.serve.service import Service

    name = options.model or Path(model_path(None)).stem
    most = 1 << 50  # the file is the caller's own: nothing in it is bounded but by the model
    policy = Policy(
        names=(name,),
        max_concurrent_requests=most,
        payload_limit=most,
        validation_timeout=0,
        max_unparsed_bytes=most,
        max_unread_bytes=most,
    )
    service = Service(policy)
    open_model(
        options, options.chat_template, (), service, 1 << 30, (lambda text: None) if options.quiet else terminal.notice
    )
    try:
        with grown(target, size) as out:
            out.seek(size)
            progress = _progress(options.quiet)
            at_once = 2 * service.engine.scheduler.width
            return asyncio.run(batch.run(make_app(service), lines, out, at_once, progress))
    except KeyboardInterrupt:
        terminal.notice("\nllama2: interrupted; what is answered stays, and the same command goes on from there")
        raise
    finally:
        service.close()


def _progress(quiet: bool) -> Any:
    def tell(done: int, total: int) -> None:
        if not quiet and sys.stderr.isatty():
            print(f"\r{done} of {total} lines", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return tell
