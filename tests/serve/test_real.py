"""SmolLM2 over HTTP: words that make sense, and the same words as generate()."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serve.conftest import Served
from wire import post

from llama2 import AutoTokenizer, cpu
from llama2.runners.native import NativeModel

pytestmark = pytest.mark.skipif(
    not cpu.available(), reason="the GGUF file runs in the native engine, which is not built"
)


@pytest.fixture(scope="module")
def smol(extra: None, smollm2: Path) -> Iterator[Served]:
    from llama2.serve.policy import Policy

    found = Served(NativeModel.from_gguf(smollm2), AutoTokenizer.from_pretrained(smollm2), Policy(("smol",)), None, {})
    yield found
    assert found.quiet()
    found.close()


def test_a_completion_is_what_generate_says(smol: Served) -> None:
    engine = smol.engine
    body: dict[str, Any] = {"prompt": "The capital of France is", "max_tokens": 12, "temperature": 0}
    text = post(smol.port, "/v1/completions", body).json["choices"][0]["text"]
    ids = engine.tokenizer(body["prompt"])["input_ids"]
    new = engine.model.generate(torch.tensor([ids]), max_new_tokens=12)[0, len(ids) :]
    assert text == engine.tokenizer.decode(new, skip_special_tokens=True) and "Paris" in text


def test_a_chat_ends_by_itself_and_is_remembered(smol: Served) -> None:
    messages = [{"role": "user", "content": "Answer in one word: what is the capital of France?"}]
    body = {"messages": messages, "max_tokens": 40, "temperature": 0}
    first = post(smol.port, "/v1/chat/completions", body).json
    assert first["choices"][0]["finish_reason"] == "stop" and "Paris" in first["choices"][0]["message"]["content"]
    messages += [first["choices"][0]["message"], {"role": "user", "content": "And of Italy?"}]
    second = post(smol.port, "/v1/chat/completions", body | {"messages": messages}).json
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["usage"]["prompt_tokens"] // 16 * 16


def test_structured_output_and_calls(smol: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "country": {"enum": ["France", "Italy"]}},
        "required": ["city", "country"],
        "additionalProperties": False,
    }
    messages = [{"role": "user", "content": "Where is the Eiffel tower? Answer in JSON."}]
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    body: dict[str, Any] = {"messages": messages, "max_tokens": 60, "temperature": 0}
    reply = post(smol.port, "/v1/chat/completions", body | {"response_format": form}).json
    found = json.loads(reply["choices"][0]["message"]["content"])
    assert found["country"] == "France" and set(found) == {"city", "country"}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
    reply = post(smol.port, "/v1/chat/completions", body | {"tools": tools, "tool_choice": "required"}).json
    (call,) = reply["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather" and set(json.loads(call["function"]["arguments"])) == set(found)
