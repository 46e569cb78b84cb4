"""OpenAI's first API of functions: `functions` and `function_call`, as clients older than tools send them."""

import json
from typing import Any

import pytest
from serve.conftest import Served
from wire import post

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a"],
}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 60}
FUNCTIONS = [{"name": "f", "description": "d", "parameters": SCHEMA}, {"name": "g"}]


@pytest.mark.parametrize("seed", range(6))
def test_a_named_function_is_called_whole_and_streamed(face: Served, seed: int) -> None:
    body = CHAT | {"functions": FUNCTIONS, "function_call": {"name": "f"}, "seed": seed}
    (choice,) = post(face.port, "/v1/chat/completions", body).json["choices"]
    made = choice["message"]["function_call"]
    assert made["name"] == "f" and json.loads(made["arguments"])["a"] in range(10)
    assert choice["finish_reason"] == "function_call" and "tool_calls" not in choice["message"]
    assert choice["message"]["content"] is None
    *chunks, _ = post(face.port, "/v1/chat/completions", body | {"stream": True}).events
    deltas = [c["choices"][0]["delta"] for c in chunks]
    calls = [delta["function_call"] for delta in deltas if "function_call" in delta]
    assert calls[0] == {"name": "f", "arguments": ""} and all("name" not in call for call in calls[1:])
    assert "".join(call["arguments"] for call in calls) == made["arguments"]
    assert not any("tool_calls" in delta for delta in deltas)
    assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"


def test_none_and_auto(face: Served) -> None:
    for choice in ("none", "auto"):
        reply = post(face.port, "/v1/chat/completions", CHAT | {"functions": FUNCTIONS, "function_call": choice})
        assert reply.status == 200
        assert choice == "auto" or "function_call" not in reply.json["choices"][0]["message"]


def test_calls_and_results_go_back_into_the_prompt(face: Served) -> None:
    call = {"name": "f", "arguments": '{"a": 3}'}
    messages = [
        *CHAT["messages"],  # type: ignore[misc]
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "f", "content": "three"},
    ]
    prompts = [
        post(face.port, "/apply-template", {"messages": given, "functions": FUNCTIONS}).json["prompt"]
        for given in (messages, CHAT["messages"])
    ]
    assert (
        '"a": 3' in prompts[0] and "three" in prompts[0] and "three" not in prompts[1] and '"name": "g"' in prompts[1]
    )


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"functions": FUNCTIONS, "function_call": {"name": "h"}}, "'h', which is not among the tools"),
        ({"function_call": "auto"}, "function_call needs functions"),
        ({"functions": FUNCTIONS, "tools": [{"type": "function", "function": FUNCTIONS[0]}]}, "send one of them"),
        ({"functions": [{"name": "a b"}]}, "functions.0.name"),
    ],
)
def test_what_is_refused(face: Served, more: dict[str, Any], told: str) -> None:
    reply = post(face.port, "/v1/chat/completions", CHAT | more)
    assert reply.status == 400 and told in reply.json["error"]["message"]
