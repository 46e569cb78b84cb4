"""Several ranks do what one does, read each other's checkpoints, and end with the bits of a straight run."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from safetensors.torch import load_file

from llama2.train import checkpoints

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
}


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


def start(world: int, *jobs: dict[str, Any], fails: bool = False) -> str:
    """Runs jobs on this many ranks, without torchrun's own process; returns what they said."""
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(HERE.parent / "ranks.py"), json.dumps(jobs)]
    processes = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**ENVIRONMENT, **common, "RANK": str(rank)})
        for rank in range(world)
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert any(process.returncode for process in processes) == fails, "\n".join(said)
    return "\n".join(said)


def job(folder: Path, kind: str = "plain", **arguments: Any) -> dict[str, Any]:
    return {"folder": str(folder), "kind": kind, "arguments": arguments}


def result(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_file(folder / "result.safetensors"), json.loads((folder / "result.json").read_text())


def alone(folder: Path, kind: str = "plain", **changes: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The same on one rank, here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = ranks.made(folder, kind, **changes)
    history = run.train().history
    torch.set_num_threads(threads)
    return {name: t.detach() for name, t in run.model.state_dict().items()}, history


SHARD = {"fsdp": "full_shard"}
HALVES = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # kind, and arguments of two ranks
    "whole": ("plain", {}),
    "accumulated": ("plain", HALVES),
    "sharded": ("plain", SHARD),
    "sharded, accumulated": ("plain", {**HALVES, **SHARD}),
    "tied": ("tied", SHARD),
    "checkpointing": ("plain", {"gradient_checkpointing": True, **SHARD}),
    "adapter": ("lora", {}),
    "adapter, sharded": ("lora", SHARD),
    "preferences": ("dpo", SHARD),
    "classifier": ("classifier", SHARD),
    "bytes": ("plain", {"optim": "adamw_8bit"}),
    "seeds": ("seeds", {}),  # an adapter that each rank makes otherwise
}


def test_two_ranks_do_what_one_does(tmp_path: Path) -> None:
    start(2, *(job(tmp_path / name, kind, save_strategy="no", **two) for name, (kind, two) in CASES.items()))
    for name, (kind, two) in CASES.items():
        one = {"per_device_train_batch_size": 4, "optim": two.get("optim", "adamw_torch"), "save_strategy": "no"}
        weights, history = alone(tmp_path / f"{name} alone", kind, **one)
        found, content = result(tmp_path / name)
        assert content["world"] == 2
        for key in ("loss", "grad_norm", "eval_loss"):
            ours, wanted = ([e[key] for e in h if key in e] for h in (content["history"], history))
            assert ours == pytest.approx(wanted, rel=1e-5), f"{name}: {key}"
        worst = max(float((found[n] - weights[n]).abs().max()) for n in weights)
        assert found.keys() == weights.keys() and worst < 2e-4, f"{name}: {worst}"


# -- checkpoints -------------------------------------------------------------------------------------------------


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], near: float = 0.0) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.allclose(found[name], wanted[name], rtol=0, atol=near) for name in wanted
    )


def losses(history: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]


def later(folder: Path) -> None:
    """Hides the last checkpoints, so that the one of step 4 is the newest."""
    for step in (6, 7):
        (folder / f"checkpoint-{step}").rename(folder / f"later-{step}")


@pytest.mark.parametrize("changes", [{}, SHARD], ids=["whole", "sharded"])
def test_a_killed_run_of_two_ranks_ends_with_the_same_bits(tmp_path: Path, changes: dict[str, Any]) -> None:
    start(2, job(tmp_path / "straight", **changes), job(tmp_path / "tied", "tied", **changes))
    start(2, {**job(tmp_path / "cut", **changes), "dies": [1, 5]}, fails=True)
    assert not (tmp_path / "cut" / "result.json").exists()
    assert [checkpoints.step_of(p) for p in checkpoints.found(tmp_path / "cut")][:2] == [2, 4]
    (tmp_path / "cut" / ".checkpoint-begun").mkdir()
    start(2, job(tmp_path / "cut", resume_from_checkpoint=True, **changes))
    (weights, content), (wanted, straight) = result(tmp_path / "cut"), result(tmp_path / "straight")
    assert same(weights, wanted) and not (tmp_path / "cut" / ".checkpoint-begun").exists()
    for key in ("loss", "grad_norm", "eval_loss"):
        assert [e.get(key) for e in content["history"]] == [e.get(key) for e in straight["history"]]
    # The same on one rank, from the checkpoint of two in the middle of the run; two batches a step make the same rows.
    for name, kind in (("straight", "plain"), ("tied", "tied")):
        later(tmp_path / name)
        found, history = alone(tmp_path / name, kind, resume_from_checkpoint=True)
        weights, content = result(tmp_path / name)
        assert losses(history) == pytest.approx(losses(content["history"]), rel=1e-5)
        assert same(found, weights, near=2e-4)


def test_a_run_of_one_rank_goes_on_with_two(tmp_path: Path) -> None:
    sizes, wanted = {"per_device_train_batch_size": 4}, {}
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "plain": ("plain", {}),
        "sharded": ("plain", SHARD),
        "adapter": ("lora", SHARD),
        "bf16": ("plain", {"bf16": True, **SHARD}),
    }
    for name, (kind, changes) in cases.items():
        wanted[name] = alone(tmp_path / name, kind, bf16="bf16" in changes, **sizes)
        later(tmp_path / name)
    again = [job(tmp_path / n, kind, resume_from_checkpoint=True, **changes) for n, (kind, changes) in cases.items()]
    start(2, *again)
    for name in cases:
        (weights, content), (before, history) = result(tmp_path / name), wanted[name]
        loose, near = (1e-2, 2e-2) if name == "bf16" else (1e-5, 2e-4)
        ours, theirs = losses(content["history"]), losses(history)
        assert ours == pytest.approx(theirs, rel=loose) and ours[:4] == theirs[:4], name
        assert same({n: t.float() for n, t in weights.items()}, {n: t.float() for n, t in before.items()}, near), name
    # And back, from what two sharded ranks in bfloat16 have written.
    (tmp_path / "bf16" / "checkpoint-7").rename(tmp_path / "bf16" / "later-sharded")
    found, history = alone(tmp_path / "bf16", bf16=True, resume_from_checkpoint=True, **sizes)
    assert losses(history)[-1] == pytest.approx(losses(result(tmp_path / "bf16")[1]["history"])[-1], rel=1e-2)
    assert found["lm_head.weight"].dtype == torch.bfloat16


def test_all_ranks_stop_where_one_is_asked_to(tmp_path: Path) -> None:
    start(2, {**job(tmp_path / "cut"), "stops": [1, 3]})
    assert result(tmp_path / "cut")[1]["step"] == 4  # the step in which the others hear of it
    assert [checkpoints.step_of(p) for p in checkpoints.found(tmp_path / "cut")] == [2, 4]
