"""Rows of two answers of which one is better, with how much better it is and whether each is safe. No torch here.

Margins and safety labels are those of Llama 2 (arXiv 2307.09288, section 3.2.2, tables 27 and 28).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, SupportsFloat, get_args

from llama2.errors import InputError
from llama2.protocols import TokenizerLike
from llama2.train.data import DataReport, EncodedPair, Example, prepare_pairs

Margins = Literal["small", "large", "none"]
RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better")
MARGINS: dict[str, tuple[float, ...]] = {
    "small": (1.0, 2 / 3, 1 / 3, 0.0),
    "large": (3.0, 2.0, 1.0, 0.0),
    "none": (0.0, 0.0, 0.0, 0.0),
}
_ALSO = {"unsure": "negligibly_better", "negligibly_better_or_unsure": "negligibly_better"}  # the paper's last grade
_OWN = ("margin", "rating", "chosen_safe", "rejected_safe")
_IDS = (("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids"),
        ("input_ids_chosen", "input_ids_rejected"))  # fmt: skip


class Ranked(NamedTuple):
    """Two answers, and by how much the better one should win.

    safe: 1 for a safe answer, 0 for an unsafe one, None where nothing is said, of chosen and rejected. labelled: what a
    labelled answer weighs in the mean over pairs, so that it becomes the mean over labelled answers.
    """

    pair: EncodedPair
    margin: float = 0.0
    rating: str | None = None
    safe: tuple[float | None, float | None] = (None, None)
    labelled: float = 0.5


def reward_pairs(
    rows: Iterable[Mapping[str, Any]], tokenizer: TokenizerLike, max_length: int | None, margins: Margins = "small"
) -> tuple[list[Ranked], DataReport]:
    """Rows of {"chosen", "rejected"}, as texts, chats or ids, with or without prompt, margin or rating, chosen_safe and
    rejected_safe.

    Pairs with an answer beyond max_length are left out, as in TRL. Raises InputError, with the row's number, for a
    margin that is no number, a rating that does not exist, both at once, and a label that is neither true nor false.
    """
    report, made = DataReport(max_length=max_length), list[Ranked]()
    for number, row in enumerate(rows):
        report.rows += 1
        rating = _rating(row.get("rating"), number)
        margin = _margin(row.get("margin"), rating, margins, number)
        safe = (_safe(row, "chosen_safe", number), _safe(row, "rejected_safe", number))
        pairs = _pairs(row, tokenizer, report, number)
        for pair in pairs:
            if max_length is not None and max(len(answer.input_ids) for answer in pair) > max_length:
                report.problems[number] = f"an answer is longer than {max_length} tokens (max_length)"
                continue
            made.append(Ranked(pair, margin, rating, safe))
            report.targets += len(pair)  # a reward is read at the last token of each answer
            report.tokens += sum(len(answer.input_ids) for answer in pair)
    return _weighted(made), report


def _pairs(row: Mapping[str, Any], tokenizer: TokenizerLike, report: DataReport, number: int) -> list[EncodedPair]:
    names = next((names for names in _IDS if all(row.get(name) is not None for name in names)), None)
    if names is not None:
        return [EncodedPair(*(Example(list(row[name]), list(row[name])) for name in names))]
    pairs, one = prepare_pairs([{k: v for k, v in row.items() if k not in _OWN}], tokenizer, None)
    report.kinds += one.kinds
    report.unused.update(one.unused)
    for said in one.notes:
        report.note(number, said)
    if one.problems:
        report.problems[number] = one.problems[0]
    return pairs


def _weighted(items: Sequence[Ranked]) -> list[Ranked]:
    """The items with the weight of a labelled answer: pairs / labelled answers."""
    labels = sum(label is not None for item in items for label in item.safe)
    return [item._replace(labelled=len(items) / labels) for item in items] if labels else list(items)


def _rating(value: object, number: int) -> str | None:
    if value is None:
        return None
    name = str(value).strip().lower().replace(" ", "_").replace("-", "_")
    name = _ALSO.get(name, name)
    if name not in RATINGS:
        raise InputError(f"row {number}: rating is {value!r}; it must be one of {', '.join(RATINGS)}, or left out")
    return name


def _margin(value: SupportsFloat | str | None, rating: str | None, margins: Margins, number: int) -> float:
    if value is None:
        return 0.0 if rating is None else MARGINS[margins][RATINGS.index(rating)]
    if rating is not None:
        raise InputError(f"row {number} has the margin {value!r} and the rating {rating}; give one of them")
    try:
        found = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"row {number}: margin is {value!r}; it must be a number") from error
    if not math.isfinite(found):
        raise InputError(f"row {number}: margin is {value!r}; it must be a finite number")
    return found


def _safe(row: Mapping[str, Any], name: str, number: int) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if value in (0, 1):  # true and false, and what they are in a .csv file once it is read as numbers
        return float(value)
    if str(value).strip().lower() in ("true", "false"):
        return float(str(value).strip().lower() == "true")
    raise InputError(f"row {number}: {name} is {value!r}; it must be true or false, or left out")


def check_margins(margins: str) -> None:
    """Raises InputError for a name that is none of `MARGINS`."""
    if margins not in get_args(Margins):
        raise InputError(f"margins is {margins!r}; it must be one of {', '.join(get_args(Margins))}")
