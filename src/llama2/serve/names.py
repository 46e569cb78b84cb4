"""The names that a served model answers to. Where it lies on the server's disk is none of them that is shown."""

from collections.abc import Iterable
from pathlib import Path

ALIASES = ("tgi", "dummy", "default", "")  # what clients send that were given an address and no name
ANY = "*"  # among the names: every other name is this model's too
_WEIGHTS = (".gguf", ".safetensors", ".bin", ".pth")


def short_name(model: str) -> str:
    """Returns the display name of a model: a hub id as it is, a folder's or a file's name without its place and
    kind."""
    path = Path(model)
    for part in path.parts:
        if part.startswith("models--"):  # a snapshot in the hub's cache
            return "/".join(part.split("--")[1:])
    if path.exists() or path.is_absolute() or path.suffix in _WEIGHTS:
        name = path.resolve().name if path.exists() and not path.is_file() else path.name
        return name.removesuffix(path.suffix) if path.suffix in _WEIGHTS else name
    return model


def names_of(model: str, shown: Iterable[str] = ()) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names that are shown, and those that are understood too.

    model: the model as the command line has it, a path or a hub id. shown: names that the command line gives it.
    """
    own = short_name(model)
    names = tuple(shown) or (own,)
    path = Path(model)
    more = [own, own.rpartition("/")[2], path.name if path.exists() or path.suffix in _WEIGHTS else own, model]
    return names, tuple(dict.fromkeys(name for name in more if name not in names))


def answers_to(name: str, names: Iterable[str]) -> bool:
    """Whether a client's name is one of these: in any case, and with Ollama's tag."""
    plain = name.removesuffix(":latest").casefold()
    return any(plain == known.removesuffix(":latest").casefold() or known == ANY for known in names)
