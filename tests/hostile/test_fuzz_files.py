"""Changed files of every kind of folder: each is read, or refused by one of the library's own errors.

LLAMA2_FUZZ is how many files (120, so that every kind has its turn; `make fuzz` reads 20,000), LLAMA2_FUZZ_SEED where
they begin. A failure prints the line that repeats it. What once failed stands in `test_corpus.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COUNT, SEED = os.environ.get("LLAMA2_FUZZ") or "120", os.environ.get("LLAMA2_FUZZ_SEED") or "0"


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and limits on memory")
def test_no_file_is_a_failure_of_a_reader() -> None:
    """In a process of its own, since forks must not inherit threads."""
    script = Path(__file__).with_name("fuzz.py")
    found = subprocess.run([sys.executable, script, "--count", COUNT, "--seed", SEED], capture_output=True, text=True)
    assert found.returncode == 0 and f"{COUNT} inputs" in found.stdout, found.stderr[-2000:]
    assert " 0 faults" in found.stdout, found.stdout[-5000:]
