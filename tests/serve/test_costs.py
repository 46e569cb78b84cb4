"""Requests that cost more than they pay: each attack is refused within its bound, and the server goes on."""

import asyncio
import contextlib
import http.client
import json
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="serving needs the extra `serve`")
pytest.importorskip("llguidance", reason="serving needs the extra `serve`")

from pydantic import ValidationError
from serve.conftest import Serve, Served
from serve.test_faults import start
from wire import begin, get, post, rest

from llama2.errors import InputError
from llama2.serve import batch
from llama2.serve.app import make_app
from llama2.serve.byte_cache import Kept
from llama2.serve.connection import Connections
from llama2.serve.constraint import Compiler, Constraint
from llama2.serve.embeddings import EmbeddingBody
from llama2.serve.errors import Refusal
from llama2.serve.openai_chat import ChatBody
from llama2.serve.openai_completions import CompletionBody
from llama2.serve.tgi import GenerateBody
from llama2.serve.tokenization import DetokenizeBody
from llama2.serve.validation import read
from llama2.serve.workers import Gate, Workers

# -- constraints -------------------------------------------------------------------------------------------------


def chain(count: int, rule: str) -> str:
    """A grammar in which each rule leads to the next."""
    rules = "".join(rule.format(i=i, j=i + 1) + "\n" for i in range(count))
    return f"start: r0\n{rules}r{count}: /x/"


def references(count: int) -> str:
    definitions: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(count)}
    return json.dumps({"$ref": "#/$defs/d0", "$defs": definitions | {f"d{count}": {"type": "null"}}})


BOMBS = {
    "rules in rules, 55 kB": Constraint("lark", chain(4400, "r{i}: r{j}")),
    "rules in rules, within the bound on their number": Constraint("lark", chain(990, "r{i}: r{j}")),
    "rules around rules": Constraint("lark", chain(990, 'r{i}: "a" r{j} "b"')),
    "terminals": Constraint("lark", chain(990, 'T{i}: "a" T{j} "b"').replace("r0", "T0").replace("r990", "T990")),
    "references": Constraint("json", references(990)),
    "too many references": Constraint("json", references(1100)),
    "brackets": Constraint("lark", "start: " + "(" * 500 + '"x"' + ")" * 500),
    "groups": Constraint("regex", "(" * 20_000 + "x" + ")" * 20_000),
    "repeated repeats": Constraint("regex", "(a{1000}){1000}"),
    "many optional": Constraint("regex", "a?" * 20_000),
    "too long": Constraint("regex", "x" * 70_000),
}


@pytest.fixture(scope="module")
def compiler(tiny_parts: tuple[Any, Any]) -> Any:
    found = Compiler(tiny_parts[1], 260, [0])
    yield found
    found.close()


@pytest.mark.parametrize("name", BOMBS)
def test_constraints_that_would_end_the_server_are_refused(compiler: Compiler, name: str) -> None:
    for _ in range(2):  # the second time it is remembered
        with pytest.raises(InputError, match="the most|cannot be used|takes longer|once compiled"):
            compiler(BOMBS[name], 1)
    assert compiler(Constraint("regex", "ab"), 1)


