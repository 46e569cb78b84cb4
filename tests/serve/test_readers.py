"""Large bodies are read in other processes: nothing of them is parsed in the one that holds the streams."""

import asyncio
import json
import os
import pickle
import subprocess
import threading
import time
from typing import Any

import pytest
from serve.conftest import Served
from wire import post

from llama2.serve import validation
from llama2.serve.errors import Refusal
from llama2.serve.openai_chat import ChatBody
from llama2.serve.openai_completions import CompletionBody
from llama2.serve.reader import Resident
from llama2.serve.readers import LARGE, MOST_KEPT, ReaderError, Readers
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


LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", {"prompt": "Hi " * 20_000, "max_tokens": 2, "truncate_prompt_tokens": 8}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi " * 20_000}], "max_tokens": 2}),
    "TGI": ("/generate", {"inputs": "Hi " * 20_000, "parameters": {"max_new_tokens": 2, "truncate": 8}}),
    "llama.cpp": ("/completion", {"prompt": "Hi " * 20_000, "n_predict": 2}),
    "Anthropic": ("/v1/messages", {"messages": [{"role": "user", "content": "Hi " * 20_000}], "max_tokens": 2}),
    "responses": ("/v1/responses", {"input": "Hi " * 20_000, "max_output_tokens": 2}),
    "Ollama": ("/api/chat", {"messages": [{"role": "user", "content": "Hi " * 20_000}], "stream": False}),
    "Ollama, raw": ("/api/generate", {"prompt": "Hi " * 20_000, "raw": True, "stream": False}),
    "tokenize": ("/tokenize", {"inputs": "Hi " * 20_000}),
    "tokenize, vLLM": ("/tokenize", {"prompt": "Hi " * 20_000}),
    "tokenize, llama.cpp": ("/tokenize", {"content": "Hi " * 20_000}),
    "template": ("/apply-template", {"messages": [{"role": "user", "content": "Hi " * 20_000}]}),
    "detokenize": ("/detokenize", {"tokens": [5] * 20_000}),
    "count": ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "Hi " * 20_000}]}),
}


@pytest.mark.parametrize("name", LONG)
def test_no_long_text_is_tokenised_in_the_servers_process(
    name: str, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, seen = type(served.service.tokenizer), list[int]()

    def watched(method: str) -> Any:
        inside = getattr(kind, method)

        def call(self: Any, given: Any, *args: Any, **more: Any) -> Any:
            seen.append(len(given))
            return inside(self, given, *args, **more)

        return call

    for method in ("__call__", "apply_chat_template", "decode"):
        monkeypatch.setattr(kind, method, watched(method))
    path, body = LONG[name]
    status = post(served.port, path, body).status
    assert status in (200, 400, 413, 422)
    assert not [length for length in seen if length > 1_000], "texts of these lengths were read beside the streams"
    assert served.service.readers.calls >= 2  # the body, then what it asks


def test_lists_of_a_large_body_stay_pickled_until_they_are_asked_for(readers: Readers) -> None:
    messages = [{"role": "user", "content": "x"}] * 2_000
    body, _ = readers(validation.read_apart, ChatBody, json.dumps({"messages": messages, "seed": 7}).encode(), "warn")
    assert "messages" not in vars(body) and body.seed == 7
    sent: ChatBody = pickle.loads(pickle.dumps(body))
    assert "messages" not in vars(sent)
    assert len(sent.messages) == 2_000 and sent.messages[-1].content == "x" and "messages" in vars(sent)
    with pytest.raises(AttributeError):
        sent.mesages  # noqa: B018


def test_a_model_is_sent_once_to_each_process_and_forgotten_behind_the_bound(readers: Readers) -> None:
    made = [_Numbered(i) for i in range(MOST_KEPT + 2)]
    for each in (made[0], made[0], *made, made[0]):
        assert readers(abs, each) == each.value
    assert [each.pickles for each in made] == [2, *[1] * (MOST_KEPT + 1)]


def test_what_fails_in_a_reader_is_no_refusal(readers: Readers) -> None:
    with pytest.raises(ReaderError, match="ZeroDivisionError"):
        readers(divmod, 1, 0)
    with pytest.raises(ReaderError, match="pickle"):
        readers(threading.Lock)
    assert readers(divmod, 7, 2) == (3, 1)


class _Numbered(Resident):
    def __init__(self, value: int) -> None:
        super().__init__()
        self.value, self.pickles = value, 0

    def pickled(self) -> bytes:
        self.pickles += 1
        return super().pickled()

    def sent(self) -> int:
        return self.value
