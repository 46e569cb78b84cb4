"""Rewards: a server, several with weights, the gate; what is refused."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from llama2 import InputError
from llama2.align.prompts import PromptRow
from llama2.align.rewards import FunctionReward, Judge, ServerReward, source_of
from llama2.align.rollout import Rollout

PROMPT = PromptRow([1], "ask", False, {})
TAGGED = PromptRow([1], [{"role": "user", "content": "ask"}], True, {})


def answers(*texts: str) -> list[Rollout]:
    return [Rollout(0, k, k, [1], [2], text, True) for k, text in enumerate(texts)]


class Handler(BaseHTTPRequestHandler):
    """Gives each row the length of its answer."""

    broken = ""

    def do_POST(self) -> None:
        rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
        if self.broken == "status":
            self.send_error(503)
            return
        texts = [row["completion"] if "prompt" in row else row["messages"][-1]["content"] for row in rows]
        data = [{"index": i, "score": float(len(text))} for i, text in enumerate(texts)][::-1]
        if self.broken == "few":
            data = data[:-1]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"no" if self.broken == "text" else json.dumps({"data": data}).encode())

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Handler.broken = ""
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_is_asked_for_each_answer(url: str) -> None:
    source = source_of(url, None)
    assert isinstance(source, ServerReward)
    texts = [f"{'x' * (i % 5)}y" for i in range(70)]
    assert source([PROMPT] * 70, answers(*texts)) == [float(len(text)) for text in texts]
    assert source([TAGGED], answers("abc")) == [3.0]


@pytest.mark.parametrize(
    ("broken", "said"), [("status", "answered 503"), ("few", "for 2 answers"), ("text", "gave no rewards")]
)
def test_a_server_that_fails(url: str, broken: str, said: str) -> None:
    Handler.broken = broken
    with pytest.raises(InputError, match=said):
        ServerReward(url)([PROMPT] * 2, answers("a", "b"))


def test_rewards_are_added_and_gated() -> None:
    def length(completions: list[str]) -> list[float | None]:
        return [None if text == "" else float(len(text)) for text in completions]

    def constant(prompts: list[Any]) -> list[float]:
        return [10.0] * len(prompts)

    def safe(completions: list[Any]) -> list[float]:
        return [-2.0 if "bad" in str(text) else 1.0 for text in completions]

    judge = Judge([FunctionReward(length), FunctionReward(constant)], [2.0, 1.0], FunctionReward(safe))
    said = answers("a", "bad", "", "ok")
    judge([PROMPT, PROMPT, PROMPT, TAGGED], said)
    assert [a.score for a in said] == [12.0, -2.0, 10.0, 1.0]
    assert said[0].parts == {"length": 1.0, "constant": 10.0, "safety": 1.0}
    assert "safety safe below 0.15" in judge.name and "2 length" in judge.name


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="3 reward weights for 1 rewards"):
        Judge([FunctionReward(len)], [1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="between 0 and 1"):
        Judge([FunctionReward(len)], threshold=1.5)
    with pytest.raises(InputError, match="a reward is 3"):
        source_of(3, None)