def test_a_refused_constraint_costs_nothing_again(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = Constraint("lark", chain(985, "r{i}: r{j}"))
    with pytest.raises(InputError, match="nests too deeply"):
        compiler(bomb, 1, "a key")
    monkeypatch.setattr(compiler, "_prover", None)
    with pytest.raises(InputError, match="nests too deeply"):
        compiler(bomb, 1, "a key")


def test_a_prover_that_was_killed_is_started_again(compiler: Compiler) -> None:
    assert compiler(Constraint("regex", "first"), 1)
    process = compiler._prover._process
    assert process is not None
    process.kill()
    process.wait()
    assert compiler(Constraint("regex", "second"), 1)
    assert compiler._prover._process is not process


def test_what_is_kept_is_bounded_in_all_and_for_each_owner() -> None:
    kept: Kept[int] = Kept(100, 40)
    for i in range(9):
        kept.put("alone", i, i, 10)
    assert kept.held == 90  # nobody else wants the room
    kept.put("alone", "large", 0, 101)
    assert kept.get("alone", "large") is None and kept.held == 90
    for i in range(9):
        kept.put("b", i, i, 10)
    assert kept.of("b") == 40 and kept.get("b", 4) is None and kept.get("b", 8) == 8
    assert kept.held <= 100 and kept.of("alone") == 60  # the one who had most gave way
    assert kept.get("b", 5) == 5
    kept.put("b", 9, 9, 10)
    assert kept.get("b", 5) == 5 and kept.get("b", 6) is None  # the least recently used went
    kept.put("b", 9, 10, 5)
    assert kept.of("b") == 35 and kept.get("b", 9) == 10
    assert kept.get("c", 1) is None and kept.of("c") == 0


def test_a_bomb_is_a_400_and_others_are_answered(served: Served) -> None:
    bomb = {"type": "grammar", "value": chain(990, "r{i}: r{j}")}
    replies: list[Any] = []
    thread = threading.Thread(
        target=lambda: replies.append(post(served.port, "/v1/completions", {"prompt": "x", "response_format": bomb}))
    )
    thread.start()
    assert post(served.port, "/v1/completions", {"prompt": "x", "max_tokens": 2}).status == 200
    thread.join()
    assert replies[0].status == 400 and "nests too deeply" in replies[0].json["error"]["message"]


# -- work beside the event loop ----------------------------------------------------------------------------------


def spin(until: threading.Event) -> str:
    while not until.is_set():
        pass
    return "done"


async def unhurried(workers: Workers, task: Callable[[], Any]) -> Any:
    """A task that may take its time."""
    deadline, workers.deadline = workers.deadline, 0.0
    try:
        return await workers("b", task)
    finally:
        workers.deadline = deadline


def test_a_task_that_loops_is_ended_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama2.serve.workers.GRACE", 60.0)

    async def main() -> None:
        workers, never = Workers(1, 0.1), threading.Event()
        try:
            for _ in range(3):
                with pytest.raises(Refusal, match="validation_timeout"):
                    await workers("a", spin, never)
                assert await unhurried(workers, lambda: 7) == 7 and workers.lost == 0
        finally:
            never.set()

    asyncio.run(main())


def test_a_task_that_cannot_be_ended_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama2.serve.workers.GRACE", 0.05)
    monkeypatch.setattr("llama2.serve.workers.MAX_LOST", 2)

    async def main() -> None:
        workers = Workers(1, 0.05)
        ends = threading.Event()
        for _ in range(2):
            with pytest.raises(Refusal, match="validation_timeout"):
                await workers("a", ends.wait)  # inside a lock: no exception gets there
            assert workers._gate.free == 1
        assert workers.lost == 2
        with pytest.raises(Refusal, match="2 requests that were given up"):
            await workers("b", lambda: 7)
        ends.set()
        while workers.lost:
            await asyncio.sleep(0.005)
        assert await unhurried(workers, lambda: 7) == 7 and workers._gate.free == 1

    asyncio.run(main())


def test_errors_and_results_come_back_and_a_client_that_leaves_frees_nothing_too_early() -> None:
    async def main() -> None:
        workers, begun, go = Workers(1, 0.0), threading.Event(), threading.Event()
        with pytest.raises(ZeroDivisionError):
            await workers("a", lambda: 1 / 0)
        first = asyncio.create_task(workers("a", lambda: begun.set() or spin(go)))
        while not begun.is_set():
            await asyncio.sleep(0.005)
        first.cancel()
        second = asyncio.create_task(workers("b", lambda: 2))
        await asyncio.sleep(0.02)
        assert not second.done()  # the thread of the first still runs
        go.set()
        assert await second == 2 and workers._gate.free == 1

    asyncio.run(main())


def test_places_go_round_by_owner() -> None:
    async def main() -> None:
        gate, order = Gate(1), list[str]()
        await gate.enter("x")

        async def wait(owner: str) -> None:
            await gate.enter(owner)
            order.append(owner)
            gate.leave()

        tasks = [asyncio.create_task(wait(owner)) for owner in ("a", "a", "a", "a", "b", "c", "b")]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0)
        gate.leave()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == ["a", "b", "c", "a", "b", "a"] and gate.free == 1

    asyncio.run(main())


