"""Several models in one server: loaded at the first request, unloaded when idle or for another, routed to by name."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="serving needs the extra `serve`")

from serve.conftest import Served
from wire import begin, get, post, rest

from llama2.engine.engine import Engine
from llama2.errors import CheckpointError
from llama2.serve import limits
from llama2.serve.facts import Facts
from llama2.serve.lifecycle import Life
from llama2.serve.model_pool import ModelPool, Offer
from llama2.serve.numbers import seconds
from llama2.serve.policy import Policy
from llama2.serve.served_model import ServedModel
from llama2.serve.service import Service

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}


class Several(Served):
    """A server of models that are all the tiny one, each with its own engine; loads are counted, slowed and broken."""

    def __init__(self, parts: Any, names: tuple[str, ...], *, needs: int = 10, pace: float = 0.0, **pool: Any) -> None:
        self.parts, self.pace, self.needs = parts, pace, needs
        self.loads, self.broken = dict.fromkeys(names, 0), dict[str, Exception]()
        self.gate: threading.Event | None = None  # where loads wait
        self.policy = Policy(names=names)
        self.service = Service(self.policy, None, Life())
        self.catalog = [self.offer(name) for name in names]
        given = {"most": 4, "keep": 300.0, "memory": 2**40, **pool}
        self.pool = ModelPool(lambda: list(self.catalog), **given)
        self.pool.put(self.catalog)
        self.service.offer(self.pool)
        self._start(self.policy, None)

    def offer(self, name: str, key: object = 0) -> Offer:
        def load() -> ServedModel:
            self.loads[name] = self.loads.get(name, 0) + 1
            if self.gate is not None:
                self.gate.wait(20)
            if name in self.broken:
                raise self.broken[name]
            engine = Engine(*self.parts, cache_tokens=4096)
            if self.pace:
                self.engine = engine
                self._slow_down(self.pace)
            return ServedModel(engine, limits.bounds(engine, limits.Wanted()), self.policy, (name,), (f"{name}.gguf",))

        def describe() -> Facts:
            if name == "unreadable":
                raise CheckpointError("/secret/unreadable.gguf has 5 bytes")
            return Facts(self.parts[0].config, 1000, "Q4", 1024, needs=self.needs, modified=1.0)

        return Offer((name,), (f"{name}.gguf",), load, describe, (f"/secret/{name}", key))

    def chat(self, name: str | None, **more: Any) -> Any:
        return post(self.port, "/v1/chat/completions", CHAT | ({} if name is None else {"model": name}) | more)

    @property
    def loaded(self) -> list[str]:
        return [offer.name for offer in self.pool.loaded]

    def until(self, true: Callable[[], bool], within: float = 20.0) -> None:
        end = time.monotonic() + within
        while not true():
            assert time.monotonic() < end
            time.sleep(0.01)

    def idle(self) -> bool:
        return not any(offer.users for offer in self.pool.offers)


Make = Callable[..., Several]


@pytest.fixture
def several(tiny_parts: Any) -> Iterator[Make]:
    made: list[Several] = []

    def make(*names: str, **given: Any) -> Several:
        made.append(Several(tiny_parts, names or ("a", "b"), **given))
        return made[-1]

    yield make
    for server in made:
        server.until(server.idle)
        server.close()


def test_each_model_is_loaded_at_its_first_request_and_routed_to_by_name(several: Make) -> None:
    server = several("a", "b", "c")
    assert server.loaded == [] and get(server.port, "/ready").status == 200
    assert server.chat("b").json["model"] == "b" and server.loaded == ["b"]
    assert server.chat("a.gguf").status == 200 and server.chat("A:latest").status == 200
    assert sorted(server.loaded) == ["a", "b"] and server.loads == {"a": 1, "b": 1, "c": 0}
    assert server.chat(None).status == 200 and server.loads["a"] == 1  # without a name: the first one
    assert server.chat("tgi").status == 200 and server.loads["c"] == 0


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/v1/chat/completions", CHAT, lambda e: e["error"]["code"] == "model_not_found"),
        ("/v1/completions", {"prompt": "x"}, lambda e: e["error"]["type"] == "not_found_error"),
        ("/v1/responses", {"input": "x"}, lambda e: e["error"]["param"] == "model"),
        ("/v1/embeddings", {"input": "x"}, lambda e: e["error"]["code"] == "model_not_found"),
        ("/v1/messages", CHAT, lambda e: e["type"] == "error" and e["error"]["type"] == "not_found_error"),
        ("/api/chat", {"messages": CHAT["messages"]}, lambda e: e["error"].startswith("model not found: ")),
        ("/api/generate", {"prompt": "x"}, lambda e: isinstance(e["error"], str)),
        ("/api/show", {}, lambda e: isinstance(e["error"], str)),
        ("/api/embed", {"input": "x"}, lambda e: isinstance(e["error"], str)),
        ("/completion", {"prompt": "x"}, lambda e: e["error"]["code"] == 404),
        ("/generate", {"inputs": "x"}, lambda e: isinstance(e["error"], str)),
        ("/tokenize", {"prompt": "x"}, lambda e: "no model" not in str(e)),
        ("/v1/score", {"text_1": "x", "text_2": "y"}, lambda e: e["error"]["code"] == "model_not_found"),
    ],
)
def test_an_unknown_name_is_404_in_the_form_of_each_api(several: Make, path: str, body: Any, told: Any) -> None:
    server = several()
    reply = post(server.port, path, {**body, "model": "nope"})
    assert reply.status == 404 and told(reply.json), reply.content
    assert "'nope'" in reply.content.decode() and "a, b" in reply.content.decode() and server.loads["a"] == 0


def test_concurrent_first_requests_load_once(several: Make) -> None:
    server = several()
    server.gate = threading.Event()
    with ThreadPoolExecutor(12) as threads:
        replies = [threads.submit(server.chat, "a") for _ in range(12)]
        server.until(lambda: server.pool.offers[0].users == 12)
        card = get(server.port, "/v1/models/a").json
        assert card["status"] == {"value": "loading"} and not any(reply.done() for reply in replies)
        server.gate.set()
        texts = {reply.result().json["choices"][0]["message"]["content"] for reply in replies}
    assert server.loads["a"] == 1 and len(texts) == 1


def test_an_idle_model_goes_after_its_time_and_comes_again(several: Make) -> None:
    server = several(keep=0.3)
    first = server.chat("a").json["choices"]
    assert server.loaded == ["a"]
    server.until(lambda: server.loaded == [])
    assert server.chat("a").json["choices"] == first and server.loads["a"] == 2


def test_keep_alive_of_a_request(several: Make) -> None:
    server = several(keep=300.0)

    def ask(name: str, keep: Any) -> None:
        body = {"model": name, "messages": CHAT["messages"], "stream": False, "options": {"num_predict": 2}}
        reply = post(server.port, "/api/chat", body | {"keep_alive": keep})
        assert reply.status == 200 and "x-llama2-warnings" not in reply.headers

    ask("a", 0)
    server.until(lambda: server.loaded == [])
    ask("a", "0.2s")
    ask("b", -1)
    server.until(lambda: server.loaded == ["b"])
    assert server.pool.offers[1].expires == float("inf")
    ask("b", "1h30m")
    (row,) = get(server.port, "/api/ps").json["models"]
    assert row["name"] == "b:latest" and row["context_length"] == 1024
    assert 5300 < server.pool.offers[1].expires <= 5400
    assert server.chat("b", keep_alive="200ms").status == 200  # on OpenAI's routes too
    server.until(lambda: server.loaded == [])
    for wrong in ("5 minutes", "x", "", "1e400", 1e300, True, "5m!"):
        assert post(server.port, "/api/generate", {"model": "a", "keep_alive": wrong}).status == 400, wrong
    assert server.loads["a"] == 2


def test_durations() -> None:
    given = {"5m": 300, "1h30m": 5400, "300ms": 0.3, "90": 90, 12.5: 12.5, "-1": float("inf"), -1: float("inf")}
    assert {text: seconds(text) for text in given} == {text: float(value) for text, value in given.items()}
    assert seconds("0") == seconds("0s") == seconds(0) == 0 and seconds("-5m") == float("inf")
    assert seconds("1.5h") == 5400 and seconds(".5s") == 0.5


def test_ollama_loads_and_unloads_without_a_prompt(several: Make) -> None:
    server = several()
    for path in ("/api/generate", "/api/chat"):
        reply = post(server.port, path, {"model": "a"})
        assert reply.json["done_reason"] == "load" and server.loaded == ["a"]
        reply = post(server.port, path, {"model": "a", "keep_alive": 0})
        assert reply.json["done_reason"] == "unload" and server.loaded == []
    loads = server.loads["a"]
    assert post(server.port, "/api/generate", {"model": "a", "keep_alive": "0s"}).json["done_reason"] == "unload"
    assert server.loads["a"] == loads and server.loaded == []  # nothing is loaded in order to go


def test_the_least_recently_used_idle_model_makes_room(several: Make) -> None:
    server = several("a", "b", "c", most=2)
    for name in ("a", "b", "a", "c"):
        assert server.chat(name).status == 200
    assert sorted(server.loaded) == ["a", "c"]
    server = several("a", "b", "c")
    server.chat("a")
    claim = server.pool.offers[0].claim
    assert claim > 100_000  # measured: weights and cache
    server.needs, server.pool.memory = claim, int(2.5 * claim)
    for name in ("b", "a", "c"):
        assert server.chat(name).status == 200
    assert len(server.loaded) == 2 and "b" not in server.loaded


def test_a_model_that_can_never_fit_is_refused_with_the_numbers(several: Make) -> None:
    server = several(memory=2**30, needs=3 * 2**30)
    reply = server.chat("a")
    assert reply.status == 503 and reply.json["error"]["code"] == "out_of_memory"
    assert "needs 3.00 GiB" in reply.json["error"]["message"] and "1.00 GiB are there" in reply.json["error"]["message"]
    assert server.loads["a"] == 0 and server.loaded == []


def test_memory_that_others_have_is_known_before_loading(several: Make) -> None:
    free = [100]
    server = several(needs=50, room=lambda: free[0])
    assert server.chat("a").status == 200
    free[0] = 10
    reply = server.chat("b")  # unloading the idle one did not help
    assert reply.status == 503 and "other programs" in reply.json["error"]["message"] and server.loads["b"] == 0
    free[0] = 100
    assert server.chat("b").status == 200


def test_a_stream_that_runs_is_never_unloaded(several: Make) -> None:
    server = several("a", "b", most=1, keep=0.0, pace=0.02)
    body = CHAT | {"model": "a", "max_tokens": 400, "stream": True, "ignore_eos": True}
    stream = begin(server.port, "/v1/chat/completions", body)
    told = b""
    while b"role" not in told:  # the headers may come by themselves
        told += stream.recv(4096)
    refused = server.chat("b")
    assert refused.status == 429 and "1 models are loaded" in refused.json["error"]["message"]
    assert "a are answering" in refused.json["error"]["message"] and refused.headers["retry-after"] == "5"
    assert post(server.port, "/api/generate", {"model": "b", "prompt": "x"}).status == 503  # as Ollama has it
    assert post(server.port, "/api/generate", {"model": "a", "keep_alive": 0}).json["done_reason"] == "unload"
    assert server.loaded == ["a"]
    server.until(lambda: server.idle() and server.loaded == [])  # with its last byte
    told += rest(stream)
    assert told.count(b'"content":') >= 200 and b"[DONE]" in told
    assert server.chat("b").status == 200


def test_a_client_that_leaves_gives_its_model_back(several: Make) -> None:
    server = several(keep=0.0, pace=0.02)
    body = CHAT | {"model": "a", "max_tokens": 900, "stream": True, "ignore_eos": True}
    stream = begin(server.port, "/v1/chat/completions", body)
    assert stream.recv(4096)
    assert server.loaded == ["a"]
    stream.close()
    server.until(lambda: server.loaded == [])
    for wrong in ({"max_tokens": 0}, {"temperature": -1}, {"messages": []}, {"top_p": 2}):
        assert server.chat("b", **wrong).status == 400
    server.until(lambda: server.loaded == [] and server.idle())


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (CheckpointError("/secret/b: a tensor is missing"), "b: a tensor is missing"),
        (RuntimeError("at /secret/b"), "RuntimeError"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_model_that_fails_leaves_the_others_as_they_are(several: Make, error: Exception, told: str) -> None:
    server = several(pace=0.01)
    server.broken["b"] = error
    stream = begin(server.port, "/v1/chat/completions", CHAT | {"model": "a", "max_tokens": 60, "stream": True})
    assert stream.recv(64)
    for _ in range(2):
        reply = server.chat("b")
        assert reply.status == 500 and reply.json["error"]["code"] == "model_not_loaded"
        assert told in reply.json["error"]["message"] and "/secret" not in reply.content.decode()
    assert b"[DONE]" in rest(stream) and server.loaded == ["a"]
    del server.broken["b"]
    assert server.chat("b").status == 200 and sorted(server.loaded) == ["a", "b"]
    page = get(server.port, "/metrics").content.decode()
    assert 'llama2_model_failed_total{model="b"} 2.0' in page and 'llama2_model_loaded_total{model="b"} 1.0' in page
    assert 'llama2_model_requests_total{model="a"} 1.0' in page and 'llama2_kv_usage_ratio{model="a"}' in page


def test_nothing_keeps_a_model_that_was_unloaded(several: Make) -> None:
    """Not even what waits for the garbage collector: its memory is back before another model is loaded."""
    server = several("a", "b")
    gc.collect()
    gc.disable()
    try:
        form = {"response_format": {"type": "json_object"}}
        assert server.chat("a").status == 200 and server.chat("a", **form).status == 200
        assert post(server.port, "/v1/embeddings", {"model": "a", "input": "x"}).status == 200
        assert post(server.port, "/api/chat", {"model": "a", "messages": CHAT["messages"]}).status == 200
        assert len(server.chat("a", stream=True).events) > 3
        assert server.chat("a", n=99).status == 400
        server.until(server.idle)
        kept = weakref.ref(server.pool.served[0]), weakref.ref(server.pool.served[0].engine)
        assert post(server.port, "/api/generate", {"model": "a", "keep_alive": 0}).status == 200
        server.until(lambda: all(ref() is None for ref in kept), 3)
    finally:
        gc.enable()


def test_lists_load_nothing(several: Make) -> None:
    server = several("a", "b", "unreadable")
    cards = get(server.port, "/v1/models").json["data"]
    assert [(card["id"], card["status"]["value"]) for card in cards] == [("a", "unloaded"), ("b", "unloaded")]
    rows = get(server.port, "/api/tags").json["models"]
    assert [row["name"] for row in rows] == ["a:latest", "b:latest"] and rows[0]["size"] == 1000
    shown = post(server.port, "/api/show", {"model": "b"}).json
    assert shown["model_info"]["llama.context_length"] == 1024 and shown["details"]["quantization_level"] == "Q4"
    assert get(server.port, "/api/ps").json["models"] == [] and sum(server.loads.values()) == 0
    reply = server.chat("unreadable")
    assert reply.status == 500 and "unreadable" in reply.json["error"]["message"]
    assert "/secret" not in reply.content.decode()


def test_routes_without_a_body_tell_of_a_named_model(several: Make) -> None:
    server = several()
    told = get(server.port, "/info").json  # the chat page asks at its start, and probes do
    assert told["model_id"] is None and told["router"] == "llama2" and server.loaded == []
    assert get(server.port, "/info?model=b").json["model_id"] == "b" and server.loaded == ["b"]
    assert get(server.port, "/info").json["model_id"] == "b" and server.loaded == ["b"]  # the one that is there
    assert get(server.port, "/props?model=a").json["model_alias"] == "a"
    assert get(server.port, "/props?model=nope").status == 404


def test_models_that_are_put_into_the_folder_are_offered_and_those_taken_away_are_not(several: Make) -> None:
    server = several()
    assert server.chat("c").status == 404
    server.catalog.append(server.offer("c"))
    assert server.chat("c").status == 200
    del server.catalog[2], server.catalog[0]
    names = [card["id"] for card in get(server.port, "/v1/models").json["data"]]
    assert names == ["b", "c"]  # c is loaded, and stays until it goes
    assert post(server.port, "/api/generate", {"model": "c", "keep_alive": 0}).status == 200
    assert [card["id"] for card in get(server.port, "/v1/models").json["data"]] == ["b"]
    assert server.chat("a").status == 404


def test_a_shutdown_ends_the_wait_for_a_model(several: Make) -> None:
    server = several()
    server.gate = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        reply = threads.submit(server.chat, "a")
        server.until(lambda: server.pool.offers[0].users == 1)
        loop = server.server.servers[0].get_loop()
        loop.call_soon_threadsafe(server.service.cut)
        assert reply.result().status == 503 and reply.result().json["error"]["code"] == "shutting_down"
        server.gate.set()
    server.until(lambda: not server.pool._loads)
    assert server.loaded == []


def test_a_stream_of_another_model_goes_on_while_one_is_loaded(several: Make) -> None:
    server = several(pace=0.005)
    server.chat("a")
    server.gate = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        reply = threads.submit(server.chat, "b")
        server.until(lambda: server.loads["b"] == 1)
        assert server.chat("a", max_tokens=20).status == 200 and not reply.done()
        server.gate.set()
        assert reply.result().status == 200


def test_many_requests_of_models_that_push_each_other_out(several: Make) -> None:
    """The pool's counts hold: nothing is lost or kept, whatever comes together."""
    server = several("a", "b", "c", most=2, keep=0.01)

    def ask(i: int) -> int:
        found: int = server.chat("abc"[i % 3], max_tokens=2).status
        return found

    with ThreadPoolExecutor(6) as threads:
        statuses = list(threads.map(ask, range(60)))
    assert set(statuses) <= {200, 429} and statuses.count(200) >= 20
    server.until(lambda: server.loaded == [] and server.idle())


def test_the_client_of_ollama(several: Make) -> None:
    ollama = pytest.importorskip("ollama", reason="needs the package `ollama`")
    server = several("a", "b")
    with ollama.Client(host=server.url) as client:
        assert [model.model for model in client.list().models] == ["a:latest", "b:latest"]
        assert client.ps().models == []
        assert client.chat("b", CHAT["messages"], options={"num_predict": 3}, keep_alive="10m").done
        (running,) = client.ps().models
        assert running.model == "b:latest" and running.expires_at is not None
        assert client.show("a").modelinfo["general.architecture"] == "llama" and server.loads["a"] == 0
        client.generate("b", "", keep_alive=0)
        assert client.ps().models == []
        with pytest.raises(ollama.ResponseError, match="not found") as told:
            client.chat("nope", CHAT["messages"])
        assert told.value.status_code == 404
