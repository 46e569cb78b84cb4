"""A model over several processes is the model of one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import VARIANTS, tiny_config, tiny_model

from llama2 import InputError
from llama2.cpu import CacheView
from llama2.engine.parallel import Place, as_integers, from_integers, load_part, part_of
from llama2.engine.torch_plan_runner import torch_plan_runner

WORKER = Path(__file__).with_name("parallel_worker.py")
needs_gloo = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def made(folder: Path, variant: str) -> Path:
    tiny_model(torch.float32, **{"max_position_embeddings": 128, **VARIANTS[variant]}).save_pretrained(folder)
    return folder


@needs_gloo
def test_equals_one_process(tmp_path: Path) -> None:
    """Two key-value heads shared out; the processes meet through a file, as those of --tensor-parallel do."""
    words = [sys.executable, str(WORKER), str(made(tmp_path / "model", "gqa")), f"file://{tmp_path / 'store'}"]
    processes = [
        subprocess.Popen(
            [*words, str(rank), "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0] and "equal" in said[0][0], said


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize(("variant", "size"), [("gqa", 2), ("biases", 4), ("tied", 2)])
def test_equals_one_process_under_torchrun(tmp_path: Path, variant: str, size: int) -> None:
    """Biases with four processes: each of the two key-value heads is held twice."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), str(WORKER)]
    words = [*words, str(made(tmp_path, variant))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=ENVIRONMENT)
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
    each = torch_plan_runner(model, 1).bytes_per_page
    assert [part.neighbours * part.plan_runner(1).bytes_per_page for part in parts] == [each, each]


@pytest.mark.parametrize(("size", "message"), [(3, r"take one of \[1, 2, 4\]"), (8, "to 8 processes")])
def test_what_cannot_be_shared_out(size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        part_of(tiny_config(), size)


def test_a_step_survives_the_way() -> None:
    starts, past = np.array([0, 3, 4, 6], np.int32), np.array([3, 0, 32], np.int32)
    tables = np.array([[4, 7, 0], [1, 0, 0], [2, 3, 5]], np.int32)
    view, tokens = (
        CacheView(torch.zeros(1), starts, past, tables, starts[1:] - 1),
        np.array([9, 8, 7, 5, 6, 6], np.int32),
    )
    positions, rows = np.array([3, 4, 5, 0, 32, 33], np.int32), np.array([0, 1, 2, 4, 5], np.int32)
    back = from_integers(as_integers(20, tokens, positions, view, rows), view.cache)
    for sent, received in zip((tokens, positions, rows), (back[0], back[1], back[3]), strict=True):
        assert np.array_equal(sent, received)
    for name in ("starts", "past", "tables", "last"):
        assert np.array_equal(getattr(view, name), getattr(back[2], name))
