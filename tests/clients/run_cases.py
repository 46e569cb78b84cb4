"""Runs the cases of one client in the clients' environment: python run_cases.py with_openai OUT.json URL MODEL

A case is a function `case_...(server)` of the module that asserts what it finds. OUT: {case: "" or the traceback}.
"""

import importlib
import json
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Server:
    """Where a server is, and the name of its model."""

    url: str
    model: str


def main() -> None:
    name, out, server = sys.argv[1], Path(sys.argv[2]), Server(*sys.argv[3:5])
    module, found = importlib.import_module(name), {}
    for case_name, case in list(vars(module).items()):
        if case_name.startswith("case_"):
            try:
                case(server)
                found[case_name] = ""
            except Exception:
                found[case_name] = traceback.format_exc(limit=-12)
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
