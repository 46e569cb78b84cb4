"""Anthropic's Messages API, through its own client and as plain HTTP."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serve.conftest import Served
from wire import get, post

anthropic = pytest.importorskip("anthropic", reason="needs the package `anthropic`")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [{"name": "f", "description": "d", "input_schema": SCHEMA}]
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
GIVEN: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "system": "S", "messages": MESSAGES}
SAMPLED = {"temperature": 1.0, "top_p": 0.99, "top_k": 50}


@pytest.fixture
def client(face: Served) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=face.url, api_key="none", max_retries=0) as found:
        yield found


def test_whole_and_streamed(client: Any) -> None:
    given = GIVEN | {"extra_body": {"temperature": 0.0}}
    whole = client.messages.create(**given)
    assert whole.type == "message" and whole.role == "assistant" and whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 8 and whole.usage.input_tokens > 0 and whole.id.startswith("msg_")
    text = whole.content[0].text
    with client.messages.stream(**given) as stream:
        assert "".join(stream.text_stream) == text
        final = stream.get_final_message()
    assert final.content[0].text == text and final.stop_reason == "max_tokens" and final.usage.output_tokens == 8
    events = list(client.messages.create(**given, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"] and kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds[-3] == "content_block_stop" and set(kinds[2:-3]) == {"content_block_delta"}
    assert events[0].message.usage.input_tokens > 0 and whole._request_id


def test_cached_tokens_are_told_apart(client: Any) -> None:
    given = GIVEN | {"messages": [{"role": "user", "content": "word " * 60}], "extra_body": {"temperature": 0.0}}
    first, second = client.messages.create(**given).usage, client.messages.create(**given).usage
    total = first.input_tokens + first.cache_read_input_tokens
    assert second.cache_read_input_tokens > 0 and second.input_tokens + second.cache_read_input_tokens == total
    counted = client.messages.count_tokens(model="tiny", system="S", messages=given["messages"])
    assert counted.input_tokens == total


def test_stop_sequences(client: Any) -> None:
    given = GIVEN | {"max_tokens": 40, "extra_body": {"temperature": 0.0}}
    text = client.messages.create(**given).content[0].text
    stop = text[6:8]
    whole = client.messages.create(**given, stop_sequences=["\x00no", stop])
    assert whole.stop_reason == "stop_sequence" and whole.stop_sequence == stop
    assert whole.content[0].text == text[: text.index(stop)]
    with client.messages.stream(**given, stop_sequences=[stop]) as stream:
        final = stream.get_final_message()
    assert (final.stop_sequence, final.stop_reason) == (stop, "stop_sequence")
    assert "".join(block.text for block in final.content) == whole.content[0].text


def test_tools(client: Any) -> None:
    for choice in ({"type": "any"}, {"type": "tool", "name": "f"}):
        given = GIVEN | {"max_tokens": 100, "tools": TOOLS, "tool_choice": choice, "extra_body": SAMPLED}
        whole = client.messages.create(**given)
        (used,) = whole.content
        assert whole.stop_reason == "tool_use" and used.type == "tool_use" and used.name == "f"
        assert used.input["a"] in range(10) and used.id.startswith("toolu_")
        with client.messages.stream(**given) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_message()
        assert final.content[0].input["a"] in range(10) and final.stop_reason == "tool_use" and "input_json" in kinds
    back = [
        *MESSAGES,
        {"role": "assistant", "content": [{"type": "text", "text": "see"}, used.model_dump(exclude_none=True)]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": used.id, "content": [{"type": "text", "text": "one"}]},
                {"type": "text", "text": "and?"},
            ],
        },
    ]
    server_tool = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
    told = client.messages.create(**{**GIVEN, "messages": back, "tools": [*TOOLS, server_tool], "extra_body": SAMPLED})
    assert told.usage.output_tokens and told.stop_reason in ("max_tokens", "end_turn")
    free = client.messages.create(**{**GIVEN, "tools": TOOLS, "tool_choice": {"type": "none"}})
    assert free.content[0].type == "text"


def test_a_form(client: Any) -> None:
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}
    found = client.messages.create(**{**GIVEN, "max_tokens": 60, "output_config": form})
    assert json.loads(found.content[0].text)["a"] in range(10) and found.stop_reason == "end_turn"


def test_conversations_as_they_are_sent(face: Served) -> None:
    """Turns of one role in a row, systems of many parts, a prefill, odd roles, what is read and not obeyed."""
    more = {
        "metadata": {"user_id": "u"}, "thinking": {"type": "disabled"}, "service_tier": "auto",
        "cache_control": {"type": "ephemeral"},
    }  # fmt: skip
    bill = {"type": "text", "text": "x-anthropic-billing-header: cc=1", "cache_control": {"type": "ephemeral"}}
    system = [bill, {"type": "text", "text": "S"}]
    said = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"},
                                          {"type": "text", "text": "c"}]},
        {"role": "ctx", "content": "d"},
    ]  # fmt: skip
    body = {"model": "tiny", "max_tokens": 4, "system": system, "messages": said, **more}
    reply = post(face.port, "/v1/messages?beta=true", body, anthropic_beta="x-2030", anthropic_version="2023-06-01")
    assert reply.status == 200, reply.content
    assert reply.headers["request-id"]
    tokens = reply.json["usage"]["input_tokens"] + reply.json["usage"]["cache_read_input_tokens"]
    merged = [{"role": "user", "content": "a\n\nb"}, {"role": "assistant", "content": "c"},
              {"role": "user", "content": "d"}]  # fmt: skip
    plain = {"model": "tiny", "max_tokens": 4, "system": "S", "messages": merged}
    usage = post(face.port, "/messages", plain).json["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == tokens
    prefill = [*MESSAGES, {"role": "assistant", "content": "The"}]
    assert post(face.port, "/v1/messages", plain | {"messages": prefill}).status == 200


def test_a_failure_in_the_middle_is_an_event(face: Served) -> None:
    from llama2.serve.anthropic import MessageWriter
    from llama2.serve.errors import Refusal

    told = MessageWriter.fail.__get__(type("W", (), {"request_id": "r"})())(Refusal("busy", "later"))
    name, data = told.decode().split("\n", 1)
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"] == {"type": "overloaded_error", "message": "later"}


REFUSED = [
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": None}, 400, "max_tokens"),
    ({"messages": [{"role": "user", "content": "long " * 2000}]}, 400, "max_input_tokens"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400, "image"),
    ({"model": "claude-9"}, 404, "claude-9"),
    ({"top_p": 7}, 400, "top_p"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "g"}}, 400, "'g'"),
]


@pytest.mark.parametrize(("change", "status", "text"), REFUSED)
def test_refusals(face: Served, change: dict[str, Any], status: int, text: str) -> None:
    reply = post(face.port, "/v1/messages", GIVEN | change)
    assert reply.status == status and text in reply.json["error"]["message"] and reply.json["type"] == "error"
    kind = "not_found_error" if status == 404 else "invalid_request_error"
    assert reply.json["error"]["type"] == kind and reply.json["request_id"] == reply.headers["request-id"]


def test_errors_of_the_client(client: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match="max_input_tokens"):
        client.messages.create(**(GIVEN | {"messages": [{"role": "user", "content": "long " * 2000}]}))
    assert client.messages.create(**(GIVEN | {"max_tokens": 5000})).usage.output_tokens > 8  # what there is room for
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**(GIVEN | {"model": "claude-9"}))
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").display_name == "tiny"


def test_models_are_told_to_both_clients(face: Served) -> None:
    found = get(face.port, "/v1/models").json
    assert found["object"] == "list" and found["has_more"] is False and found["first_id"] == found["last_id"] == "tiny"
