"""Lists of whole numbers on a command line, as llama-bench takes them: 128,512 or 1-8+2 or 1-64*2."""

import re
from collections.abc import Sequence

from llama2.errors import InputError

_RANGE = re.compile(r"(\d+)-(\d+)(?:([+*])(\d+))?")
_MOST = 10_000  # numbers of one list


def read(flag: str, texts: Sequence[str], default: int, least: int) -> list[int]:
    """The numbers of a flag that may be given several times. Raises InputError for other words and for numbers under
    `least`."""
    found: list[int] = []
    for word in [part.strip() for text in texts for part in text.split(",")]:
        if match := _RANGE.fullmatch(word):
            found += _between(flag, word, int(match[1]), int(match[2]), match[3] or "+", int(match[4] or 1))
        elif word.isdecimal() and word.isascii() and len(word) < 16:
            found.append(int(word))
        else:
            raise InputError(f"{flag}: {word!r} is not a whole number; give a list such as 128,512 or 1-8*2")
    if bad := [number for number in found if number < least]:
        raise InputError(f"{flag} is {bad[0]}; give at least {least}")
    return found or [default]


def one(flag: str, text: str, least: int) -> int:
    """The one number of a setting. Raises InputError for a list."""
    found = read(flag, (text,), least, least)
    if len(found) != 1:
        raise InputError(f"{flag} is {text!r}; give one whole number")
    return found[0]


def _between(flag: str, word: str, first: int, last: int, how: str, by: int) -> list[int]:
    if last < first or by < 1 or (how == "*" and (by < 2 or first < 1)) or (how == "+" and last - first > _MOST * by):
        raise InputError(f"{flag}: {word!r} is not a range; give FIRST-LAST+STEP or FIRST-LAST*FACTOR")
    found = []
    while first <= last:
        found.append(first)
        first = first + by if how == "+" else first * by
    return found
