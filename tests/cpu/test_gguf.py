"""The real SmolLM2 file through the native engine, against the torch module on its dequantised weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama2 import cpu
from llama2.checkpoint.gguf import GgufFile
from llama2.errors import CheckpointError, InputError

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native module is not built")

PROMPT = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1]


@pytest.fixture(scope="module")
def weights(smollm2: Path) -> cpu.CpuWeights:
    return cpu.CpuWeights.from_gguf(GgufFile(smollm2), threads=2)


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> np.ndarray:
    """Logits (tokens, vocabulary) of the torch module in float32."""
    import torch

    from llama2.model import LlamaForCausalLM

    module = LlamaForCausalLM.from_pretrained(str(smollm2), dtype=torch.float32).eval()
    with torch.no_grad():
        logits: np.ndarray = module(input_ids=torch.tensor([PROMPT])).logits[0].numpy()
    return logits


def logits(weights: cpu.CpuWeights, **settings: Any) -> np.ndarray:
    run, cache = cpu.CpuRunner(weights, **settings), cpu.PagedCache(weights, 64, "float32")
    every = np.arange(len(PROMPT))
    return run.step(PROMPT, every, cache.view([(cache.sequence(), len(PROMPT))]), every)


def test_exact_equals_torch(weights: cpu.CpuWeights, reference: np.ndarray) -> None:
    got = logits(weights, precision="exact")
    assert np.abs(got - reference).max() < 2e-5 * np.abs(reference).max()


@pytest.mark.parametrize("isa", cpu.instruction_sets() if cpu.available() else [])
def test_fast_differs_by_the_rounding_of_activations(weights: cpu.CpuWeights, reference: np.ndarray, isa: str) -> None:
    got = logits(weights, isa=isa)
    error = np.sqrt(np.mean((got - reference) ** 2) / np.mean(reference**2))
    assert 1e-5 < error < 6e-2
    # Near ties may fall either way: two of this prompt's positions are closer than the error.
    clear = np.diff(np.sort(reference, axis=1)[:, -2:])[:, 0] > 6e-2 * np.sqrt(np.mean(reference**2))
    assert clear.sum() == 8  # of 13: the reference alone decides it
    assert (got.argmax(1) == reference.argmax(1))[clear].all()


def test_threads_change_nothing(smollm2: Path, weights: cpu.CpuWeights) -> None:
    one = cpu.CpuWeights.from_gguf(GgufFile(smollm2), threads=1)
    np.testing.assert_array_equal(logits(one), logits(weights))


def test_no_torch_is_imported(smollm2: Path) -> None:
    code = f"""
import sys
from llama2.checkpoint.gguf import GgufFile
from llama2.cpu import CpuRunner, CpuWeights, PagedCache
weights = CpuWeights.from_gguf(GgufFile({str(smollm2)!r}))
print(CpuRunner(weights).feed(PagedCache(weights, 16).sequence(), [1, 2]).argmax())
assert "torch" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout


def test_refuses_a_cut_file_and_an_unknown_type(smollm2: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2.read_bytes()[:5_000_000])
    with pytest.raises(CheckpointError, match="fetch the file again"):
        cpu.CpuWeights.from_gguf(GgufFile(cut))
    file = GgufFile(smollm2)
    object.__setattr__(file.tensors["blk.0.attn_q.weight"], "type_id", 10)
    with pytest.raises(InputError, match="type 10, which has no native kernel"):
        cpu.CpuWeights.from_gguf(file)
