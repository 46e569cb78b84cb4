"""A real request enters the rooms of its path in docs/how-it-works.md, and what it calls besides only falls."""

import json
import urllib.request
from typing import Any

from rooms import walked
from test_paths import PATHS

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": True, "seed": 1}
# Calls against the order of the path, each with its reason; a new one is a detour.
BACK = {
    ("serve/service.py", "serve/openai_chat.py"),  # keys and bounds first, then the handler of the route
    ("serve/session.py", "serve/service.py"),  # a session that ends is taken off the list
    ("engine/engine.py", "serve/session.py"),  # events
    ("engine/plan_runners.py", "engine/scheduler.py"),  # how many logits a chunk wants
    *(("serve/sse.py", room) for room in ("serve/openai_chat.py", "serve/service.py", "serve/session.py")),  # it pulls
}
MOST_BESIDE = 50


def test_a_request_walks_its_path(serve: Any) -> None:
    rooms = PATHS["request -> stream"]
    with walked() as walk:
        served = serve()
        walk.forget()  # the start
        request = urllib.request.Request(f"{served.url}/v1/chat/completions", json.dumps(BODY).encode())
        request.add_header("content-type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert b"[DONE]" in answer.read()
    assert set(walk.rooms(rooms)) == set(rooms)
    assert walk.backward(rooms) <= BACK
    assert len(walk.beside(rooms)) <= MOST_BESIDE, sorted(walk.beside(rooms))
