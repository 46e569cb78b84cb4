"""The examples from beginning to end on the real checkpoint: what they print has improved. Minutes each."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from align.policies import write_policy

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(
    ("name", "line", "least", "most"),
    [
        ("instruction_tuning", r"right answers (\d+)% before, (\d+)% after", 20, 80),
        ("text_classifier", r"held out, accuracy: ([\d.]+) before, ([\d.]+) after", 0.7, 0.9),
        ("preferences", r"held out, rewards/accuracies: ([\d.]+) before, ([\d.]+) after", 0.7, 0.9),
    ],
)
def test_example(smollm2: Path, tmp_path: Path, name: str, line: str, least: float, most: float) -> None:
    """Before at most `least`, after at least `most`."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), str(smollm2), str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert ran.returncode == 0, ran.stderr
    found = re.search(line, ran.stdout)
    assert found is not None, ran.stdout
    assert float(found[1]) <= least and float(found[2]) >= most


def test_the_whole_recipe_in_small(tmp_path: Path) -> None:
    """Every command of Llama 2-Chat's recipe runs, on a tiny model, and what was to be reached is told; a second start
    does nothing."""
    write_policy(tmp_path / "tiny", max_position_embeddings=2048)
    command = [
        sys.executable,
        str(EXAMPLES / "llama2_chat.py"),
        str(tmp_path / "tiny"),
        str(tmp_path / "out"),
        "--quick",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    stages = ("tuned", "rejection 1", "rejection 2", "ppo", "ghost", "distilled")
    lines = ran.stdout.splitlines()
    assert all(any(line.startswith(f"{stage} ") for line in lines) for stage in stages), ran.stdout[-3000:]
    assert sum(line.startswith(("met ", "NOT MET ")) for line in lines) == 7
    again = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert again.returncode == 0 and "$ llama2" not in again.stdout
