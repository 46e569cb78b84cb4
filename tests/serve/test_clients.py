"""Other people's clients, unmodified: openai, huggingface_hub and text-generation, every call for text and chat."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from serve.conftest import Serve, Served

from llama2.serve.auth import Keys

MESSAGES: list[Any] = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}]


@pytest.fixture(scope="module")
def keyed(serve: Serve) -> Iterator[Served]:
    found = serve(keys=Keys(["sesame"]))
    yield found
    assert found.quiet()


# -- huggingface_hub, which is a dependency of ours -----------------------------------------------------------------


@pytest.fixture
def hub(served: Served) -> Iterator[Any]:
    from huggingface_hub import InferenceClient

    with InferenceClient(served.url) as client:
        yield client


def test_hub_text_generation(hub: Any) -> None:
    # On / the whole text is the default, also of TGI; its streams have the new text alone.
    given: dict[str, Any] = {"max_new_tokens": 8, "seed": 1, "temperature": 1.5, "return_full_text": False}
    text = hub.text_generation("Hi", **given)
    assert isinstance(text, str) and text
    assert "".join(hub.text_generation("Hi", stream=True, **given)) == text
    full = given | {"return_full_text": True}
    details = hub.text_generation("Hi", details=True, top_n_tokens=2, **full)
    assert details.generated_text == "Hi" + text and details.details.generated_tokens == 8
    assert len(details.details.top_tokens) == 8
    events = list(hub.text_generation("Hi", details=True, stream=True, **given))
    assert events[-1].generated_text == text and events[-1].details.finish_reason == "length"
    rated = hub.text_generation("Hi", details=True, decoder_input_details=True, max_new_tokens=2)
    assert [t.text for t in rated.details.prefill] == ["H", "i"]
    many = hub.text_generation("Hi", details=True, best_of=2, do_sample=True, max_new_tokens=3, watermark=True,
                               top_k=40, top_p=0.9, typical_p=0.95, repetition_penalty=1.1, frequency_penalty=0.5,
                               truncate=1, stop=["zzz"])  # fmt: skip
    assert len(many.details.best_of_sequences) == 1
    grammar = {"type": "json", "value": SCHEMA}
    assert json.loads(hub.text_generation("Hi", grammar=grammar, max_new_tokens=30, return_full_text=False))[
        "a"
    ] in range(10)


def test_hub_errors(hub: Any, keyed: Served) -> None:
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError, TextGenerationError, ValidationError

    with pytest.raises(ValidationError, match="at most 16"):
        hub.text_generation("Hi", stop=["a"] * 17)
    with pytest.raises(ValidationError, match="stream"):
        list(hub.text_generation("Hi", stream=True, best_of=2, do_sample=True))
    refused = pytest.raises((HfHubHTTPError, TextGenerationError), match=r"401|key")
    with InferenceClient(keyed.url) as wrong, refused:
        wrong.text_generation("Hi")
    with InferenceClient(keyed.url, token="sesame") as right:
        assert right.text_generation("Hi", max_new_tokens=2)


def test_hub_chat(hub: Any) -> None:
    given: dict[str, Any] = {"max_tokens": 8, "seed": 1, "temperature": 1.5}
    whole = hub.chat_completion(MESSAGES, logprobs=True, top_logprobs=2, stop=["zz"], n=1, frequency_penalty=0.1,
                                presence_penalty=0.1, top_p=0.9, **given)  # fmt: skip
    assert whole.choices[0].finish_reason == "length" and whole.choices[0].logprobs.content[0].top_logprobs
    text = hub.chat_completion(MESSAGES, **given).choices[0].message.content
    chunks = list(hub.chat_completion(MESSAGES, stream=True, stream_options={"include_usage": True}, **given))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.completion_tokens == 8
    call = hub.chat_completion(MESSAGES, tools=TOOLS, tool_choice="required", max_tokens=60)
    assert json.loads(call.choices[0].message.tool_calls[0].function.arguments)["a"] in range(10)
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    found = hub.chat_completion(MESSAGES, response_format=form, max_tokens=40).choices[0].message.content
    assert json.loads(found)["a"] in range(10)


def test_hub_async(served: Served) -> None:
    from huggingface_hub import AsyncInferenceClient

    async def main() -> None:
        async with AsyncInferenceClient(served.url) as client:
            await calls(client)

    async def calls(client: Any) -> None:
        text = await client.text_generation("Hi", max_new_tokens=5, return_full_text=False)
        stream = await client.text_generation("Hi", max_new_tokens=5, stream=True)
        assert "".join([piece async for piece in stream]) == text
        chat = await client.chat_completion(MESSAGES, max_tokens=3)
        assert chat.usage.completion_tokens == 3
        chunks = await client.chat_completion(MESSAGES, max_tokens=3, stream=True)
        assert len([c async for c in chunks]) >= 2

    asyncio.run(main())


# -- openai ------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(served: Served) -> Iterator[Any]:
    openai = pytest.importorskip("openai", reason="openai is of the extra `parity`")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.mark.parity
def test_openai_chat(client: Any) -> None:
    given: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 8, "seed": 1}
    whole = client.chat.completions.create(**given, n=2, logprobs=True, top_logprobs=3, stop=["zz"], temperature=1.5,
                                           top_p=0.9, logit_bias={"70": 1}, presence_penalty=0.1, frequency_penalty=0.1,
                                           user="u", metadata={"a": "b"}, store=False)  # fmt: skip
    assert [c.index for c in whole.choices] == [0, 1] and whole.choices[0].finish_reason == "length"
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 3 and whole.usage.completion_tokens == 16
    text = client.chat.completions.create(**given).choices[0].message.content
    chunks = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.completion_tokens == 8 and all(c.usage is None for c in chunks[:-1])
    given |= {"stop": [text[4:6]]}  # an answer that ended in time: the helper refuses one that was cut off
    with client.chat.completions.stream(**given) as stream:
        final = stream.get_final_completion()
    message = final.choices[0].message
    assert (message.content, message.role) == (text[: text.index(text[4:6])], "assistant")


@pytest.mark.parity
def test_openai_tools_and_structured_output(client: Any) -> None:
    from pydantic import BaseModel, ConfigDict

    class Found(BaseModel):
        model_config = ConfigDict(extra="forbid")
        yes: bool
        kind: str | None

    given: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 60, "tools": TOOLS}
    given |= {"tool_choice": "required", "parallel_tool_calls": False, "seed": 2}
    (made,) = client.chat.completions.create(**given).choices[0].message.tool_calls
    assert made.function.name == "f" and json.loads(made.function.arguments)["a"] in range(10)
    with client.chat.completions.stream(**given) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    (again,) = final.choices[0].message.tool_calls
    assert again.function.arguments == made.function.arguments and again.type == "function"
    assert "tool_calls.function.arguments.delta" in kinds and final.choices[0].finish_reason == "tool_calls"
    body: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 900, "logit_bias": {"38": 10}}
    parsed = client.chat.completions.parse(**body, response_format=Found)  # 38 is a quote: strings end
    assert isinstance(parsed.choices[0].message.parsed, Found)
    free = client.chat.completions.create(**body, response_format={"type": "json_object"})
    assert free.choices[0].finish_reason == "length" or isinstance(json.loads(free.choices[0].message.content), dict)


@pytest.mark.parity
def test_openai_completions_models_embeddings(client: Any) -> None:
    given: dict[str, Any] = {"model": "tiny", "prompt": "Hi", "max_tokens": 8, "seed": 1}
    whole = client.completions.create(**given, echo=True, logprobs=2, best_of=2, n=1, stop=["zz"])
    assert whole.choices[0].text.startswith("Hi") and whole.choices[0].logprobs.token_logprobs[0] is None
    text = client.completions.create(**given).choices[0].text
    assert "".join(c.choices[0].text for c in client.completions.create(**given, stream=True)) == text
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    found = client.embeddings.create(model="tiny", input=["a", "b"])
    assert len(found.data[1].embedding) == 32
    plain = client.embeddings.create(model="tiny", input=["a", "b"], encoding_format="float")
    assert found.data[1].embedding == pytest.approx(plain.data[1].embedding, abs=1e-6)


@pytest.mark.parity
def test_openai_errors(client: Any, keyed: Served) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="max_total_tokens") as caught:
        client.completions.create(model="tiny", prompt="Hi", max_tokens=5000)
    assert caught.value.code == "context_length_exceeded" and caught.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")
    with (
        openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="Sesame") as wrong,
        pytest.raises(openai.AuthenticationError),
    ):
        wrong.models.list()
    with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="sesame") as right:
        assert right.models.list()


@pytest.mark.parity
def test_openai_async(served: Served) -> None:
    openai = pytest.importorskip("openai", reason="openai is of the extra `parity`")

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            given: dict[str, Any] = {"model": "dummy", "messages": MESSAGES, "max_tokens": 6, "seed": 1}
            found = await asyncio.gather(*(client.chat.completions.create(**given) for _ in range(8)))
            assert len({f.choices[0].message.content for f in found}) == 1
            async with await client.chat.completions.create(**given, stream=True) as stream:
                async for _ in stream:
                    break  # leaves the rest

    asyncio.run(main())


# -- text-generation ---------------------------------------------------------------------------------------------


@pytest.fixture
def old(served: Served) -> Any:
    module = pytest.importorskip("text_generation", reason="text-generation is of the extra `parity`")
    return module.Client(served.url)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_text_generation_client(old: Any) -> None:
    given: dict[str, Any] = {"max_new_tokens": 8, "seed": 1, "temperature": 1.5}
    whole = old.generate("Hi", **given, top_n_tokens=2, decoder_input_details=True, top_k=50, top_p=0.9, typical_p=0.9,
                         repetition_penalty=1.1, frequency_penalty=0.1, stop_sequences=["zz"], truncate=1)  # fmt: skip
    assert whole.details.generated_tokens == 8 and len(whole.details.top_tokens) == 8 and whole.details.seed == 1
    text = old.generate("Hi", **given).generated_text
    events = list(old.generate_stream("Hi", **given))
    assert "".join(e.token.text for e in events if not e.token.special) == text == events[-1].generated_text
    many = old.generate("Hi", do_sample=True, best_of=2, watermark=True, return_full_text=True)
    assert many.generated_text.startswith("Hi") and len(many.details.best_of_sequences) == 1
    import text_generation.types as kinds

    grammar = kinds.Grammar(type="json", value=SCHEMA)
    assert json.loads(old.generate("Hi", grammar=grammar, max_new_tokens=40).generated_text)["a"] in range(10)
    grammar = kinds.Grammar(type="regex", value="[0-9]{3}")
    assert old.generate("Hi", grammar=grammar).generated_text.isdigit()
    from text_generation.errors import ValidationError

    with pytest.raises(ValidationError, match="max_total_tokens"):
        old.generate("Hi", max_new_tokens=5000)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_text_generation_client_chat(old: Any) -> None:
    import text_generation.types as kinds

    messages = [kinds.Message(role="user", content="Hi")]
    given: dict[str, Any] = {"max_tokens": 8, "seed": 1, "temperature": 1.5}
    whole = old.chat(messages, **given, logprobs=True, top_logprobs=2, n=1, top_p=0.9, presence_penalty=0.1,
                     frequency_penalty=0.1, repetition_penalty=1.1, logit_bias=[0.0, 0.5])  # fmt: skip
    assert whole.choices[0].finish_reason == "length"
    text = old.chat(messages, **given).choices[0].message.content
    chunks = list(old.chat(messages, **given, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
    tools = [kinds.Tool(type="function", function={"name": "f", "parameters": SCHEMA})]
    call = old.chat(messages, tools=tools, tool_choice="f", max_tokens=60, seed=1)
    arguments = call.choices[0].message.tool_calls[0]["function"]["arguments"]
    chunks = list(old.chat(messages, tools=tools, tool_choice="f", max_tokens=60, seed=1, stream=True))
    pieces = [c.choices[0].delta.tool_calls for c in chunks if c.choices[0].delta.tool_calls]
    assert "".join(p.function.arguments for p in pieces) == arguments and {p.function.name for p in pieces} == {"f"}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_text_generation_client_async(served: Served) -> None:
    module = pytest.importorskip("text_generation", reason="text-generation is of the extra `parity`")
    import text_generation.types as kinds

    async def main() -> None:
        client = module.AsyncClient(served.url)
        text = (await client.generate("Hi", max_new_tokens=6)).generated_text
        assert "".join([e.token.text async for e in client.generate_stream("Hi", max_new_tokens=6)]) == text
        messages = [kinds.Message(role="user", content="Hi")]
        whole = (await client.chat(messages, max_tokens=6, seed=1)).choices[0].message.content
        chunks = await client.chat(messages, max_tokens=6, seed=1, stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in chunks]) == whole

    asyncio.run(main())
