"""`llama2 ps`: the servers of this user."""

import json
import time
from dataclasses import asdict, dataclass

from llama2.cli.args import option
from llama2.cli.info import size
from llama2.cli.terminal import table


@dataclass(frozen=True, kw_only=True)
class PsOptions:
    """The servers that this user has started with `llama2 serve`: process, address, models, memory and age."""

    json: bool = option(False, "one JSON array")


def run(options: PsOptions) -> int:
    """Runs the command."""
    from llama2.cli.registry import running

    servers = running()
    if options.json:
        print(json.dumps([asdict(server) for server in servers]))
        return 0
    if not servers:
        print("no server of this user is running; `llama2 serve MODEL` starts one")
        return 0
    lines = [
        (
            str(server.pid),
            server.address,
            ", ".join(server.models),
            "-" if server.memory is None else size(server.memory),
            f"{time.time() - server.began:,.0f} s",
        )
        for server in servers
    ]
    print(table(("PID", "ADDRESS", "MODELS", "MEMORY", "AGE"), lines))
    return 0
