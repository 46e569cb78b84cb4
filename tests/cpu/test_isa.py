"""LLAMA2_ISA names the best instruction set that a process may use."""

import os
import platform
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
from llama2.runners.native import native_runner
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


NEEDS = {  # as Linux names the features
    "avx512bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512vbmi", "avx512_bf16"},
    "avx512vnni": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    "avxvnni": {"avx2", "fma", "f16c", "avx_vnni"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx2": {"avx2", "fma", "f16c"},
}


@pytest.mark.skipif(
    not os.path.exists("/proc/cpuinfo") or platform.machine() != "x86_64", reason="Linux on x86_64 tells"
)
def test_every_row_is_there_whose_features_this_processor_has() -> None:
    """Features are independent: VNNI without BF16 gets the kernels with VNNI."""
    with open("/proc/cpuinfo") as file:
        flags = set(next(line for line in file if line.startswith("flags")).split())
    asked = os.environ.get("LLAMA2_ISA", "auto")
    wanted = [name for name, needs in NEEDS.items() if needs <= flags] + ["scalar"]
    assert instruction_sets() == wanted[wanted.index(asked) if asked != "auto" else 0 :]
