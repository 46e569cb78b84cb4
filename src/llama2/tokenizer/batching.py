"""Rows to rectangles: truncation into windows, and padding of columns."""

from typing import Any, Literal, get_args

from llama2.errors import TokenizerError
from llama2.tokenizer.encoding import Segment

Truncation = Literal["longest_first", "only_first", "only_second", "do_not_truncate"]
Padding = Literal["longest", "max_length", "do_not_pad"]
_FILL = {"attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1, "offset_mapping": (0, 0)}


def check_side(name: str, side: str) -> str:
    """ "left" or "right"."""
    if side not in ("left", "right"):
        raise TokenizerError(f"{name}={side!r}; it must be 'left' or 'right'")
    return side


def padding_of(padding: bool | str | None) -> Padding:
    """True and "longest" pad to the longest row, "max_length" to max_length, False not at all."""
    value = getattr(padding, "value", padding)
    table: dict[Any, Padding] = {True: "longest", False: "do_not_pad", None: "do_not_pad"}
    if value in table:
        return table[value]
    for name in get_args(Padding):
        if value == name:
            return name
    raise TokenizerError(f"padding={padding!r}; use True, False, 'longest' or 'max_length'")


def truncation_of(truncation: bool | str | None) -> Truncation:
    """True is "longest_first", False and None cut nothing."""
    value = getattr(truncation, "value", truncation)
    table: dict[Any, Truncation] = {True: "longest_first", False: "do_not_truncate", None: "do_not_truncate"}
    if value in table:
        return table[value]
    for name in get_args(Truncation):
        if value == name:
            return name
    raise TokenizerError(f"truncation={truncation!r}; use True, False, 'longest_first', 'only_first' or 'only_second'")


def windows(segment: Segment, size: int, stride: int, side: str) -> list[Segment]:
    """The first `size` tokens (last ones for side "left") and then the overflow, each window `stride` back."""
    n = len(segment.ids)
    if n <= size:
        return [segment]
    if size == 0:
        return [segment.cut(0, 0)]
    if stride >= size:
        raise TokenizerError(f"stride={stride} must be below the {size} tokens that max_length leaves for text")
    out, step = [], size - stride
    for i in range(0, n, step):
        start, stop = (i, min(i + size, n)) if side == "right" else (max(0, n - i - size), n - i)
        out.append(segment.cut(start, stop))
        if stop == n if side == "right" else start == 0:
            break
    return out


def truncate(
    a: Segment, b: Segment | None, room: int, strategy: Truncation, stride: int, side: str
) -> list[tuple[Segment, Segment | None]]:
    """Cut a text or pair to `room` tokens (special tokens already subtracted); the rows behind the first are overflow.

    "longest_first" evens out the two texts; "only_first" and "only_second" cut one and need it to be long enough.
    """
    total = len(a.ids) + (len(b.ids) if b else 0)
    if strategy == "do_not_truncate" or total <= room:
        return [(a, b)]
    if room < 0:
        raise TokenizerError(f"max_length leaves {room} tokens for text after the special tokens; make it larger")
    size_a, size_b = _sizes(len(a.ids), len(b.ids) if b else None, room, strategy)
    rows_a = windows(a, size_a, stride, side)
    rows_b = windows(b, size_b, stride, side) if b else [None]
    return [(x, y) for x in rows_a for y in rows_b]


def _sizes(a: int, b: int | None, room: int, strategy: Truncation) -> tuple[int, int]:
    if b is None:
        if strategy == "only_second":
            raise TokenizerError("truncation='only_second' needs a text_pair")
        return room, 0
    if strategy == "longest_first":
        short = min(a, b)
        long = short if short > room else max(short, room - short)
        if short + long > room:
            short, long = room // 2, room // 2 + room % 2
        return (short, long) if a <= b else (long, short)
    cut, name = (a, "first") if strategy == "only_first" else (b, "second")
    left = room - (a + b - cut)
    if left <= 0:
        raise TokenizerError(
            f"truncation='only_{name}' would have to remove {cut - left} of its {cut} tokens; "
            "raise max_length or use 'longest_first'"
        )
    return (left, b) if strategy == "only_first" else (a, left)


def target_length(longest: int, padding: Padding, max_length: int | None, multiple: int | None) -> int:
    """The length that rows are padded to."""
    length = max_length if padding == "max_length" else longest
    assert length is not None, "the caller leaves padding='max_length' without a length alone"
    return -(-length // multiple) * multiple if multiple else length


def pad_columns(columns: dict[str, list[Any]], length: int, side: str, fill: dict[str, Any]) -> None:
    """Pad every row of every known column to `length` in place; `labels` and unknown columns are left alone."""
    for name, rows in columns.items():
        value = fill.get(name, _FILL.get(name))
        if value is None:
            continue
        for i, row in enumerate(rows):
            missing = length - len(row)
            if missing > 0:
                rows[i] = [value] * missing + list(row) if side == "left" else list(row) + [value] * missing
