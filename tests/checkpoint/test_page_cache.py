"""What the kernel is told about pages: memory falls, no byte changes, the conversion asks for it."""

import ctypes
import itertools
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

import llama2.checkpoint as checkpoint
from llama2.checkpoint import convert as engine
from llama2.checkpoint import writer
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.checkpoint.page_cache import fetch, pass_on, release

linux = pytest.mark.skipif(sys.platform != "linux", reason="page advice is Linux's")
SIZE = 32 << 20


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[torch.Tensor]:
    """A file of known bytes, mapped."""
    data = torch.arange(SIZE // 4, dtype=torch.int32)
    with (tmp_path / "x").open("w+b") as file:
        file.write(data.numpy().data)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        tensor = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.int32)
        if resident(tensor) == 1:
            pytest.skip("the temporary folder is in memory, set TMPDIR to one on a disk")
        yield tensor


def resident(tensor: torch.Tensor) -> float:
    """The share of a mapped tensor's pages that are in memory."""
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    count = -(-(tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE)
    seen = (ctypes.c_ubyte * count)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(count * mmap.PAGESIZE), seen) == 0
    return sum(page & 1 for page in seen) / count


@linux
def test_fetched_and_released(mapped: torch.Tensor) -> None:
    fetch(mapped)
    assert resident(mapped) == 1
    release(mapped)
    assert resident(mapped) < 0.1
    fetch(mapped[: SIZE // 8])
    assert resident(mapped[: SIZE // 8]) == 1
    assert torch.equal(mapped, torch.arange(SIZE // 4, dtype=torch.int32))


def test_memory_that_is_no_files_survives() -> None:
    for tensor in (torch.arange(1 << 20), torch.arange(1 << 20).view(1024, 1024).T, torch.ones(()), torch.ones(0)):
        before = tensor.clone()
        fetch(tensor)
        release(tensor)
        assert torch.equal(tensor, before)


@linux
def test_written_pages_leave_once_they_are_on_the_disk(mapped: torch.Tensor, tmp_path: Path) -> None:
    with (tmp_path / "x").open("r+b") as file:
        file.write(bytes(range(256)) * (SIZE // 256))
        file.flush()
        os.fsync(file.fileno())
        assert resident(mapped) == 1
        pass_on(file.fileno(), 0, SIZE // 2)
        assert resident(mapped[: SIZE // 8]) < 0.1 and resident(mapped[SIZE // 8 :]) == 1
        assert mapped[:64].view(torch.uint8).tolist() == list(range(256))


@pytest.mark.filterwarnings("ignore:there is no tokenizer")
def test_a_conversion_fetches_each_tensor_and_lets_go_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor but the first is fetched ahead, every one but the last two is let go, and windows are passed on."""
    tiny_model(torch.bfloat16).save_pretrained(tmp_path / "hf")
    fetched: list[int] = []
    released: list[int] = []
    passed: list[tuple[int, int]] = []
    monkeypatch.setattr(writer, "WINDOW_BYTES", 10_000)
    monkeypatch.setattr(engine, "fetch", lambda tensor: fetched.append(tensor.data_ptr()))
    monkeypatch.setattr(engine, "release", lambda tensor: released.append(tensor.data_ptr()))
    monkeypatch.setattr(writer, "pass_on", lambda descriptor, start, stop: passed.append((start, stop)))
    source = checkpoint.open(tmp_path / "hf")
    convert(source, tmp_path / "out", ConversionSettings())
    order = checkpoint.open(tmp_path / "out").tensors
    places = [source.read(name).data_ptr() for name in order]
    assert fetched == places[1:] and released == places[:-2]
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    fresh = passed[::2]
    assert fresh[0][0] == 0 and all(a[1] == b[0] for a, b in itertools.pairwise(fresh)) and fresh[-1][1] <= size
    assert all(old[1] == new[0] for new, old in zip(fresh, passed[1::2]))
