"""From the start of a process to its first token, as a user of `llama2 generate` experiences it; and its memory."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llama2.cli.loading import RunOptions

PROMPT = "The capital of France is"


class FirstToken(NamedTuple):
    """Seconds from the start of the process to its first token; bytes of memory that it held at most, where known."""

    seconds: float
    peak_bytes: int | None


def measure(options: RunOptions, model: str) -> FirstToken | str:
    """Starts `llama2 generate` for one token and waits for it; the reason where it failed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llama2", "generate", *words(options, model), "--max-new-tokens", "1", "--", PROMPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    began = time.perf_counter()
    assert process.stdout is not None and process.stderr is not None
    first = process.stdout.read(1)
    seconds = time.perf_counter() - began
    peak = _high_water(process.pid)
    process.stdout.read()
    said = process.stderr.read().decode(errors="replace").strip()
    process.wait()
    if process.returncode or not first:
        return said.splitlines()[-1] if said else f"exit code {process.returncode}"
    return FirstToken(seconds, peak)


def _high_water(pid: int) -> int | None:
    """Bytes of memory that a running process has held at most, where the system tells it. Not ru_maxrss, which a
    process inherits from its parent."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(found[0]) * 1024 if found else None


def words(options: RunOptions, model: str) -> Sequence[str]:
    """The flags of a command that runs the model as these options say."""
    found = ["--model", model, "--dtype", options.dtype, "--device", options.device, "--runner", options.runner]
    found += ["--kv-cache", options.kv_cache, "--precision", options.precision]
    for flag, value in (
        ("--adapter", options.adapter),
        ("--revision", options.revision),
        ("--attn-implementation", options.attn_implementation),
    ):
        found += [] if value is None else [flag, value]
    return [*found, "--no-mmap"] if options.no_mmap else found