def test_templates_that_loop_do_not_stop_the_server(serve: Serve) -> None:
    served = serve(validation_timeout=0.3)
    tokenizer = served.engine.tokenizer
    before = tokenizer.chat_template
    tokenizer.chat_template = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    body = {"messages": [{"role": "user", "content": "x"}]}
    try:
        threads = [threading.Thread(target=post, args=(served.port, "/v1/chat/completions", body)) for _ in range(4)]
        for thread in threads:
            thread.start()
        reply = post(served.port, "/v1/chat/completions", body)
        # The deadline of the check, or the template's own count of steps: the processor's speed says which comes first.
        assert reply.status == 400 and reply.json["error"]["code"] in ("request_too_costly", "template_error")
        for thread in threads:
            thread.join()
    finally:
        tokenizer.chat_template = before
    served.service.check.deadline = 0.0  # a slow processor may take its time for this one
    assert post(served.port, "/v1/chat/completions", body | {"max_tokens": 1}).status == 200


# -- numbers -----------------------------------------------------------------------------------------------------


def numbers(schema: Any, path: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Every number in a JSON schema that is not open to anything."""
    found = []
    if isinstance(schema, dict):
        if schema.get("type") in ("number", "integer"):
            found.append((path, schema))
        for name, inner in schema.items():
            found += numbers(inner, f"{path}/{name}")
    elif isinstance(schema, list):
        for i, inner in enumerate(schema):
            found += numbers(inner, f"{path}/{i}")
    return found


def test_every_number_of_the_api_has_bounds(served: Served) -> None:
    document = get(served.port, "/openapi.json").json
    found = [
        entry
        for path, methods in document["paths"].items()
        for method in methods.values()
        for entry in numbers(method.get("requestBody", {}), path)
    ]
    assert len(found) > 60
    for path, schema in found:
        if "/logit_bias/" in path or "enum" in schema:  # any finite number, rounded to the bound: see the next test
            continue
        assert {"minimum", "exclusiveMinimum"} & schema.keys(), path
        assert {"maximum", "exclusiveMaximum"} & schema.keys(), path


HUGE = "1" * 5000
WRONG_NUMBERS: list[tuple[str, str]] = [
    ("/v1/completions", f'{{"prompt": [{2**63}]}}'),
    ("/v1/completions", f'{{"prompt": [[1, {2**63}]]}}'),
    ("/v1/completions", '{"prompt": [-1]}'),
    ("/v1/completions", '{"prompt": "x", "logit_bias": {"5": true}}'),
    ("/v1/completions", '{"prompt": "x", "repetition_penalty": 1e-300}'),
    ("/v1/completions", f'{{"prompt": "x", "stop_token_ids": [{2**63}]}}'),
    ("/v1/completions", f'{{"prompt": "x", "seed": {2**64}}}'),
    ("/v1/completions", f'{{"prompt": "x", "max_tokens": {HUGE}}}'),
    ("/generate", '{"inputs": "x", "parameters": {"repetition_penalty": 1e-300}}'),
    ("/detokenize", f'{{"tokens": [{2**63}]}}'),
    ("/detokenize", f'{{"tokens": [{HUGE}]}}'),
    ("/v1/embeddings", f'{{"input": [{2**63}]}}'),
]


@pytest.mark.parametrize(("path", "body"), WRONG_NUMBERS, ids=lambda v: v[:60])
def test_numbers_beyond_their_bounds_are_the_clients_fault(served: Served, path: str, body: str) -> None:
    reply = post(served.port, path, body.encode())
    assert reply.status in (400, 422), reply.content


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1e-999", HUGE, "1" * 400, "-0.0", f"{2**64}", "0.1e1"])
def test_numbers_where_anything_may_stand(served: Served, number: str) -> None:
    """Schemas of tools and answers, arguments of calls, metadata: they are data, and no failure of the server."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "NUMBER"}}}
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    schema = {"type": "object", "properties": {"x": {"minimum": "NUMBER", "type": "number"}}}
    for body in (
        chat | {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]},
        chat | {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}},
        chat | {"messages": [*chat["messages"], {"role": "assistant", "tool_calls": [call]}, *chat["messages"]]},  # type: ignore[misc]
        chat | {"metadata": {"x": "NUMBER"}},
    ):
        data = json.dumps(body).replace('"NUMBER"', number).encode()
        assert post(served.port, "/v1/chat/completions", data).status in (200, 400), body


