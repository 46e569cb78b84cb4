"""A tiny checkpoint, a tokenizer of one token a byte, and text for both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2 import LlamaConfig, LlamaForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


class Letters:
    """One token a character, the code of it; a chat is its roles and contents."""

    chat_template = "letters"

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 128 for c in text]}

    def apply_chat_template(self, chat: Any, tokenize: bool, return_dict: bool) -> list[int]:
        return self("".join(f"<{m['role']}>{m['content']}" for m in chat))["input_ids"]


@pytest.fixture(scope="session")
def letters() -> Letters:
    return Letters()


@pytest.fixture(scope="session")
def text() -> str:
    """1,500 characters that are not all alike."""
    made = torch.Generator().manual_seed(5)
    return "".join(chr(32 + int(i)) for i in torch.randint(0, 90, (1500,), generator=made))


def make(folder: Path, **changes: Any) -> Path:
    """Saves a seeded model, with inputs of different sizes."""
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.2, 2.0)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def save_model() -> Callable[..., Path]:
    """`make`, for tests that want another shape."""
    return make


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied model with biases, float32."""
    return make(tmp_path_factory.mktemp("source") / "model", attention_bias=True, mlp_bias=True)
