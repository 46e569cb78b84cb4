"""The container file: its command, as it stands, serves; nobody is root."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from bytewise import write_tokenizer
from tiny import tiny_model

FILE = Path(__file__).resolve().parents[2] / "deploy" / "Containerfile"


def instructions() -> dict[str, list[str]]:
    """Those of the final stage, by name."""
    text = re.sub(r"\\\n", " ", FILE.read_text()).rpartition("\nFROM ")[2]
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, _, rest = line.strip().partition(" ")
        if name.isupper():
            found.setdefault(name, []).append(rest)
    return found


def environment() -> dict[str, str]:
    pairs = [pair.partition("=") for line in instructions()["ENV"] for pair in line.split()]
    return {name: value for name, _, value in pairs if name != "PATH"}


def test_what_it_copies_exists_and_the_user_is_not_root() -> None:
    user = instructions()["USER"]
    assert user == ["10001"] and f"useradd --uid {user[0]}" in FILE.read_text()
    for line in re.findall(r"^COPY (?!--from)(.*)$", FILE.read_text(), re.M):
        for name in line.split()[:-1]:
            assert (FILE.parents[1] / name).exists(), name


def test_it_copies_what_the_build_reads() -> None:
    """A file that CMake misses fails the install of the compiled module, for which torch steps in without a word."""
    root = FILE.parents[1]
    copied = {name for line in re.findall(r"^COPY (?!--from)(.*)$", FILE.read_text(), re.M) for name in line.split()}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    cmake = (root / "CMakeLists.txt").read_text()
    wanted = [project["readme"], *re.findall(r"install\(FILES ([\w/.]+)", cmake), *re.findall(r"csrc/[\w/.]+", cmake)]
    assert len(wanted) > 10
    assert [name for name in wanted if not {name, name.partition("/")[0]} & copied] == []
    assert "llama2.compiled.available()" in FILE.read_text()  # an image without it is never made


def test_everything_is_installed_by_hash_and_torch_only_where_asked_for() -> None:
    """And the lock has what pyproject.toml asks for, in versions that it takes."""
    requirements = pytest.importorskip("packaging.requirements")
    text = FILE.with_name("requirements.lock").read_text()
    locked = dict(re.findall(r"^([\w.-]+)==(\S+) \\\n +--hash=sha256:[0-9a-f]{64}", text, re.M))
    assert len(locked) == len(re.findall(r"^[^\s#]", text, re.M)) > 30
    project = tomllib.loads((FILE.parents[1] / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["serve"],
              *project["build-system"]["requires"]]  # fmt: skip
    assert "torch" not in locked and 'ARG TORCH=""' in FILE.read_text()
    names = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in locked.items()}
    for line in wanted:
        one = requirements.Requirement(line)
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        assert one.specifier.contains(names[name]), line
    installs = re.findall(r"pip install (.*)", FILE.read_text())
    assert [("--require-hashes" in line, "--no-deps" in line) for line in installs] == [
        (True, True),
        (False, False),
        (False, True),
    ]
    assert (
        installs[1].endswith("-c constraints.txt $TORCH")
        and re.findall("^FROM (.*?)(?: AS .*)?$", FILE.read_text(), re.M) == ["${BASE}"] * 2
    )


@pytest.mark.parametrize("words", [None, pytest.param(["serve"], marks=pytest.mark.slow)], ids=["default", "sagemaker"])
def test_its_command_serves(tmp_path: Path, words: list[str] | None) -> None:
    pytest.importorskip("uvicorn", reason="serving needs the extra `serve`")
    pytest.importorskip("llguidance", reason="serving needs the extra `serve`")
    model, scripts = tmp_path / "model", tmp_path / "bin"
    tiny_model(vocab_size=260, max_position_embeddings=256, bos_token_id=None, eos_token_id=0).float().save_pretrained(
        model
    )
    write_tokenizer(model)
    scripts.mkdir()
    (scripts / "llama2").write_text(
        f"#!{sys.executable}\nimport sys\nfrom llama2.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    (scripts / "llama2").chmod(0o755)
    assert environment()["LLAMA2_HOST"] == "0.0.0.0" and environment()["PORT"] == "8080"
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    argv = json.loads(instructions()["ENTRYPOINT"][0]) + (words or json.loads(instructions()["CMD"][0]))
    variables = {**os.environ, **environment(), "PATH": f"{scripts}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    variables |= {"HF_MODEL_ID": str(model), "SAGEMAKER_BIND_TO_PORT": str(port), "MAX_BATCH_TOTAL_TOKENS": "1024"}
    process = subprocess.Popen(argv, env=variables, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", process)
        body = json.dumps({"inputs": "Hi", "parameters": {"max_new_tokens": 3}}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            assert isinstance(json.load(reply), dict | list)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


def wait_for(url: str, process: subprocess.Popen[str]) -> None:
    for _ in range(600):
        assert process.poll() is None, process.communicate()[1]
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(f"{url} never answered 200")
