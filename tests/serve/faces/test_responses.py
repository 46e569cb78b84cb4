"""OpenAI's Responses API, through its own client and as plain HTTP."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serve.conftest import Served
from wire import call, get, post

openai = pytest.importorskip("openai", reason="needs the package `openai`")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [{"type": "function", "name": "f", "description": "d", "parameters": SCHEMA, "strict": True}]
GIVEN: dict[str, Any] = {"model": "tiny", "input": "Hi", "instructions": "S", "max_output_tokens": 8, "temperature": 0}


@pytest.fixture
def client(face: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{face.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_whole_and_streamed(client: Any) -> None:
    whole = client.responses.create(**GIVEN)
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage.output_tokens == 8 and whole.usage.total_tokens == whole.usage.input_tokens + 8
    events = list(client.responses.create(**GIVEN, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added",
                         "response.content_part.added"]  # fmt: skip
    assert kinds[-4:] == ["response.output_text.done", "response.content_part.done", "response.output_item.done",
                          "response.incomplete"]  # fmt: skip
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert (
        events[-1].response.output_text == whole.output_text
        and len({events[0].response.id, events[-1].response.id}) == 1
    )
    assert events[-1].response.usage.output_tokens == 8


def test_the_stream_helper(client: Any) -> None:
    text = client.responses.create(**{**GIVEN, "max_output_tokens": 60}).output_text
    given = GIVEN | {
        "max_output_tokens": 60,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
    }
    with client.responses.stream(**given) as stream:
        told = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert json.loads(told)["a"] in range(10) and final.output_text == told and final.status == "completed" and text


def test_parse(client: Any) -> None:
    from pydantic import BaseModel, ConfigDict

    class Found(BaseModel):
        model_config = ConfigDict(extra="forbid")
        yes: bool

    found = client.responses.parse(**{**GIVEN, "max_output_tokens": 60}, text_format=Found)
    assert isinstance(found.output_parsed, Found)


def test_tools(client: Any) -> None:
    for choice in ("required", {"type": "function", "name": "f"}):
        given = GIVEN | {"max_output_tokens": 100, "tools": TOOLS, "tool_choice": choice}
        whole = client.responses.create(**given)
        (made,) = whole.output
        assert made.type == "function_call" and json.loads(made.arguments)["a"] in range(10)
        assert made.id != made.call_id and made.name == "f" and whole.status == "completed"
        with client.responses.stream(**given) as stream:
            kinds = [event.type for event in stream]
            (again,) = stream.get_final_response().output
        assert again.arguments == made.arguments and "response.function_call_arguments.done" in kinds
    back = [
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        made.model_dump(),
        {"type": "function_call_output", "call_id": made.call_id, "output": "one"},
        {"role": "user", "content": [{"type": "input_text", "text": "and?"}]},
    ]
    more = [*TOOLS, {"type": "web_search"}]
    told = client.responses.create(**{**GIVEN, "input": back, "tools": more, "tool_choice": "none"})
    assert told.output[0].type == "message"
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]}
    (made,) = client.responses.create(
        **{**GIVEN, "max_output_tokens": 100, "tools": TOOLS, "tool_choice": allowed}
    ).output
    assert made.type == "function_call"


def test_logprobs(client: Any) -> None:
    given = GIVEN | {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = client.responses.create(**given)
    (part,) = whole.output[0].content
    assert len(part.logprobs) == 8 and len(part.logprobs[0].top_logprobs) == 2
    events = list(client.responses.create(**given, stream=True))
    assert len(events[-1].response.output[0].content[0].logprobs) == 8


def test_input_tokens_and_what_is_not_stored(client: Any, face: Served) -> None:
    tokens = client.responses.create(**GIVEN).usage.input_tokens
    assert client.responses.input_tokens.count(model="tiny", input="Hi", instructions="S").input_tokens == tokens
    with pytest.raises(openai.NotFoundError, match="nothing is stored"):
        client.responses.retrieve("resp_1")
    assert call(face.port, "DELETE", "/v1/responses/resp_1").status == 404
    assert get(face.port, "/v1/responses/resp_1/input_items").status == 404
    assert call(face.port, "POST", "/v1/responses/resp_1/cancel").status == 404
    for given in ({"previous_response_id": "resp_1"}, {"conversation": "c"}, {"background": True}):
        with pytest.raises(openai.BadRequestError, match="nothing is stored") as caught:
            client.responses.create(**GIVEN, **given)
        assert caught.value.param in given
    said = client.responses.create(**GIVEN, store=True, metadata={"k": "v"}, truncation="auto", user="u")
    assert said.store is False and said.metadata == {"k": "v"}


REFUSED = [
    ({"input": None, "instructions": None}, 400, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "refers"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, 400, "input_image"),
    ({"input": [{"type": "computer_call", "id": "x"}]}, 400, "computer_call"),
    ({"input": "long " * 2000}, 400, "max_input_tokens"),
    ({"model": "gpt-9"}, 404, "gpt-9"),
    ({"top_p": 7}, 400, "top_p"),
]


@pytest.mark.parametrize(("change", "status", "text"), REFUSED)
def test_refusals(face: Served, change: dict[str, Any], status: int, text: str) -> None:
    reply = post(face.port, "/v1/responses", GIVEN | change)
    assert reply.status == status and text in reply.json["error"]["message"]
    assert reply.json["error"].keys() == {"message", "type", "param", "code"}


def test_a_failure_in_the_middle_is_an_event(face: Served) -> None:
    from llama2.serve.errors import Refusal
    from llama2.serve.openai_responses import ResponseWriter

    class Stub:
        number, output = 4, list[Any]()
        event = ResponseWriter.event

        class reply:
            @staticmethod
            def response(status: str, output: Any, **more: Any) -> dict[str, Any]:
                return {"status": status, **more}

    told = ResponseWriter.fail(Stub(), Refusal("deadline", "too long"))  # type: ignore[arg-type]
    name, data = told.decode().split("\n", 1)
    found = json.loads(data.removeprefix("data: "))
    assert name == "event: response.failed" and found["sequence_number"] == 4
    assert found["response"]["error"] == {"code": "deadline_exceeded", "message": "too long"}
