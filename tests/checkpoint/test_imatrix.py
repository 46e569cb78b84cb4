"""Importance matrices: bytes written by hand, both ways, malformed files, and llama.cpp's own reader."""

import struct
from pathlib import Path

import pytest
import torch
from checkpoint.gguf_bytes import gguf

from llama2.checkpoint.imatrix import Imatrix, from_importance, read_imatrix, write_imatrix
from llama2.errors import CheckpointError, InputError

NAME, OURS = "blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"


def hand_written() -> bytes:
    """One entry of three values in the older format: means 1, 0.5 and 4, times 2 calls."""
    entry = struct.pack("<i", len(NAME)) + NAME.encode() + struct.pack("<ii3f", 2, 3, 2.0, 1.0, 8.0)
    return struct.pack("<i", 1) + entry + struct.pack("<ii", 2, 8) + b"text.txt"


def gguf_file(**changes: torch.Tensor) -> bytes:
    """The same in GGUF: sums over 10 tokens, two windows of 5."""
    keys = {"general.type": "imatrix", "imatrix.datasets": ["text.txt"], "imatrix.chunk_count": 2,
            "imatrix.chunk_size": 5}  # fmt: skip
    tensors = {f"{NAME}.in_sum2": torch.tensor([10.0, 5.0, 40.0]), f"{NAME}.counts": torch.tensor([10.0])}
    return gguf(keys, {name: (tensor, "F32") for name, tensor in (tensors | changes).items()})


@pytest.mark.parametrize(("content", "file"), [(hand_written(), "i.dat"), (gguf_file(), "i.gguf")])
def test_both_formats_give_means(tmp_path: Path, content: bytes, file: str) -> None:
    (tmp_path / file).write_bytes(content)
    found = read_imatrix(tmp_path / file)
    assert (found.chunks, list(found.datasets)) == (2, ["text.txt"])
    (name,) = found.importance()
    assert name == OURS and found.importance()[name].tolist() == [1.0, 0.5, 4.0]


def test_writing_gives_the_bytes_back(tmp_path: Path) -> None:
    """GGUF bit for bit; from GGUF to the older format as llama-imatrix does, ceil(10 tokens / 5) = 2 calls."""
    (tmp_path / "i.gguf").write_bytes(gguf_file())
    found = read_imatrix(tmp_path / "i.gguf")
    write_imatrix(tmp_path / "again.gguf", found)
    assert read_imatrix(tmp_path / "again.gguf").sums[NAME].equal(found.sums[NAME])
    write_imatrix(tmp_path / "i.dat", found)
    assert (tmp_path / "i.dat").read_bytes() == hand_written()


def test_from_importance_and_back(tmp_path: Path) -> None:
    importance = {
        OURS: torch.rand(48),
        "lm_head.weight": torch.rand(32),
        "model.layers.0.self_attn.q_proj.weight": torch.rand(32),
    }
    write_imatrix(tmp_path / "i.gguf", from_importance(importance, 1024, 512, "words.txt"))
    found = read_imatrix(tmp_path / "i.gguf")
    assert (found.chunks, found.chunk_size, list(found.datasets)) == (2, 512, ["words.txt"])
    assert set(found.sums) == {NAME, "output.weight", "blk.0.attn_q.weight"}
    for name, values in found.importance().items():
        torch.testing.assert_close(values, importance[name], rtol=1e-6, atol=0)
    with pytest.raises(InputError, match=r"no place for model\.norm\.gain"):
        from_importance({"model.norm.gain": torch.ones(2)}, 1, 1, "")


def test_entries_without_data_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "i.gguf").write_bytes(gguf_file(**{f"{NAME}.counts": torch.tensor([0.0])}))
    assert read_imatrix(tmp_path / "i.gguf").importance() == {}
    write_imatrix(tmp_path / "i.dat", Imatrix({NAME: torch.zeros(3)}, {NAME: 0}))
    assert read_imatrix(tmp_path / "i.dat").importance() == {}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (hand_written()[:40], "neither a GGUF file nor a whole importance matrix"),
        (struct.pack("<i", -3), "announces -3 entries"),
        (b"{\"a\": 1, \"b\": [2, 3, 4]}", "neither a GGUF file nor"),
        (b"", "neither a GGUF file nor"),
        (gguf_file()[:-20], "not F32 within the file"),
        (gguf_file(**{f"{NAME}.counts": torch.ones(8)}), "8 counts"),
        (gguf_file(**{f"{NAME}.in_sum2": torch.tensor([1.0, torch.nan, 1.0])}), "NaN, infinity or a negative"),
        (gguf_file(**{f"{NAME}.in_sum2": torch.tensor([1.0, -1.0, 1.0])}), "NaN, infinity or a negative"),
        (gguf({"general.type": "imatrix"}, {"x": (torch.ones(32), "F32")}), "without .in_sum2 tensors"),
        (gguf({"general.type": "imatrix"}, {"x.in_sum2": (torch.ones(32), "F32")}), r"no x\.counts beside it"),
    ],
)  # fmt: skip
def test_malformed_files(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "i").write_bytes(content)
    with pytest.raises(CheckpointError, match=match):
        read_imatrix(tmp_path / "i")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_imatrix(tmp_path / "none.dat")
