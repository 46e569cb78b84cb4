"""Servers for the APIs of other projects: tiny random models with a byte-level tokenizer and with Llama 2's own."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from serve.conftest import Served

from llama2 import LlamaConfig, LlamaForCausalLM, LlamaTokenizer
from llama2.tokenizer import LLAMA2_CHAT_TEMPLATE


@pytest.fixture(scope="session")
def llama2_parts(extra: None, request: Any) -> tuple[Any, Any]:
    """A model of 2 layers and 32,000 tokens with weights from a fixed seed, and Llama 2's tokenizer."""
    tokenizer = LlamaTokenizer(str(request.getfixturevalue("tokenizer_model")))
    tokenizer.chat_template = LLAMA2_CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return model, tokenizer


@pytest.fixture(scope="module", params=["bytes", "llama2"])
def face(request: Any) -> Iterator[Served]:
    """A server; at the end of a module's tests it holds no page and no request."""
    from llama2.serve.policy import Policy

    parts = request.getfixturevalue("tiny_parts" if request.param == "bytes" else "llama2_parts")
    served = Served(*parts, Policy(names=("tiny",)), None, {})
    yield served
    assert served.quiet()
    served.close()
