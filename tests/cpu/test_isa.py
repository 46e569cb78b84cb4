"""LLAMA2_ISA names the best instruction set that a process may use."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama2 import cpu
from llama2.compiled import instruction_sets, left_out

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
    wanted = wanted[wanted.index(asked) if asked != "auto" else 0 :]
    assert instruction_sets() == [name for name in wanted if name not in left_out()]


PROGRAM = """
#include <cstdio>
#include <exception>
#include "kernels/kernels.h"
#include "kernels/rows.h"
namespace llama2 {
#define BUILT(name) const Kernels* kernels_##name() { static Kernels table = {#name}; return &table; }
#include "rows.inc"
}
int main() {
  try {
    const char* names[8];
    for (int i = 0, n = llama2::list_kernels(names, 8); i < n; ++i) std::printf("%s ", names[i]);
    for (int i = 0, n = llama2::list_left_out(names); i < n; ++i) std::printf("-%s ", names[i]);
  } catch (const std::exception& error) {
    std::printf("%s", error.what());
  }
}
"""
CSRC = Path(__file__).parents[2] / "csrc"


def selection(folder: Path, rows: list[str], asked: str = "auto") -> str:
    """What dispatch.cpp says in a build of these rows: its instruction sets, -those left out, or its error."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "rows.inc").write_text("".join(f"BUILT({row})\n" for row in rows))
    (folder / "main.cpp").write_text(PROGRAM)
    sources = [str(folder / "main.cpp"), str(CSRC / "kernels" / "dispatch.cpp")]
    command = [compiler, "-std=c++17", f"-I{CSRC}", f"-I{folder}", *sources, "-o", str(folder / "program")]
    subprocess.run(command, check=True)
    environment = {**os.environ, "LLAMA2_ISA": asked}
    return subprocess.run([str(folder / "program")], env=environment, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86_64")
def test_a_build_without_a_row_says_so(tmp_path: Path) -> None:
    assert selection(tmp_path, ["scalar"]).startswith("scalar")
    if "avx2" not in instruction_sets() + left_out():
        pytest.skip("this processor has no AVX2")
    assert "-avx2" in selection(tmp_path, ["scalar"]).split()
    assert selection(tmp_path, ["avx2"]).split()[0] == "avx2"
    assert "-scalar" in selection(tmp_path, ["avx2"]).split()
    assert selection(tmp_path, ["avx2"], "scalar") == (
        "LLAMA2_ISA is 'scalar'; this machine and build have auto, avx2, and this build leaves that one out"
    )


@pytest.mark.skipif(
    platform.machine() != "x86_64" or "avx512bf16" in instruction_sets() + left_out(), reason="a row that is not here"
)
def test_a_row_that_this_processor_does_not_run(tmp_path: Path) -> None:
    assert selection(tmp_path, ["avx512bf16", "scalar"], "avx512bf16") == (
        "LLAMA2_ISA is 'avx512bf16'; this machine and build have auto, scalar, and this processor does not run that one"
    )
    assert selection(tmp_path, ["avx512bf16"]).startswith(
        "the native engine was built for another processor (avx512bf16)"
    )
