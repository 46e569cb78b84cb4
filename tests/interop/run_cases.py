"""Runs the cases of one library in its environment: python run_cases.py with_peft OUT.json

A case is a function `case_...(folder)` of the module that asserts what it finds. OUT: {case: "" or the traceback}.
"""

import importlib
import json
import sys
import tempfile
import traceback
from pathlib import Path


def main() -> None:
    module, out = importlib.import_module(sys.argv[1]), Path(sys.argv[2])
    found = {}
    for name, case in list(vars(module).items()):
        if name.startswith("case_"):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    case(Path(folder))
                    found[name] = ""
                except Exception:
                    found[name] = traceback.format_exc(limit=-12)
            print(name, "failed" if found[name] else "passed", flush=True)
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
