"""Vectors of texts: the native engine's are torch's, alone or in a step with others, long or short."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic", reason="serving needs the extra `serve`")

from llama2 import LlamaConfig, LlamaForCausalLM
from llama2.cpu import available
from llama2.runners.native import NativeModel
from llama2.serve.embeddings import AT_ONCE, CHUNK, batches, vectors


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.skipif(not available(), reason="needs the compiled module")
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_native_engine_gives_torchs_vectors(model: Any, pooling: str) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 300, size).tolist() for size in (3, 1, CHUNK, CHUNK + 1, 700, *[5] * (AT_ONCE + 3))]
    native = list(vectors(NativeModel.from_module(model, 1), rows, pooling))
    for ours, theirs in zip(native, vectors(model, rows, pooling), strict=True):
        assert ours.shape == (64,) and np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_torch_computes_texts_of_one_length_together(model: Any, pooling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 300, size).tolist() for size in (3, 5, 3, 300, 5, 3)]
    alone = [next(iter(vectors(model, [row], pooling))) for row in rows]
    shapes: list[tuple[int, ...]] = []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda ids: shapes.append(tuple(ids.shape)) or forward(ids))
    for vector, wanted in zip(vectors(model, rows, pooling), alone, strict=True):
        assert np.abs(vector - wanted).max() < 1e-5
    assert shapes == [(2, 3), (1, 5), (1, 300), (1, 5), (1, 3)]


def test_short_texts_share_a_step() -> None:
    rows = [[1]] * 200 + [[1] * 300] + [[1] * 100] * 3
    found = list(batches(rows))
    assert [row for batch in found for row in batch] == rows
    assert len(found) < 10 and all(len(batch) == 1 or sum(map(len, batch)) <= CHUNK for batch in found)


def test_thousands_of_inputs_and_both_poolings(tiny_folder: Path) -> None:
    from serve.conftest import Served
    from wire import post

    from llama2 import AutoTokenizer
    from llama2.serve.policy import Policy

    loaded = LlamaForCausalLM.from_pretrained(tiny_folder).eval()
    served = Served(loaded, AutoTokenizer.from_pretrained(tiny_folder), Policy(("tiny",)), None, {})
    try:
        reply = post(served.port, "/v1/embeddings", {"input": ["ab"] * 3000, "dimensions": 8})
        assert reply.status == 200 and [row["index"] for row in reply.json["data"]] == list(range(3000))
        assert all(abs(np.linalg.norm(row["embedding"]) - 1) < 1e-5 for row in reply.json["data"][::500])
        mean, last = (
            post(served.port, "/v1/embeddings", {"input": "ab", "pooling": pooling}).json["data"][0]["embedding"]
            for pooling in ("mean", "last")
        )
        assert mean != last and len(mean) == 32
        assert post(served.port, "/v1/embeddings", {"input": ["a"] * 9000}).status == 400
    finally:
        served.close()
