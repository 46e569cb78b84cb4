"""The engine over a GGUF file in a process in which torch cannot be imported."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama2 import cpu
from llama2.engine.engine import Engine
from llama2.runners.native import NativeModel

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native engine is not built")
WAYS: list[dict[str, Any]] = [
    {},
    {"do_sample": True},
    {"do_sample": True, "top_k": 0, "top_p": 0.8, "repetition_penalty": 1.2},
]
CODE = """
import json, sys
sys.modules["torch"] = None  # an import raises
from pathlib import Path
from llama2 import cpu
from llama2.checkpoint.gguf import GgufFile
from llama2.engine.engine import Engine

path, ways = json.loads(sys.argv[1])
draft = cpu.CpuModel.from_source(GgufFile(Path(path)))
for given in (None, draft):
    with Engine(cpu.CpuModel.from_source(GgufFile(Path(path))), draft=given) as engine:
        found = [engine.generate([[1, 5, 9], [7, 3]], max_new_tokens=12, eos_token_id=None, seed=3, logprobs=2, **way)
                 for way in ways]
    print(json.dumps([[c.tokens for c in each] for each in found]))
"""


def test_the_engine_says_the_same_with_and_without_torch(smollm2: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps([str(smollm2), WAYS])], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    alone, drafted = map(json.loads, done.stdout.splitlines())
    given: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, "seed": 3, "logprobs": 2}
    with Engine(NativeModel.from_gguf(smollm2)) as engine:
        wanted = [[c.tokens for c in engine.generate([[1, 5, 9], [7, 3]], **given, **way)] for way in WAYS]
    assert alone == drafted == wanted
