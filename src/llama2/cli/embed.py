"""`llama2 embed`: vectors of texts."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama2.cli import terminal
from llama2.cli.args import option
from llama2.cli.loading import RunOptions, load
from llama2.cli.progress import Waiting
from llama2.errors import InputError, MissingDependencyError

KINDS = (".npy", ".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(RunOptions):
    """Vectors of texts: the hidden states behind the last norm, their mean or that of the last token. Texts are words
    on the command line, lines of --file (a .jsonl's field `text`), or lines of the standard input.

    --output ends in .npy (texts, width), .jsonl or .parquet; without it JSON lines go to the standard output."""

    texts: tuple[str, ...] = option((), "the texts, each in quotes", metavar="TEXT", positional=True)
    file: str | None = option(None, "a file of texts: one per line, or .jsonl", alias="-f", metavar="FILE")
    field: str = option("text", "the field of a .jsonl that holds the text", metavar="NAME")
    pooling: Literal["mean", "last"] = option("mean", "of which tokens the vector is")
    normalise: bool = option(False, "vectors of length 1")
    output: str | None = option(None, "where the vectors go", alias="-o", metavar="FILE")
    overwrite: bool = option(False, "where FILE of --output exists, lose what it holds")


def run(options: EmbedOptions) -> int:
    """Runs the command."""
    output = _output(options)
    texts = _texts(options)
    model, tokenizer = load(options)
    from llama2.evaluate.embedding import Embedder

    # What rounds activations for speed would round vectors too: exact unless --precision says fast on purpose.
    embedder = Embedder(model, options.runner, options.precision, options.cache_dtype)
    records = []
    with Waiting("embedding") as waiting:
        for number, text in enumerate(texts):
            ids = tokenizer(text, verbose=False)["input_ids"]
            try:
                vector = embedder.vector(ids, options.pooling, options.normalise)
            except InputError as error:
                raise InputError(f"text {number + 1}: {error}") from error
            if output is None:
                print(json.dumps({"text": text, "embedding": vector.tolist()}, ensure_ascii=False), flush=True)
            else:
                records.append(vector)
            waiting.say(f"{number + 1} of {len(texts)} texts")
    if output is not None:
        _write(output, texts, records)
        terminal.notice(f"llama2: {len(records)} vectors of {len(records[0])} in {output}")
    return 0


def _output(options: EmbedOptions) -> Path | None:
    if options.output is None:
        return None
    path = Path(options.output)
    if path.suffix not in KINDS:
        raise InputError(f"--output {path}: its end says the format; give one of {', '.join(KINDS)}")
    if path.exists() and not options.overwrite:
        raise InputError(f"--output {path} exists; give another file, or --overwrite to lose what it holds")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError(
                "parquet files need pyarrow; run `pip install pyarrow`, or give .npy"
            ) from error
    return path


def _texts(options: EmbedOptions) -> list[str]:
    if options.texts and options.file is not None:
        raise InputError("texts were given and --file too; give one of them")
    found = list(options.texts) if options.texts else list(_lines(options.file, options.field))
    if not found:
        raise InputError("there are no texts; give some on the command line, in --file or on the standard input")
    if blank := [i for i, text in enumerate(found) if not text.strip()]:
        raise InputError(f"text {blank[0] + 1} is empty; leave it out")
    return found


def _lines(file: str | None, name: str) -> Iterator[str]:
    try:
        raw = sys.stdin.read() if file in (None, "-") else Path(str(file)).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (byte {error.start}); convert it first") from error
    for number, line in enumerate(raw.splitlines()):
        if not line.strip():
            continue
        if file is None or not file.endswith(".jsonl"):
            yield line
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{file}: line {number + 1} is no JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get(name), str):
            raise InputError(f"{file}: line {number + 1} has no text {name!r}; see --field")
        yield row[name]


def _write(path: Path, texts: list[str], vectors: list[Any]) -> None:
    import io

    import numpy as np

    from llama2.files import write_bytes

    if path.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, np.stack(vectors))
        write_bytes(path, buffer.getvalue())
    elif path.suffix == ".jsonl":
        lines = [
            json.dumps({"text": text, "embedding": vector.tolist()}, ensure_ascii=False)
            for text, vector in zip(texts, vectors, strict=True)
        ]
        write_bytes(path, ("\n".join(lines) + "\n").encode())
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        flat = pa.array(np.stack(vectors).ravel(), pa.float32())
        table = pa.table({"text": texts, "embedding": pa.FixedSizeListArray.from_arrays(flat, len(vectors[0]))})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        write_bytes(path, buffer.getvalue())
