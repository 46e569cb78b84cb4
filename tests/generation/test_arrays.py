"""One rule for numpy arrays and tensors: both columns of `arrays` beside each other, and the draws of before."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llama2.engine.sampler import TokenSampler
from llama2.generation import filters, tensors
from llama2.generation import processors as pr
from llama2.generation.config import GenerationConfig
from llama2.generation.seeded import Uniform
from llama2.serve.logits_processors import Bias, CountPenalty, Watermark

IDS = [[1, 2, 3, 1, 2], [4, 4, 5, 6, 4]]
MASK = torch.tensor([[False, True, True], [True, True, True]])
RULES: list[tuple[Any, int]] = [  # what makes a processor, and how many rows it takes
    (lambda: filters.TemperatureLogitsWarper(0.7), 2),
    (lambda: filters.TopKLogitsWarper(7), 2),
    (lambda: filters.TopPLogitsWarper(0.8), 2),
    (lambda: filters.TopPLogitsWarper(0.3, min_tokens_to_keep=3), 2),
    (lambda: filters.TopHLogitsWarper(0.4), 2),
    (lambda: filters.MinPLogitsWarper(0.05), 2),
    (lambda: filters.MinPLogitsWarper(0.9, min_tokens_to_keep=4), 2),
    (lambda: filters.TypicalLogitsWarper(0.5), 2),
    (lambda: filters.EpsilonLogitsWarper(3e-3), 2),
    (lambda: filters.EtaLogitsWarper(3e-3), 2),
    (lambda: pr.RepetitionPenaltyLogitsProcessor(1.3, prompt_mask=MASK), 2),
    (lambda: pr.EncoderRepetitionPenaltyLogitsProcessor(1.3, torch.tensor(IDS)[:, :3], MASK), 2),
    (lambda: pr.NoRepeatNGramLogitsProcessor(2, MASK), 2),
    (lambda: pr.EncoderNoRepeatNGramLogitsProcessor(2, torch.tensor(IDS)[:, :3], MASK), 2),
    (lambda: pr.SequenceBiasLogitsProcessor({(3,): 1.5, (2, 9): -2.0, (6, 4, 8): 3.0}), 2),
    (lambda: pr.NoBadWordsLogitsProcessor([[3], [2, 9]], 2), 2),
    (lambda: pr.MinLengthLogitsProcessor(9, [2, 4]), 2),
    (lambda: pr.ForcedEOSTokenLogitsProcessor(6, 2), 2),
    (lambda: pr.InfNanRemoveLogitsProcessor(), 2),
    (lambda: pr.ExponentialDecayLengthPenalty((1, 1.5), [2, 5], 2), 2),
    (lambda: pr.SuppressTokensLogitsProcessor([1, 2]), 2),
    (lambda: pr.LogitNormalization(), 2),
    (lambda: CountPenalty(0.5, 0.25, 2), 1),
    (lambda: Bias({3: 1.5, 7: -2.0}), 1),
    (lambda: Watermark(), 1),
]


def rows(count: int, size: int, seed: int) -> Tensor:
    """Logits with ties, and one that is forbidden."""
    found = torch.randn(count, size, generator=torch.Generator().manual_seed(seed)).mul(3).round(decimals=1)
    found[:, 11] = -math.inf
    return found


@pytest.mark.parametrize(("make", "count"), RULES, ids=lambda x: type(x()).__name__ if callable(x) else "")
@pytest.mark.parametrize("size", [40, 3000])
def test_a_rule_is_the_same_on_arrays_and_on_tensors(
    make: Any, count: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.tensor(IDS[:count])
    for seed in range(5):
        scores = rows(count, size, seed)
        if isinstance(make(), filters.TopHLogitsWarper):  # which of equal ones come first is the sort's choice
            scores += torch.arange(size) * 1e-5
        before = scores.clone()
        of_arrays = make()(ids.numpy(), scores.numpy())
        through = make()(ids, scores)
        with monkeypatch.context() as patch:
            patch.setattr(tensors, "lies_in_memory", lambda x: False)
            of_tensors = make()(ids, scores)
        assert isinstance(of_arrays, np.ndarray) and isinstance(through, Tensor) and isinstance(of_tensors, Tensor)
        assert of_arrays.dtype == np.float32 and through.dtype == of_tensors.dtype == torch.float32
        assert np.array_equal(of_arrays, through.numpy())  # on a CPU it is one column
        assert torch.equal(through.isinf(), of_tensors.isinf())
        torch.testing.assert_close(through, of_tensors, rtol=1e-5, atol=1e-6)
        assert torch.equal(scores, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_with_torch(dtype: torch.dtype) -> None:
    scores = rows(1, 40, 1).to(dtype)
    out = filters.TopKLogitsWarper(5)(torch.tensor(IDS[:1]), scores)
    assert out.dtype == dtype and int(out.isfinite().sum()) >= 5


def test_a_gradient_goes_through() -> None:
    scores = rows(1, 40, 1).requires_grad_()
    filters.TemperatureLogitsWarper(0.5)(torch.tensor(IDS[:1]), scores)[0, 3].backward()
    assert scores.grad is not None and float(scores.grad[0, 3]) == 2.0


@pytest.mark.parametrize("seed", [0, 1, 7, 2**40 + 5, 2**63 - 1, -3])
def test_numbers_of_a_seed_are_torchs(seed: int) -> None:
    uniform, generator = Uniform(seed), torch.Generator().manual_seed(seed)
    for count in (1, 64, 700):
        assert uniform.draw(count).tolist() == torch.rand(count, dtype=torch.float64, generator=generator).tolist()


@pytest.mark.parametrize("size", [2, 260, 32_000])
def test_the_permutation_of_a_watermark_is_torchs(size: int) -> None:
    for previous in (0, 5, 259):
        generator = torch.Generator().manual_seed(15485863 * previous)
        assert (
            Watermark().green(previous, size).tolist()
            == torch.randperm(size, generator=generator)[: size // 2].tolist()
        )


PLAIN: dict[str, Any] = {"do_sample": True, "top_k": 0}
DRAWN: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temp": PLAIN,
    "temp.7": PLAIN | {"temperature": 0.7},
    "k40p9": {"do_sample": True, "top_k": 40, "top_p": 0.9},
    "p9": PLAIN | {"top_p": 0.9},
    "p5t1.3": PLAIN | {"top_p": 0.5, "temperature": 1.3},
    "minp": PLAIN | {"min_p": 0.1, "temperature": 0.8},
    "typical": PLAIN | {"typical_p": 0.9},
    "eps": PLAIN | {"epsilon_cutoff": 1e-3},
    "eta": PLAIN | {"eta_cutoff": 1e-3},
    "toph": PLAIN | {"top_h": 0.5},
    "pen": {"repetition_penalty": 1.2},
    "penp": PLAIN | {"repetition_penalty": 1.2, "top_p": 0.9},
    "ngram": {"do_sample": True, "top_k": 30, "no_repeat_ngram_size": 2},
    "bias": PLAIN
    | {
        "sequence_bias": [[[5], 2.0], [[6, 7], 3.0]],
        "bad_words_ids": [[9], [10, 11]],
        "eos_token_id": 2,
        "min_new_tokens": 5,
        "exponential_decay_length_penalty": [3, 1.01],
        "suppress_tokens": [12],
    },
    "norm": {"do_sample": True, "top_k": 50, "renormalize_logits": True},
    "f64": PLAIN | {"top_p": 0.9},
}


@pytest.mark.parametrize("name", DRAWN)
def test_seeds_give_what_they_gave(name: str) -> None:
    """drawn.json was written while torch did all of this: 2,000 logits, a scale of each row, the tokens of a seed."""
    drawn = json.loads((Path(__file__).parent / "drawn.json").read_text())[name]
    seed, size, prompt = 2**40 + 5, 2000, list(range(3, 40))
    own = [Bias({5: 3.0, 6: -3.0}), CountPenalty(0.5, 0.5, len(prompt))] if name in ("penp", "greedy") else []
    choice = TokenSampler(GenerationConfig(**DRAWN[name]), prompt, 1000, seed, None, own)
    numbers, found = np.random.default_rng(seed + 1), []
    for _ in drawn:
        row = numbers.choice([1.0, 2.5, 4.0]) * numbers.standard_normal(size, np.float32)
        found.append(choice(row.astype(np.float64 if name == "f64" else np.float32)).token)
    assert found == drawn


def test_a_token_is_picked_where_there_is_no_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None  # an import raises
import numpy as np
from llama2.engine.sampler import TokenSampler
from llama2.generation.config import GenerationConfig
from llama2.serve.logits_processors import Bias, CountPenalty, Watermark
rows = np.random.default_rng(1).standard_normal((8, 300), np.float32)
for given in ({}, {"do_sample": True}, {"do_sample": True, "top_k": 0, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9,
        "repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "min_new_tokens": 3, "eos_token_id": 2}):
    choice = TokenSampler(GenerationConfig(**given), [1, 2], 20, 3, 4, [Bias({3: 1.0}), CountPenalty(0.5, 0.5, 2)])
    print([choice(row).token for row in rows])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
