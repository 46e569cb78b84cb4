"""generate() through the native runner gives what it gives through torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu.test_step import model

from llama2 import cpu
from llama2.cpu.generation import NativeRunner
from llama2.errors import InputError

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native module is not built")

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "seed": 5, "top_k": 20},
    "chunked prefill": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_generate_equals_torch(name: str) -> None:
    module = model("gqa")
    ids = torch.randint(3, 131, (3, 11))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[2, :1] = 0
    settings = {"max_new_tokens": 25, "min_new_tokens": 25, "pad_token_id": 0, "attention_mask": mask, **SETTINGS[name]}
    want = module.generate(ids, runner="torch", **settings)
    got = module.generate(ids, runner=NativeRunner(module, "exact"), **settings)
    assert want.unique().numel() > 8, "the text must vary"
    assert torch.equal(got, want)


def test_beams_give_their_pages_back() -> None:
    module = model("gqa")
    runner = NativeRunner(module)
    cache = runner.new_cache(None, 2, 40)
    free = len(cache.pages._free)
    runner.step(torch.arange(34).view(2, 17), torch.arange(17)[None], None, cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    runner.step(torch.ones(2, 1, dtype=torch.long), torch.tensor([[17]]), None, cache)
    shared, own = cache.sequences[0].pages, cache.sequences[1].pages
    assert shared[0] == own[0] and shared[1] != own[1]
    cache.crop(-18)
    assert len(cache.pages._free) == free


def test_what_cannot_run_natively_is_refused() -> None:
    module = model("mha")
    with pytest.raises(InputError, match=r"model.eval\(\)"):
        NativeRunner(module.train())
    runner = NativeRunner(module.eval())
    with pytest.raises(InputError, match="not inputs_embeds"):
        runner.step(torch.zeros(1, 2, 64), torch.arange(2)[None], None, runner.new_cache(None, 1, 8))
    with pytest.raises(InputError, match="cache of its own for 2 rows"):
        runner.step(torch.ones(2, 1, dtype=torch.long), torch.zeros(1, 1).long(), None, runner.new_cache(None, 1, 8))
