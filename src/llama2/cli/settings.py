"""Options that are not typed at each call: environment variables and one file, config.toml.

The command line wins, then the environment, then the file, then the default:

    LLAMA2_SERVE_PORT, LLAMA2_PORT              of one command, or of every command that has the option
    [serve] port = 8080                         of one command; of a task, [finetune.sft]
    model = "smollm2"                           at the top: of every command that has the option
"""

import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from llama2.errors import InputError

MAX_CONFIG_BYTES = 1_000_000


@dataclass(frozen=True)
class Setting:
    """A value and where it comes from, for messages and for `llama2 config`."""

    value: Any
    origin: str


def user_folder(environment: Mapping[str, str], variable: str, default: str) -> Path:
    """Our folder within one of those of the XDG base directory specification: of $XDG_..., where that is an absolute
    path, else of the default."""
    base = environment.get(variable, "")
    return (Path(base) if base.startswith("/") else Path(default).expanduser()) / "llama2"


def config_folder(environment: Mapping[str, str]) -> Path:
    """Where a user's settings are: $XDG_CONFIG_HOME/llama2, by default ~/.config/llama2."""
    return user_folder(environment, "XDG_CONFIG_HOME", "~/.config")


def config_path(environment: Mapping[str, str]) -> Path:
    """The settings file: what LLAMA2_CONFIG names, else config.toml in the folder of settings."""
    named = environment.get("LLAMA2_CONFIG", "").strip()
    return Path(named).expanduser() if named else config_folder(environment) / "config.toml"


def read_config(environment: Mapping[str, str]) -> dict[str, Any]:
    """The content of the settings file; {} where none is. Raises InputError for one that is no TOML or was named and
    does not exist."""
    path = config_path(environment)
    try:
        if not path.is_file():
            if environment.get("LLAMA2_CONFIG", "").strip():
                raise InputError(f"LLAMA2_CONFIG names {path}, which is no file; create it, or unset the variable")
            return {}
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise InputError(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_CONFIG_BYTES:,} are read")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is no TOML file: {error}; mend it, or move it away") from error


def settings_of(
    command: tuple[str, ...],
    known: Mapping[str, Any],
    environment: Mapping[str, str],
    aliases: Mapping[str, tuple[str, ...]],
) -> dict[str, Setting]:
    """Collects a command's options from the environment and the file; `known` maps their names to types, `aliases` to
    the variables of other servers that mean the same.

    Raises InputError for a value of another type, and for an option in the command's table of the file that it has not.
    """
    found = _from_file(command, known, environment)
    for name, hint in known.items():
        for variable in (*variables_of(command, name), *aliases.get(name, ())):
            if text := environment.get(variable, "").strip():
                found[name] = Setting(_parsed(variable, text, hint), variable)
                break
    return found


def variables_of(command: tuple[str, ...], name: str) -> list[str]:
    """The environment variables that set an option, the first of which counts."""
    parts = [part.upper().replace("-", "_") for part in command]
    scopes = ["_".join(parts[:count]) + "_" for count in range(len(parts), 0, -1)] + [""]
    return [f"LLAMA2_{scope}{name.upper()}" for scope in scopes]


def _from_file(
    command: tuple[str, ...], known: Mapping[str, Any], environment: Mapping[str, str]
) -> dict[str, Setting]:
    content = read_config(environment)
    path = config_path(environment)
    found = _table(content, "", known, path, strict=False)
    table: Any = content
    for depth, word in enumerate(command, 1):
        table = table.get(word, {})
        title = ".".join(command[:depth])
        if not isinstance(table, dict):
            raise InputError(f"{path}: {title} must be a table, [{title}], not {table!r}")
        found |= _table(table, title, known, path, strict=depth == len(command))
    return found


def _table(
    table: Mapping[str, Any],
    title: str,
    known: Mapping[str, Any],
    path: Path,
    *,
    strict: bool,
) -> dict[str, Setting]:
    from llama2.cli.args import nearest

    found = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        where = f"{path}: {f'[{title}] ' if title else ''}{key}"
        if name in known and not isinstance(value, dict):
            found[name] = Setting(_typed(where, value, known[name]), where)
        elif strict:
            hint = nearest(name, list(known)) or f"; `llama2 config {title.replace('.', ' ')}` lists them"
            raise InputError(f"{where} is no option of `llama2 {title.replace('.', ' ')}`{hint}")
    return found


def bare(hint: Any) -> Any:
    """The type of an option without its None."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def _parsed(name: str, text: str, hint: Any) -> Any:
    """The value that a variable's text means."""
    kind = bare(hint)
    if get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind is bool:
        if text.lower() not in ("1", "0", "true", "false", "yes", "no"):
            raise InputError(f"{name} is {text!r}; it must be true or false")
        return text.lower() in ("1", "true", "yes")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise InputError(f"{name} is {text!r}; it must be {wanted}") from None
    return _typed(name, text, hint)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """A value as TOML gives it, as the option takes it."""
    kind = bare(hint)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise InputError(f"{name} is {value!r}; it must be one of {', '.join(map(str, get_args(kind)))}")
        return value
    if get_origin(kind) is tuple:
        rows = value if isinstance(value, list) else [value]
        if not all(isinstance(row, str) for row in rows):
            raise InputError(f"{name} is {value!r}; it must be a text, or a list of texts")
        return tuple(rows)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # such as one temperature where a command takes several
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a text"}[kind]
    fits: Any = {bool: bool, int: int, float: (int, float), str: str, Path: str}[kind]
    if not isinstance(value, fits) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{name} is {value!r}; it must be {wanted}")
    return kind(value)


def unknown_names(known: set[str], commands: set[str], environment: Mapping[str, str]) -> list[str]:
    """Names that no command has: at the top of the file, and variables that begin with LLAMA2_."""
    lost = [
        f"{config_path(environment)}: {key}"
        for key, value in read_config(environment).items()
        if key.replace("-", "_") not in known and not (isinstance(value, dict) and key in commands)
    ]
    scopes = ["", *(f"{command.upper().replace('-', '_')}_" for command in commands)]
    names = {f"LLAMA2_{scope}{name.upper()}" for scope in scopes for name in known} | OTHER_VARIABLES
    return lost + sorted(key for key in environment if key.startswith("LLAMA2_") and key not in names)


# What else the library reads from the environment, besides options.
OTHER_VARIABLES = {"LLAMA2_CONFIG", "LLAMA2_ISA", "LLAMA2_PARALLEL_STORE"}