def test_extremes_inside_the_bounds_are_answered(served: Served) -> None:
    for settings in (
        {"temperature": 1e-4}, {"temperature": 100}, {"repetition_penalty": 0.01}, {"repetition_penalty": 100},
        {"top_p": 1e-300}, {"typical_p": 1e-300}, {"min_p": 1.0}, {"logit_bias": {"5": 100, "6": -100}},
        {"seed": -(2**63)}, {"seed": 2**64 - 1}, {"top_k": 10_000_000}, {"presence_penalty": 2, "frequency_penalty": 2},
    ):  # fmt: skip
        body = {"prompt": "x", "max_tokens": 3, "temperature": 1.0} | settings
        reply = post(served.port, "/v1/completions", body)
        assert reply.status == 200, (settings, reply.content)
    given = {"temperature": 1e-5, "repetition_penalty": 0.01, "max_new_tokens": 3, "do_sample": True}
    assert post(served.port, "/generate", {"inputs": "x", "parameters": given}).status == 200


MODELS: dict[str, Any] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/generate": GenerateBody,
    "/detokenize": DetokenizeBody,
    "/v1/embeddings": EmbeddingBody,
}

# -- faults without number ---------------------------------------------------------------------------------------

MANY = 100_000
FLOODS: dict[str, tuple[str, str]] = {
    "stops": ("/v1/completions", '{"prompt": "x", "stop": [' + "1," * MANY + "1]}"),
    "stop_sequences": ("/generate", '{"inputs": "x", "parameters": {"stop_sequences": [' + "1," * MANY + "1]}}"),
    "unknown fields": (
        "/v1/completions",
        '{"prompt": "x", ' + ", ".join(f'"f{i}": 1' for i in range(MANY)) + "}",
    ),
    "unknown parameters": (
        "/generate",
        '{"inputs": "x", "parameters": {' + ", ".join(f'"f{i}": 1' for i in range(MANY)) + "}}",
    ),
    "biases": (
        "/v1/completions",
        '{"prompt": "x", "logit_bias": {' + ", ".join(f'"{i}": "a"' for i in range(MANY)) + "}}",
    ),
    "list of biases": ("/v1/completions", '{"prompt": "x", "logit_bias": [' + '"a",' * MANY + "1]}"),
    "prompts": ("/v1/completions", '{"prompt": [' + "null," * MANY + "1]}"),
    "lists of ids": ("/v1/completions", '{"prompt": [' + '["a"],' * MANY + "[1]]}"),
    "messages": ("/v1/chat/completions", '{"messages": [' + '{"role": 1},' * MANY + "1]}"),
    "parts": ("/v1/chat/completions", '{"messages": [{"role": "user", "content": [' + "{}," * MANY + "1]}]}"),
    "tools": ("/v1/chat/completions", '{"messages": [{"role": "user"}], "tools": [' + "1," * 200 + "1]}"),
    "calls": (
        "/v1/chat/completions",
        '{"messages": [{"role": "assistant", "tool_calls": [' + "1," * MANY + "1]}]}",
    ),
    "modalities": (
        "/v1/chat/completions",
        '{"messages": [{"role": "user"}], "modalities": [' + "1," * MANY + "1]}",
    ),
    "tokens": ("/detokenize", '{"tokens": [' + '"a",' * MANY + "1]}"),
    "inputs": ("/v1/embeddings", '{"input": [' + "null," * MANY + "1]}"),
}


@pytest.mark.parametrize("name", FLOODS)
def test_validation_stops_at_the_first_faults(name: str) -> None:
    path, text = FLOODS[name]
    model = MODELS[path]
    try:
        model.model_validate_json(text)
    except ValidationError as error:
        assert error.error_count() <= 6
    else:
        raise AssertionError("nothing was wrong with it")
    with pytest.raises(Refusal):
        read(model, text.encode())


def test_half_a_surrogate_pair_in_an_id_ends_no_batch(served: Served, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"custom_id": "\\ud800", "body": {"inputs": 1}}\n{"custom_id": "é", "body": {"inputs": 2}}\n')
    lines = batch.read_lines(source)
    with target.open("wb") as out:
        app = make_app(served.service)
        assert asyncio.run(batch.run(app, lines, out, 2, lambda done, total: None)) == (2, 2)
    assert batch.answered(target) == ({"\ud800", "é"}, target.stat().st_size)
    assert "é" in target.read_text(encoding="utf-8")


