"""Every tutorial of docs/tutorials runs from beginning to end in a clean folder, on SmolLM2 or a tiny model.

Shell fences (`sh`) go to bash, Python fences run in one namespace per page, and a fence `output` is what the fence
before it printed on the standard output. A fence behind `<!-- not run: REASON -->` is only parsed
(test_documented_commands.py).
"""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece_files import write_llama_model
from tiny import tiny_model

from llama2.checkpoint.convert import ConversionSettings, convert

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
_FENCE = re.compile(r"^(<!-- not run: [^\n]+ -->\n)?```(sh|python|output)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = {"serve": ("fastapi", "openai", "llguidance"), "run": ("llguidance",)}


@pytest.fixture
def home(tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clean folder, in which the name `smollm2` means the model of the package, and nothing is fetched."""
    config = tmp_path / "user" / "llama2"
    config.mkdir(parents=True)
    (config / "models.toml").write_text(f'smollm2 = "{smollm2}"\n')
    for name in [name for name in os.environ if name.startswith(("LLAMA2_", "XDG_"))]:
        monkeypatch.delenv(name)
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "user"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def write_meta_download(folder: Path) -> None:
    """A tiny model in the form of Meta's download."""
    torch.manual_seed(0)
    tiny_model(torch.float32, vocab_size=300, num_key_value_heads=4).save_pretrained(folder.parent / "source")
    write_llama_model(folder.parent / "source" / "tokenizer.model", 300)
    convert(folder.parent / "source", folder, ConversionSettings(to="meta"))


def fences(page: Path) -> Iterator[tuple[str, str, int]]:
    """Language and content of each fence that is run, and the lines above the content."""
    text = page.read_text()
    for match in _FENCE.finditer(text):
        if not match[1]:
            yield match[2], match[3], text.count("\n", 0, match.start(3))


def matches(wanted: str, found: str) -> bool:
    """Whether a text is the wanted one; a line `...` stands for any lines."""
    parts = re.split(r"^\.\.\.\n", wanted.rstrip() + "\n", flags=re.MULTILINE)
    return re.fullmatch(r"(?:.*\n)*".join(map(re.escape, parts)), found.rstrip() + "\n") is not None


class Runner:
    """Runs the fences of a page; what a fence starts in the background ends with the page."""

    def __init__(self, page: Path, port: int) -> None:
        self.page, self.port = page, port
        self.names: dict[str, Any] = {"__name__": "tutorial"}
        self.background: list[subprocess.Popen[bytes]] = []

    def shell(self, code: str) -> str:
        """Returns what a block printed."""
        if code.rstrip().endswith("&"):
            with open("background.log", "ab") as log:
                command = ["bash", "-c", f"set -euo pipefail\n{code}\nwait"]
                self.background.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
            return ""
        command = ["bash", "-c", f"set -euo pipefail\n{code}"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert ran.returncode == 0, f"{code}\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}"
        return ran.stdout

    def run(self) -> None:
        """Runs all of the page. Raises AssertionError for a block that fails or prints something else."""
        printed = ""
        for language, body, above in fences(self.page):
            code = body.replace(":8000", f":{self.port}").replace("--port 8000", f"--port {self.port}")
            if language == "sh":
                printed = self.shell(code)
            elif language == "python":
                exec(compile("\n" * above + code, str(self.page), "exec"), self.names)  # a traceback shows the page
            else:
                assert matches(body, printed), f"wanted {body!r}, printed {printed!r}"

    def close(self) -> None:
        """Ends what runs in the background."""
        for process in self.background:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore")
def test_tutorial(page: Path, home: Path, smollm2: Path) -> None:
    for package in NEEDS.get(page.stem, ()):
        pytest.importorskip(package)
    if "smollm2.gguf" in page.read_text():
        (home / "smollm2.gguf").symlink_to(smollm2)
    if page.stem == "convert":
        write_meta_download(home / "llama-2-7b-chat")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = torch.get_num_threads()
    runner = Runner(page, port)
    try:
        runner.run()
    finally:
        runner.close()
        torch.set_num_threads(threads)


def test_eight_tutorials_run_most_of_what_they_show() -> None:
    assert len(TUTORIALS) == 8
    for page in TUTORIALS:
        skipped = [mark for mark, _, _ in _FENCE.findall(page.read_text())]
        assert len(skipped) > 2 * sum(map(bool, skipped)), page.name
        assert len(re.findall(r"^```(?:sh|python|output)$", page.read_text(), re.MULTILINE)) == len(skipped), page.name


def test_a_page_that_fails_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    for text, fault in (
        ("```sh\nfalse | cat\n```\n", "false"),
        ("```sh\necho a\n```\n\n```output\nb\n```\n", "wanted"),
        ("```python\nassert 1 > 2, 'three'\n```\n", "three"),
    ):
        page.write_text(text)
        with pytest.raises(AssertionError, match=fault):
            Runner(page, 1).run()
    page.write_text(
        "<!-- not run: a reason -->\n```sh\nfalse\n```\n\n```sh\necho a\necho b\n```\n\n```output\na\n...\n```\n"
    )
    Runner(page, 1).run()
