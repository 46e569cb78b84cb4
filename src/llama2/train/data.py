"""Rows of a data set as token ids with targets, every row checked before any step runs. No torch here.

`shapes` says what the columns of a row mean; here that becomes ids: of texts all, of completions and chats the answers
are targets. What is left out, cut or not used stands in the report.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llama2.errors import InputError, Llama2Error
from llama2.protocols import TokenizerLike
from llama2.train.readers import Row, held_out, read, renamed
from llama2.train.shapes import CONTINUED, PREFERENCE, Chat, Content, PromptCompletion, Text, content_of, shape_of
from llama2.train.shapes import Pair as Answers

__all__ = ["IGNORED", "DataReport", "EncodedPair", "Example", "Row", "encode", "encode_pair", "held_out", "kind_of",
           "pieces", "prepare", "prepare_pairs", "read", "renamed"]  # fmt: skip

IGNORED = -100


class Example(NamedTuple):
    """One row: ids, and the same ids where they are targets, else -100."""

    input_ids: list[int]
    labels: list[int]


class EncodedPair(NamedTuple):
    """Two answers to one prompt."""

    chosen: Example
    rejected: Example


@dataclass
class DataReport:
    """Report on a data set. problems: row -> what is wrong with it; those rows are left out.

    notes: what happened to rows that are kept; unused: columns without a meaning here, with the rows that have them.
    """

    rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    targets: int = 0
    truncated: list[int] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)
    notes: dict[str, list[int]] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)
    max_length: int | None = None

    def note(self, row: int, said: str) -> None:
        """Writes down what happened to a row."""
        self.notes.setdefault(said, []).append(row)

    def text(self, shown: int = 5) -> str:
        """A few lines for people, naming the first rows of each problem."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.most_common())
        first = f"{self.rows:,} rows ({kinds}), {self.tokens:,} tokens, {self.targets:,} of them targets"
        return "\n".join([first, *self.remarks(shown)])

    def cut(self, shown: int = 5) -> str:
        """A line on the answers that are cut, or ""."""
        if not self.truncated:
            return ""
        longest = "" if self.max_length is None else f" of {self.max_length:,} tokens (max_length)"
        rows = _some(self.truncated, shown)
        return f"{len(self.truncated):,} answers are cut at the longest length{longest}: rows {rows}"

    def remarks(self, shown: int = 5) -> list[str]:
        """The lines on what is cut, left out, changed or not used; none where every row is used as it is."""
        lines = [said] if (said := self.cut(shown)) else []
        by_problem: dict[str, list[int]] = {}
        for row, problem in self.problems.items():
            by_problem.setdefault(problem, []).append(row)
        lines += [
            f"{len(rows):,} rows left out, {said}: rows {_some(rows, shown)}" for said, rows in by_problem.items()
        ]
        lines += [f"{len(rows):,} rows, {said}: rows {_some(rows, shown)}" for said, rows in self.notes.items()]
        if self.unused:
            columns = ", ".join(f"{name} ({count:,} rows)" for name, count in self.unused.items())
            lines.append(f"columns that are not used: {columns}")
        return lines


def _some(rows: Sequence[int], shown: int) -> str:
    return ", ".join(map(str, rows[:shown])) + (", ..." if len(rows) > shown else "")


# -- rows --------------------------------------------------------------------------------------------------------


def kind_of(row: Row) -> str:
    """Which of the shapes a row has. Raises InputError naming its keys where it has none."""
    return shape_of(row).kind


def encode(row: Row, tokenizer: TokenizerLike) -> Example:
    """Ids and targets of a row to be continued. Raises InputError, or the template's error, for one that cannot be."""
    return _encoded(_continued(row), tokenizer)


def _continued(row: Row) -> Content:
    content = content_of(row, shape_of(row, CONTINUED))
    assert not isinstance(content, Answers)
    return content


def encode_pair(row: Row, tokenizer: TokenizerLike) -> EncodedPair:
    """Both answers of a preference row behind their prompt."""
    return _encoded_pair(_answers(row), tokenizer)


def _answers(row: Row) -> Answers:
    content = content_of(row, shape_of(row, (PREFERENCE,)))
    assert isinstance(content, Answers)
    return content


def _encoded_pair(answers: Answers, tokenizer: TokenizerLike) -> EncodedPair:
    return EncodedPair(_encoded(answers.chosen, tokenizer), _encoded(answers.rejected, tokenizer))


def _encoded(content: Content, tokenizer: TokenizerLike) -> Example:
    if isinstance(content, Text):
        ids = _ended(list(tokenizer(content.text)["input_ids"]), tokenizer)
        return Example(ids, list(ids))
    if isinstance(content, Chat) and (content.otherwise is None or tokenizer.chat_template is not None):
        return _chat(content, tokenizer)
    plain = content.otherwise if isinstance(content, Chat) else content
    assert isinstance(plain, PromptCompletion)
    return completion(plain.prompt, plain.answer, tokenizer)


def completion(prompt: str, answer: str, tokenizer: TokenizerLike) -> Example:
    """Prompt and answer encoded as one text; targets are what the prompt alone does not begin with, and the end."""
    ids = _ended(list(tokenizer(prompt + answer)["input_ids"]), tokenizer)
    before = tokenizer(prompt)["input_ids"] if prompt else []
    start = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids)))
    return Example(ids, [IGNORED] * start + ids[start:])


