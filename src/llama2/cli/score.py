"""`llama2 score`: the rewards that a reward model gives to answers."""

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama2.cli import terminal
from llama2.cli.args import option, revision_option
from llama2.cli.loading import load_classifier
from llama2.cli.progress import Waiting
from llama2.errors import InputError

_ROWS = 64  # scored at once; their lines are written before the next ones


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Score answers with a reward model: MODEL is the folder that `llama2 finetune reward` wrote (an adapter or a whole
    model), or a base model with --adapter. FILE holds rows of {"text"}, {"messages"}, {"prompt", "answers"} with a list
    of answers, or a prompt with one answer; a .txt file holds a text per line. For each row a JSON line comes out, with
    "score", or "scores" and the number of the best one."""

    paths: tuple[str, ...] = option((), "the reward model, and a file of rows", metavar="MODEL FILE", positional=True)
    adapter: str | None = option(None, "an adapter for MODEL, with its head", metavar="FOLDER")
    columns: str | None = option(None, "columns that are called otherwise in FILE: prompt=question,answers=replies",
                                 metavar="NAME=COLUMN,...")  # fmt: skip
    split: str = option("train", "part of a data set, of a folder, or of a .json file with several lists")
    output: str | None = option(None, "where the JSON lines go (default: the standard output)", metavar="FILE")
    overwrite: bool = option(False, "where FILE of --output exists, lose what it holds")
    max_length: int | None = option(None, "tokens of an answer with its prompt, at most (default: the model's context)")
    runner: Literal["auto", "native", "torch"] = option("auto", "what computes it; auto is the native engine on a CPU")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option("auto", "number format of the weights")
    revision: str | None = revision_option("MODEL")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto is the GPU where there is one", metavar="DEVICE")


def run(options: ScoreOptions) -> int:
    """Runs the command."""
    if len(options.paths) != 2:
        raise InputError(f"score needs a reward model and a file of rows, but {len(options.paths)} paths were given")
    if options.output is not None and Path(options.output).exists() and not options.overwrite:
        raise InputError(f"--output {options.output} exists; give another file, or --overwrite to lose what it holds")
    rows = _rows(options)
    with Waiting(f"loading {options.paths[0]}"):
        scorer = _scorer(options)
    _write(scorer, rows, options)
    return 0


def _scorer(options: ScoreOptions) -> Any:
    from llama2.scoring import Scorer

    model, tokenizer = load_classifier(options.paths[0], options.adapter, options.revision, options.dtype,
                                       options.device, "reward")  # fmt: skip
    return Scorer(model, tokenizer, runner=options.runner, max_length=options.max_length)


def _rows(options: ScoreOptions) -> list[Any]:
    from llama2.cli.finetune import columns_of
    from llama2.train.data import read, renamed

    file = Path(options.paths[1])
    if file.suffix == ".txt":
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise InputError(f"{file} holds no texts")
        return list(lines)
    return list(renamed(read(options.paths[1], options.split), columns_of(options.columns or "")))


def _write(scorer: Any, rows: list[Any], options: ScoreOptions) -> None:
    from llama2.files import replacing

    scores: list[float] = []
    with nullcontext(None) if options.output is None else replacing(Path(options.output)) as file:
        for first in range(0, len(rows), _ROWS):
            part = rows[first : first + _ROWS]
            for number, found in enumerate(scorer(part, first), first):
                scores += found
                line = json.dumps({"row": number, **_record(rows[number], found)}, ensure_ascii=False) + "\n"
                if file is None:
                    sys.stdout.write(line)
                else:
                    file.write(line.encode())
    mean = sum(scores) / len(scores)
    spread = (sum((one - mean) ** 2 for one in scores) / len(scores)) ** 0.5
    terminal.notice(f"llama2: {len(scores):,} answers of {len(rows):,} rows, mean {mean:.4f}, deviation {spread:.4f}")


def _record(row: Any, found: list[float]) -> dict[str, Any]:
    several = not isinstance(row, str) and len(found) > 1
    if several:
        return {"scores": found, "best": max(range(len(found)), key=lambda i: found[i])}
    return {"score": found[0]}
