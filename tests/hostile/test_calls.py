"""Calls into the compiled module with changed arguments: each answers, or is refused by an error of Python's.

LLAMA2_CALLS is how many (500; `make fuzz-native` makes 5,000), LLAMA2_FUZZ_SEED where they begin.
LLAMA2_SANITIZED_MODULE is a module built with AddressSanitizer, whose library must be there before any other.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama2 import cpu

COUNT, SEED = os.environ.get("LLAMA2_CALLS") or "500", os.environ.get("LLAMA2_FUZZ_SEED") or "0"
MODULE = os.environ.get("LLAMA2_SANITIZED_MODULE")
SCRIPT = Path(__file__).with_name("calls.py")

pytestmark = pytest.mark.skipif(not MODULE and not cpu.available(), reason="the native module is not built")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, for what it looks for ends the process."""
    command, environment = [sys.executable, str(SCRIPT), *arguments], dict(os.environ)
    if MODULE:
        libraries = [
            subprocess.run(
                ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for name in ("libasan.so", "libubsan.so", "libstdc++.so")
        ]
        # Python keeps its own memory to the end; ASan's allocator refuses sizes by an error, as the usual one does.
        environment |= {
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        command += ["--module", MODULE]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_no_call_is_a_failure_of_the_module() -> None:
    done = run("--count", COUNT, "--seed", SEED)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert f"{COUNT} calls" in done.stdout and " 0 faults" in done.stdout


def test_most_unchanged_calls_answer() -> None:
    """Arguments that fit are no error: without this the fuzzer could test nothing but its own mistakes."""
    done = run("--count", "150", "--seed", SEED, "--changes", "0")
    assert done.returncode == 0 and "150 calls, 150 answered, 0 faults" in done.stdout, (
        done.stdout + done.stderr[-3000:]
    )