def _ended(ids: list[int], tokenizer: TokenizerLike) -> list[int]:
    """ids that end in one end token."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _chat(chat: Chat, tokenizer: TokenizerLike) -> Example:
    messages, variables = list(chat.messages), dict(chat.variables or {})
    if chat.tools:
        variables["tools"] = list(chat.tools)
    _check_template(chat, tokenizer)
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **variables)
    ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    if chat.first or chat.silent:
        mask = _of_messages(chat, mask)
    return Example(ids, [token if on else IGNORED for token, on in zip(ids, mask, strict=True)])


def _check_template(chat: Chat, tokenizer: TokenizerLike) -> None:
    """Refuses what the template would leave out without a word."""
    template = tokenizer.get_chat_template(tools=list(chat.tools) or None)
    if chat.tools and "tools" not in template:
        raise InputError("it has tools, and the chat template writes none")
    if "tool_calls" not in template and any(message.get("tool_calls") for message in chat.messages):
        raise InputError("a message has tool_calls, and the chat template writes none")


def _unread(content: Content, tokenizer: TokenizerLike) -> list[str]:
    """Keys of messages that the chat template does not read."""
    if not isinstance(content, Chat) or tokenizer.chat_template is None:
        return []
    template = tokenizer.get_chat_template(tools=list(content.tools) or None)
    keys = {key for message in content.messages for key in message} - {"role", "content", "tool_calls"}
    return sorted(f"{key} of messages" for key in keys if key not in template)


def _of_messages(chat: Chat, mask: list[int]) -> list[int]:
    """The mask with the answers alone that are learnt. Raises InputError where the template runs answers together."""
    answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    begins = [i for i, on in enumerate(mask) if on and not (i and mask[i - 1])]
    if len(begins) != len(answers):
        raise InputError(
            f"the chat template marks {len(begins)} answers of {len(answers)}, so one of them cannot be left out"
        )
    made, at = list(mask), -1
    for i, on in enumerate(mask):
        at += bool(on) and i in begins[at + 1 : at + 2]
        if on and (answers[at] < chat.first or answers[at] in chat.silent):
            made[i] = 0
    return made


# -- data sets ---------------------------------------------------------------------------------------------------


def prepare(rows: Iterable[Row], tokenizer: TokenizerLike, max_length: int | None) -> tuple[list[Example], DataReport]:
    """The usable examples, cut to max_length at the end, and the report on all rows."""
    report, made = DataReport(max_length=max_length), []

    def make(row: Row) -> tuple[Example, list[str]]:
        content = _continued(row)
        return _encoded(content, tokenizer), _unread(content, tokenizer)

    for row, (example, unread) in each(rows, report, make, CONTINUED):
        report.unused.update(unread)
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


def prepare_pairs(
    rows: Iterable[Row], tokenizer: TokenizerLike, max_length: int | None
) -> tuple[list[EncodedPair], DataReport]:
    """The usable pairs, each answer cut to max_length at the end, and the report on all rows."""
    report, made = DataReport(max_length=max_length), []

    def make(row: Row) -> tuple[EncodedPair, tuple[str, ...], list[str]]:
        answers = _answers(row)
        return _encoded_pair(answers, tokenizer), answers.notes, _unread(answers.chosen, tokenizer)

    for row, (pair, notes, unread) in each(rows, report, make, (PREFERENCE,)):
        report.unused.update(unread)
        cuts = [_fitted(row, example, tokenizer, max_length, report) for example in pair]
        if cuts[0] is not None and cuts[1] is not None:
            if cuts[0].input_ids == cuts[1].input_ids:
                report.problems[row] = "both answers are the same"
                continue
            for said in notes:
                report.note(row, said)
            made.append(EncodedPair(cuts[0], cuts[1]))
            report.tokens += sum(len(cut.input_ids) for cut in made[-1])
            report.targets += sum(label != IGNORED for cut in made[-1] for label in cut.labels)
    return made, report


def each(
    rows: Iterable[Row], report: DataReport, make: Callable[[Row], Any], kinds: Collection[str] | None = None
) -> Iterable[tuple[int, Any]]:
    """The number of each row of these kinds and what `make` makes of it; rows that cannot be used go to the report."""
    for number, row in enumerate(rows):
        report.rows += 1
        try:
            shape = shape_of(row, kinds)
            report.kinds[shape.kind] += 1
            made = make(row)
        except Llama2Error as error:
            report.problems[number] = str(error).partition(";")[0]
        else:
            report.unused.update(name for name in row if name not in shape.columns and row[name] is not None)
            yield number, made


def _fitted(
    row: int, example: Example, tokenizer: TokenizerLike, most: int | None, report: DataReport
) -> Example | None:
    """The example within `most` tokens, or None with the reason in the report."""
    ids, labels = example
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        while ids[:2] == [bos, bos]:
            ids, labels = ids[1:], labels[1:]
        report.note(row, "the text or template begins with a BOS token of its own: one is kept")
    whole = len(ids)
    if most is not None and whole > most:
        if any(label != IGNORED for label in labels[most:]):
            report.truncated.append(row)
        ids, labels = ids[:most], labels[:most]
    if all(label == IGNORED for label in labels[1:]):
        lost = len(ids) < whole
        report.problems[row] = "no target is left within the longest length" if lost else "it has no target"
        return None
    return Example(ids, labels)
