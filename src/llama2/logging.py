"""How much the library says, under the names of transformers.logging: `logging.set_verbosity(logging.ERROR)`.

The library warns by Python's `warnings` (UserWarning) and logs under the name "llama2". A verbosity above WARNING keeps
both back: UserWarnings of every library in the process, since a filter cannot tell whose they are.
"""

import logging
import warnings
from logging import CRITICAL, DEBUG, ERROR, FATAL, INFO, WARN, WARNING

from llama2.errors import InputError

_NAME = "llama2"
_LEVELS = (DEBUG, INFO, WARNING, ERROR, CRITICAL)
_MUTE = ("ignore", None, UserWarning, None, 0)  # an entry of warnings.filters, as simplefilter makes it


def get_logger(name: str | None = None) -> logging.Logger:
    """The logger of a name, of the library where none is given."""
    return logging.getLogger(name or _NAME)


def get_verbosity() -> int:
    """The level from which on something is said; WARNING unless set."""
    return logging.getLogger(_NAME).getEffectiveLevel()


def set_verbosity(verbosity: int) -> None:
    """Sets that level: DEBUG 10, INFO 20, WARNING 30, ERROR 40 or CRITICAL 50. Raises InputError for another."""
    if verbosity not in _LEVELS:
        raise InputError(f"verbosity is {verbosity!r}; it must be one of {', '.join(map(str, _LEVELS))}")
    logging.getLogger(_NAME).setLevel(verbosity)
    while _MUTE in warnings.filters:
        warnings.filters.remove(_MUTE)  # type: ignore[attr-defined]
    if verbosity > WARNING:
        warnings.simplefilter("ignore", UserWarning)


def set_verbosity_debug() -> None:
    """As set_verbosity(DEBUG)."""
    set_verbosity(DEBUG)


def set_verbosity_info() -> None:
    """As set_verbosity(INFO)."""
    set_verbosity(INFO)


def set_verbosity_warning() -> None:
    """As set_verbosity(WARNING)."""
    set_verbosity(WARNING)


def set_verbosity_error() -> None:
    """As set_verbosity(ERROR)."""
    set_verbosity(ERROR)


__all__ = [
    "CRITICAL",
    "DEBUG",
    "ERROR",
    "FATAL",
    "INFO",
    "WARN",
    "WARNING",
    "get_logger",
    "get_verbosity",
    "set_verbosity",
    "set_verbosity_debug",
    "set_verbosity_error",
    "set_verbosity_info",
    "set_verbosity_warning",
]
