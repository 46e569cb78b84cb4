"""docs/extending.md: the files that a change touches are there, each has its row, and a row alone is enough."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_model

from llama2 import cli
from llama2.cli.args import option
from llama2.cpu import available
from llama2.errors import ConfigError
from llama2.rope_types import ROPE_TYPES, RopeType, context_limit
from llama2.schema import real

ROOT = Path(__file__).resolve().parent.parent
_ROW = re.compile(r"^\| (an? [^|]+) \| (\d) \| ([^|]+) \| `([^`|]+)` \|$", re.M)
TEXT = (ROOT / "docs" / "extending.md").read_text()
ROWS = {
    change: (int(most), re.findall(r"`([^`]+)`", files), member) for change, most, files, member in _ROW.findall(TEXT)
}
BOUNDS = {
    "a RoPE type": 3,
    "a GGUF block type": 6,
    "a quantised folder format": 6,
    "a generation processor or filter": 3,
    "a training task": 2,
    "an HTTP API": 2,
    "an instruction set": 3,
    "a command": 2,
}


def test_the_table_has_every_kind_of_change() -> None:
    assert {change: most for change, (most, _, _) in ROWS.items()} == BOUNDS


@pytest.mark.parametrize("change", BOUNDS)
def test_each_file_has_the_row_of_the_member(change: str) -> None:
    most, files, member = ROWS[change]
    assert 1 <= len(files) <= most and len(set(files)) == len(files)
    for name in files:
        path = ROOT / name
        assert path.is_file(), name
        assert member.lower() in (path.read_text() + path.name).lower(), f"{name} says nothing of {member}"


def test_a_member_is_named_in_no_other_file_of_its_registry() -> None:
    """An instruction set and a task, whose names mean nothing else, stand in the files of the table only."""
    _, files, _ = ROWS["an instruction set"]
    csrc = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".inl", ".cpp") and '"neon"' in p.read_text()]
    assert [str(p.relative_to(ROOT)) for p in csrc] == [files[1]]
    task = [p for p in (ROOT / "src").rglob("*.py") if re.search(r"\bSimpo\b", p.read_text())]
    assert sorted(str(p.relative_to(ROOT)) for p in task) == sorted(ROWS["a training task"][1])


def _slowed(inv: Any, config: Any, length: int | None, xp: Any) -> Any:
    return inv / config.rope_parameters["slowness"]


def test_a_row_is_a_rope_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings, their bounds, torch and the native engine know it; "linear" is the same arithmetic."""
    row = RopeType(("slowness",), (), _slowed, unbounded=True, values={"slowness": real(1, 100)})
    monkeypatch.setitem(ROPE_TYPES, "slowed", row)
    model = tiny_model(torch.float32, rope_scaling={"rope_type": "slowed", "slowness": 3.0})
    oracle = tiny_model(torch.float32, rope_scaling={"rope_type": "linear", "factor": 3.0})
    oracle.load_state_dict(model.state_dict())
    ids = tiny_ids(2, 20)
    assert torch.equal(model(ids).logits, oracle(ids).logits)
    assert context_limit(model.config) is None and context_limit(oracle.config) == oracle.config.max_position_embeddings
    with pytest.raises(ConfigError, match="'slowed' needs slowness"):
        tiny_model(torch.float32, rope_scaling={"rope_type": "slowed"})
    if available():
        for other in (model, oracle):
            other.generation_config.max_new_tokens = 8
        made = [m.generate(ids[:1], runner="native", do_sample=False) for m in (model, oracle)]
        assert torch.equal(*made)


@dataclass(frozen=True, kw_only=True)
class GreetOptions:
    """Greet somebody."""

    name: str = option("you", "who")


def test_a_module_and_a_row_are_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = ModuleType("llama2.cli.greet")
    module.GreetOptions = GreetOptions  # type: ignore[attr-defined]
    module.run = lambda options: print(f"hello {options.name}") or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "greet", (module.__name__, "say hello"))
    monkeypatch.setenv("LLAMA2_NAME", "all")
    assert cli.main(["greet"]) == 0 and cli.main(["greet", "--name", "one"]) == 0
    assert capsys.readouterr().out == "hello all\nhello one\n"
    assert cli.main(["--help"]) == 0 and "say hello" in capsys.readouterr().out
    assert cli.main(["greet", "--nme", "x"]) == 2 and "--name" in capsys.readouterr().err
