"""Shared functions of the library's helper processes. Standard library only."""

import subprocess
from typing import Any


def end_process(process: subprocess.Popen[Any]) -> None:
    """Kills a process, waits for it, and closes the pipes to it."""
    process.kill()
    process.wait()
    for file in (process.stdin, process.stdout):
        if file is not None:
            try:
                file.close()
            except OSError:
                continue  # what was written last has no reader any more