# -- connections and bodies --------------------------------------------------------------------------------------


def connect(port: int, data: bytes = b"", size: int = 65536) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    sock.settimeout(30)
    sock.connect(("127.0.0.1", port))
    sock.sendall(data)
    return sock


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def guarded(serve: Serve) -> Served:
    """A server of few connections and little patience."""
    bounds = Connections(most=6, header_timeout=0.6, stall_timeout=0.6)
    return serve(bounds=bounds, body_timeout=0.6, stall_timeout=0.6, max_unparsed_bytes=100_000)


def freed(served: Served) -> None:
    """Waits until no connection is open."""
    while served.server.server_state.connections:  # for how long is pytest's bound on a test
        time.sleep(0.01)


def test_silent_connections_and_half_sent_headers_are_closed(guarded: Served) -> None:
    freed(guarded)
    silent = connect(guarded.port)
    half = connect(guarded.port, HEAD)
    noise = connect(guarded.port, b"\r\n")
    assert rest(silent) == b"" and rest(noise) == b""
    assert rest(half).startswith(b"HTTP/1.1 408 ")


def test_headers_that_do_not_end_are_refused_before_they_are_held(guarded: Served) -> None:
    freed(guarded)
    assert b" 431 " in rest(connect(guarded.port, HEAD + b"x: " + b"a" * 40_000))[:20]
    assert (
        b" 431 " in rest(connect(guarded.port, HEAD + b"".join(b"x%d: 1\r\n" % i for i in range(200)) + b"\r\n"))[:20]
    )
    assert b" 431 " in rest(connect(guarded.port, b"GET /" + b"a" * 40_000))[:20]


def test_half_a_body_is_given_up(guarded: Served) -> None:
    freed(guarded)
    reply = rest(connect(guarded.port, HEAD + b'content-length: 1000\r\n\r\n{"prompt": "x"'))
    assert reply.startswith(b"HTTP/1.1 408 ") and b"body_timeout" in reply
    assert not guarded.service.unparsed.held and not guarded.service.life.inside


def test_a_body_that_was_refused_does_not_keep_its_connection(guarded: Served) -> None:
    freed(guarded)
    reply = rest(connect(guarded.port, HEAD + b"content-length: 9000000\r\n\r\n{"))
    assert reply.startswith(b"HTTP/1.1 413 ")


def test_bodies_are_counted_while_they_come(guarded: Served) -> None:
    freed(guarded)
    half = [connect(guarded.port, HEAD + b"content-length: 90000\r\n\r\n" + b" " * 45_000) for _ in range(2)]
    while guarded.service.unparsed.held < 90_000:
        time.sleep(0.005)
    reply = post(guarded.port, "/v1/completions", b" " * 60_000)
    assert reply.status == 429 and int(reply.headers["retry-after"]) >= 1
    for sock in half:
        assert rest(sock).startswith(b"HTTP/1.1 408 ")
    assert not guarded.service.unparsed.held
    assert post(guarded.port, "/v1/completions", {"prompt": "x", "max_tokens": 1}).status == 200


def test_too_many_connections_are_refused_and_the_others_live(guarded: Served) -> None:
    freed(guarded)
    kept = http.client.HTTPConnection("127.0.0.1", guarded.port, timeout=30)
    kept.request("GET", "/health")
    assert kept.getresponse().read() == b'{"status":"ok"}'
    more = [connect(guarded.port) for _ in range(20)]
    replies = [rest(sock) for sock in more[10:]]
    assert all(reply.startswith(b"HTTP/1.1 503 ") and b"retry-after" in reply for reply in replies)
    kept.request("GET", "/health")
    assert kept.getresponse().status == 200
    kept.close()
    for sock in more[:10]:
        sock.close()
    freed(guarded)
    assert get(guarded.port, "/health").status == 200


def test_pipelined_requests_are_bounded(guarded: Served) -> None:
    freed(guarded)
    data = json.dumps({"prompt": "x", "max_tokens": 300, "ignore_eos": True}).encode()
    one = HEAD + b"content-length: %d\r\n\r\n" % len(data) + data
    rest(connect(guarded.port, one + b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 100))
    assert guarded.quiet()


