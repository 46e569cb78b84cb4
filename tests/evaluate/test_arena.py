"""Verdicts, swapped orders, win rates; a judge behind a URL."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from llama2.errors import InputError
from llama2.evaluate import arena
from llama2.evaluate.arena import JudgedPair, JudgeError, judge_pair, read_verdict


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("B is longer, but A is right. [[A]]", "first"),
        ("[[A]] at first, yet [[ b ]]", "second"),
        ("[[C]]", "tie"),
        ("Tie.", "tie"),
        ("second", "second"),
        (7, "first"),
        (5, "first"),
        (4, "tie"),
        (3.5, "second"),
        (1, "second"),
        (0, "unreadable"),
        (8, "unreadable"),
        (True, "unreadable"),
        ("I like both", "unreadable"),
        (None, "unreadable"),
    ],
)
def test_verdicts(said: Any, verdict: str) -> None:
    assert read_verdict(said) == verdict


def test_a_judge_that_prefers_a_place_makes_ties() -> None:
    assert judge_pair(lambda p, a, b: "A", "q", "x", "y") == JudgedPair("tie", "first", "second")
    longer = lambda p, a, b: "A" if len(a) > len(b) else "B"  # noqa: E731
    assert judge_pair(longer, "q", "xx", "y") == JudgedPair("first", "first", "first")
    assert judge_pair(longer, "q", "x", "yy") == JudgedPair("second", "second", "second")
    assert judge_pair(lambda p, a, b: "no", "q", "x", "yy").winner == "tie"


def test_win_rate_counts_ties_as_half() -> None:
    outcomes = [JudgedPair(w, w, w) for w in ("first", "first", "second", "tie")]  # type: ignore[arg-type]
    rows = {row.test: row for row in arena.rows("a", "b", outcomes)}
    rate = rows["win rate against b"]
    assert rate.value == 62.5 and rate.low is not None and rate.high is not None and rate.low < 62.5 < rate.high
    assert (rows["wins"].value, rows["losses"].value, rows["ties"].value) == (2, 1, 1)


def test_ratings() -> None:
    found = arena.read_ratings([7, {"rating": 4}, {"rating": 2}])
    assert [outcome.winner for outcome in found] == ["first", "tie", "second"]
    for wrong in (0, 8, "5", None, True, {"score": 3}):
        with pytest.raises(InputError, match="line 2"):
            arena.read_ratings([4, wrong])


def test_functions_as_judges() -> None:
    assert arena.python_judge("builtins:max")("a", "b", "c") == "c"
    for wrong in ("nowhere_at_all:f", "builtins:nothing", "builtins", "sys:path"):
        with pytest.raises(InputError, match="python:"):
            arena.python_judge(wrong)


def test_a_server_as_judge() -> None:
    heard: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            body = b'{"choices": [{"message": {"content": "[[B]]"}}]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        for address in (url, f"{url}/v1", f"{url}/v1/chat/completions"):
            assert read_verdict(arena.url_judge(address)("What?", "one", "two")) == "second"
        server.shutdown()
        thread.join()
    assert {path for path, _ in heard} == {"/v1/chat/completions"}
    assert "one" in heard[0][1]["messages"][0]["content"] and heard[0][1]["temperature"] == 0
    with pytest.raises(JudgeError, match="no verdict"):
        arena.url_judge(url)("What?", "one", "two")
