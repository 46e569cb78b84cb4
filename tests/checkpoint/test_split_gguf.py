"""Split GGUF files, written by the gguf package: one model on every path, whichever part is named."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint import gguf_package
from checkpoint.test_coverage import native_logits
from tiny import tiny_ids, tiny_model

import llama2.checkpoint as checkpoint
from llama2 import AutoConfig, AutoModelForCausalLM, cpu
from llama2.checkpoint.convert import ConversionSettings, convert, verify
from llama2.checkpoint.gguf import GgufFile
from llama2.cli import main
from llama2.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer")
PARTS = 3  # 21 tensors, 8 in a part; the last part holds the head


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """whole.gguf and split-00001-of-00003.gguf and on, the same model in Q8_0."""
    place = tmp_path_factory.mktemp("split")
    state = tiny_model(torch.float32, vocab_size=40, intermediate_size=96).state_dict()
    gguf_package.write(place / "whole.gguf", state, quantise="Q8_0")
    (place / "parts").mkdir()
    gguf_package.write(place / "parts" / "split.gguf", state, split=8, quantise="Q8_0")
    assert len(list((place / "parts").iterdir())) == PARTS
    return place


def part(folder: Path, number: int) -> Path:
    return folder / "parts" / f"split-{number:05d}-of-{PARTS:05d}.gguf"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_any_part_is_the_whole(folder: Path, number: int) -> None:
    one, many = checkpoint.open(folder / "whole.gguf"), checkpoint.open(part(folder, number))
    assert dict(one.tensors) == dict(many.tensors) and one.config == many.config
    assert not many.config.tie_word_embeddings
    for name in one.tensors:
        assert torch.equal(one.read(name), many.read(name)), name


@pytest.mark.parametrize("name", ["parts", "parts/split.gguf", "parts/split", "parts/split-00002-of-00003.gguf"])
def test_loading_by_folder_prefix_or_part(folder: Path, name: str) -> None:
    want = AutoModelForCausalLM.from_pretrained(folder / "whole.gguf", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype="float32")
    assert torch.equal(model(tiny_ids() % 40).logits, want(tiny_ids() % 40).logits)
    assert AutoConfig.from_pretrained(folder / name) == checkpoint.open(folder / "whole.gguf").config


@pytest.mark.skipif(not cpu.available(), reason="the native engine is not built")
def test_the_native_engine_reads_all_parts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = tiny_ids() % 40
    want = native_logits(folder / "whole.gguf", ids)
    assert torch.equal(native_logits(part(folder, 2), ids), want)
    shutil.copytree(folder / "parts", tmp_path / "parts")
    assert main(["pack", str(part(tmp_path, 3)), "--quiet"]) == 0
    packed = tmp_path / "parts" / "split-00001-of-00003.gguf.packed"
    assert packed.exists() and cpu.find_packed(GgufFile(part(tmp_path, 1))) is not None
    assert torch.equal(native_logits(part(tmp_path, 1), ids), want)
    with part(tmp_path, 2).open("r+b") as file:  # a changed part is another source
        file.seek(-8, 2)
        file.write(b"\1")
    with pytest.warns(UserWarning, match="packed weights are not used"):
        assert cpu.find_packed(GgufFile(part(tmp_path, 1))) is None
    assert "split-00001-of-00003.gguf.packed" in capsys.readouterr().out


def test_conversion_and_info(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(part(folder, 2), tmp_path / "out.gguf", ConversionSettings("gguf"))
    verify(tmp_path / "out.gguf")
    one, made = checkpoint.open(folder / "whole.gguf"), checkpoint.open(tmp_path / "out.gguf")
    assert dict(one.tensors) == dict(made.tensors)
    assert all(torch.equal(one.raw(name).rows, made.raw(name).rows) for name in one.tensors)
    assert main(["info", str(part(folder, 3))]) == 0
    out = capsys.readouterr().out
    assert "GGUF version 3 in 3 parts" in out and "separate head" in out
    parameters = sum(p.numel() for p in tiny_model(vocab_size=40, intermediate_size=96).parameters())
    assert f"{parameters:,}" in out


def lost(folder: Path) -> None:
    part(folder, 2).unlink()


def exchanged(folder: Path) -> None:
    shutil.copy(part(folder, 2), part(folder, 3))


def renamed(folder: Path) -> None:
    part(folder, 1).rename(folder / "parts" / "model.gguf")


def foreign(folder: Path) -> None:
    """The last part of another file, cut elsewhere."""
    state = tiny_model(torch.float32, vocab_size=40, intermediate_size=96, attention_bias=True).state_dict()
    made = gguf_package.write(folder / "other.gguf", state, split=10)
    shutil.copy(made.with_name("other-00003-of-00003.gguf"), part(folder, 3))


def headless(folder: Path) -> None:
    """The last part of the same model saved as a tied one: everything fits but the number of tensors."""
    state = tiny_model(torch.float32, vocab_size=40, intermediate_size=96).state_dict()
    del state["lm_head.weight"]
    made = gguf_package.write(folder / "other.gguf", state, split=8, quantise="Q8_0")
    shutil.copy(made.with_name("other-00003-of-00003.gguf"), part(folder, 3))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lost, "split-00002-of-00003.gguf .1 in all. is missing beside it"),
        (exchanged, r"says that it is part 2 of 3 .*not 3 of 3"),
        (renamed, "model.gguf is part 1 of 3 of a split GGUF file"),
        (foreign, "both hold"),
        (headless, "announces 21 tensors in all its parts, which hold 20"),
    ],
)
def test_parts_that_do_not_make_a_whole(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(folder / "parts", tmp_path / "parts")
    damage(tmp_path)
    path = part(tmp_path, 1) if part(tmp_path, 1).exists() else tmp_path / "parts" / "model.gguf"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(path)
