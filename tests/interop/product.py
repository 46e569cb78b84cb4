"""This library and its tiny models, in the environment of another library. Imported first by every `with_*` file."""

import os
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent / "src"), str(TESTS)]

import torch  # noqa: E402

import llama2  # noqa: E402

if os.environ.get("LLAMA2_NATIVE"):  # the folder of the compiled module
    llama2.__path__.append(os.environ["LLAMA2_NATIVE"])

from bytewise import write_tokenizer  # noqa: E402
from tiny import tiny_config, tiny_ids, tiny_model  # noqa: E402

DEMO = os.environ.get("LLAMA2_DEMO", "")  # the demo model's GGUF file
IDS = tiny_ids(2, 10)
BYTES: dict[str, Any] = {"vocab_size": 260, "max_position_embeddings": 128, "eos_token_id": 0, "bos_token_id": None}


def byte_model(**changes: Any) -> Any:
    """A tiny model for the byte-level tokenizer."""
    return tiny_model(torch.float32, **{**BYTES, **changes})


def byte_tokenizer(folder: str | Path) -> Any:
    """The byte-level tokenizer, written to `folder`, with a pad token."""
    write_tokenizer(Path(folder))
    tokenizer = llama2.AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def demo() -> tuple[Any, Any]:
    """The demo model in float32 and its tokenizer."""
    model = llama2.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    return model, llama2.AutoTokenizer.from_pretrained(DEMO)


def greedy(model: Any, ids: torch.Tensor = IDS, **how: Any) -> torch.Tensor:
    """Five tokens behind `ids`."""
    out: torch.Tensor = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0, **how)
    return out


__all__ = ["BYTES", "DEMO", "IDS", "byte_model", "byte_tokenizer", "demo", "greedy", "tiny_config", "tiny_model"]
