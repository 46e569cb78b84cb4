"""`llama2 config`: the effective options of a command, and where each comes from."""

import json
import os
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from llama2.cli import COMMANDS, options_class, terminal
from llama2.cli.args import nearest, option, settings
from llama2.cli.names import names_path
from llama2.cli.settings import config_path, unknown_names, variables_of


@dataclass(frozen=True, kw_only=True)
class ShowConfigOptions:
    """The options of a command as they are without flags, and where each comes from: the environment (LLAMA2_NAME,
    LLAMA2_COMMAND_NAME), config.toml, or the default. Without a command, the files of settings and what they set."""

    paths: tuple[str, ...] = option((), "a command, such as serve, or finetune sft", metavar="COMMAND", positional=True)
    all: bool = option(False, "options with their default value too")
    json: bool = option(False, "one JSON object")


def run(options: ShowConfigOptions) -> int:
    """Runs the command."""
    environment = os.environ
    if options.paths:
        rows = effective(options.paths, environment)
        if not options.all:
            rows = {name: row for name, row in rows.items() if row["origin"] != "default"}
        if options.json:
            print(json.dumps(rows, default=str))
        elif rows:
            lines = [(name, _shown(row["value"]), row["origin"]) for name, row in rows.items()]
            print(terminal.table(("OPTION", "VALUE", "FROM"), lines))
        else:
            print("every option has its default; --all lists them")
        return 0
    names = (str(config_path(environment)), str(names_path(environment)))
    known, commands = _every_name(), set(COMMANDS)
    lost = unknown_names(known, commands, environment)
    if options.json:
        print(json.dumps({"config": names[0], "names": names[1], "unknown": lost}))
        return 0
    print(terminal.table(("FILE", "PATH", ""), [(kind, path, "" if os.path.exists(path) else "not there")
                                                for kind, path in zip(("settings", "names"), names)]))  # fmt: skip
    for command in _commands():
        rows = effective(command, environment)
        for name, row in rows.items():
            if row["origin"] != "default":
                print(
                    f"llama2 {' '.join(command)} --{name.replace('_', '-')} {_shown(row['value'])}  ({row['origin']})"
                )
    for name in lost:
        terminal.notice(f"llama2: no command has an option {name}{nearest(name.rpartition(': ')[2], sorted(known))}")
    return 0


def effective(command: tuple[str, ...], environment: Any) -> dict[str, dict[str, Any]]:
    """Each option of a command: its value without flags, where that comes from, and the variables that set it.

    Raises InputError for an unknown command, and for a wrong value.
    """
    cls = options_class(command)
    given = settings(cls, " ".join(("llama2", *command)), environment)
    rows = {}
    for f in fields(cls):
        if not f.metadata["positional"]:
            found = given.get(f.name)
            rows[f.name] = {
                "value": f.default if found is None else found.value,
                "origin": "default" if found is None else found.origin,
                "variables": variables_of(command, f.name),
            }
    return rows


def _commands() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, (module, _) in COMMANDS.items():
        tasks = getattr(import_module(module), "TASKS", None)
        found += [(name, task) for task in tasks] if tasks else [(name,)]
    return found


def _every_name() -> set[str]:
    return {f.name for command in _commands() for f in fields(options_class(command))}


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
