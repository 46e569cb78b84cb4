"""anthropic: messages whole and streamed, tools, counts, models."""

from typing import Any

import anthropic
from run_cases import Server
from shared import FUNCTION, QUESTION, SCHEMA


def client(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def given(server: Server) -> dict[str, Any]:
    messages = [{"role": "user", "content": QUESTION}]
    return {"model": server.model, "max_tokens": 12, "messages": messages, "extra_body": {"temperature": 0}}


def case_messages(server: Server) -> None:
    whole = client(server).messages.create(**given(server), system="Be short.")
    with client(server).messages.stream(**given(server), system="Be short.") as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        final = stream.get_final_message()
    assert final.usage.output_tokens == whole.usage.output_tokens


def case_tools(server: Server) -> None:
    tools = [{"name": "pick", "description": FUNCTION["description"], "input_schema": SCHEMA}]
    more = {**given(server), "max_tokens": 200, "tools": tools, "tool_choice": {"type": "any"}}
    (used,) = client(server).messages.create(**more).content
    assert used.input["a"] in range(10)
    result = {"type": "tool_result", "tool_use_id": used.id, "content": "7"}
    back = [
        *more["messages"],
        {"role": "assistant", "content": [used.model_dump(exclude_none=True)]},
        {"role": "user", "content": [result]},
    ]
    assert client(server).messages.create(**{**given(server), "messages": back, "tools": tools}).usage.output_tokens


def case_counts_models_and_errors(server: Server) -> None:
    messages = given(server)["messages"]
    counted = client(server).messages.count_tokens(model=server.model, messages=messages).input_tokens
    usage = client(server).messages.create(**given(server)).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens
    assert server.model in [model.id for model in client(server).models.list()]
    try:
        client(server).messages.create(**{**given(server), "model": "claude-of-nowhere"})
    except anthropic.NotFoundError as error:
        assert "claude-of-nowhere" in str(error)
    else:
        raise AssertionError("a model that is not served was taken")
