"""`llama2 compare`: how far models are from another one on a text."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2.cli import terminal, texts, variants
from llama2.cli.args import option
from llama2.cli.loading import RunOptions, load, load_tokenizer, local_model
from llama2.cli.progress import Waiting
from llama2.errors import InputError


@dataclass(frozen=True, kw_only=True)
class CompareOptions(RunOptions):
    """Compare models with a base on a text: KL divergence, the same first choice, flipped tokens, perplexity ratio,
    each with its standard error over the windows. Flipped tokens are those that one of the two had first and the other
    had not.

    OTHER is a model, settings of the base as KEY=VALUE,... (kv-cache=int8), or both (x.gguf,precision=exact). BASE may
    be a file that --save or llama.cpp's --kl-divergence-base wrote: its text is in it, and TEXT is left out."""

    paths: tuple[str, ...] = option(
        (), "the base, the models beside it, and a text (UTF-8, - for the standard input)",
        metavar="BASE OTHER... TEXT", positional=True,
    )  # fmt: skip
    window: int = option(512, "tokens of a window; its second half is compared")
    chunks: int | None = option(None, "windows at most (default: all of the text)")
    save: str | None = option(None, "keep the base's log-probabilities in llama.cpp's format", metavar="FILE")
    overwrite: bool = option(False, "where FILE of --save exists, lose what it holds")
    json: bool = option(False, "the report that all measuring commands write, as JSON")
    md: bool = option(False, "that report as a Markdown table (the default shows the same)")


def run(options: CompareOptions) -> int:
    """Runs the command."""
    from llama2.evaluate.kl_file import is_base

    if options.json and options.md:
        raise InputError("--json and --md each say what is printed; give one of them")
    if options.model is not None:
        raise InputError(f"--model {options.model} is no part of compare; give BASE OTHER TEXT")
    saved = bool(options.paths) and is_base(options.paths[0])
    if len(options.paths) < (2 if saved else 3) and not (options.save and len(options.paths) == 2):
        raise InputError(
            f"compare takes BASE OTHER TEXT, but {len(options.paths)} path(s) were given"
            + ("; beside a base file give at least one model" if saved else "")
        )
    if saved and options.save is not None:
        raise InputError(f"--save {options.save}: {options.paths[0]} is a base file already; copy it")
    if options.save is not None and Path(options.save).exists() and not options.overwrite:
        raise InputError(f"--save {options.save} exists; give another file, or --overwrite to lose what it holds")
    with ExitStack() as stack:
        report = _with_file(options, stack) if saved else _with_model(options, stack)
    if report is not None:
        print(report.as_json() if options.json else report.as_markdown())
    return 0


def compared_with_model(options: CompareOptions) -> Any:
    """The report of BASE OTHER... TEXT, without printing it. Raises InputError for texts and models that do not fit."""
    with ExitStack() as stack:
        return _with_model(options, stack)


def _others(options: CompareOptions, words: tuple[str, ...], base: str | None) -> dict[str, variants.Variant]:
    """The models beside the base by the names that the report gives them."""
    found: dict[str, variants.Variant] = {}
    for word in words:
        variant = variants.read(word, base)
        name = ",".join(part for part in (Path(variant.path).name, variant.label) if part)
        found[name if name not in found else word] = variant
    return found


def _with_file(options: CompareOptions, stack: ExitStack) -> Any:
    """Against a base file."""
    from llama2.evaluate import compare
    from llama2.evaluate.kl_file import BaseReader

    reader = BaseReader(options.paths[0])
    stack.callback(reader.close)
    header = reader.header
    if options.chunks is not None:
        header = header._replace(tokens=header.tokens[: options.chunks])
        if options.chunks < 1:
            raise InputError(f"--chunks is {options.chunks}; give at least 1")
    others = _others(options, options.paths[1:], None)
    models = {name: _opened(options, variant) for name, variant in others.items()}
    for name, (_, model, tokenizer) in models.items():
        _fits(name, model, header)
        bos = _bos(tokenizer)
        models[name] = (models[name][0], model, bos)
    streams = {name: compare.chunk_logits(runner, header, bos) for name, (runner, model, bos) in models.items()}
    base = (compare.split(chunk) for chunk in reader.chunks())
    return _report(options, base, True, streams, header, None, Path(options.paths[0]).name)


def _with_model(options: CompareOptions, stack: ExitStack) -> Any:
    """Against a model, which computes beside the others."""
    from llama2.evaluate import compare, kl_file

    text = texts.read([options.paths[-1]])
    base = variants.Variant(local_model(options.paths[0], options.revision), "", {})
    others = _others(options, options.paths[1:-1], base.path)
    tokenizer = load_tokenizer(base.path)
    ids = tokenizer(text, verbose=False)["input_ids"]
    chunks = compare.chunks(ids, options.window, len(tokenizer), options.chunks)  # refused before a model is loaded
    runner, model, _ = _opened(options, base)
    header = chunks._replace(vocabulary=model.config.vocab_size)
    _fits(Path(base.path).name, model, header)
    bos = _bos(tokenizer)
    streams = {}
    for name, variant in others.items():
        other_runner, other, _ = _opened(options, variant)
        _fits(name, other, header)
        streams[name] = compare.chunk_logits(other_runner, header, bos)
    writer = None if options.save is None else stack.enter_context(kl_file.writing(options.save, header))
    pieces = compare.chunk_logits(runner, header, bos)
    return _report(options, pieces, False, streams, header, writer, Path(base.path).name)


def _opened(options: CompareOptions, variant: variants.Variant) -> tuple[Any, Any, Any]:
    """Runner, model and tokenizer of a variant."""
    from llama2.evaluate.steps import make_steps

    own = variants.applied(options, variant)
    model, tokenizer = load(own)
    return make_steps(model, own.runner, own.cache_dtype, own.precision), model, tokenizer


def _bos(tokenizer: Any) -> int | None:
    """The BOS token where this tokenizer puts it before a text."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    return int(ids[0]) if ids and ids[0] == tokenizer.bos_token_id else None


def _fits(name: str, model: Any, header: Any) -> None:
    config = model.config
    if config.vocab_size != header.vocabulary:
        raise InputError(
            f"{name} has a vocabulary of {config.vocab_size} and the base one of {header.vocabulary}; only models with "
            "the same tokens compare"
        )
    if header.context > config.max_position_embeddings:
        raise InputError(
            f"windows of {header.context} tokens exceed the context of {name}, {config.max_position_embeddings}; give "
            "a smaller --window"
        )


def _report(
    options: CompareOptions,
    base: Iterator[Any],
    base_is_log: bool,
    streams: dict[str, Any],
    header: Any,
    writer: Any,
    base_name: str,
) -> Any:
    from llama2.evaluate import compare
    from llama2.evaluate.report import EvaluationReport

    found: dict[str, Any] = {}
    with Waiting("comparing") as waiting:
        for number, so_far in enumerate(compare.run(base, base_is_log, streams, header, writer)):
            found = so_far
            waiting.say(f"window {number + 1} of {len(header.tokens)}")
    if not streams:
        terminal.notice(f"llama2: {len(header.tokens)} windows of {base_name} are in {options.save}")
        return None
    rows = [row for name, each in found.items() for row in each.rows(name)]
    settings = {"base": base_name, "window": header.context, "chunks": len(header.tokens)}
    return EvaluationReport("compare", rows, settings, {name: {} for name in found})
