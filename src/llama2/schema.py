"""Schemas of settings files: kinds of values with bounds, and one check of a file's fields against them.

A reader writes its schema as a table {key: kind}; `check` runs before anything computes with the values. Standard
library only.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llama2.errors import CheckpointError, Llama2Error
from llama2.text_file import shown


class Kind(NamedTuple):
    """words: what a value must be, as a sentence goes on. holds: whether one is."""

    words: str
    holds: Callable[[Any], bool]


Schema = Mapping[str, Kind]
ANY = Kind("anything", lambda value: True)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))

NUMBER = Kind("a number", lambda value: (type(value) in (int, float) and abs(value) <= 1e300) or value != value)


def whole(low: int = 0, high: int = 2**31 - 1, also: tuple[int, ...] = ()) -> Kind:
    """An integer of a range, or one of a few beside it."""
    beside = "".join(f", or {value}" for value in also)
    return Kind(
        f"a whole number from {low} to {high}{beside}",
        lambda value: type(value) is int and (low <= value <= high or value in also),
    )


def real(low: float = -math.inf, high: float = math.inf) -> Kind:
    """A finite number of a range."""
    bounds = "" if low == -math.inf and high == math.inf else f" from {low:g} to {high:g}"
    return Kind(
        f"a finite number{bounds}",
        lambda value: type(value) in (int, float) and abs(value) < 1e300 and low <= value <= high,
    )


def text(most: int = 4096) -> Kind:
    """A string of at most `most` characters."""
    return Kind(f"a text of at most {most} characters", lambda value: isinstance(value, str) and len(value) <= most)


def choice(*values: Any) -> Kind:
    """One of these values."""
    words = ", ".join(map(str, values))
    return Kind(f"one of {words}", lambda value: isinstance(value, str | int | float | None) and value in values)


def either(*kinds: Kind) -> Kind:
    """A value of one of these kinds."""
    words = ", or ".join(kind.words for kind in kinds)
    return Kind(words, lambda value: any(kind.holds(value) for kind in kinds))


def maybe(kind: Kind) -> Kind:
    """A value of this kind, or null."""
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.holds(value))


def several(kind: Kind, most: int) -> Kind:
    """A list of at most `most` values of this kind."""
    return Kind(
        f"a list of at most {most} entries, each {kind.words}",
        lambda value: isinstance(value, list | tuple) and len(value) <= most and all(map(kind.holds, value)),
    )


def table(kind: Kind, most: int) -> Kind:
    """An object of at most `most` entries whose values are of this kind."""
    return Kind(
        f"an object of at most {most} entries, each {kind.words}",
        lambda value: (
            isinstance(value, Mapping)
            and len(value) <= most
            and all(isinstance(key, str) for key in value)
            and all(map(kind.holds, value.values()))
        ),
    )


def check(
    fields: Mapping[str, Any], schema: Schema, where: str | Path = "", error: type[Llama2Error] = CheckpointError
) -> None:
    """Raises `error` for the first field whose value is not what the schema says, with the file, the key and the value.

    Keys that are missing, or that the schema does not have, are the reader's affair."""
    for key, kind in schema.items():
        if key in fields and not kind.holds(fields[key]):
            place = f"{where}: " if str(where) else ""
            raise error(f"{place}{key} is {shown(fields[key])}; it must be {kind.words}")


def check_names(owner: type, names: Iterable[str], what: str, error: type[Llama2Error]) -> None:
    """Raises `error` for a name that would take the place of a method, or of what an object works out, if it were set
    on an object of this class."""
    for name in names:
        held = inspect.getattr_static(owner, name, None)
        fixed = isinstance(held, property) and held.fset is None
        if name == "self" or fixed or callable(held) or isinstance(held, classmethod | staticmethod):
            raise error(f"{shown(name)} is what {owner.__name__} calls something of its own; it is no field of {what}")
