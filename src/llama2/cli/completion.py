"""`llama2 completion SHELL`: a script that completes commands, options and files, made from the parsers."""

import argparse
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from llama2.cli import COMMANDS, options_class
from llama2.cli.args import add_flags, option
from llama2.errors import InputError, MissingDependencyError

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True, kw_only=True)
class CompletionOptions:
    """Print a script that completes commands, options and paths. bash: `llama2 completion bash >
    ~/.local/share/bash-completion/completions/llama2`; zsh: into a folder of $fpath, as _llama2; fish: `llama2
    completion fish > ~/.config/fish/completions/llama2.fish`."""

    paths: tuple[str, ...] = option((), "bash, zsh or fish", metavar="SHELL", positional=True)


def run(options: CompletionOptions) -> int:
    """Runs the command."""
    if len(options.paths) != 1 or options.paths[0] not in SHELLS:
        raise InputError(f"completion needs one of {', '.join(SHELLS)}, not {' '.join(options.paths)!r}")
    try:
        import shtab
    except ImportError as error:
        raise MissingDependencyError("completion needs shtab; run `pip install shtab`") from error
    print(shtab.complete(whole_parser(shtab.FILE), shell=options.paths[0]))
    return 0


def whole_parser(file: Any = None) -> argparse.ArgumentParser:
    """One parser of all commands; `file` is what completes paths."""
    parser = argparse.ArgumentParser(prog="llama2", description="Run, train and serve Llama-architecture models.")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers()
    for name, (module, text) in COMMANDS.items():
        loaded = import_module(module)
        child = commands.add_parser(name, help=_plain(text))
        if tasks := getattr(loaded, "TASKS", None):
            rows = child.add_subparsers()
            for task in tasks:
                _fill(rows.add_parser(task, help=_plain(loaded.SUMMARY[task])), (name, task), file)
        else:
            _fill(child, (name,), file)
    return parser


def children(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a parser's commands or tasks, by name."""
    found = next((action for action in parser._actions if isinstance(action, argparse._SubParsersAction)), None)
    return {} if found is None else dict(found.choices)


def _fill(parser: argparse.ArgumentParser, command: tuple[str, ...], file: Any) -> None:
    cls = options_class(command)
    parser.description = _plain(cls.__doc__ or "")
    add_flags(parser, cls)
    for action in parser._actions:
        if file is not None and action.metavar in _PATHS:
            action.complete = file  # type: ignore[attr-defined]


_PATHS = ("FILE", "FOLDER", "DIR", "MODEL", "SRC DST", "MODEL DATA OUT", "BASE ADAPTER DST", "IN.jsonl OUT.jsonl")


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("%", "%%")
