"""A model beside another one, in one word: OTHER.gguf, KEY=VALUE,... of the same model, or OTHER.gguf,KEY=VALUE,..."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from llama2.cli.args import nearest, parse
from llama2.cli.loading import RunOptions, local_model
from llama2.errors import InputError

SETTINGS = ("kv-cache", "precision", "runner", "dtype", "device", "adapter")
Options = TypeVar("Options", bound=RunOptions)


class Variant(NamedTuple):
    """A model of this machine: where it is, what it is called beside others, the settings that its word gave."""

    path: str
    label: str
    settings: dict[str, str]


def read(text: str, base: str | None, extra: Sequence[str] = (), flag: str = "") -> Variant:
    """The variant of a word. base: the model where the word names none; extra: settings beside SETTINGS.

    Raises InputError for what is no setting, before anything is loaded.
    """
    words = [word.strip() for word in text.split(",")]
    named = "=" not in words[0] or not words[0].partition("=")[0].replace("-", "").replace("_", "").isalpha()
    if named and not words[0]:
        raise InputError(f"{flag}{text!r} names nothing; give a model, settings as KEY=VALUE, or both")
    found: dict[str, str] = {}
    for word in words[1:] if named else words:
        key, _, value = word.partition("=")
        known = (*SETTINGS, *extra)
        if key not in known or not value:
            raise InputError(
                f"{flag}{text!r}: {word!r} is not a setting{nearest(key, known)}; give a model first, then KEY=VALUE "
                f"with {', '.join(known)}"
            )
        if key in SETTINGS:
            parse(RunOptions, "llama2", [f"--{key}", value])  # refuses a value as its flag does
        found[key] = value
    if not named and base is None:
        raise InputError(f"{flag}{text!r} names no model; give one before its settings")
    path = local_model(words[0]) if named else str(base)
    return Variant(path, ",".join(words[1:] if named else words), found)


def applied(options: Options, variant: Variant) -> Options:
    """The options with the model and the settings of a variant."""
    changes: dict[str, Any] = {
        key.replace("-", "_"): value for key, value in variant.settings.items() if key in SETTINGS
    }
    return replace(options, model=variant.path, **changes)
