"""kill -9 in any phase of an iteration, and several ranks: the same bits, or the same numbers."""

import json
import os
import signal
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

TESTS = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
               "OMP_NUM_THREADS": "1"}  # fmt: skip


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


def run(job: dict[str, Any], world: int = 1) -> list[int]:
    """The exit codes of the processes of a job."""
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(TESTS / "align_worker.py"), json.dumps(job)]
    own = [{**common, "RANK": str(rank)} if world > 1 else {} for rank in range(world)]
    processes = [
        subprocess.Popen(command, env={**ENVIRONMENT, **more}, stderr=subprocess.PIPE, text=True) for more in own
    ]
    said = [process.communicate()[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert all(code in (0, -signal.SIGKILL) for code in codes), said
    return codes


@cache
def straight(kind: str, home: Path) -> dict[str, torch.Tensor]:
    """What a run gives that nothing ends."""
    folder = home / f"{kind}-straight"
    assert run({"folder": str(folder), "kind": kind}) == [0]
    return load_file(folder / "after.safetensors")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


PHASES = (("sampling", 2), ("scoring", 1), ("forward", 2), ("training", 4), ("update", 2), ("saving", 3))
QUICK = (("scoring", "ppo"), ("training", "grpo"))  # of the others each takes its seconds too
KILLS = [
    pytest.param(dies, kind, marks=() if (dies[0], kind) in QUICK else pytest.mark.slow)
    for dies in PHASES
    for kind in ("ppo", "grpo")
]


@pytest.mark.parametrize(("dies", "kind"), KILLS)
def test_a_kill_in_any_phase(dies: tuple[str, int], kind: str, home: Path, tmp_path: Path) -> None:
    assert run({"folder": str(tmp_path), "kind": kind, "dies": dies}) == [-signal.SIGKILL]
    assert run({"folder": str(tmp_path), "kind": kind}) == [0]
    after, wanted = load_file(tmp_path / "after.safetensors"), straight(kind, home)
    assert after.keys() == wanted.keys()
    assert all(bool((after[name] == wanted[name]).all()) for name in wanted)


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_two_ranks_do_what_one_does(kind: str, home: Path, tmp_path: Path) -> None:
    assert run({"folder": str(tmp_path), "kind": kind}, 2) == [0, 0]
    after, wanted = load_file(tmp_path / "after.safetensors"), straight(kind, home)
    moved = max(float(tensor.abs().max()) for name, tensor in wanted.items() if "lora_B" in name)
    away = max(float((after[name] - wanted[name]).abs().max()) for name in wanted)
    assert away < 0.02 * moved
