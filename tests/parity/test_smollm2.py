"""A real checkpoint, SmolLM2-135M-Instruct dequantised to float32, beside transformers reading the same GGUF file."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2 import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1800)]
transformers = pytest.importorskip("transformers")

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "The three primary colours are",
    "In 1969, Neil Armstrong",
    "To make a good cup of tea, first",
    "The quick brown fox",
    "import numpy as np\n\nx = ",
    "Dear Sir or Madam,\n\nI am writing to",
    "Photosynthesis is the process by which",
    "1, 1, 2, 3, 5, 8,",
    "The difference between a virus and a bacterium is",
    "List of planets:\n- Mercury\n-",
    "Q: What is the speed of light?\nA:",
    "La capitale de l'Espagne est",
    "SELECT name FROM users WHERE",
    "Shakespeare wrote",
    "The moon orbits the earth because",
    "If all cats are animals, then",
)


@pytest.fixture(scope="module")
def ours(smollm2: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> tuple[Any, Any]:
    folder, file = smollm2.parent, smollm2.name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)


def test_the_weights_are_the_same(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> None:
    mine, other = ours[0].state_dict(), theirs[0].state_dict()
    assert mine.keys() == other.keys()
    for name, tensor in other.items():
        assert torch.equal(mine[name], tensor), name


def test_64_greedy_tokens_of_20_prompts(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> None:
    kwargs = {"max_new_tokens": 64, "do_sample": False}
    for prompt in PROMPTS:
        ids = theirs[1](prompt, return_tensors="pt").input_ids
        assert ours[1](prompt, return_tensors="pt").input_ids.tolist() == ids.tolist(), prompt
        one = ours[0].generate(ids, runner="torch", **kwargs)
        other = theirs[0].generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **kwargs)
        assert one.tolist() == other.tolist(), prompt


@pytest.mark.parametrize("windows", [8, pytest.param(None, marks=pytest.mark.slow)])
def test_perplexity_on_news(
    ours: tuple[Any, Any], theirs: tuple[Any, Any], news_text: str, windows: int | None
) -> None:
    ids = ours[1](news_text, return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // 512 * 512].view(-1, 512)[:windows]
    totals = [0.0, 0.0]
    with torch.inference_mode():
        for row in rows:
            for number, model in enumerate((ours[0], theirs[0])):
                logits = model(row[None]).logits[0, :-1]
                totals[number] += float(torch.nn.functional.cross_entropy(logits, row[1:]))
    one, other = (math.exp(total / len(rows)) for total in totals)
    print(f"perplexity over {len(rows)} windows of 512: {one:.4f} here, {other:.4f} there")
    assert 10 < other < 100
    assert abs(one / other - 1) < 1e-3
