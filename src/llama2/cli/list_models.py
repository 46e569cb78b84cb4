"""`llama2 list`: the models on this machine."""

import json
import os
import time
from dataclasses import dataclass

from llama2.cli.args import option
from llama2.cli.info import size
from llama2.cli.names import BUILT_IN, names_path, own_names
from llama2.cli.terminal import table


@dataclass(frozen=True, kw_only=True)
class ListModelsOptions:
    """The models on this machine: in the hub's cache and in the stores of Ollama and LM Studio. Each name can be given
    to -m. With --names, the short names that `pull` and -m know."""

    names: bool = option(False, "the short names instead, the user's own first")
    json: bool = option(False, "one JSON array")


def run(options: ListModelsOptions) -> int:
    """Runs the command."""
    if options.names:
        return _names(options.json)
    from llama2.cli.store import stored_models

    rows = stored_models()
    if options.json:
        fields = ("name", "format", "bytes", "modified", "store")
        print(json.dumps([{key: getattr(row, key) for key in fields} | {"path": str(row.path)} for row in rows]))
        return 0
    if not rows:
        print("no model is in the hub's cache; `llama2 pull owner/name` fetches one, `llama2 list --names` shows names")
        return 0
    lines = [(row.name, row.format, size(row.bytes), _age(time.time() - row.modified), row.store) for row in rows]
    print(table(("NAME", "FORMAT", "SIZE", "MODIFIED", "STORE"), lines))
    return 0


def _names(as_json: bool) -> int:
    own = own_names(os.environ)
    names = own | {name: model for name, model in BUILT_IN.items() if name not in own}
    if as_json:
        print(json.dumps(names))
        return 0
    print(table(("NAME", "MODEL", ""), [(name, model, "own" if name in own else "") for name, model in names.items()]))
    print(f'\nyour own: {names_path(os.environ)}, lines such as mine = "owner/name:Q4_K_M"')
    return 0


def _age(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit} ago"
    return "just now"
