"""What goes wrong: nonsense, clients that leave or do not read, too much at once, SIGTERM. Nothing leaks or hangs."""

import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve.conftest import Serve, Served
from wire import begin, call, get, post, rest

from llama2.errors import InputError
from llama2.serve.auth import Keys

LONG: dict[str, Any] = {"prompt": "Hi", "max_tokens": 900, "ignore_eos": True, "stream": True}
PATHS = ("/generate", "/generate_stream", "/", "/v1/completions", "/v1/chat/completions", "/invocations",
         "/tokenize", "/chat_tokenize", "/detokenize", "/v1/embeddings")  # fmt: skip
FINE = {200, 400, 404, 413, 415, 422}


@pytest.fixture(scope="module")
def small(serve: Serve) -> Iterator[Served]:
    """A server with room for four texts at once, where a long answer takes seconds."""
    found = serve(engine={"cache_tokens": 4096, "width": 4, "waiting": 4}, pace=0.003)
    yield found
    assert found.quiet()


@pytest.fixture(scope="module")
def leisurely(serve: Serve) -> Iterator[Served]:
    """A server where a long answer takes seconds."""
    found = serve(pace=0.003)
    yield found
    assert found.quiet()


def until(true: Callable[[], Any]) -> None:
    """Waits; how long is pytest's bound on a test."""
    while not true():
        time.sleep(0.005)


# -- nonsense ----------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from([2**63, -1, 1e308, "", "\0", "<|end|>", "a" * 5000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
FIELDS = [
    "inputs", "parameters", "stream", "prompt", "messages", "model", "max_tokens", "temperature", "top_p", "n", "stop",
    "seed", "logprobs", "best_of", "echo", "logit_bias", "tools", "tool_choice", "response_format", "top_logprobs",
    "stream_options",     "presence_penalty", "tokens", "input", "top_k", "min_p", "stop_token_ids", "min_tokens",
]  # fmt: skip
PARAMETERS = ["temperature", "top_k", "top_p", "best_of", "grammar", "stop", "seed", "truncate", "details", "typical_p",
              "top_n_tokens", "watermark", "decoder_input_details", "frequency_penalty", "do_sample"]  # fmt: skip
GOOD: dict[str, Any] = {"inputs": "x", "prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
       st.dictionaries(st.sampled_from(PARAMETERS), VALUES, max_size=3), st.booleans())  # fmt: skip
def test_no_field_of_any_kind_is_a_failure_of_the_server(
    served: Served, path: str, fields: dict[str, Any], parameters: dict[str, Any], good: bool
) -> None:
    body = ({k: v for k, v in GOOD.items() if path.startswith("/v1") == (k != "inputs")} if good else {}) | fields
    if not path.startswith("/v1"):
        body.setdefault("parameters", {"max_new_tokens": 2} | parameters)
    reply = post(served.port, path, body)
    assert reply.status in FINE, (reply.status, reply.content)
    if reply.status != 200:
        assert "error" in reply.json


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(PATHS), st.binary(max_size=200), st.data())
def test_no_bytes_are_a_failure_of_the_server(served: Served, path: str, noise: bytes, data: st.DataObject) -> None:
    good = json.dumps(GOOD).encode()
    at = data.draw(st.integers(0, len(good)))
    for body in (noise, good[:at] + noise, good[:at] + noise + good[at:]):
        assert post(served.port, path, body).status in FINE


def test_every_number_at_and_beyond_its_bounds(served: Served) -> None:
    for name in ("temperature", "top_p", "n", "seed", "presence_penalty", "max_tokens", "top_k", "min_p", "logprobs"):
        for text in (
            "NaN",
            "Infinity",
            "-Infinity",
            "1e999",
            "-1e999",
            "1" * 400,
            "-0.0",
            "0",
            "true",
            '"1"',
            "[]",
            "{}",
        ):
            body = f'{{"prompt": "x", "max_tokens": 1, "{name}": {text}}}'.replace(
                '"max_tokens": 1, "max_tokens"', '"max_tokens"'
            )
            reply = post(served.port, "/v1/completions", body.encode())
            assert reply.status in (200, 400), (name, text, reply.content)
            if "Inf" in text or "NaN" in text or "999" in text:
                assert reply.status == 400, (name, text)


# -- clients that leave or do not read -----------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_pages_at_once(leisurely: Served) -> None:
    for body in (LONG, LONG | {"stream": False}, LONG | {"n": 4}):
        sock = begin(leisurely.port, "/v1/completions", body)
        until(lambda: leisurely.engine.running)
        before = leisurely.engine.tokens_out
        sock.close()
        assert leisurely.quiet()
        assert leisurely.engine.tokens_out - before < 800