def test_an_answer_that_nobody_reads_is_dropped(guarded: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    freed(guarded)
    body = json.dumps({"inputs": "x" * 60_000}).encode()
    head = HEAD.replace(b"/v1/completions", b"/tokenize")
    taken: list[int] = []
    take = guarded.service.unread.take
    monkeypatch.setattr(guarded.service.unread, "take", lambda owner, size: (take(owner, size), taken.append(size)))
    sock = connect(guarded.port, head + b"content-length: %d\r\n\r\n" % len(body) + body, size=1024)
    while not taken:
        time.sleep(0.005)
    assert taken[0] > 1_000_000
    freed(guarded)
    assert not guarded.service.unread.held
    sock.close()


def test_unread_answers_are_bounded_together(serve: Serve) -> None:
    served = serve(max_unread_bytes=4_000_000)
    body = json.dumps({"inputs": "x" * 60_000}).encode()
    head = HEAD.replace(b"/v1/completions", b"/tokenize")
    socks = [connect(served.port, head + b"content-length: %d\r\n\r\n" % len(body) + body, size=1024) for _ in range(3)]
    assert any(sock.recv(12).endswith(b"429") for sock in socks)
    assert served.service.unread.held <= 4_000_000
    for sock in socks:
        sock.close()
    freed(served)
    assert not served.service.unread.held


def test_texts_to_be_tokenised_are_bounded_in_bytes(served: Served) -> None:
    reply = post(served.port, "/tokenize", {"inputs": "\U0001f600" * 100_000})
    assert reply.status == 413 and "262144" in reply.json["error"]
    chat = {"messages": [{"role": "user", "content": "\U0001f600" * 40_000}] * 2}
    assert post(served.port, "/chat_tokenize", chat).status == 413
    assert post(served.port, "/detokenize", {"tokens": [5] * 300_000}).status == 422


def test_answers_are_bounded_before_they_are_made(served: Served) -> None:
    body = {"prompt": ["x"] * 32, "n": 8, "max_tokens": 900, "logprobs": 20, "temperature": 1}
    reply = post(served.port, "/v1/completions", body)
    assert reply.status == 400 and "stream" in reply.json["error"]["message"]


# -- the end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGHUP])
def test_a_signal_ends_the_server_in_time_whatever_clients_do(
    tiny_folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Half a body, half a header, a template that loops, an answer that nobody reads: none of them is waited for.

    By default the one signal; test_faults has SIGTERM under load.
    """
    template = tmp_path / "loop.jinja"
    template.write_text("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}")
    words = ("--chat-template", str(template), "--shutdown-timeout", "200", "--body-timeout", "200")
    process, port = start(tiny_folder, tmp_path / "log", *words)
    half = connect(port, HEAD + b'content-length: 1000\r\nexpect: 100-continue\r\n\r\n{"prompt": "x"')
    header = connect(port, HEAD)
    loops = begin(port, "/chat_tokenize", {"messages": [{"role": "user", "content": "x"}]})
    unread = begin(port, "/tokenize", {"inputs": "x" * 200_000}, size=1024)
    unread.recv(1, socket.MSG_PEEK)
    assert half.recv(65536).startswith(b"HTTP/1.1 100 ")  # the body is being read
    process.send_signal(number)
    assert rest(half).startswith(b"HTTP/1.1 503 ")
    assert process.wait(150) == 0
    for sock in (header, loops, unread):
        sock.close()


def test_file_descriptors_that_run_out_are_a_line_a_second(tiny_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process, port = start(tiny_folder, log, "--max-connections", "400")

    def complaints() -> int:
        return log.read_text().count("out of system resource")

    try:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{process.pid}/fd")) + 4,) * 2)
        socks = [connect(port) for _ in range(60)]
        began = time.monotonic()
        while time.monotonic() - began < 1.5 or not complaints():
            time.sleep(0.05)
        assert 1 <= complaints() <= time.monotonic() - began + 2
        for sock in socks:
            sock.close()
        while True:  # what waits to be accepted comes first
            with contextlib.suppress(OSError):
                assert get(port, "/health").status == 200
                break
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
