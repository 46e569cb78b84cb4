"""Requests that cost more than they pay: each attack is refused within its bound, and the server goes on."""

import asyncio
import json
import threading
import time
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="serving needs the extra `serve`")
pytest.importorskip("llguidance", reason="serving needs the extra `serve`")

from serve.conftest import Serve, Served
from wire import post

from llama2.errors import InputError
from llama2.serve.constraint import Compiler, Constraint
from llama2.serve.kept import Kept
from llama2.serve.refusal import Refusal
from llama2.serve.work import Gate, Workers

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


def test_a_task_that_loops_is_ended_at_its_deadline() -> None:
    async def main() -> None:
        workers, never = Workers(1, 0.1), threading.Event()
        try:
            for _ in range(3):
                with pytest.raises(Refusal, match="validation_timeout"):
                    await workers("a", spin, never)
                assert await workers("b", lambda: 7) == 7 and workers.lost == 0
        finally:
            never.set()

    asyncio.run(main())


def test_a_task_that_cannot_be_ended_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama2.serve.work.GRACE", 0.05)
    monkeypatch.setattr("llama2.serve.work.MAX_LOST", 2)

    async def main() -> None:
        workers = Workers(1, 0.05)
        ends = threading.Event()
        for _ in range(2):
            with pytest.raises(Refusal, match="validation_timeout"):
                await workers("a", ends.wait, 20)  # inside a lock: no exception gets there
            assert workers._gate.free == 1
        assert workers.lost == 2
        with pytest.raises(Refusal, match="2 requests that were given up"):
            await workers("b", lambda: 7)
        ends.set()
        for _ in range(100):
            await asyncio.sleep(0.02)
            if not workers.lost:
                break
        assert await workers("b", lambda: 7) == 7 and workers._gate.free == 1

    asyncio.run(main())


def test_errors_and_results_come_back_and_a_client_that_leaves_frees_nothing_too_early() -> None:
    async def main() -> None:
        workers, go = Workers(1, 5), threading.Event()
        with pytest.raises(ZeroDivisionError):
            await workers("a", lambda: 1 / 0)
        first = asyncio.create_task(workers("a", spin, go))
        await asyncio.sleep(0.05)
        first.cancel()
        second = asyncio.create_task(workers("b", lambda: 2))
        await asyncio.sleep(0.05)
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
        began = time.monotonic()
        reply = post(served.port, "/v1/chat/completions", body)
        assert reply.status == 400 and reply.json["error"]["code"] == "request_too_costly"
        for thread in threads:
            thread.join()
        assert time.monotonic() - began < 30
    finally:
        tokenizer.chat_template = before
    assert post(served.port, "/v1/chat/completions", body | {"max_tokens": 1}).status == 200
