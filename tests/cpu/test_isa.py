"""LLAMA2_ISA names the best instruction set that a process may use."""

import os
import subprocess
import sys

import pytest

from llama2 import cpu
from llama2.compiled import instruction_sets

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the compiled module is not built")

SHOW = """
import torch
from llama2 import compiled, cpu
from tiny import tiny_ids, tiny_model
print(compiled.instruction_sets())
from llama2.native import native_runner
print(native_runner(tiny_model(torch.float32)).isa)
"""


def run(asked: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LLAMA2_ISA": asked, "PYTHONPATH": "tests"}
    return subprocess.run([sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("asked", instruction_sets())
def test_lowers_the_whole_process(asked: str) -> None:
    found = run(asked)
    assert found.returncode == 0, found.stderr
    sets, used = found.stdout.splitlines()
    assert sets == str(instruction_sets()[instruction_sets().index(asked) :]) and used == asked


def test_an_unknown_name_is_an_error_that_lists_what_there_is() -> None:
    found = run("avx1024")
    assert found.returncode == 1
    assert "InputError: LLAMA2_ISA is 'avx1024'; this machine and build have auto, " in found.stderr
    assert "scalar" in found.stderr.splitlines()[-1]
