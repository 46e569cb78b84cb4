"""`llama2 classify`: labels of texts with their probabilities, line by line or for a file of rows."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama2.cli import terminal
from llama2.cli.args import option, revision_option
from llama2.cli.loading import load_classifier
from llama2.cli.progress import Waiting
from llama2.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions:
    """Label texts with a classifier: MODEL is the folder that `llama2 finetune classify` wrote (an adapter or a whole
    model), or a base model with --adapter. FILE holds rows as those that it was trained on, or a text per line (.txt);
    one JSON line comes out for each. Without FILE each line of the standard input is a text.

    Where the rows of FILE have labels, the share that is right is told at the end."""

    paths: tuple[str, ...] = option((), "the classifier, and a file of texts", metavar="MODEL FILE", positional=True)
    adapter: str | None = option(None, "an adapter for MODEL, with its head", metavar="FOLDER")
    text_column: str | None = option(None, "the column of the text (default: text)", metavar="NAME")
    label_column: str | None = option(None, "the column of the label, if there is one (default: label)", metavar="NAME")
    output: str | None = option(None, "where the JSON lines go (default: the standard output)", metavar="FILE")
    overwrite: bool = option(False, "where FILE of --output exists, lose what it holds")
    threshold: float = option(0.5, "probability from which a text has a label, of several")
    max_length: int | None = option(None, "tokens of a text, at most (default: the model's context)")
    batch_size: int = option(16, "texts at once")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option("auto", "number format of the weights")
    revision: str | None = revision_option("MODEL")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto is the GPU where there is one", metavar="DEVICE")


def run(options: ClassifyOptions) -> int:
    """Runs the command."""
    if not 1 <= len(options.paths) <= 2:
        raise InputError(f"classify needs a classifier and at most one file, but {len(options.paths)} paths were given")
    if not 0 < options.threshold < 1:
        raise InputError(f"--threshold is {options.threshold}; it must lie between 0 and 1")
    if options.output is not None and Path(options.output).exists() and not options.overwrite:
        raise InputError(f"--output {options.output} exists; give another file, or --overwrite to lose what it holds")
    rows = _rows(options) if len(options.paths) == 2 else None
    with Waiting(f"loading {options.paths[0]}"):
        classifier = Classifier(options)
    if rows is None:
        _talk(classifier)
    else:
        _label(classifier, rows, options)
    return 0


class Classifier:
    """A model and its tokenizer: texts to records."""

    def __init__(self, options: ClassifyOptions) -> None:
        from llama2.pipelines import TextClassificationPipeline

        model, tokenizer = load_classifier(options.paths[0], options.adapter, options.revision, options.dtype,
                                           options.device)  # fmt: skip
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.kind, self.names = _kind(model.config), list(model.config.id2label.values())
        self.threshold, self.config = options.threshold, model.config
        length = options.max_length or model.config.max_position_embeddings
        self._pipe = TextClassificationPipeline(
            model, tokenizer, options.batch_size, top_k=None, truncation=True, max_length=length
        )

    def __call__(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """For each text its label and probability, its labels, or its value; and the probabilities of all labels."""
        made = []
        for found in self._pipe(list(texts)):
            scores = {entry["label"]: entry["score"] for entry in found}
            if self.kind == "regression":
                made.append({"value": found[0]["score"]})
            elif self.kind == "multi_label_classification":
                chosen = [label for label, score in scores.items() if score >= self.threshold]
                made.append({"labels": chosen, "scores": scores})
            else:
                made.append({"label": found[0]["label"], "score": found[0]["score"], "scores": scores})
        return made

    def right(self, record: dict[str, Any], label: Any) -> float:
        """1 where the record agrees with a label, else 0; for a value how far it is from it."""
        from llama2.train.labels import Labels

        wanted = Labels(self.kind, tuple(self.names)).target(label)
        if isinstance(wanted, list):
            return float({name for name, on in zip(self.names, wanted, strict=True) if on} == set(record["labels"]))
        if self.kind == "regression":
            return abs(float(record["value"]) - float(wanted))
        return float(record["label"] == self.names[int(wanted)])


def _kind(config: Any) -> str:
    if config.problem_type is not None:
        return str(config.problem_type)
    return "regression" if config.num_labels == 1 else "single_label_classification"


# -- a file ------------------------------------------------------------------------------------------------------


def _rows(options: ClassifyOptions) -> list[dict[str, Any]]:
    from llama2.train.data import read, renamed

    file = Path(options.paths[1])
    if file.suffix == ".txt":
        rows = [{"text": line} for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not rows:
            raise InputError(f"{file} holds no texts")
        return rows
    rows = [dict(row) for row in renamed(read(file), {"text": options.text_column, "label": options.label_column})]
    for number, row in enumerate(rows):
        if not isinstance(row.get("text"), str) or not row["text"]:
            raise InputError(
                f"row {number} of {file} has no text; its columns are {', '.join(map(str, row))}; see --text-column"
            )
    return rows


def _label(classifier: Classifier, rows: Sequence[dict[str, Any]], options: ClassifyOptions) -> None:
    from llama2.files import replacing

    agreed = []
    with nullcontext(None) if options.output is None else replacing(Path(options.output)) as file:
        for row, record in _records(classifier, rows, options.batch_size):
            line = json.dumps({"text": row["text"], **record}, ensure_ascii=False) + "\n"
            if file is None:
                sys.stdout.write(line)
            else:
                file.write(line.encode())
            if row.get("label") is not None:
                agreed.append(classifier.right(record, row["label"]))
    if agreed:
        mean = sum(agreed) / len(agreed)
        if classifier.kind == "regression":
            terminal.notice(f"llama2: {mean:.4f} from the labels on average, {len(agreed):,} rows")
        else:
            terminal.notice(f"llama2: {mean:.1%} of {len(agreed):,} rows are labelled as they say")


def _records(
    classifier: Classifier, rows: Sequence[dict[str, Any]], size: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        yield from zip(batch, classifier([row["text"] for row in batch]), strict=True)


# -- lines -------------------------------------------------------------------------------------------------------


def _talk(classifier: Classifier) -> None:
    while True:
        try:
            text = input("> ") if terminal.interactive() else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration):
            return
        if text.strip():
            print(_said(classifier([text])[0]), flush=True)


def _said(record: dict[str, Any]) -> str:
    if "value" in record:
        return f"{record['value']:.4f}"
    scores = "  ".join(f"{label} {score:.3f}" for label, score in list(record["scores"].items())[:5])
    if "labels" in record:
        return f"{', '.join(record['labels']) or 'none'}  ({scores})"
    return f"{record['label']}  ({scores})"
