"""All attacks of test_costs.py at once, eight keys against one: the server goes on, and the one is answered."""

import contextlib
import itertools
import json
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from serve.conftest import Serve, Served
from serve.test_costs import BOMBS, FLOODS, HEAD, connect, freed
from wire import begin, call, get

from llama2.serve.auth import Keys
from llama2.serve.connection import Connections

pytestmark = pytest.mark.slow
SECONDS = 20.0


def attacks(served: Served, key: str) -> list[Callable[[], Any]]:
    """One round of each kind."""
    named = {"authorization": f"Bearer {key}"}
    greedy = {"prompt": ["x"] * 16, "n": 4, "temperature": 1.0, "max_tokens": 200, "ignore_eos": True}
    numbers = itertools.count()

    def bomb() -> Any:
        found = list(BOMBS.values())[next(numbers) % len(BOMBS)]
        kinds = {"json": "json", "regex": "regex", "lark": "grammar"}
        given: Any = json.loads(found.source) if found.kind == "json" else f"{found.source}{' ' * next(numbers)}"
        body = {"prompt": "x", "response_format": {"type": kinds[found.kind], "value": given}}
        return call(served.port, "POST", "/v1/completions", body, named)

    def flood() -> Any:
        path, text = list(FLOODS.values())[next(numbers) % len(FLOODS)]
        return call(served.port, "POST", path, text.encode(), named)

    def half() -> None:
        login = f"authorization: Bearer {key}\r\n".encode()
        socks = [
            connect(served.port, HEAD + login + b"content-length: 90000\r\n\r\n" + b" " * 45_000) for _ in range(8)
        ]
        time.sleep(0.3)
        for sock in socks:
            sock.close()

    def unread() -> None:
        sock = begin(served.port, "/tokenize", {"inputs": "x" * 100_000}, size=1024, **named)
        time.sleep(0.3)
        sock.close()

    return [lambda: call(served.port, "POST", "/v1/completions", greedy, named), bomb, flood, half, unread,
            lambda: [connect(served.port).close() for _ in range(50)]]  # fmt: skip


def gaps(served: Served, key: str) -> list[float]:
    """Seconds between the tokens of an answer."""
    body = {"prompt": "Hi", "max_tokens": 60, "ignore_eos": True, "stream": True}
    sock = begin(served.port, "/v1/completions", body, authorization=f"Bearer {key}")
    times, text = [], b""
    while part := sock.recv(4096):
        text += part
        times += [time.monotonic()] * part.count(b"data: {")
    sock.close()
    assert b" 200 " in text[:20] and b"[DONE]" in text, text[:300]
    return [b - a for a, b in itertools.pairwise(times)]


def test_eight_attackers_and_one_client(serve: Serve) -> None:
    names = [f"attacker{i}" for i in range(8)]
    served = serve(
        keys=Keys(["good", *names]),
        bounds=Connections(most=200, header_timeout=2, stall_timeout=2),
        engine={"width": 18, "waiting": 128},
        body_timeout=2.0,
        stall_timeout=2.0,
        max_unparsed_bytes=4_000_000,
    )
    stop = threading.Event()

    def attack(i: int) -> None:
        kinds = attacks(served, names[i])
        while not stop.is_set():
            with contextlib.suppress(OSError):  # refused, or dropped
                kinds[i % len(kinds)]()

    alone = gaps(served, "good")
    threads = [threading.Thread(target=attack, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    found, end = list[float](), time.monotonic() + SECONDS
    try:
        while time.monotonic() < end:
            found += gaps(served, "good")
            assert get(served.port, "/health").status == 200
    finally:
        stop.set()
        for thread in threads:
            thread.join(120)
    p99 = [statistics.quantiles(times, n=100)[-1] * 1000 for times in (alone, found)]
    print(f"ms between tokens, p99: alone {p99[0]:.1f}, under attack {p99[1]:.1f}, of {len(found)}")
    assert served.quiet(60)
    freed(served)
    assert not served.service.unparsed.held and not served.service.unread.held and not served.service.check.lost
    assert not served.service.places.count
