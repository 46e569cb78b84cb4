"""Rows of one answer that is good or bad, as KTO takes them (arXiv 2402.01306). No torch here."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from llama2.errors import InputError
from llama2.protocols import TokenizerLike
from llama2.train.data import IGNORED, DataReport, Example, prepare, prepare_pairs


class Unpaired(NamedTuple):
    """An answer and whether it is desirable; mismatched: its prompt with another row's answer."""

    example: Example
    desirable: bool
    mismatched: Example


def unpaired(
    rows: Sequence[Mapping[str, Any]], tokenizer: TokenizerLike, max_length: int | None
) -> tuple[list[Unpaired], DataReport]:
    """Rows of a prompt, an answer and a label (true or false), or of pairs, which become a good answer and a bad one.

    Raises InputError, with the row's number, for a label that is neither, and where all answers have the same prompt,
    since then no answer is another prompt's.
    """
    pairs = [row.get("chosen") is not None and row.get("rejected") is not None for row in rows]
    if all(pairs):
        found, report = prepare_pairs(rows, tokenizer, max_length)
        return _mismatched([(answer, i == 0) for pair in found for i, answer in enumerate(pair)], max_length), report
    if any(pairs):
        raise InputError("some rows are pairs and some are single answers with a label; give rows of one kind")
    labels = [_label(row.get("label"), number) for number, row in enumerate(rows)]
    bare = [{name: value for name, value in row.items() if name != "label"} for row in rows]
    made, report = list[tuple[Example, bool]](), DataReport(max_length=max_length)
    for number, (row, label) in enumerate(zip(bare, labels, strict=True)):
        examples, one = prepare([row], tokenizer, max_length)
        made += [(example, label) for example in examples]
        _add(report, one, number)
    return _mismatched(made, max_length), report


def _add(report: DataReport, one: DataReport, number: int) -> None:
    """Adds the findings of one row to the report on all."""
    report.rows += 1
    report.tokens, report.targets = report.tokens + one.tokens, report.targets + one.targets
    report.kinds += one.kinds
    report.unused.update(one.unused)
    report.truncated += [number] * len(one.truncated)
    report.problems.update(dict.fromkeys([number] * len(one.problems), next(iter(one.problems.values()), "")))
    for said in one.notes:
        report.note(number, said)


def _label(value: object, number: int) -> bool:
    if value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    raise InputError(f"row {number}: label is {value!r}; it must be true (desirable) or false")


def _parts(example: Example) -> tuple[list[int], list[int]]:
    start = next((i for i, label in enumerate(example.labels) if label != IGNORED), len(example.labels))
    return example.input_ids[:start], example.input_ids[start:]


def _mismatched(made: Iterable[tuple[Example, bool]], max_length: int | None) -> list[Unpaired]:
    """Each answer with the nearest earlier row's answer (around the end) that has another prompt."""
    found = list(made)
    parts = [_parts(example) for example, _ in found]
    if found and all(prompt == parts[0][0] for prompt, _ in parts):
        raise InputError(
            "all answers have the same prompt; KTO compares with answers to other prompts: give rows of several"
        )
    items = []
    for i, (example, desirable) in enumerate(found):
        other = next(j for j in (i - k for k in range(1, len(found))) if parts[j][0] != parts[i][0])
        prompt, answer = parts[i][0], parts[other][1]
        ids = [*prompt, *answer][:max_length]
        items.append(Unpaired(example, desirable, Example(ids, [*[IGNORED] * len(prompt), *answer][:max_length])))
    return items


def balance(items: Sequence[Unpaired], desirable: float, undesirable: float) -> str:
    """A warning where the two kinds of answers weigh too differently, else "" (the paper: a ratio in 1 to 4/3)."""
    good = sum(item.desirable for item in items)
    bad = len(items) - good
    if not good or not bad or not desirable or not undesirable:
        return f"of {len(items):,} answers {good:,} are desirable: KTO needs both kinds to tell them apart"
    ratio = desirable * good / (undesirable * bad)
    if 1 <= ratio <= 4 / 3:
        return ""
    return (
        f"desirable answers weigh {ratio:.2f} times the others ({good:,} and {bad:,} rows); the paper keeps that in 1 "
        f"to 1.33: desirable_weight {undesirable * bad / good:.2g} would make it 1"
    )