def test_many_clients_that_vanish_in_the_middle(leisurely: Served) -> None:
    served = leisurely
    rng = random.Random(1)

    def vanish(i: int) -> None:
        path, body = rng.choice([
            ("/v1/completions", LONG), ("/generate_stream", {"inputs": "Hi" * rng.randrange(1, 50)}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "stream": bool(i % 2)}),
            ("/generate", {"inputs": "Hi"}),
        ])  # fmt: skip
        sock = begin(served.port, path, body)
        time.sleep(rng.random() * 0.1)
        if i % 3:
            sock.recv(rng.randrange(1, 2000)) if body.get("stream") else None
        sock.close()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(vanish, range(150)))
    assert served.quiet()
    assert post(served.port, "/generate", {"inputs": "x", "parameters": {"max_new_tokens": 2}}).status == 200


def test_slow_readers_hold_nobody_up(serve: Serve) -> None:
    served = serve(stall_timeout=1.0)
    served.send_little()
    body = LONG | {"logprobs": 20, "max_tokens": 200}  # some 400 kB of events
    socks = [begin(served.port, "/v1/completions", body, size=1024) for _ in range(6)]
    assert post(served.port, "/v1/completions", {"prompt": "x", "max_tokens": 3}).status == 200
    assert served.quiet()  # those that do not read are dropped, pages and all
    for sock in socks:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)  # or the rest would come byte by byte
        assert b"[DONE]" not in rest(sock)


# -- too much ----------------------------------------------------------------------------------------------------


def test_a_full_queue_is_429_with_a_time_to_wait(small: Served) -> None:
    socks = [begin(small.port, "/v1/completions", LONG) for _ in range(8)]
    until(lambda: small.engine._count == 8)
    openai = post(small.port, "/v1/completions", LONG)
    assert openai.status == 429 and int(openai.headers["retry-after"]) >= 1
    assert openai.json["error"]["type"] == "rate_limit_error"
    tgi = post(small.port, "/generate_stream", {"inputs": "x"})
    assert (tgi.status, tgi.json["error_type"]) == (429, "overloaded")
    for sock in socks:
        sock.close()
    assert small.quiet()


def test_all_answers_of_a_request_are_taken_or_none(small: Served) -> None:
    socks = [begin(small.port, "/v1/completions", LONG) for _ in range(5)]
    until(lambda: small.engine._count == 5)
    assert post(small.port, "/v1/completions", LONG | {"n": 8}).status == 429
    for sock in socks:
        sock.close()
    assert small.quiet()


def test_the_bound_on_requests_inside(serve: Serve) -> None:
    served = serve(max_concurrent_requests=2, pace=0.003)
    socks = [begin(served.port, "/v1/completions", LONG) for _ in range(2)]
    until(lambda: len(served.service.sessions) == 2)
    reply = post(served.port, "/v1/completions", LONG)
    assert reply.status == 429 and "max_concurrent_requests" in reply.json["error"]["message"]
    for sock in socks:
        sock.close()


def test_a_request_larger_than_the_memory(serve: Serve) -> None:
    served = serve(engine={"cache_tokens": 128})
    reply = post(served.port, "/generate", {"inputs": "x" * 200})
    assert reply.status == 422 and "128" in reply.json["error"]
    reply = post(served.port, "/v1/completions", {"prompt": "x" * 200, "max_tokens": 5})
    assert reply.status == 400 and reply.json["error"]["code"] == "context_length_exceeded"
    fits = post(served.port, "/v1/completions", {"prompt": "x", "max_tokens": 500, "ignore_eos": True})
    assert fits.json["usage"]["completion_tokens"] <= 128 and fits.json["warnings"]
    with ThreadPoolExecutor(6) as pool:  # more than fits at once: they take turns
        body = {"inputs": "x" * 40, "parameters": {"max_new_tokens": 60}}
        replies = list(pool.map(lambda _: post(served.port, "/generate", body), range(6)))
    assert {r.status for r in replies} == {200} and len({r.json["generated_text"] for r in replies}) == 1


def test_a_deadline(serve: Serve) -> None:
    served = serve(request_timeout=0.3, pace=0.003)
    whole = post(served.port, "/v1/completions", LONG | {"stream": False, "n": 8})
    assert whole.status == 504 and "request_timeout" in whole.json["error"]["message"]
    stream = post(served.port, "/v1/completions", LONG | {"n": 8})
    last = stream.events[-1] if stream.status == 200 else stream.json
    assert last["error"]["code"] == "deadline_exceeded"
    assert served.quiet()


