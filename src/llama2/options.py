"""Fields of a dataclass that are flags of the command line too: their type is the value's, their text is the help."""

from dataclasses import field
from typing import TypeVar

T = TypeVar("T")


def option(
    default: T,
    help: str,
    *,
    alias: str | None = None,
    metavar: str | None = None,
    positional: bool = False,
    switches: bool = False,
    commas: bool = False,
    replaces: str | None = None,
) -> T:
    """Declares a dataclass field that is a flag.

    switches: a choice is spelled as one flag per value (--ids, --json, ...). commas: a tuple is one text with commas;
    without it the flag is repeated. replaces: the flag that a positional argument stands for.
    """
    metadata = {"help": help, "alias": alias, "metavar": metavar, "positional": positional, "switches": switches,
                "commas": commas, "replaces": replaces}  # fmt: skip
    made: T = field(default=default, metadata=metadata)
    return made
