"""Every example of docs/apis.md, and the client of docs/index.md, runs as it stands, against a server of the tests."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from serve.conftest import Serve

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "apis.md").read_text()
COMMANDS = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
EXAMPLES = re.findall(r"^```py\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
START = (Path(__file__).resolve().parents[3] / "docs" / "index.md").read_text()
STARTED = re.findall(r"^```sh\n(curl .*?)^```", START, re.MULTILINE | re.DOTALL)
STARTED_IN_PYTHON = re.findall(r"^```py\n(.*?)^```", START, re.MULTILINE | re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def url(serve: Serve) -> str:
    return serve(names=("llama2",)).url


def test_every_api_has_both() -> None:
    sections = [part for part in PAGE.split("\n## ")[1:] if "```" in part]
    assert len(sections) == len(COMMANDS) == len(EXAMPLES) >= 6
    assert len(STARTED) == len(STARTED_IN_PYTHON) == 1


@pytest.mark.parametrize("command", COMMANDS + STARTED, ids=lambda c: re.findall(r"8000(\S+)", c)[0])
def test_command(url: str, command: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    assert ADDRESS in command
    ran = subprocess.run(command.replace(ADDRESS, url), shell=True, capture_output=True, text=True, timeout=60)
    lines: list[Any] = [json.loads(line) for line in ran.stdout.splitlines()]
    assert lines and not any(line.get("error") or line.get("type") == "error" for line in lines), ran.stdout


@pytest.mark.parametrize("code", EXAMPLES + STARTED_IN_PYTHON, ids=lambda c: c.split()[1])
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_example(url: str, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)
    if missing := [name for name in wanted if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    assert ADDRESS in code
    exec(compile(code.replace(ADDRESS, url), "apis.md", "exec"), {})
    assert capsys.readouterr().out
