"""Constrained answers on three kinds of tokenizer: SentencePiece with its dummy space, bytes alone, byte-level BPE."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bytewise import write_tokenizer
from wire import post

pytest.importorskip("llguidance", reason="serving needs the extra `serve`")
pytest.importorskip("uvicorn", reason="serving needs the extra `serve`")

from serve.conftest import Served

from llama2 import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.serve.chat import Tool, chosen
from llama2.serve.constraint import Compiler, Constraint, json_schema
from llama2.serve.policy import Policy
from llama2.tokenizer import LLAMA2_CHAT_TEMPLATE, LlamaTokenizer, LlamaTokenizerFast

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"place": {"enum": ["Zürich", "東京", "naïve 🦙"]}, "n": {"type": "integer", "maximum": 9}},
    "required": ["place", "n"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]


def tokenizers() -> list[str]:
    return ["slow", "fast", "bytes", "smollm2"]


@pytest.fixture(scope="module", params=tokenizers())
def compiler(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Compiler]:
    if request.param == "bytes":
        folder = tmp_path_factory.mktemp("bytes")
        write_tokenizer(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    elif request.param == "smollm2":
        tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue("smollm2"))
    else:
        kind = LlamaTokenizer if request.param == "slow" else LlamaTokenizerFast
        tokenizer = kind(request.getfixturevalue("tokenizer_model"))
    # rows beyond the tokenizer, as pad_to_multiple_of makes them
    return tokenizer, Compiler(tokenizer, len(tokenizer) + 7, [tokenizer.eos_token_id])


def walk(tokenizer: Any, compiler: Compiler, constraint: Constraint, seed: int) -> str:
    """A random answer that the constraint lets through, to its end."""
    size, generator = len(tokenizer) + 7, torch.Generator().manual_seed(seed)
    processor, ids = compiler(constraint, 2), [5, 6]
    for _ in range(400):
        scores = processor(torch.tensor([ids]), torch.zeros(1, size))
        allowed = (scores[0] > -torch.inf).nonzero()[:, 0]
        ids.append(int(allowed[torch.randint(len(allowed), (1,), generator=generator)]))
        if ids[-1] == tokenizer.eos_token_id:
            return b"".join(map(tokenizer.token_bytes, ids[2:-1])).decode()
    raise AssertionError("no end within 400 tokens")


@pytest.mark.parametrize("seed", range(3))
def test_every_kind_of_constraint(compiler: tuple[Any, Compiler], seed: int) -> None:
    found = json.loads(walk(*compiler, json_schema(SCHEMA), seed))
    assert found["place"] in SCHEMA["properties"]["place"]["enum"] and isinstance(found["n"], int)
    text = walk(*compiler, Constraint("regex", "[0-9]{3}-[a-f]{2} (ja|nein) ▁x"), seed)
    assert text[:3].isdigit() and text[3] == "-" and text.endswith(" ▁x")
    assert walk(*compiler, Constraint("lark", 'start: "(" start ")" | "x"'), seed).strip("()") == "x"
    tools = [Tool.model_validate(tool) for tool in TOOLS]
    assert '"weather"' in walk(*compiler, chosen(tools, "required").constraint(), seed)


def test_bytes_come_back_as_they_were(compiler: tuple[Any, Compiler]) -> None:
    tokenizer = compiler[0]
    for data in (b"-", b' "', b"{", "▁a 東京\n".encode(), "é".encode()[:1], b"\xe2\x82a", b"", b"<s></s>"):
        ids = tokenizer.encode_bytes(data)
        assert b"".join(map(tokenizer.token_bytes, ids)) == data
        assert not set(ids) & set(tokenizer.special_ids)


@pytest.fixture(scope="module", params=["folder", "gguf"])
def served(
    request: pytest.FixtureRequest, tokenizer_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A tiny random model with Llama 2's tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    LlamaTokenizerFast(tokenizer_model, chat_template=LLAMA2_CHAT_TEMPLATE).save_pretrained(folder)
    place = folder
    if request.param == "gguf":
        place = folder.parent / f"{folder.name}.gguf"
        convert(folder, place, ConversionSettings(to="gguf"))
    model = LlamaForCausalLM.from_pretrained(place).eval()
    found = Served(model, AutoTokenizer.from_pretrained(place), Policy(("tiny",)), None, {})
    yield found
    assert found.quiet()
    found.close()


def test_served_answers_keep_to_their_form(served: Served) -> None:
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 80, "seed": 3}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    (choice,) = post(served.port, "/v1/chat/completions", chat | {"response_format": form}).json["choices"]
    assert set(json.loads(choice["message"]["content"])) == {"place", "n"}
    (choice,) = post(served.port, "/v1/chat/completions", chat | {"tools": TOOLS, "tool_choice": "required"}).json[
        "choices"
    ]
    (call,) = choice["message"]["tool_calls"]
    assert set(json.loads(call["function"]["arguments"])) == {"place", "n"}
    body = {"inputs": "Hi", "parameters": {"grammar": {"type": "regex", "value": "[0-9]{3}-[a-f]{2}"}, "seed": 1}}
    text = post(served.port, "/generate", body).json["generated_text"]
    assert len(text) == 6 and text[3] == "-"
