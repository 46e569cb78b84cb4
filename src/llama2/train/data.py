"""Rows of a data set as token ids with targets, every row checked before any step runs. No torch here.

{"messages": [{"role", "content"}, ...]}   chat, through the tokenizer's template; answers are targets
{"conversations": [{"from", "value"}, ...]}   the same in ShareGPT's words
{"prompt", "completion"}                   the completion is the target
{"instruction", "input", "output"}         the same in Alpaca's words ("input" may be missing)
{"prompt", "chosen", "rejected"}           preferences: texts, or lists of messages; without a prompt it is what both
                                           answers begin with
{"text", "label"}                          classification: a number, a name, or a list of names or numbers
{"text"}                                   every token is a target
"""

import csv
import difflib
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llama2.errors import InputError, Llama2Error, MissingDependencyError
from llama2.text_file import read_utf8

IGNORED = -100
_SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{context}### Response:\n"
)
Row = Mapping[str, Any]


class Example(NamedTuple):
    """One row: ids, and the same ids where they are targets, else -100."""

    input_ids: list[int]
    labels: list[int]


class Pair(NamedTuple):
    """Two answers to one prompt."""

    chosen: Example
    rejected: Example


@dataclass
class Report:
    """What was found in a data set. problems: row -> what is wrong with it; those rows are left out."""

    rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    targets: int = 0
    truncated: list[int] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)

    def text(self, shown: int = 5) -> str:
        """A few lines for people, naming the first rows of each problem."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.most_common())
        lines = [f"{self.rows:,} rows ({kinds}), {self.tokens:,} tokens, {self.targets:,} of them targets"]
        if self.truncated:
            lines.append(
                f"{len(self.truncated):,} answers are cut at the longest length: rows {_some(self.truncated, shown)}"
            )
        by_problem: dict[str, list[int]] = {}
        for row, problem in self.problems.items():
            by_problem.setdefault(problem, []).append(row)
        lines += [
            f"{len(rows):,} rows left out, {problem}: rows {_some(rows, shown)}" for problem, rows in by_problem.items()
        ]
        return "\n".join(lines)


def _some(rows: Sequence[int], shown: int) -> str:
    return ", ".join(map(str, rows[:shown])) + (", ..." if len(rows) > shown else "")


# -- files -------------------------------------------------------------------------------------------------------


def read(source: str | Path, split: str = "train") -> list[dict[str, Any]]:
    """The rows of a .jsonl, .json, .csv, .parquet or .txt file (a text a paragraph), or of a hub data set.

    Raises InputError for a file that holds no rows, naming the line that is wrong; MissingDependencyError where a hub
    id needs `datasets`, or a .parquet file `pyarrow`, and it is not installed.
    """
    path = Path(source)
    if not path.exists():
        return _from_hub(str(source), split)
    reader = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _text}.get(
        path.suffix.lower()
    )
    if reader is None:
        raise InputError(f"{path} is no .jsonl, .json, .csv, .parquet or .txt file; convert it to one of these")
    rows = reader(path)
    if not rows:
        raise InputError(f"{path} holds no rows; there is nothing to train on")
    return rows


def _jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    lines = read_utf8(path, "utf-8-sig").split("\n")  # a text may hold other line ends, such as U+2028
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_object(line, f"{path}, line {number}"))
    return rows


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}); correct or remove it") from error
    if not isinstance(row, dict):
        raise InputError(f"{where} is a JSON {type(row).__name__}; each row must be an object")
    return row


def _json(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(read_utf8(path, "utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); is it JSON lines? Then call it .jsonl") from error
    if isinstance(content, dict):  # {"data": [...]} and the like
        content = next((value for value in content.values() if isinstance(value, list)), None)
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise InputError(f"{path} is no list of objects; each row must be an object")
    return content


def _csv(path: Path) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(read_utf8(path, "utf-8-sig"), newline=""))
    rows = []
    for row in reader:
        if None in row or None in row.values():
            fields = len(reader.fieldnames or ())
            raise InputError(
                f"{path}, line {reader.line_num} has more or fewer than the {fields} fields of its first line; a text "
                'with commas needs quotes: "..."'
            )
        rows.append(row)
    return rows


def _text(path: Path) -> list[dict[str, Any]]:
    return [{"text": part.strip()} for part in read_utf8(path, "utf-8-sig").split("\n\n") if part.strip()]


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            "parquet files need the package pyarrow: pip install 'llama2[train]', or use .jsonl"
        ) from error
    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is no parquet file ({str(error)[:100]}); write it again") from error
    return rows


def _from_hub(name: str, split: str) -> list[dict[str, Any]]:
    if name.count("/") > 1 or name.endswith((".jsonl", ".json", ".csv", ".parquet", ".txt")):
        raise InputError(f"{name} does not exist; give a file of rows, or the id of a data set (owner/name)")
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"{name} is no file here, and a hub data set needs the package datasets: pip install 'llama2[train]'"
        ) from error
    try:
        found = datasets.load_dataset(name, split=split)
    except ValueError as error:  # a split, or a configuration, that it does not have
        raise InputError(f"{name} cannot be read: {error}") from error
    named = {column: kind.int2str for column, kind in (found.features or {}).items() if hasattr(kind, "int2str")}
    return [{**row, **{c: name_of(row[c]) for c, name_of in named.items() if isinstance(row[c], int)}} for row in found]


def renamed(rows: Sequence[Row], columns: Mapping[str, str | None]) -> list[Row]:
    """Rows with columns under the names used here: {"text": "review"}; None leaves one. Raises InputError for a column
    that no row has."""
    wanted = {name: column for name, column in columns.items() if column is not None}
    there = sorted({key for row in rows for key in row})
    for column in wanted.values():
        if column not in there:
            close = difflib.get_close_matches(column, there, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(f"there is no column {column!r}; there are {', '.join(there)}{hint}")
    return [{**row, **{name: row[column] for name, column in wanted.items() if column in row}} for row in rows]


def held_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows to train on and a random share of them to measure on, each in their order."""
    if not 0 < share < 1:
        raise InputError(f"the share to hold out is {share!r}; it must lie between 0 and 1, such as 0.1")
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise InputError(f"of {len(rows)} rows none is left to train on when {share:.0%} are held out; give more rows")
    out = set(random.Random(f"{seed}/held out").sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in out], [row for i, row in enumerate(rows) if i in out]


