"""Large bodies are read in other processes: nothing of them is parsed in the one that holds the streams."""

import asyncio
import os
import subprocess
import threading
import time
from typing import Any

import pytest
from serve.conftest import Served
from wire import post

from llama2.serve import validation
from llama2.serve.errors import Refusal
from llama2.serve.openai_completions import CompletionBody
from llama2.serve.readers import LARGE, Readers
from llama2.serve.service import Service
from llama2.serve.workers import Workers

HOSTILE: dict[str, tuple[str, str]] = {
    "faults in a list": ("/v1/completions", '{"prompt": "x", "stop": [' + "1," * 60_000 + "1]}"),
    "faults in objects": ("/v1/chat/completions", '{"messages": [' + '{"role": 1},' * 20_000 + "1]}"),
    "unknown fields": ("/v1/completions", "{" + ", ".join(f'"f{i}": 1' for i in range(20_000)) + "}"),
    "too many values": ("/v1/completions", '{"prompt": [' + "1," * 300_000 + "1]}"),
    "a field of no meaning": ("/v1/completions", '{"prompt": "x", "user": [' + "{}," * 40_000 + "1]}"),
    "no JSON": ("/generate", '{"inputs": "' + "x" * LARGE),
    "any of three": ("/invocations", '{"what": [' + "1," * 60_000 + "1]}"),
}


@pytest.fixture
def readers() -> Any:
    made = Readers(2)
    yield made
    made.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_no_large_body_is_parsed_in_the_servers_process(
    name: str, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    inside = validation.Body.model_validate_json

    def counted(cls: Any, data: bytes, **more: Any) -> Any:
        sizes.append(len(data))
        return inside.__func__(cls, data, **more)  # type: ignore[attr-defined]

    monkeypatch.setattr(validation.Body, "model_validate_json", classmethod(counted))
    monkeypatch.setattr(validation, "check_depth", lambda data: sizes.append(len(data)))
    before = served.service.readers.calls
    path, body = HOSTILE[name]
    assert post(served.port, path, body.encode()).status in (400, 422)
    assert served.service.readers.calls == before + 1
    assert not [size for size in sizes if size >= LARGE]


def test_a_large_body_that_is_right_is_answered(served: Served) -> None:
    body = {"prompt": "Hi", "max_tokens": 2, "user": "x" * LARGE}
    assert post(served.port, "/v1/completions", body).status == 200


def test_values_are_counted_outside_of_strings() -> None:
    validation.check_values(b'{"a": "' + b"," * validation.MAX_VALUES + b'\\",,"}')
    validation.check_values(b"[" + b"1," * (validation.MAX_VALUES - 1) + b"1]")
    validation.check_values(b'["' + b"[{" * validation.MAX_CONTAINERS + b'"]')
    with pytest.raises(Refusal, match="32769 lists and objects"):
        validation.check_values(b"[" + b"[]," * (validation.MAX_CONTAINERS - 1) + b"[]]")
    with pytest.raises(Refusal, match="300001 values"):
        validation.check_values(b"[" + b"1," * validation.MAX_VALUES + b"1]")


def test_calls_go_to_other_processes_and_refusals_come_back(readers: Readers) -> None:
    readers.prepare()
    mine, again = readers(os.getpid), readers(os.getpid)
    assert mine == again != os.getpid()
    with pytest.raises(Refusal, match="stop") as caught:
        readers(validation.read, CompletionBody, b'{"prompt": "x", "stop": [1]}')
    assert caught.value.kind == "validation" and str(caught.value.param).startswith("stop")
    assert readers(os.getpid) == mine


def test_a_process_that_ends_is_a_refusal_and_the_next_call_has_another(readers: Readers) -> None:
    first = readers(os.getpid)
    with pytest.raises(Refusal, match="ended"):
        readers(os._exit, 3)
    assert readers(os.getpid) not in (first, os.getpid())


def test_a_deadline_ends_the_process(readers: Readers) -> None:
    async def run() -> int:
        workers = Workers(1, 0.5)
        await Workers(1, 0)("a", readers.prepare)
        first = await workers("a", readers, os.getpid)
        with pytest.raises(Refusal, match="validation_timeout"):
            await workers("a", readers, time.sleep, 60)
        assert workers.lost == 0
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)
        return first

    assert asyncio.run(asyncio.wait_for(run(), 60))


def test_no_more_processes_than_allowed(readers: Readers) -> None:
    for _ in range(3):
        readers.prepare()
    pids: set[str] = set()
    threads = [
        threading.Thread(target=lambda: pids.add(readers(subprocess.getoutput, "sleep 0.2; echo $PPID")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= len(pids) <= 2 and str(readers(os.getpid)) in pids


def test_a_closed_service_has_no_process() -> None:
    service = Service()
    service.readers.prepare()
    pid = service.readers(os.getpid)
    service.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
