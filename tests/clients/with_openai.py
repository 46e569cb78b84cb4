"""openai: chats, completions, responses, embeddings, models, whole, streamed and asynchronous."""

import asyncio
import json
from typing import Any

import openai
from run_cases import Server
from shared import FUNCTION, MESSAGES, SCHEMA, TOOLS


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def case_chat(server: Server) -> None:
    given: dict[str, Any] = {"model": server.model, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client(server).chat.completions.create(**given)
    text = whole.choices[0].message.content
    chunks = list(client(server).chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    rated = client(server).chat.completions.create(**given, logprobs=True, top_logprobs=3)
    assert len(rated.choices[0].logprobs.content) == whole.usage.completion_tokens


def case_chat_tools_and_forms(server: Server) -> None:
    given: dict[str, Any] = {"model": server.model, "messages": MESSAGES, "max_tokens": 200, "temperature": 0}
    (call,) = (
        client(server)
        .chat.completions.create(**given, tools=TOOLS, tool_choice="required")
        .choices[0]
        .message.tool_calls
    )
    assert json.loads(call.function.arguments)["a"] in range(10)
    with client(server).chat.completions.stream(**given, tools=TOOLS, tool_choice="required") as stream:
        (again,) = stream.get_final_completion().choices[0].message.tool_calls
    assert again.function.arguments == call.function.arguments
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    assert json.loads(client(server).chat.completions.create(**given, response_format=form).choices[0].message.content)
    back = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "7"},
    ]
    assert client(server).chat.completions.create(**{**given, "messages": back, "max_tokens": 8}, tools=TOOLS).choices


def case_completions(server: Server) -> None:
    given: dict[str, Any] = {"model": server.model, "prompt": "The sky is", "max_tokens": 8, "temperature": 0}
    whole = client(server).completions.create(**given, logprobs=2, echo=True)
    assert whole.choices[0].text.startswith("The sky is")
    text = client(server).completions.create(**given).choices[0].text
    assert "".join(c.choices[0].text for c in client(server).completions.create(**given, stream=True)) == text
    assert len(client(server).completions.create(**{**given, "prompt": ["a", "b"]}, n=1).choices) == 2


def case_responses(server: Server) -> None:
    given: dict[str, Any] = {"model": server.model, "input": "Name a color.", "max_output_tokens": 12, "temperature": 0}
    text = client(server).responses.create(**given).output_text
    events = list(client(server).responses.create(**given, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == text
    tools = [{"type": "function", **FUNCTION, "strict": True}]
    made = client(server).responses.create(**{**given, "max_output_tokens": 200}, tools=tools, tool_choice="required")
    assert json.loads(made.output[0].arguments)["a"] in range(10)


def case_embeddings_and_models(server: Server) -> None:
    assert server.model in [model.id for model in client(server).models.list()]
    try:
        found = client(server).embeddings.create(model=server.model, input=["a", "b"])
        assert len(found.data) == 2 and len(found.data[0].embedding) >= 32
    except openai.APIStatusError as error:  # packed weights alone may have none
        assert error.status_code == 501


def case_asynchronous(server: Server) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as own:
            given: dict[str, Any] = {"model": server.model, "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
            found = await asyncio.gather(*(own.chat.completions.create(**given) for _ in range(4)))
            assert len({f.choices[0].message.content for f in found}) == 1

    asyncio.run(main())
