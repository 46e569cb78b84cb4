"""A server on loopback over a tiny random model with a byte-level tokenizer."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bytewise import write_tokenizer

from llama2 import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from llama2.engine.engine import Engine
from llama2.serve.constraint import Compiler
from llama2.tokenizer import LlamaTokenizerFast

CONTEXT = 1024
EXTRA = ("fastapi", "uvicorn", "llguidance")


@pytest.fixture(scope="session")
def extra() -> None:
    """Skips where the packages of the extra are absent."""
    for name in EXTRA:
        pytest.importorskip(name, reason="serving needs the extra `serve`")


@pytest.fixture(scope="session")
def tiny_folder(extra: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint: 2 layers, 260 tokens, a context of 1024, weights from a fixed seed."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


class Served:
    """A running server: its address, service and engine."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        policy: Any,
        keys: Any,
        engine: dict[str, Any],
        bounds: Any = None,
        pace: float = 0.0,
    ) -> None:
        from llama2.serve import limits  # the extra may be absent: see `extra`
        from llama2.serve.lifecycle import Life
        from llama2.serve.service import Service

        self.engine = Engine(model, tokenizer, **{"cache_tokens": 16384, **engine})
        if pace:
            self._slow_down(pace)
        self.service = Service(policy, keys, Life())
        self.service.open(self.engine, limits.bounds(self.engine, limits.Wanted()))
        self._start(policy, bounds)

    def _start(self, policy: Any, bounds: Any) -> None:
        import uvicorn

        from llama2.serve.app import make_app
        from llama2.serve.connection import Connections, guarded
        from llama2.serve.lifecycle import Server

        protocol = guarded(bounds or Connections(stall_timeout=policy.stall_timeout))
        config = uvicorn.Config(
            make_app(self.service), port=0, log_config=None, access_log=False, ws="none", http=protocol, backlog=128
        )
        self.server = Server(config, self.service.life, self.service.cut)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def _slow_down(self, seconds: float) -> None:
        """A step takes at least so long, so that a long answer is one on any processor."""
        step: Any = self.engine.runner.step

        def slow(*given: Any) -> Any:
            time.sleep(seconds)
            return step(*given)

        self.engine.runner.step = slow  # type: ignore[method-assign]

    def _run(self) -> None:
        asyncio.run(self.server.serve())

    def send_little(self) -> None:
        """The system takes few bytes of an answer that nobody reads, where else it may take megabytes."""
        for sock in self.server.servers[0].sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # those that it accepts are like it

    def quiet(self, seconds: float = 120) -> bool:
        """Whether nothing runs and no page is held, within some seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (
                not self.engine.running
                and not self.service.sessions
                and self.engine.pool.free == self.engine.pool.count
                and not self.service.life.inside
            ):
                return True
            time.sleep(0.02)
        return False

    def close(self) -> None:
        self.server.should_exit = True
        self._thread.join(15)
        self.service.close()


Serve = Callable[..., Served]


@pytest.fixture(scope="session")
def tiny_parts(tiny_folder: Path) -> tuple[Any, Any]:
    return LlamaForCausalLM.from_pretrained(tiny_folder).eval(), AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module", params=["llama", "bytes", "smollm2"])
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Compiler]:
    """The three kinds of tokenizer, SentencePiece with a dummy space, bytes alone and byte-level BPE, each with the
    compiler of its constraints."""
    if request.param == "bytes":
        folder = tmp_path_factory.mktemp("bytes")
        write_tokenizer(folder)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    elif request.param == "smollm2":
        tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue("smollm2"))
    else:
        tokenizer = LlamaTokenizerFast(request.getfixturevalue("tokenizer_model"))
    return tokenizer, Compiler(tokenizer, len(tokenizer), [tokenizer.eos_token_id])


@pytest.fixture(scope="module")
def serve(tiny_parts: tuple[Any, Any]) -> Iterator[Serve]:
    """serve(policy fields, keys=..., engine={...}, pace=seconds of a step) starts a server of its own."""
    running: list[Served] = []

    from llama2.serve.policy import Policy

    def start(
        keys: Any = None, engine: dict[str, Any] | None = None, bounds: Any = None, pace: float = 0.0, **policy: Any
    ) -> Served:
        chosen = Policy(**{"names": ("tiny",), **policy})
        running.append(Served(*tiny_parts, chosen, keys, engine or {}, bounds, pace))
        return running[-1]

    yield start
    for served in running:
        served.close()


@pytest.fixture(scope="module")
def served(serve: Serve) -> Iterator[Served]:
    """One server for a module's tests; at their end it holds no page."""
    found = serve()
    yield found
    assert found.quiet()