# -- keys --------------------------------------------------------------------------------------------------------


def test_every_route_but_the_listed_needs_a_key(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nalice: one\ntwo\n")
    served = serve(keys=Keys(["given"], file))
    open_routes = {"/", "/health", "/v1/health", "/ready", "/ping", "/docs", "/openapi.json", "/api/version"}
    for path, methods in get(served.port, "/openapi.json").json["paths"].items():
        for method in methods:
            reply = call(served.port, method.upper(), path.replace("{id}", "tiny"), None if method == "get" else b"{}")
            if (method == "get" and path in open_routes) or path == "/ping":
                assert reply.status == 200, path
            else:
                assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer"), path
    for key, status in (("given", 200), ("one", 200), ("two", 200), ("ONE", 401), ("", 401), ("alice: one", 401)):
        assert get(served.port, "/info", authorization=f"Bearer {key}").status == status, key
    host = get(served.port, "/info", host="x/health?")  # the path decides, not the Host header
    assert host.status == 401
    file.write_text("three\n")
    monkeypatch.setattr("llama2.serve.auth._LOOK_AGAIN", 0.0)
    assert get(served.port, "/info", authorization="Bearer three").status == 200
    assert get(served.port, "/info", authorization="Bearer one").status == 401
    with pytest.raises(InputError, match="empty"):
        Keys([""])


def test_keys_share_no_cached_prefix(serve: Serve) -> None:
    served = serve(keys=Keys(["a", "b"]))
    found = []
    for key in ("a", "b", "a"):
        body = {"prompt": "x" * 64, "max_tokens": 1}
        reply = call(served.port, "POST", "/v1/completions", body, {"authorization": f"Bearer {key}"})
        found.append(reply.json["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert found == [0, 0, 48]


# -- the end -----------------------------------------------------------------------------------------------------

START = "import sys; from llama2.cli import main; sys.exit(main(sys.argv[1:]))"


def start(folder: Path, log: Path, *words: str) -> tuple[subprocess.Popen[bytes], int]:
    """`llama2 serve` in a process of its own, and its port once it is ready."""
    argv = [
        sys.executable,
        "-c",
        START,
        "serve",
        str(folder),
        "--port",
        "0",
        "--max-batch-total-tokens",
        "8192",
        *words,
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(argv, stderr=file)
    while process.poll() is None:  # how long that may take is pytest's bound on a test
        found = re.search(r"running on http://127.0.0.1:(\d+)", log.read_text())
        if found and get(int(found[1]), "/ping").status == 200:
            return process, int(found[1])
        time.sleep(0.05)
    raise AssertionError(f"the server has ended with {process.returncode}: {log.read_text()}")


def test_sigterm_under_load_loses_no_accepted_answer(tiny_folder: Path, tmp_path: Path) -> None:
    process, port = start(tiny_folder, tmp_path / "log")
    replies: list[Any] = []

    def ask(i: int) -> None:
        for _ in range(50):
            try:
                body = {"prompt": f"Hi {i}", "max_tokens": 200, "stream": bool(i % 2), "ignore_eos": True}
                reply = post(port, "/v1/completions", body)
            except OSError:
                return  # the port is closed: nothing was accepted
            replies.append(reply)
            if reply.status != 200:
                return

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    until(lambda: len(replies) >= 12)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert process.wait(60) == 0
    good = [r for r in replies if r.status == 200]
    assert len(good) >= 12
    for reply in replies:
        if reply.status == 503:
            assert reply.json["error"]["code"] == "shutting_down" and reply.headers["retry-after"]
        else:
            assert reply.status == 200
            if "event-stream" in reply.headers["content-type"]:
                assert reply.events[-1] == "[DONE]" and reply.events[-2]["choices"][0]["finish_reason"] == "length"
            else:
                assert reply.json["usage"]["completion_tokens"] == 200


def test_what_takes_too_long_is_cut_short_with_a_reason(tiny_folder: Path, tmp_path: Path) -> None:
    process, port = start(tiny_folder, tmp_path / "log", "--shutdown-timeout", "0.2")
    socks = [begin(port, "/v1/completions", LONG | {"n": 8}) for _ in range(4)]
    for sock in socks:
        sock.recv(1, socket.MSG_PEEK)  # it was taken
    process.send_signal(signal.SIGTERM)
    texts = [rest(sock) for sock in socks]
    assert process.wait(60) == 0
    assert all(b"shutting_down" in text or b"[DONE]" in text for text in texts)


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    words = [sys.executable, "-c", START, "serve", str(tmp_path), "--port", "0"]
    found = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 2 and "llama2: " in found.stderr and "Traceback" not in found.stderr
