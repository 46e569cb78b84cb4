"""`llama2 pull`, `list`, `show`, `rm`, `ps`, and the names that -m knows: over a hub on this machine, and the stores of
Ollama and LM Studio as those programs lay them out."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint import gguf_package
from cli.fake_hub import fake_hub
from tiny import tiny_model

from llama2.cli import main
from llama2.cli.names import BUILT_IN, add_name, names_path, resolve_name
from llama2.cli.registry import registered, running
from llama2.errors import InputError

REPO = "someone/Tiny-GGUF"
SIZES: dict[str, Any] = {"vocab_size": 40, "intermediate_size": 96}
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def gguf(tmp_path: Path) -> bytes:
    file = tmp_path / "made.gguf"
    gguf_package.write(file, tiny_model(torch.float32, 0, **SIZES).state_dict())
    return file.read_bytes()


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has nothing."""
    folder = tmp_path / "home"
    folder.mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_", "LLAMA2_", "OLLAMA"))}
    return kept | {"HOME": str(folder), "HF_HUB_DISABLE_TELEMETRY": "1"}


def command(environment: dict[str, str], *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "llama2", *words], capture_output=True, text=True, env=environment, timeout=200,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def repository(gguf: bytes) -> dict[str, bytes]:
    return {"tiny.Q4_K_M.gguf": gguf, "tiny.Q8_0.gguf": gguf + b"\0" * 4096, "tiny.F16.gguf": gguf + b"\0" * 9000,
            "README.md": b"# tiny"}  # fmt: skip


def test_a_model_is_fetched_listed_shown_and_removed(gguf: bytes, home: dict[str, str]) -> None:
    with fake_hub(REPO, repository(gguf)) as hub:
        online = home | {"HF_ENDPOINT": hub.url}
        told = command(online, "pull", REPO, "--dry-run")
        assert told.returncode == 0, told.stderr
        assert "tiny.Q8_0.gguf is the largest that fits" in told.stderr and "tiny.Q8_0.gguf" in told.stdout
        assert not any("/resolve/" in path for path in hub.asked)
        got = command(online, "pull", f"{REPO}:q4_k_m", "--name", "mine")
        assert got.returncode == 0, got.stderr
        file = Path(got.stdout.strip())
        assert file.name == "tiny.Q4_K_M.gguf" and file.read_bytes() == gguf
        assert not any("Q8_0" in path for path in hub.asked if path.startswith("GET") and "/resolve/" in path)
    offline = home | {"HF_HUB_OFFLINE": "1"}
    assert json.loads(command(offline, "list", "--json").stdout)[0]["name"] == REPO
    assert "GGUF" in command(offline, "list").stdout
    shown = command(offline, "show", "mine", "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["format"] == "GGUF version 3"
    refused = command(offline, "rm", REPO)
    assert refused.returncode == 2 and "--yes" in refused.stderr
    assert "freed" in command(offline, "rm", REPO, "--yes").stdout
    assert json.loads(command(offline, "list", "--json").stdout) == []
    assert not list(Path(home["HOME"]).glob("**/*.gguf")) and not list(Path(home["HOME"]).glob("**/blobs/*"))


def test_wrong_bytes_are_refused_and_removed(gguf: bytes, home: dict[str, str]) -> None:
    with fake_hub(REPO, repository(gguf)) as hub:
        hub.wrong.add("tiny.Q8_0.gguf")
        got = command(home | {"HF_ENDPOINT": hub.url}, "pull", f"{REPO}:Q8_0")
        assert got.returncode == 2 and "SHA-256 differs" in got.stderr
        assert not list(Path(home["HOME"]).glob("**/*.gguf"))
        hub.wrong.clear()
        assert command(home | {"HF_ENDPOINT": hub.url}, "pull", f"{REPO}:Q8_0").returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [((), "fetches one model, but 0"), ((f"{REPO}:Q3_K_S",), "means 0 files"), ((f"{REPO}/other.gguf",), "holds no"),
     (("someone/nothing",), "did not serve it"), (("no id at all",), "it does not look like a hub id")],
)  # fmt: skip
def test_what_cannot_be_fetched(gguf: bytes, home: dict[str, str], words: tuple[str, ...], message: str) -> None:
    with fake_hub(REPO, repository(gguf)) as hub:
        got = command(home | {"HF_ENDPOINT": hub.url}, "pull", *words)
    assert got.returncode == 2 and message in got.stderr and "Traceback" not in got.stderr


