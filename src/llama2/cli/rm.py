"""`llama2 rm`: models out of the hub's cache."""

import difflib
import sys
from dataclasses import dataclass

from llama2.cli.args import option
from llama2.cli.info import size
from llama2.cli.names import resolve_name
from llama2.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RmOptions:
    """Remove models from the hub's cache, and free what no other model there needs."""

    paths: tuple[str, ...] = option((), "names that `llama2 list` shows", metavar="MODEL", positional=True)
    yes: bool = option(False, "do not ask", alias="-y")


def run(options: RmOptions) -> int:
    """Runs the command."""
    from llama2.cli.store import remove, stored_models

    if not options.paths:
        raise InputError("rm needs the name of a model; `llama2 list` shows them")
    models = {row.name: row for row in stored_models()}
    chosen = []
    for name in options.paths:
        row = models.get(name) or models.get(resolve_name(name))
        if row is None:
            close = difflib.get_close_matches(name, models, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; `llama2 list` shows what there is"
            raise InputError(f"{name!r} is no model on this machine{hint}")
        chosen.append(row)
    for row in chosen:
        if not options.yes:
            if not sys.stdin.isatty():
                raise InputError(f"removing {row.name} ({size(row.bytes)}) needs --yes where nobody can be asked")
            if input(f"remove {row.name} ({size(row.bytes)})? [y/N] ").strip().lower() not in ("y", "yes"):
                print(f"{row.name} stays")
                continue
        print(f"removed {row.name}, {size(remove(row))} freed")
    return 0
