"""Every N-th call to the system fails in everything that writes: what was there, or what was to be, is there whole.

LLAMA2_FUZZ=1 tries every N, a plain run some. RLIMIT_FSIZE stands for a full disk.
"""

import json
import os
import resource
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from bytewise import write_tokenizer
from cpu.test_packed_file import make as make_gguf
from faults import Faulty, content, failing
from tiny import random_adapter, tiny_model

from llama2 import AutoModelForCausalLM, AutoTokenizer, LoraConfig, cpu
from llama2.checkpoint import convert as engine
from llama2.checkpoint.convert import ConversionSettings, convert, verify
from llama2.checkpoint.gguf import GgufFile
from llama2.checkpoint.peft import load_adapter, save_adapter
from llama2.errors import Llama2Error
from llama2.files import saving, settle, write_text
from llama2.quantize.job import quantize
from llama2.train import checkpoints

EVERY = "LLAMA2_FUZZ" in os.environ
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 260}
pytestmark = [
    pytest.mark.filterwarnings("ignore:there is no tokenizer"),
    pytest.mark.filterwarnings("ignore:the tokenizer has no tokenizer.model form"),
]


def chosen(total: int) -> range:
    """Which calls fail: all, or about a dozen with another remainder than any loop has."""
    return range(1, total + 1, 1 if EVERY else max(1, total // 11))


def visible(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(folder).items() if not name.startswith(".")}


# -- saves over a folder that is there ---------------------------------------------------------------------------


def _model(folder: Path, seed: int, shards: str) -> None:
    tiny_model(torch.float32, seed, **SMALL).save_pretrained(folder, max_shard_size=shards)


def _adapter(folder: Path, seed: int, _: str) -> None:
    model = tiny_model(torch.float32, **SMALL)
    random_adapter(model, LoraConfig(r=1 + seed), seed)
    save_adapter(model, folder)


def _tokenizer(folder: Path, seed: int, _: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER[0])
    tokenizer.chat_template = None if seed else {"default": "{{ messages }}", "other": "{{ messages }}."}
    tokenizer.save_pretrained(folder, save_jinja_files=not seed)


def _all_three(folder: Path, seed: int, shards: str) -> None:
    with saving(folder) as save:
        _model(save.stage, seed, shards)
        _tokenizer(save.stage, seed, shards)
        write_text(save.stage / "finetune.json", str(seed))


def _loads(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        load_adapter(tiny_model(torch.float32, **SMALL), folder)
    if (folder / "config.json").exists():
        AutoModelForCausalLM.from_pretrained(folder)
    if (folder / "tokenizer.json").exists():
        AutoTokenizer.from_pretrained(folder)


TOKENIZER: list[Path] = []
SAVES = {"model": _model, "adapter": _adapter, "tokenizer": _tokenizer, "all three": _all_three}


@pytest.fixture(autouse=True, scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    TOKENIZER.append(tmp_path_factory.mktemp("tokenizer"))
    write_tokenizer(TOKENIZER[0])
    yield
    TOKENIZER.clear()


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("name", SAVES)
def test_a_save_over_another_leaves_one_of_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, lasting: bool
) -> None:
    save, place = SAVES[name], tmp_path / "model"
    save(tmp_path / "new", 1, "50KB")
    save(place, 0, "30KB")
    (place / "notes").write_text("foreign")
    old, new = content(place), {**content(tmp_path / "new"), "notes": b"foreign"}
    with failing(monkeypatch, Faulty()) as counting:
        save(place, 1, "50KB")
    assert content(place) == new and old != new
    seen = set()
    for at in chosen(len(counting.calls)):
        save(place, 0, "30KB")
        assert content(place) == old
        with failing(monkeypatch, Faulty(at, lasting)) as system, suppress(OSError, Llama2Error):
            save(place, 1, "50KB")
        settle(place)
        left = lasting or system.calls[at - 1] == "unlink"
        found = visible(place) if left else content(place)
        assert found in (old, new), (at, system.calls[-1])
        if (found == new) not in seen:
            _loads(place)
        seen.add(found == new)
        assert left or [p.name for p in tmp_path.iterdir() if p.name not in ("new", "model")] == []
    assert seen == {True, False}


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may be longer than `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", SAVES)
def test_a_full_disk_leaves_the_old_folder(tmp_path: Path, name: str) -> None:
    save, place = SAVES[name], tmp_path / "model"
    save(place, 0, "30KB")
    old = content(place)
    for size in (0, 10, 300, max(map(len, old.values())) - 1):
        with disk_of(size), pytest.raises((OSError, Llama2Error, RuntimeError)):
            save(place, 1, "1GB")
        assert content(place) == old and sorted(p.name for p in tmp_path.iterdir()) == ["model"]


# -- what goes on when it is called again ------------------------------------------------------------------------


def _source(folder: Path) -> Path:
    if not folder.exists():
        tiny_model(torch.float32, **SMALL).save_pretrained(folder)
        write_tokenizer(folder)
        model = tiny_model(torch.float32, **SMALL)
        random_adapter(model, LoraConfig(r=2), 0)
        save_adapter(model, folder.with_name("adapter"))
    return folder


def _converted(source: Path, out: Path, **options: Any) -> Path:
    convert(source, out, ConversionSettings(**options))
    return out


MAKES: dict[str, Callable[[Path, Path], Path]] = {
    "convert to hf": lambda source, home: _converted(source, home / "out", dtype="bfloat16"),
    "convert to meta": lambda source, home: _converted(source, home / "out", to="meta", shards=2),
    "convert to gguf": lambda source, home: _converted(source, home / "out.gguf", to="gguf"),
    "shard": lambda source, home: _converted(source, home / "out", shard_size="50KB"),
    "merge": lambda source, home: _converted(source, home / "out", adapter=str(source.with_name("adapter"))),
    "quantize": lambda source, home: (quantize(source, home / "out", "int8", eval_tokens=0), home / "out")[1],
    "quantize to gguf": lambda source, home: (
        quantize(source, home / "out.gguf", "gguf:q8_0", calibrate=False, eval_tokens=0),
        home / "out.gguf",
    )[1],
}
_LAST = ("config.json", "params.json", "out.gguf")  # without which nobody takes it for a checkpoint


def bits(home: Path) -> dict[str, bytes]:
    """What a command has made, but for times in reports."""
    return {name: data for name, data in content(home).items() if "report." not in name and "SHA256SUMS" not in name}


@pytest.mark.parametrize("name", MAKES)
def test_a_command_that_failed_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(engine, "SYNC_BYTES", 1 << 14)
    make, source = MAKES[name], _source(tmp_path / "source")
    with failing(monkeypatch, Faulty()) as counting:
        (tmp_path / "whole").mkdir()
        make(source, tmp_path / "whole")
    whole = bits(tmp_path / "whole")
    named = [at + 2 for at, call in enumerate(counting.calls) if call == "rename"]  # a name is given, and then it fails
    for at in sorted({*chosen(len(counting.calls)), *(named if name.startswith("quantize") else ())}):
        home = tmp_path / str(at)
        home.mkdir()
        with failing(monkeypatch, Faulty(at)) as system, suppress(OSError, Llama2Error):
            make(source, home)
        seen = {name for name in content(home) if not any(part.startswith(".") for part in Path(name).parts)}
        if any(Path(name).name in _LAST for name in seen):
            assert set(whole) <= seen, (at, system.calls[-1])
        with suppress(Llama2Error):  # "exists": it was complete
            make(source, home)
        found = {name: data for name, data in bits(home).items() if not name.endswith(".lock")}
        assert found == whole, (at, system.calls[at - 1])
    verify(make(source, tmp_path / "verified"))


@pytest.mark.skipif(not cpu.available(), reason="the native module is not built")
def test_a_pack_that_fails_leaves_the_old_packed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = make_gguf(tmp_path, "q4_0", hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    packed = gguf.with_name(f"{gguf.name}.packed")
    with failing(monkeypatch, Faulty()) as counting:
        cpu.write_packed(GgufFile(gguf))
    new, old = packed.read_bytes(), packed.read_bytes()[:5000]
    before = {p.name for p in tmp_path.iterdir()}
    for at in range(1, len(counting.calls) + 1):
        packed.write_bytes(old)
        with failing(monkeypatch, Faulty(at)) as system, suppress(OSError, Llama2Error):
            cpu.write_packed(GgufFile(gguf))
        assert packed.read_bytes() in (old, new)
        assert {p.name for p in tmp_path.iterdir()} == before or system.calls[at - 1] == "unlink"
    packed.write_text("notes of mine")
    with pytest.raises(Llama2Error, match="is no packed file; nothing but one is replaced"):
        cpu.write_packed(GgufFile(gguf))
    assert packed.read_text() == "notes of mine"


# -- checkpoints of a run ----------------------------------------------------------------------------------------


def _checkpoint(folder: Path, text: str) -> None:
    with checkpoints.writing(folder, 3, "run") as made:
        write_text(made / "a", text)
        (made / "below").mkdir()
        (made / "below" / "b").write_text(text)


def _state(folder: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # damaged ones are told
        newest = checkpoints.newest(folder)
    assert newest is not None and checkpoints.found(folder) == [newest]
    return [(newest / "a").read_text(), (newest / "below" / "b").read_text()]


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "for good"])
def test_a_checkpoint_over_its_own_leaves_one_of_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lasting: bool
) -> None:
    states = set()
    for at in range(1, 100):
        folder = tmp_path / str(at)
        _checkpoint(folder, "old")
        with failing(monkeypatch, Faulty(at, lasting)) as system, suppress(OSError):
            _checkpoint(folder, "new")
        checkpoints.sweep(folder)
        found = _state(folder)
        assert found in (["old"] * 2, ["new"] * 2) and not list(folder.glob(".*")), (at, system.calls[-1])
        states.add(found[0])
        if len(system.calls) < at:
            break
    assert states == {"old", "new"} and at > 10


def test_a_run_that_is_killed_while_it_replaces_one_loses_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at any rename: everything before it is on the disk, nothing after it has happened."""
    for stop in range(1, 3):
        folder = tmp_path / str(stop)
        _checkpoint(folder, "old")
        child = os.fork()
        if child == 0:
            done: list[str] = []

            def rename(old: Path, new: Path, done: list[str] = done, stop: int = stop) -> None:
                done.append(str(new))
                if len(done) == stop:
                    os._exit(9)
                os.rename(old, new)

            monkeypatch.setattr(checkpoints, "rename", rename)
            _checkpoint(folder, "new")
            checkpoints.prune(folder, 1, run="run")
            os._exit(0)
        os.waitpid(child, 0)
        checkpoints.sweep(folder)
        assert _state(folder) in (["old"] * 2, ["new"] * 2)
        assert not list(folder.glob(".*"))


def test_reports_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama2.quantize.report import Report

    report = Report("int8", "a", "b", {}, None, None)
    for at in range(1, 100):
        folder = tmp_path / str(at)
        with failing(monkeypatch, Faulty(at)) as system, suppress(OSError):
            report.write(folder / "report.json", folder / "report.svg")
        if (folder / "report.json").exists():
            assert json.loads((folder / "report.json").read_text())["method"] == "int8"
        assert not [p for p in folder.iterdir() if p.suffix == ".tmp" and system.calls[at - 1 : at] != ["unlink"]]
        if len(system.calls) < at:
            break
    assert at > 8
