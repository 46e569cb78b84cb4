"""kill -9 at random moments; `make fuzz` does it 200 times a command (`tests/kills.py`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = ("convert", "merge-adapter", "pack", "quantize", "batch", "finetune")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_killed_commands_go_on_to_the_same_bits(name: str) -> None:
    pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
    kills, seed = os.environ.get("LLAMA2_KILLS", "4"), os.environ.get("LLAMA2_FUZZ_SEED", "0")
    words = [sys.executable, str(Path(__file__).with_name("kills.py")), name, "--kills", kills, "--seed", seed]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=36_000)
    assert ran.returncode == 0, ran.stdout + ran.stderr
