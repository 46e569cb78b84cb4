"""Holds csrc to its style: layout, lines, includes, where intrinsics stand, and the faults that clang-tidy finds.

`make check` runs it; `--fix` (`make format`) lays the files out in place. clang-format and clang-tidy come from PyPI
(extra `dev`). A translation unit that passed is not read again until it, a header, or the checks change: what passed
is remembered in .make/tidy.
"""

import hashlib
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
BIN = Path(sys.executable).parent
PASSED = ROOT / ".make" / "tidy"
GENERATED = ROOT / ".make" / "generated"
GRIDS = ROOT / "src" / "llama2" / "quantization" / "grids.bin"
WIDTH = 120

# Files that include in their middle: each is written over the kernels before it.
LATE_INCLUDES = {"isa.cpp", "matmul.inl", "training.inl"}
INTRINSIC = re.compile(r"\b(_mm\d*_\w+|__m(128|256|512|mask)\w*|v(ld1|st1|dup|fma|dot)q_\w+|__builtin_ia32_\w+)")
# Beside simd_*.h: the register tile of bfloat16 sums is written for one instruction; a pause has no wrapper.
INTRINSICS = {"gemm_bf16.inl", "pool.h"}


def sources(*suffixes: str) -> list[Path]:
    return sorted(path for path in CSRC.glob("*/*") if path.suffix in suffixes)


def layout(path: Path) -> str:
    """Returns the file as clang-format lays it out; an .inl is C++ that no suffix says."""
    name = f"--assume-filename={path.with_suffix('.cpp')}"
    with path.open("rb") as file:
        return subprocess.run([BIN / "clang-format", name], stdin=file, capture_output=True, check=True).stdout.decode()


def check_layout(path: Path, fix: bool) -> Iterator[str]:
    text, wanted = path.read_text(), layout(path)
    if text == wanted:
        return
    if fix:
        path.write_text(wanted)
        return
    pairs = zip(text.splitlines(), wanted.splitlines())
    line = next((i for i, (a, b) in enumerate(pairs, 1) if a != b), len(text.splitlines()))
    yield f"{path}:{line}: clang-format lays it out otherwise; `make format` does so"


def check_lines(path: Path) -> Iterator[str]:
    code = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if len(line) > WIDTH:
            yield f"{path}:{number}: {len(line)} columns; {WIDTH} at most"
        table = line.startswith("#include") and '.inc"' in line  # numbers within an initialiser
        if line.startswith("#include") and code and not table and path.name not in LATE_INCLUDES:
            yield f"{path}:{number}: an include below code"
        code = code or (bool(line) and not line.startswith(("#", "//")))
        found = INTRINSIC.search(line.split("//")[0])
        if found and not path.name.startswith("simd_") and path.name not in INTRINSICS:
            yield f"{path}:{number}: {found[0]} outside simd_*.h"


def units() -> dict[Path, list[str]]:
    """Returns every translation unit with the flags that it is read with; bind/ where nanobind is installed."""
    isa = ["-DLLAMA2_NO_UNROLL", "-DLLAMA2_ISA_NAME=scalar", '-DLLAMA2_SIMD="kernels/simd_scalar.h"']
    flags = {path: isa if path.name == "isa.cpp" else [] for path in sources(".cpp") if path.parent.name != "bind"}
    nanobind = find_spec("nanobind")
    if nanobind is None or nanobind.origin is None:
        print("nanobind is not installed (pip install -e '.[dev]'): csrc/bind is not read by clang-tidy")
        return flags
    headers = [Path(nanobind.origin).parent / "include", sysconfig.get_paths()["include"]]
    return flags | {path: [f"-isystem{h}" for h in headers] for path in sources(".cpp") if path.parent.name == "bind"}


def write_generated() -> None:
    """Makes what CMakeLists.txt generates: the grids of GGUF's IQ types as numbers, and the rows of a build."""
    GENERATED.mkdir(parents=True, exist_ok=True)
    (GENERATED / "grids.inc").write_text("".join(f"{byte}," for byte in GRIDS.read_bytes()) + "\n")
    (GENERATED / "rows.inc").write_text("BUILT(scalar)\n")


def tidy(unit: tuple[Path, list[str]], shared: bytes) -> str:
    path, flags = unit
    digest = hashlib.sha256(shared + path.read_bytes() + repr(flags).encode()).hexdigest()
    stamp = PASSED / f"{path.parent.name}-{path.stem}"
    if stamp.exists() and stamp.read_text() == digest:
        return ""
    command = [BIN / "clang-tidy", "--quiet", path, "--", "-std=c++17", f"-I{CSRC}", f"-I{GENERATED}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return done.stdout + done.stderr
    stamp.write_text(digest)
    return ""


def main() -> int:
    fix = "--fix" in sys.argv
    problems = []
    for path in sources(".cpp", ".h", ".inl"):
        problems += check_layout(path, fix)
        problems += check_lines(path)
    if not fix:
        PASSED.mkdir(parents=True, exist_ok=True)
        write_generated()
        version = subprocess.run([BIN / "clang-tidy", "--version"], capture_output=True, check=True).stdout
        headers = b"".join(path.read_bytes() for path in sources(".h", ".inl"))
        shared = hashlib.sha256(version + (ROOT / ".clang-tidy").read_bytes() + headers).digest()
        with ThreadPoolExecutor(2) as pool:
            problems += [text for text in pool.map(lambda unit: tidy(unit, shared), units().items()) if text]
    print("\n".join(problems), end="\n" if problems else "")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
