"""Keys, places, quotas, metrics and refusals are the same on every route that makes text, whatever its API."""

import json
from typing import Any

import pytest
from serve.conftest import Serve
from wire import call, get

pytest.importorskip("fastapi", reason="serving needs the extra `serve`")

from llama2.serve.app import DIALECTS
from llama2.serve.auth import Keys
from llama2.serve.dialect import Dialect, Route

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
INPUTS: dict[str, Any] = {"inputs": "Hi", "parameters": {"max_new_tokens": 3}}
NATIVE: dict[str, Any] = {"prompt": "Hi", "n_predict": 3}
GAP: dict[str, Any] = {"input_prefix": "a", "input_suffix": "b", "n_predict": 3}
OLLAMA: dict[str, Any] = {"model": "tiny", "options": {"num_predict": 3}}
BODIES: dict[str, dict[str, Any]] = {  # by the end of a path
    "chat/completions": CHAT,
    "messages": CHAT,
    "responses": {"model": "tiny", "input": "Hi", "max_output_tokens": 3},
    "v1/completions": {"model": "tiny", "prompt": "Hi", "max_tokens": 3},
    "completions": NATIVE,
    "completion": NATIVE,
    "infill": GAP,
    "api/chat": OLLAMA | {"messages": CHAT["messages"]},
    "api/generate": OLLAMA | {"prompt": "Hi"},
    "generate": INPUTS,
    "generate_stream": INPUTS,
    "invocations": INPUTS,
    "": INPUTS,
}
ROUTES = [(dialect, route) for dialect in DIALECTS for route in dialect.routes if route.counted]
each_route = pytest.mark.parametrize(("dialect", "route"), ROUTES, ids=[route.path for _, route in ROUTES])


def body_of(path: str) -> dict[str, Any]:
    return next(body for end, body in BODIES.items() if path.endswith(f"/{end}"))


def test_every_route_that_makes_text_has_a_body_here() -> None:
    assert len(ROUTES) >= 14
    for _, route in ROUTES:
        body_of(route.path)


@pytest.fixture(scope="module")
def port(serve: Serve) -> int:
    return serve(keys=Keys(["a", "b"]), max_requests_per_key=2).port


def count(port: int) -> int:
    lines = get(port, "/metrics", authorization="Bearer b").content.decode().splitlines()
    return int(float(next(line.split()[-1] for line in lines if line.startswith("tgi_request_count"))))


@each_route
def test_keys_and_metrics(port: int, dialect: Dialect, route: Route) -> None:
    body, before = body_of(route.path), count(port)
    for headers in ({}, {"authorization": "Bearer no"}, {"x-api-key": "no"}):
        refused = call(port, "POST", route.path, body, headers)
        assert refused.status == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert refused.json.keys() == dialect.error(_refusal("key"), "").keys()
    assert count(port) == before  # who has no key is not a request
    for headers in ({"authorization": "Bearer a"}, {"x-api-key": "a"}, {"api-key": "a"}):
        reply = call(port, "POST", route.path, body, headers)
        assert reply.status == (501 if route.path == "/infill" else 200), reply.content
    assert count(port) == before + 3


@each_route
def test_quotas_and_bounds(serve: Serve, dialect: Dialect, route: Route) -> None:
    if route.path == "/infill":
        pytest.skip("this tokenizer has no marks of a gap: the route is refused before a quota is charged")
    served = serve(keys=Keys(["a", "b"]), tokens_per_minute=4, max_requests_per_key=2, payload_limit=4000)
    body, a, b = body_of(route.path), {"x-api-key": "a"}, {"x-api-key": "b"}
    assert call(served.port, "POST", route.path, body, a).status == 200
    assert served.quiet()
    spent = call(served.port, "POST", route.path, body, a)
    assert spent.status == dialect.status(_refusal("rate")) and int(spent.headers["retry-after"]) > 0
    assert "tokens per minute" in json.dumps(spent.json)
    assert call(served.port, "POST", route.path, body, b).status == 200  # another key has its own
    assert call(served.port, "POST", route.path, b" " * 5000 + b"{}", b).status == 413
    assert served.quiet()


@each_route
def test_a_full_server_says_when_to_come_back(serve: Serve, dialect: Dialect, route: Route) -> None:
    if route.path == "/infill":
        pytest.skip("this tokenizer has no marks of a gap: the route is refused before it takes a place")
    served = serve(max_concurrent_requests=0)
    reply = call(served.port, "POST", route.path, body_of(route.path))
    assert reply.status == dialect.status(_refusal("busy")) and int(reply.headers["retry-after"]) > 0
    assert served.quiet()


def _refusal(kind: str) -> Any:
    from llama2.serve.errors import Refusal

    return Refusal(kind, "why")
