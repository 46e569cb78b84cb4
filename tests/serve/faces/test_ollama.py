"""Ollama's API, through its own client and as plain HTTP."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serve.conftest import Served
from wire import call, get, post

ollama = pytest.importorskip("ollama", reason="needs the package `ollama`")

MESSAGES: list[Any] = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
OPTIONS: dict[str, Any] = {"num_predict": 8, "seed": 1, "temperature": 1.5, "num_ctx": 512, "repeat_penalty": 1.1}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}]


@pytest.fixture
def client(face: Served) -> Iterator[Any]:
    with ollama.Client(host=face.url) as found:
        yield found


def lines(content: bytes) -> list[Any]:
    assert content.endswith(b"\n") and b"\n\n" not in content
    return [json.loads(line) for line in content.splitlines()]


def test_chat_whole_and_streamed(client: Any) -> None:
    whole = client.chat("tiny", MESSAGES, options=OPTIONS)
    assert whole.done and whole.done_reason == "length" and whole.eval_count == 8 and whole.message.role == "assistant"
    assert whole.prompt_eval_count > 0 and whole.total_duration >= whole.eval_duration > 0
    chunks = list(client.chat("tiny:latest", MESSAGES, options=OPTIONS, stream=True))
    assert "".join(c.message.content for c in chunks) == whole.message.content
    assert [c.done for c in chunks[:-1]] == [False] * (len(chunks) - 1) and chunks[-1].done
    assert chunks[-1].message.content == "" and chunks[-1].eval_count == 8 and chunks[-1].done_reason == "length"


def test_generate_whole_streamed_raw_and_with_context(client: Any) -> None:
    whole = client.generate("tiny", "Hi", system="S", options=OPTIONS)
    assert whole.response and whole.eval_count == 8 and len(whole.context) == whole.prompt_eval_count + 8
    chunks = list(client.generate("tiny", "Hi", system="S", options=OPTIONS, stream=True))
    assert "".join(c.response for c in chunks) == whole.response and chunks[-1].context == whole.context
    more = client.generate("tiny", "And?", context=whole.context, options=OPTIONS)
    assert more.prompt_eval_count > whole.prompt_eval_count + 8 and more.context[: len(whole.context)] == whole.context
    raw = client.generate("tiny", "Hi", raw=True, options=OPTIONS)
    assert raw.context is None and raw.prompt_eval_count < whole.prompt_eval_count
    assert "".join(c.response for c in client.generate("tiny", "Hi", raw=True, options=OPTIONS, stream=True)) == (
        raw.response
    )


def test_logprobs(client: Any) -> None:
    for given in ({"logprobs": True, "top_logprobs": 2}, {"logprobs": True}):
        whole = client.chat("tiny", MESSAGES, options=OPTIONS, **given)
        assert len(whole.logprobs) == 8 and len(whole.logprobs[0].top_logprobs) == given.get("top_logprobs", 0)
        chunks = list(client.generate("tiny", "Hi", raw=True, options=OPTIONS, stream=True, **given))
        assert sum(len(c.logprobs or []) for c in chunks) == 8


def test_format(client: Any) -> None:
    options = OPTIONS | {"num_predict": 60}
    for seed in range(4):
        whole = client.chat("tiny", MESSAGES, format=SCHEMA, options=options | {"seed": seed})
        assert json.loads(whole.message.content)["a"] in range(10) and whole.done_reason == "stop"
        said = "".join(
            c.response
            for c in client.generate("tiny", "Hi", format=SCHEMA, options=options | {"seed": seed}, stream=True)
        )
        assert json.loads(said)["a"] in range(10)
    free = client.generate("tiny", "Hi", format="json", options=options)
    assert free.response.startswith("{")


def test_tools(client: Any) -> None:
    def f(a: int) -> str:
        """d

        Args:
          a: the number
        """
        return str(a)

    # "auto" lets a model talk; this bias is what a model trained on calls would have
    options = OPTIONS | {"num_predict": 200}
    called = said = 0
    for seed in range(6):
        given: dict[str, Any] = {"tools": TOOLS, "options": options | {"seed": seed}}
        whole = client.chat("tiny", MESSAGES, **given)
        chunks = list(client.chat("tiny", MESSAGES, stream=True, **given))
        calls = [c for chunk in chunks for c in chunk.message.tool_calls or []]
        assert [c.function for c in calls] == [c.function for c in whole.message.tool_calls or []]
        assert "".join(c.message.content or "" for c in chunks) == whole.message.content
        called, said = called + bool(calls), said + bool(whole.message.content)
    assert called + said >= 6
    assert client.chat("tiny", MESSAGES, tools=[f], options=OPTIONS).done
    back = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "tool_name": "f", "content": "one"},
    ]
    assert client.chat("tiny", back, tools=TOOLS, options=OPTIONS).prompt_eval_count > 10


def test_a_call_is_told_whole_with_an_object_of_arguments(face: Served) -> None:
    from llama2.engine.engine import TokenEvent
    from llama2.serve.chat import Tool, chosen
    from llama2.serve.ollama import _ChatLines
    from llama2.serve.request import GenerationRequest

    class Call:
        class times:
            came = 0.0

    tools = chosen([Tool.model_validate(TOOLS[0])], "required")
    writer = _ChatLines(Call, "tiny", face.service.model, GenerationRequest(prompts=((1,),)), tools)  # type: ignore[arg-type]
    text = '{"name": "f", "arguments": {"a": 3}}'
    told = b"".join(
        writer.put(0, TokenEvent(7, c, finish="eos" if i == len(text) - 1 else None)) for i, c in enumerate(text)
    )
    (line,) = lines(told)
    (made,) = line["message"]["tool_calls"]
    assert made["function"] == {"index": 0, "name": "f", "arguments": {"a": 3}} and made["id"].startswith("call_")
    assert line["message"]["content"] == "" and line["done"] is False


def test_models(client: Any, face: Served) -> None:
    (row,) = client.list().models
    assert row.model == "tiny:latest" and row.details.family == "llama" and row.size > 0 and len(row.digest) == 64
    shown = client.show("tiny")
    assert shown.modelinfo["general.architecture"] == "llama" and "completion" in shown.capabilities
    assert shown.modelinfo["llama.context_length"] == 1024
    (loaded,) = client.ps().models
    assert loaded.context_length == 1024 and loaded.name == "tiny:latest"
    assert client.pull("tiny").status == "success"
    assert [p.status for p in client.pull("tiny", stream=True)][-1] == "success"
    for name in get(face.port, "/api/version").json["version"].split("."):
        assert name.isdecimal()
    with pytest.raises(ollama.ResponseError) as caught:
        client.delete("tiny")
    assert caught.value.status_code == 501
    assert call(face.port, "HEAD", "/").status == 200 and get(face.port, "/").content == b"Ollama is running"


def test_vectors(client: Any) -> None:
    found = client.embed("tiny", ["a", "b", "a"])
    assert len(found.embeddings) == 3 and found.embeddings[0] == pytest.approx(found.embeddings[2], abs=1e-5)
    assert sum(v * v for v in found.embeddings[1]) == pytest.approx(1, abs=1e-4)
    cut = client.embed("tiny", "a", dimensions=8).embeddings[0]
    assert len(cut) == 8 and sum(v * v for v in cut) == pytest.approx(1, abs=1e-4)
    old = client.embeddings("tiny", "a").embedding
    assert old == pytest.approx(found.embeddings[0], abs=1e-5)
    assert client.embed("tiny", "a" * 5000).prompt_eval_count <= 1024  # cut, as Ollama does
    with pytest.raises(ollama.ResponseError):
        client.embed("tiny", "a" * 5000, truncate=False)


def test_empty_calls_ask_for_the_model(client: Any) -> None:
    assert client.generate("tiny").done_reason == "load" and client.chat("tiny").done_reason == "load"
    assert client.generate("tiny", keep_alive=0).done_reason == "unload"


REFUSED = [
    ("/api/chat", {"messages": MESSAGES}, 400, "model is required"),
    ("/api/chat", {"model": "no", "messages": MESSAGES}, 404, "not found"),
    ("/api/chat", {"model": "tiny", "messages": MESSAGES, "think": True}, 400, "thinking"),
    ("/api/chat", {"model": "tiny", "messages": [{"role": "user", "images": ["x"]}]}, 400, "images"),
    ("/api/chat", {"model": "tiny", "messages": MESSAGES, "format": "xml"}, 400, "xml"),
    ("/api/chat", {"model": "tiny", "messages": MESSAGES, "options": {"top_p": "a"}}, 400, "top_p"),
    ("/api/chat", {"model": "tiny", "messages": MESSAGES, "options": {"num_predict": "a"}}, 400, "num_predict"),
    ("/api/chat", {"model": "tiny", "messages": MESSAGES, "top_logprobs": 99}, 400, "top_logprobs"),
    ("/api/generate", {"model": "tiny", "prompt": "x", "suffix": "y"}, 400, "insert"),
    ("/api/generate", {"model": "tiny", "prompt": "x", "raw": True, "system": "y"}, 400, "raw"),
    ("/api/generate", {"model": "tiny", "prompt": "x", "template": "y"}, 400, "template"),
    ("/api/generate", b"{", 400, "JSON"),
    ("/api/show", {"model": "no"}, 404, "not found"),
    ("/api/pull", {"model": "no"}, 404, "not found"),
    ("/api/no", {"model": "no"}, 404, "/api/no"),
]


@pytest.mark.parametrize(("path", "body", "status", "text"), REFUSED)
def test_refusals(face: Served, path: str, body: Any, status: int, text: str) -> None:
    reply = post(face.port, path, body)
    assert reply.status == status and reply.json.keys() == {"error"} and text in reply.json["error"]


def test_a_body_as_curl_sends_it(face: Served) -> None:
    body = {"model": "tiny", "prompt": "Hi", "options": {"num_predict": 2, "seed": 1}}
    reply = post(face.port, "/api/generate", body, content_type="application/x-www-form-urlencoded")
    assert (
        reply.status == 200
        and lines(reply.content)[-1]["done"]
        and reply.headers["content-type"] == ("application/x-ndjson")
    )
    kinds = {"content_type": "text/plain", "origin": "https://evil.example"}
    assert post(face.port, "/api/generate", body, **kinds).status == 415


def test_defaults_are_ollamas(face: Served) -> None:
    from llama2.serve.ollama import OllamaChatBody

    found = OllamaChatBody.model_validate({"model": "tiny"}).fields(face.service.model)
    assert (found["temperature"], found["top_k"], found["top_p"]) == (0.8, 40, 0.9)
