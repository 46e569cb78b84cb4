"""A model over several processes is the model of one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import VARIANTS, tiny_config, tiny_model

from llama2 import InputError
from llama2.engine.parallel import Place, load_part, packed, part_of, unpacked
from llama2.engine.runners import TorchPlanRunner
from llama2.engine.scheduler import Chunk, Sequence

WORKER = Path(__file__).with_name("parallel_worker.py")
needs_gloo = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


def torchrun(size: int, *words: Any) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), *words]
    return subprocess.run(
        [str(w) for w in argv], capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@needs_gloo
@pytest.mark.parametrize(
    ("variant", "size"),
    [("gqa", 2), pytest.param("biases", 4, marks=pytest.mark.slow), pytest.param("tied", 2, marks=pytest.mark.slow)],
)
def test_equals_one_process(tmp_path: Path, variant: str, size: int) -> None:
    """gqa: two key-value heads shared out; biases with four processes: each of the two heads is held twice."""
    tiny_model(torch.float32, **{"max_position_embeddings": 128, **VARIANTS[variant]}).save_pretrained(tmp_path)
    done = torchrun(size, WORKER, tmp_path)
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-3000:]


def test_the_parts_together_need_what_the_whole_needs(tmp_path: Path) -> None:
    model = tiny_model(torch.float32, max_position_embeddings=128, vocab_size=97)
    model.save_pretrained(tmp_path)
    parts = [load_part(tmp_path, Place(i, 2), neighbours=2) for i in range(2)]
    whole, held = dict(model.named_parameters()), [dict(part.named_parameters()) for part in parts]
    head = torch.cat([part["lm_head.weight"] for part in held])
    assert torch.equal(head, whole["lm_head.weight"]) and [len(p["lm_head.weight"]) for p in held] == [49, 48]
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(torch.cat([part[name] for part in held], 1), whole[name])
    each = TorchPlanRunner(model, 1).bytes_per_page
    assert [part.neighbours * part.plan_runner(1).bytes_per_page for part in parts] == [each, each]


@pytest.mark.parametrize(("size", "message"), [(3, r"take one of \[1, 2, 4\]"), (8, "to 8 processes")])
def test_what_cannot_be_shared_out(size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        part_of(tiny_config(), size)


def test_a_plan_survives_the_way() -> None:
    chunks = [
        Chunk(Sequence([], 0, pages=[4, 7]), 3, [9, 8, 7], True, 2),
        Chunk(Sequence([], 0, pages=[1]), 0, [5], False),
        Chunk(Sequence([], 0, pages=[2, 3, 0]), 32, [6, 6], True, 0, True),
    ]
    found = unpacked(packed(chunks))
    assert [(c.start, c.tokens, c.sampled, c.drafted, c.whole, c.sequence.pages) for c in found] == [
        (c.start, c.tokens, c.sampled, c.drafted, c.whole, c.sequence.pages) for c in chunks
    ]