def test_a_repository_of_safetensors_brings_its_tokenizer(home: dict[str, str], tmp_path: Path) -> None:
    tiny_model(torch.float32, 0, **SIZES).save_pretrained(tmp_path / "made")
    files = {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir() if file.is_file()}
    files |= {"tokenizer.json": b"{}", "original/consolidated.00.pth": b"x" * 99, "notes.txt": b"x"}
    with fake_hub("someone/tiny", files) as hub:
        got = command(home | {"HF_ENDPOINT": hub.url}, "pull", "someone/tiny")
    assert got.returncode == 0, got.stderr
    there = {file.name for file in Path(got.stdout.strip()).rglob("*") if file.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= there and not {"notes.txt"} & there
    assert "consolidated.00.pth" not in there


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gguf: bytes) -> Path:
    """Ollama's and LM Studio's stores with a model each, as these programs lay them out."""
    digest = hashlib.sha256(gguf).hexdigest()
    root = tmp_path / "ollama"
    (root / "blobs").mkdir(parents=True)
    (root / "blobs" / f"sha256-{digest}").write_bytes(gguf)
    layers = [{"mediaType": "application/vnd.ollama.image.template", "digest": f"sha256:{'0' * 64}"},
              {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}]  # fmt: skip
    for place in ("registry.ollama.ai/library/llama2/13b-chat", "registry.ollama.ai/library/tiny/latest",
                  "hf.co/someone/Tiny-GGUF/Q4_0"):  # fmt: skip
        manifest = root / "manifests" / place
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    broken = root / "manifests/registry.ollama.ai/library/broken/latest"
    broken.parent.mkdir()
    broken.write_text('{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../x"}]}')
    studio = tmp_path / "home" / ".lmstudio" / "models" / "someone" / "Studio-GGUF"
    studio.mkdir(parents=True)
    (studio / "studio.Q4_0.gguf").write_bytes(gguf)
    monkeypatch.setenv("OLLAMA_MODELS", str(root))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return root


@pytest.mark.parametrize("name", ["tiny", "tiny:latest", "llama2:13b-chat", "hf.co/someone/Tiny-GGUF:Q4_0"])
def test_a_model_of_ollama_is_found_by_its_name(stores: Path, name: str) -> None:
    assert Path(resolve_name(name)).parent == stores / "blobs"


def test_a_model_of_lm_studio_is_found_by_its_name(stores: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve_name("someone/Studio-GGUF").endswith("studio.Q4_0.gguf")
    assert main(["show", "someone/Studio-GGUF"]) == 0
    assert "GGUF version 3" in capsys.readouterr().out
    assert main(["rm", "someone/Studio-GGUF", "--yes"]) == 2
    assert "in the store of LM Studio" in capsys.readouterr().err
    assert Path(resolve_name("someone/Studio-GGUF")).exists()


def test_the_users_own_names_come_first(stores: Path) -> None:
    assert resolve_name("llama2") == BUILT_IN["llama2"]  # Ollama holds llama2:13b-chat, not llama2:latest
    path = add_name("tiny", "someone/else:Q8_0", os.environ)
    assert path == names_path(os.environ) and resolve_name("tiny") == "someone/else:Q8_0"
    add_name("llama2", str(stores), os.environ)
    assert resolve_name("llama2") == str(stores)
    with pytest.raises(InputError, match="means someone/else:Q8_0 already"):
        add_name("tiny", "other/one", os.environ)
    path.write_text("tiny = 3\n")
    with pytest.raises(InputError, match="tiny is 3"):
        resolve_name("tiny")


def test_what_exists_is_itself(stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    assert resolve_name("tiny") == "tiny"
    assert resolve_name("owner/name:Q4_K_M") == "owner/name:Q4_K_M"


# -- servers -------------------------------------------------------------------------------------------------------


def test_servers_are_listed_while_they_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with registered("http://127.0.0.1:1", ["a", "b"]):
        (server,) = running()
        assert (server.pid, server.address, server.models) == (os.getpid(), "http://127.0.0.1:1", ("a", "b"))
        assert server.memory is None or server.memory > 1 << 20
        # A server that was killed left its file behind, and another process has its number now.
        stale = {"address": "http://x", "models": [], "began": 0, "ticks": -1}
        (tmp_path / "llama2" / f"{os.getppid()}.json").write_text(json.dumps(stale))
        (tmp_path / "llama2" / "1x.json").write_text("no JSON")
        assert [row.pid for row in running()] == [os.getpid()]
        assert not (tmp_path / "llama2" / f"{os.getppid()}.json").exists()
    assert running() == []