# -- rows --------------------------------------------------------------------------------------------------------


def kind_of(row: Row) -> str:
    """Which of the shapes above a row has. Raises InputError naming its keys where it has none."""
    keys = set(row)
    for kind, needed in _NEEDED.items():
        if needed <= keys:
            return kind
    raise InputError(
        f"a row with the keys {sorted(keys)} is of no known shape; {'; '.join(map(str, map(sorted, _NEEDED.values())))}"
    )


_NEEDED: dict[str, set[str]] = {
    "preference": {"chosen", "rejected"},
    "messages": {"messages"},
    "conversations": {"conversations"},
    "completion": {"prompt", "completion"},
    "instruction": {"instruction", "output"},
    "classification": {"text", "label"},
    "text": {"text"},
}


def encode(row: Row, tokenizer: Any) -> Example:
    """Ids and targets of a row to be continued. Raises InputError, or the template's error, for one that cannot be."""
    kind = kind_of(row)
    if kind == "messages":
        return _chat(_checked(row["messages"]), tokenizer)
    if kind == "conversations":
        return _chat(_from_sharegpt(row["conversations"]), tokenizer)
    if kind == "completion":
        return completion(row["prompt"], row["completion"], tokenizer)
    if kind == "instruction":
        return completion(_alpaca(row), row["output"], tokenizer)
    if kind in ("text", "classification"):
        ids = [*tokenizer(_string(row["text"], "text"))["input_ids"], *_end(tokenizer)]
        return Example(ids, list(ids))
    raise InputError("a preference row has two answers; use `encode_pair`")


def encode_pair(row: Row, tokenizer: Any) -> Pair:
    """Both answers of a preference row behind their prompt."""
    if kind_of(row) != "preference":
        raise InputError(f"a row with the keys {sorted(row)} is no preference; it needs prompt, chosen and rejected")
    prompt, pair = row.get("prompt"), (row["chosen"], row["rejected"])
    if prompt is None and isinstance(pair[0], str) and isinstance(pair[1], str):
        prompt = _shared(*pair)
        pair = (pair[0][len(prompt) :], pair[1][len(prompt) :])
    if not (all(isinstance(a, str) for a in pair) or all(isinstance(a, list | tuple) for a in pair)):
        kinds = " and ".join(type(answer).__name__ for answer in pair)
        raise InputError(f"chosen and rejected are {kinds}, not both texts or both lists of messages")
    if isinstance(pair[0], str):
        return Pair(*(completion(_string(prompt or "", "prompt"), answer, tokenizer) for answer in pair))
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _checked(prompt) if prompt else []
    return Pair(*(_chat(_checked([*before, *answer]), tokenizer, last_only=True) for answer in pair))


def _shared(one: str, other: str) -> str:
    """What both texts begin with, up to the space before the first difference."""
    count = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[: count - 1 if one[count - 1 : count] == " " else count]


