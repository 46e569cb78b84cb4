"""Flags from a dataclass: one field is one flag, its type is the value's type, its text is the help.

argparse and not tyro, which the rest of the field uses for this: importing tyro takes longer than all of `--help` may.
"""

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from llama2.cli.settings import Setting, bare, settings_of
from llama2.errors import InputError
from llama2.options import option

__all__ = ["nearest", "option", "parse", "revision_option"]

T = TypeVar("T")
_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "FILE"}


def revision_option(what: str, besides: str = "") -> str | None:
    """--revision of every command: which version of the hub id that `what` may be."""
    text = f"branch, tag or commit of {what}, a hub id{besides} (default: its main branch)"
    return option(None, text, metavar="NAME")


def parse(cls: type[T], prog: str, argv: Sequence[str], environment: Mapping[str, str] | None = None) -> T:
    """An instance of the dataclass from the words of a command line; what they leave open comes from the environment
    and the settings file, where an environment is given (`settings`).

    Raises InputError; --help raises SystemExit(0).
    """
    parser = make_parser(cls, prog)
    positional = next((f.name for f in fields(cast(Any, cls)) if f.metadata["positional"]), None)
    # What stands behind `--` is text, whatever it looks like; argparse itself loses track of it between flags.
    cut = list(argv).index("--") if "--" in argv else len(argv)
    found, extra = parser.parse_known_args(list(argv[:cut]))
    values = vars(found)
    unknown = [word for word in extra if word.startswith("-") and word != "-"]
    if unknown or (positional is None and (extra or cut < len(argv))):
        raise InputError(_unknown(prog, (unknown or extra or ["--"])[0], parser))
    if positional is not None:
        values[positional] = (*values[positional], *extra, *argv[cut + 1 :])
    if environment is not None:
        typed = {f.dest for word in argv[:cut] if (f := parser._option_string_actions.get(word.split("=")[0]))}
        typed |= {f.metadata["replaces"] for f in fields(cast(Any, cls)) if f.name == positional and values[positional]}
        values |= {name: s.value for name, s in settings(cls, prog, environment).items() if name not in typed}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def settings(cls: type, prog: str, environment: Mapping[str, str]) -> dict[str, Setting]:
    """Reads a command's options from the environment and the settings file. Raises InputError."""
    hints = get_type_hints(cls)
    known = {f.name: hints[f.name] for f in fields(cls) if not f.metadata["positional"]}
    return settings_of(tuple(prog.split()[1:]), known, environment, getattr(cls, "VARIABLES", {}))


def make_parser(cls: type, prog: str) -> argparse.ArgumentParser:
    """The parser of a command's flags."""
    parser = _Parser(prog=prog, description=cls.__doc__, allow_abbrev=False)
    add_flags(parser, cls)
    return parser


def add_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """Adds a dataclass's fields to a parser: the command's own flags first, then those it shares with others."""
    hints = get_type_hints(cls)
    groups: dict[type, Any] = {}
    declared = {name: owner for owner in reversed(cls.__mro__) for name in vars(owner).get("__annotations__", {})}
    declared |= {f.name: f.metadata["group"] for f in fields(cast(Any, cls)) if "group" in f.metadata}
    for f in sorted(fields(cast(Any, cls)), key=lambda f: declared[f.name] is not cls):
        owner = declared[f.name]
        if f.metadata["positional"]:
            parser.add_argument(f.name, nargs="*", default=[], metavar=f.metadata["metavar"], help=f.metadata["help"])
            continue
        if owner not in groups:
            groups[owner] = parser if owner is cls else parser.add_argument_group((owner.__doc__ or "").rstrip("."))
        _add_flag(groups[owner], f, hints[f.name])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise InputError(f"{message.removeprefix('argument ')}; see `{self.prog} --help`")


def nearest(word: str, known: Sequence[str]) -> str:
    """'; did you mean X?' where something known is close, else ''."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _unknown(prog: str, word: str, parser: argparse.ArgumentParser) -> str:
    known = [name for name in parser._option_string_actions if name.startswith("--")]
    hint = nearest(word.split("=")[0], known)
    text = " (text that begins with '-' goes behind `--`)" if word.startswith("-") else ""
    return f"`{prog}` does not know {word!r}{hint or f'; see `{prog} --help`'}{text}"


def _add_flag(group: Any, f: "Field[Any]", hint: Any) -> None:
    flag, meta = "--" + f.name.replace("_", "-"), f.metadata
    kind = bare(hint)
    names = [meta["alias"], flag] if meta["alias"] else [flag]
    if meta["switches"]:
        one = group.add_mutually_exclusive_group()
        for value, text in zip(get_args(kind), meta["help"].split("|"), strict=True):
            if value != f.default:
                one.add_argument(f"--{value}", dest=f.name, action="store_const", const=value, help=text.strip())
        group.set_defaults(**{f.name: f.default})
        return
    if kind is bool:
        action: Any = "store_true" if f.default is False else argparse.BooleanOptionalAction
        group.add_argument(*names, dest=f.name, action=action, default=f.default, help=_escaped(meta["help"]))
        return
    settings: dict[str, Any] = {"dest": f.name, "default": f.default, "help": _help(f)}
    if get_origin(kind) is Literal:
        settings["choices"], settings["metavar"] = get_args(kind), meta["metavar"]
    elif get_origin(kind) is tuple and meta["commas"]:
        settings |= {"type": _parts, "metavar": meta["metavar"] or "A,B,..."}
    elif get_origin(kind) is tuple:
        settings |= {"action": "append", "default": [], "metavar": meta["metavar"] or "TEXT"}
    else:
        settings |= {"type": _reader(kind), "metavar": meta["metavar"] or _METAVARS[kind]}
    group.add_argument(*names, **settings)


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _help(f: "Field[Any]") -> str:
    default = "" if f.default is None or f.default == () else f" (default: {f.default})"
    return _escaped(f.metadata["help"] + default)


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def _reader(kind: Any) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            wanted = {int: "a whole number", float: "a number"}[kind]
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None

    return read
