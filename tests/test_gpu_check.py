"""The CUDA check's own logic, exercised on CPU tensors, and the GPU suite where there is one."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))  # as for a script: gpu.py imports its neighbours
SPEC = importlib.util.spec_from_file_location("gpu", BENCH / "gpu.py")
assert SPEC is not None and SPEC.loader is not None
gpu = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gpu)


def test_parity_table_on_the_cpu() -> None:
    rows = gpu.parity("cpu", ["eager", "sdpa"], [torch.bfloat16, torch.float16], width=64)
    assert len(rows) == 8
    assert all(row["ok"] for row in rows), gpu.table(rows)
    assert all(row["error"] > 1e-5 for row in rows), "low precision cannot be exact: the comparison is vacuous"


def test_says_so_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu.main() == 0
    assert "no CUDA device" in capsys.readouterr().out
