"""Clients of many projects, unmodified and in an environment of their own (make clients), against `llama2 serve`.

The servers are SmolLM2 and a tiny random model with Llama 2's own tokenizer. LLAMA2_CLIENTS is the interpreter of the
environment. The cases are in `with_CLIENT.py`.
"""

import ast
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.parity, pytest.mark.timeout(1800)]
HERE = Path(__file__).resolve().parent
INTERPRETER = os.environ.get("LLAMA2_CLIENTS", "")
CLIENTS = sorted(path.stem.removeprefix("with_") for path in HERE.glob("with_*.py"))


def cases(client: str) -> list[str]:
    """The names of the cases, without importing the client."""
    tree = ast.parse((HERE / f"with_{client}.py").read_text())
    return [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("case_")]


@pytest.fixture(scope="session")
def llama2_folder(tokenizer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 2 layers with weights from a fixed seed, and Llama 2's tokenizer."""
    import torch

    from llama2 import LlamaConfig, LlamaForCausalLM, LlamaTokenizer
    from llama2.tokenizer import LLAMA2_CHAT_TEMPLATE

    folder = tmp_path_factory.mktemp("llama2")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    tokenizer = LlamaTokenizer(str(tokenizer_model))
    tokenizer.chat_template = LLAMA2_CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["smollm2", "llama2"])
def server(request: Any) -> Iterator[tuple[str, str]]:
    """The address of a server and the name of its model."""
    if not INTERPRETER:
        pytest.skip("needs LLAMA2_CLIENTS, the interpreter of the clients' environment; `make clients` makes it")
    model = request.getfixturevalue("smollm2" if request.param == "smollm2" else "llama2_folder")
    command = [sys.executable, "-m", "llama2", "serve", str(model), "--port", "0", "--served-model-name", request.param]
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen([*command, "--max-batch-total-tokens", "16384"], stderr=log.file)
        try:
            yield _ready(process, Path(log.name)), request.param
        finally:
            process.terminate()
            process.wait(60)


def _ready(process: "subprocess.Popen[bytes]", log: Path) -> str:
    while process.poll() is None:
        for word in log.read_text().split():
            if (address := word.strip('",.')).startswith("http://127.0.0.1:"):
                try:
                    urllib.request.urlopen(f"{address}/ready", timeout=60).close()
                    return address
                except OSError:  # 503 while it loads
                    break
        time.sleep(0.1)
    raise AssertionError(f"the server has ended with {process.returncode}: {log.read_text()}")


@cache
def outcomes(client: str, url: str, model: str) -> dict[str, str]:
    """What each case of a client ended with. One process for all of them."""
    environment = {
        **os.environ, "OPENAI_API_KEY": "none", "PYTHONWARNINGS": "ignore",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [INTERPRETER, str(HERE / "run_cases.py"), f"with_{client}", str(out), url, model]
        ran = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
        found: dict[str, str] = json.loads(out.read_text()) if out.exists() else {}
    return found | {name: ran.stderr[-4000:] or "not reached" for name in cases(client) if name not in found}


@pytest.mark.parametrize(("client", "case"), [(name, case) for name in CLIENTS for case in cases(name)])
def test_case(server: tuple[str, str], client: str, case: str) -> None:
    failure = outcomes(client, *server)[case]
    assert not failure, failure
