"""Packed weights kept in a file: the same results from it, and nothing from one that does not fit."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu.ggml_blocks import TYPES, random_blocks
from tiny import tiny_model

from llama2 import cpu
from llama2.checkpoint.gguf import GgufFile
from llama2.cli import main
from llama2.compiled import native as engine
from llama2.cpu import packed_file
from llama2.errors import CheckpointError, InputError
from llama2.runners.native import NativeModel

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason="the native module is not built"),
    pytest.mark.filterwarnings("ignore:there is no tokenizer"),
]

PROMPT = [1, 40, 9, 96, 3]


def make(folder: Path, dtype: str, **changes: Any) -> Path:
    """A tiny GGUF file of this type, every matrix of which has whole blocks."""

    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4} | changes
    tiny_model(torch.float32, **sizes).save_pretrained(folder / "hf")
    path = folder / "tiny.gguf"
    assert main(["convert", str(folder / "hf"), str(path), "--dtype", dtype, "--quiet"]) == 0
    return path


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return make(tmp_path, "q4_0")


def logits(weights: cpu.CpuWeights) -> np.ndarray:
    cache = cpu.PagedCache(weights, 16)
    return cpu.CpuRunner(weights).feed(cache.sequence(), PROMPT)


def beside(gguf: Path) -> Path:
    return gguf.with_name(gguf.name + ".packed")


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [("q4_0", {}), ("q4_k", {}), ("q8_0", {"tie_word_embeddings": True}), ("q5_1", {"attention_bias": True})],
)
def test_same_logits_from_the_file(
    tmp_path: Path, dtype: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = make(tmp_path, dtype, **changes)
    want = logits(cpu.CpuWeights.from_gguf(GgufFile(gguf)))
    assert cpu.find_packed(GgufFile(gguf)) is None
    assert cpu.write_packed(GgufFile(gguf)) == beside(gguf)
    kept = cpu.find_packed(GgufFile(gguf))
    assert kept is not None
    kept.verify()

    def pack(*args: Any) -> None:
        raise AssertionError("a matrix was packed in memory")

    monkeypatch.setattr(cpu.CpuWeights, "pack", pack)
    np.testing.assert_array_equal(logits(cpu.CpuWeights.from_gguf(GgufFile(gguf), packed=kept)), want)
    np.testing.assert_array_equal(logits(NativeModel.from_gguf(gguf).weights), want)  # finds it by itself


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch, gguf: Path) -> None:
    cpu.write_packed(GgufFile(gguf))
    whole = beside(gguf).read_bytes()
    monkeypatch.setattr(packed_file, "_PIECE", 1)  # one tile at a time
    cpu.write_packed(GgufFile(gguf), threads=1)
    assert beside(gguf).read_bytes() == whole


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def other_layout(path: Path) -> None:
    """A whole file of another layout: header and checksum are in order."""
    content = path.read_bytes()
    length = int.from_bytes(content[12:16], "little")
    header = json.loads(content[16 : 16 + length])
    layout = "0" * len(header["layout"])
    text = json.dumps({**header, "layout": layout}, sort_keys=True).encode()
    assert len(text) == length
    whole = content[:16] + text
    path.write_bytes(whole + packed_file.hashlib.sha256(whole).digest() + content[16 + length + 32 :])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda path: os.truncate(path, 0), "too short"),
    "magic": (lambda path: flip(path, 0), "is no packed file"),
    "version": (lambda path: flip(path, 8), "of version 0, 1 is read here"),
    "length": (lambda path: flip(path, 15), "damaged header"),
    "header": (lambda path: flip(path, 40), "damaged header"),
    "cut": (cut, "are needed: it is damaged"),
    "longer": (lambda path: os.truncate(path, path.stat().st_size + 1), "are needed: it is damaged"),
    "layout": (other_layout, "packed for kernels of another layout"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_does_not_fit_is_told_and_not_used(gguf: Path, kind: str) -> None:
    want = logits(cpu.CpuWeights.from_gguf(GgufFile(gguf)))
    cpu.write_packed(GgufFile(gguf))
    change, said = DAMAGE[kind]
    change(beside(gguf))
    with pytest.raises(CheckpointError, match=said):
        cpu.PackedFile(beside(gguf), GgufFile(gguf))
    with pytest.warns(UserWarning, match=f"not used and the model is packed in memory.*{said}.*llama2 pack"):
        model = NativeModel.from_gguf(gguf)
    np.testing.assert_array_equal(logits(model.weights), want)


def test_a_changed_source_makes_it_stale(gguf: Path) -> None:
    cpu.write_packed(GgufFile(gguf))
    status = gguf.stat()
    os.utime(gguf, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match="before it changed"):
        cpu.PackedFile(beside(gguf), GgufFile(gguf))
    os.utime(gguf, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert cpu.find_packed(GgufFile(gguf)) is not None
    flip(gguf, GgufFile(gguf).data_starts[0] + 5)  # other weights, and the time set back
    os.utime(gguf, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CheckpointError, match="from another file"):
        cpu.PackedFile(beside(gguf), GgufFile(gguf))


def test_another_models_file_is_foreign(tmp_path: Path, gguf: Path) -> None:
    cpu.write_packed(GgufFile(gguf))
    (tmp_path / "other").mkdir()
    other = make(tmp_path / "other", "q8_0")
    shutil.copy(beside(gguf), beside(other))
    with pytest.raises(CheckpointError, match="from another file"):
        cpu.PackedFile(beside(other), GgufFile(other))


def test_damaged_weights_are_found_by_verify(gguf: Path) -> None:
    cpu.write_packed(GgufFile(gguf))
    flip(beside(gguf), beside(gguf).stat().st_size - 100)
    kept = cpu.PackedFile(beside(gguf), GgufFile(gguf))
    with pytest.raises(CheckpointError, match="'blk.1.ffn_down.weight' is damaged"):
        kept.verify()


def test_nothing_is_left_of_an_interrupted_write(gguf: Path) -> None:
    before = sorted(gguf.parent.iterdir())

    def interrupt(done: int, total: int, item: str) -> None:
        if item.startswith("blk.1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cpu.write_packed(GgufFile(gguf), interrupt)
    assert sorted(gguf.parent.iterdir()) == before


def test_a_source_that_changes_meanwhile_is_refused(gguf: Path) -> None:
    with pytest.raises(CheckpointError, match="changed while it was packed"):
        cpu.write_packed(GgufFile(gguf), lambda done, total, item: os.utime(gguf))
    assert not beside(gguf).exists()


def test_room_is_looked_for_first(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(gguf.parent)._replace(free=1000)
    monkeypatch.setattr(packed_file.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"needs [\d,]+ bytes and .* has 1,000 free"):
        cpu.write_packed(GgufFile(gguf))
    assert not list(gguf.parent.glob(".*")) and not beside(gguf).exists()


def test_one_writer_at_a_time_and_leftovers_are_taken_over(gguf: Path) -> None:
    name = beside(gguf).name
    part, lock = gguf.with_name(f".{name}-{'0' * 16}.tmp"), gguf.with_name(f".{name}.lock")
    part.write_bytes(b"left by a killed process" * 1_000_000)
    lock.touch()
    with lock.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="is being written by another process"):
            cpu.write_packed(GgufFile(gguf))
        assert part.exists()
    cpu.write_packed(GgufFile(gguf))
    assert not part.exists() and not lock.exists()
    lock.touch()  # of a process that was killed when all was done
    assert main(["pack", str(gguf), "--quiet"]) == 0 and not lock.exists()
    cpu.PackedFile(beside(gguf), GgufFile(gguf)).verify()


def test_nothing_to_pack(tmp_path: Path) -> None:
    gguf = make(tmp_path, "float16")
    with pytest.raises(InputError, match="used in place, without packing"):
        cpu.write_packed(GgufFile(gguf))


@pytest.mark.parametrize("name", TYPES)
def test_native_sizes_are_checked(name: str) -> None:
    type_id, rows, cols = TYPES[name][0], 40, 512
    pool = engine().Pool(1, [])
    raw = random_blocks(name, rows, cols, np.random.default_rng(0)).reshape(-1)
    tile = engine().tile_bytes(type_id, rows, cols)
    whole = np.empty(3 * tile, np.uint8)
    engine().pack_tiles(pool, raw, type_id, rows, cols, None, 0, whole)
    last = np.empty(tile, np.uint8)
    engine().pack_tiles(pool, raw, type_id, rows, cols, None, 2, last)
    np.testing.assert_array_equal(last, whole[-tile:])
    for first, size, said in ((3, tile, "tiles 3 to 4"), (-1, tile, "tiles -1"), (0, tile - 1, "multiple of that")):
        with pytest.raises(ValueError, match=said):
            engine().pack_tiles(pool, raw, type_id, rows, cols, None, first, np.empty(size, np.uint8))
    with pytest.raises(ValueError, match="bytes, got"):
        engine().pack_tiles(pool, raw[1:], type_id, rows, cols, None, 0, whole)
    with pytest.raises(ValueError, match="a packed matrix of 40 x 512 takes"):
        engine().packed_view(whole[:-1], type_id, rows, cols)
    shifted = np.empty(len(whole) + 64, np.uint8)
    at = (1 - shifted.ctypes.data) % 64
    with pytest.raises(ValueError, match="multiple of 64 bytes"):
        engine().packed_view(shifted[at : at + len(whole)], type_id, rows, cols)


def test_what_fits_in_a_folder_that_cannot_be_written(
    gguf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def refused(path: Path) -> Iterator[None]:
        raise OSError(errno.EROFS, "Read-only file system", str(path))
        yield

    monkeypatch.setattr("llama2.cli.pack.locked", refused)
    assert main(["pack", str(gguf)]) == 2 and "Read-only file system" in capsys.readouterr().err
    cpu.write_packed(GgufFile(gguf))
    assert main(["pack", str(gguf)]) == 0 and "is there already" in capsys.readouterr().out


def test_command(gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(gguf), "--check"]) == 2 and "No such file" in capsys.readouterr().err
    assert main(["pack", str(gguf)]) == 0
    assert "delete it at any time" in capsys.readouterr().out
    assert main(["pack", str(gguf), "--check"]) == 0 and "every checksum matches" in capsys.readouterr().out
    assert main(["pack", str(gguf)]) == 0 and "is there already" in capsys.readouterr().out
    flip(beside(gguf), 40)
    assert main(["pack", str(gguf), "--check"]) == 2 and "damaged header" in capsys.readouterr().err
    assert main(["pack", str(gguf)]) == 0 and "delete it at any time" in capsys.readouterr().out
    assert main(["pack"]) == 2 and "takes one .gguf file" in capsys.readouterr().err