def completion(prompt: str, answer: str, tokenizer: Any) -> Example:
    """Prompt and answer encoded as one text; targets are what the prompt alone does not begin with, and the end."""
    ids = [*tokenizer(_string(prompt, "prompt") + _string(answer, "completion"))["input_ids"], *_end(tokenizer)]
    before = tokenizer(prompt)["input_ids"] if prompt else []
    start = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids)))
    return Example(ids, [IGNORED] * start + ids[start:])


def _chat(messages: list[Row], tokenizer: Any, last_only: bool = False) -> Example:
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    if last_only:  # of several answers only the one that differs
        before = len(tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True))
        mask = [m if i >= before else 0 for i, m in enumerate(mask)]
    return Example(ids, [token if m else IGNORED for token, m in zip(ids, mask, strict=True)])


def _listed(messages: Any) -> list[Row]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError("messages is not a list of messages")
    return list(messages)


def _checked(messages: Any) -> list[Row]:
    for number, message in enumerate(_listed(messages)):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"message {number} has no role")
        if message.get("content") is None and not message.get("tool_calls"):  # a template would write "None"
            raise InputError(f"message {number} has no content")
    return list(messages)


def _from_sharegpt(turns: Any) -> list[Row]:
    try:
        return [{"role": _SPEAKERS[turn["from"]], "content": turn["value"]} for turn in _listed(turns)]
    except (KeyError, TypeError) as error:
        raise InputError(f"a turn of conversations lacks a known 'from' or a 'value' ({error!r})") from error


def _alpaca(row: Row) -> str:
    context = row.get("input") or ""
    return _ALPACA.format(
        paired=", paired with an input that provides further context" if context else "",
        instruction=_string(row["instruction"], "instruction"),
        context=f"### Input:\n{context}\n\n" if context else "",
    )


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} is a {type(value).__name__}, not a text")
    return value


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


# -- data sets ---------------------------------------------------------------------------------------------------


def prepare(rows: Iterable[Row], tokenizer: Any, max_length: int | None) -> tuple[list[Example], Report]:
    """The usable examples, cut to max_length at the end, and the report on all rows."""
    report, made = Report(), []
    for row, example in each(rows, report, lambda row: encode(row, tokenizer)):
        cut = _fitted(row, example, tokenizer, max_length, report)
        if cut is not None:
            made.append(cut)
            report.tokens += len(cut.input_ids)
            report.targets += sum(label != IGNORED for label in cut.labels)
    return made, report


def pieces(examples: Iterable[Example], length: int) -> list[Example]:
    """Each example in pieces of at most `length` tokens: for texts that are all target, so that nothing is cut off."""
    made = []
    for ids, labels in examples:
        made += [Example(ids[i : i + length], labels[i : i + length]) for i in range(0, len(ids), length)]
    return [piece for piece in made if len(piece.input_ids) > 1]


def prepare_pairs(rows: Iterable[Row], tokenizer: Any, max_length: int | None) -> tuple[list[Pair], Report]:
    """The usable pairs, each answer cut to max_length at the end, and the report on all rows."""
    report, made = Report(), []
    for row, pair in each(rows, report, lambda row: encode_pair(row, tokenizer)):
        cuts = [_fitted(row, example, tokenizer, max_length, report) for example in pair]
        if cuts[0] is not None and cuts[1] is not None:
            if cuts[0].input_ids == cuts[1].input_ids:
                report.problems[row] = "both answers are the same"
                continue
            made.append(Pair(cuts[0], cuts[1]))
            report.tokens += sum(len(cut.input_ids) for cut in made[-1])
            report.targets += sum(label != IGNORED for cut in made[-1] for label in cut.labels)
    return made, report


def each(rows: Iterable[Row], report: Report, make: Callable[[Row], Any]) -> Iterable[tuple[int, Any]]:
    for number, row in enumerate(rows):
        report.rows += 1
        try:
            report.kinds[kind_of(row)] += 1
            made = make(row)
        except Llama2Error as error:
            report.problems[number] = str(error).partition(";")[0]
        else:
            yield number, made


def _fitted(row: int, example: Example, tokenizer: Any, most: int | None, report: Report) -> Example | None:
    """The example within `most` tokens, or None with the reason in the report."""
    ids, labels = example
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        report.problems[row] = "it begins with two BOS tokens: take the one out of the text or template"
        return None
    if most is not None and len(ids) > most:
        if any(label != IGNORED for label in labels[most:]):
            report.truncated.append(row)
        ids, labels = ids[:most], labels[:most]
    if all(label == IGNORED for label in labels[1:]):
        lost = len(ids) < len(example.input_ids)
        report.problems[row] = "no target is left within the longest length" if lost else "it has no target"
        return None
    return Example(ids, labels)
