"""The servers that run for this user: each keeps a file in one folder while it lives, `llama2 ps` reads them.

$XDG_RUNTIME_DIR/llama2, where the system has one, else ~/.cache/llama2/run: PID.json
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from llama2.cli.settings import user_folder
from llama2.errors import CheckpointError
from llama2.files import write_text
from llama2.text_file import read_object


@dataclass(frozen=True)
class RunningServer:
    """A server: process id, the URL that it answers at, its models, bytes of memory (None where not told), start in
    seconds since 1970."""

    pid: int
    address: str
    models: tuple[str, ...]
    memory: int | None
    began: float


def folder() -> Path:
    """Where the files are."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/") and Path(runtime).is_dir():
        return Path(runtime) / "llama2"
    return user_folder(os.environ, "XDG_CACHE_HOME", "~/.cache") / "run"


@contextmanager
def registered(address: str, models: Sequence[str]) -> Iterator[None]:
    """A server is listed while this lasts. A folder that cannot be written costs the listing, not the server."""
    file = folder() / f"{os.getpid()}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        entry = {"address": address, "models": list(models), "began": time.time(), "ticks": _ticks(os.getpid())}
        write_text(file, json.dumps(entry))
    except OSError:
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()


def running() -> list[RunningServer]:
    """The servers that live, oldest first; the files of those that were killed are removed."""
    found = []
    for file in sorted(folder().glob("*.json")):
        try:
            entry, pid = read_object(file, "an entry"), int(file.stem)
            address, models, began = str(entry["address"]), tuple(map(str, entry["models"])), float(entry["began"])
        except (CheckpointError, ValueError, KeyError, TypeError, OSError):
            continue
        if _ticks(pid) != entry.get("ticks") or not _alive(pid):
            with suppress(OSError):
                file.unlink()
            continue
        found.append(RunningServer(pid, address, models, _memory(pid), began))
    return sorted(found, key=lambda server: server.began)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def _ticks(pid: int) -> int | None:
    """When a process began, in the kernel's ticks: the same number of another process is not taken for it."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _memory(pid: int) -> int | None:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
