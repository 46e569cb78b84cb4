"""llama.cpp's importance matrices: of each tensor the sums of squares of what its columns were multiplied with.

Two formats, both read and written: GGUF (tensors NAME.in_sum2 and NAME.counts), and the older .dat, which holds
means times a number of calls. Source: llama.cpp, tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llama2.checkpoint.gguf import GgufFile
from llama2.checkpoint.gguf_write import ALIGNMENT, container_head
from llama2.checkpoint.names import gguf_to_hf, hf_to_gguf
from llama2.errors import CheckpointError, InputError
from llama2.files import write_bytes
from llama2.text_file import LISTING_BYTES, opened, read_bytes

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Imatrix:
    """sums: (K,) float32 by GGUF name; counts: the tokens (.dat: calls) that they are over, as many as names.

    chunks windows of chunk_size tokens of the datasets, which are file names; 0 where the file does not say."""

    sums: dict[str, Tensor]
    counts: dict[str, int]
    chunks: int = 0
    chunk_size: int = 0
    datasets: Sequence[str] = ()

    def importance(self) -> dict[str, Tensor]:
        """Mean squares (K,) by Hugging Face name, for `quantize`. Entries without data, or that are no tensor of a
        Llama model, are left out."""
        names = {name: gguf_to_hf(name) for name in self.sums}
        return {
            ours: self.sums[name] / self.counts[name]
            for name, ours in names.items()
            if ours is not None and self.counts[name] > 0
        }


def from_importance(importance: Mapping[str, Tensor], tokens: int, chunk_size: int, dataset: str) -> Imatrix:
    """Inverse of `importance`: mean squares by Hugging Face name, over `tokens` tokens in windows of
    `chunk_size`. Raises InputError for a name that GGUF has no place for."""
    named = {hf_to_gguf(name): values for name, values in importance.items()}
    if None in named:
        odd = next(name for name in importance if hf_to_gguf(name) is None)
        raise InputError(f"GGUF has no place for {odd}; importance is named by tensors of a Llama model")
    sums = {str(name): values.detach().float().cpu() * tokens for name, values in named.items()}
    return Imatrix(sums, dict.fromkeys(sums, tokens), tokens // chunk_size, chunk_size, [dataset])


# -- reading -----------------------------------------------------------------------------------------------------


def read_imatrix(path: str | Path) -> Imatrix:
    """The importance matrix in a file of either format. Raises CheckpointError for a malformed one, and for numbers
    that are negative or not finite."""
    path = Path(path)
    try:
        with opened(path) as file:
            magic = file.read(4)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); give a file that llama-imatrix made"
        ) from error
    found = _from_gguf(path) if magic == b"GGUF" else _from_dat(path)
    for name, sums in found.sums.items():
        if not (sums.isfinite().all() and (sums >= 0).all()):
            raise CheckpointError(f"{path}: the sums of {name} hold NaN, infinity or a negative number; make it again")
    return found


def _from_gguf(path: Path) -> Imatrix:
    file = GgufFile(path)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for name, info in file.tensors.items():
        base = name.removesuffix(_SUMS)
        if base == name:
            continue
        if base + _COUNTS not in file.tensors:
            raise CheckpointError(f"{path}: {name} has no {base}{_COUNTS} beside it; make the file again")
        count = file.floats(base + _COUNTS)
        if len(count) != 1:
            raise CheckpointError(
                f"{path}: {base} has {len(count)} counts, for so many experts; a Llama model has none. Give the "
                "importance matrix of this model"
            )
        sums[base] = torch.tensor(file.floats(name)).view(info.shape[-1])
        counts[base] = round(count[0])
    if not sums:
        raise CheckpointError(f"{path} is a GGUF file without {_SUMS} tensors; give one that llama-imatrix made")
    keys = file.metadata
    chunks, size = (keys.get(f"imatrix.chunk_{what}", 0) for what in ("count", "size"))
    return Imatrix(sums, counts, chunks, size, keys.get("imatrix.datasets", []))


def _from_dat(path: Path) -> Imatrix:
    data = read_bytes(path, LISTING_BYTES)
    reader = _Dat(data, path)
    entries = reader.number("entries", 1)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for _ in range(entries):
        name = reader.text(reader.number("characters", 1))
        counts[name] = reader.number("calls", 0)
        values = reader.take(4 * reader.number("values", 1))
        sums[name] = torch.frombuffer(bytearray(values), dtype=torch.float32)
    if reader.at == len(data):
        return Imatrix(sums, counts)
    chunks = reader.number("chunks", 0)
    dataset = reader.text(reader.number("characters", 0)) if reader.at < len(data) else ""
    return Imatrix(sums, counts, chunks, 0, [dataset] if dataset else [])


class _Dat:
    """A cursor over the bytes that refuses to pass their end."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise CheckpointError(
                f"{self.path} is neither a GGUF file nor a whole importance matrix: at byte {self.at} of "
                f"{len(self.data)} it announces {count} bytes. Make it again with llama-imatrix"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, what: str, least: int) -> int:
        value: int = struct.unpack("<i", self.take(4))[0]
        if value < least:
            raise CheckpointError(
                f"{self.path} is no importance matrix: at byte {self.at - 4} it announces {value} {what}"
            )
        return value

    def text(self, length: int) -> str:
        return self.take(length).decode(errors="replace")


# -- writing -----------------------------------------------------------------------------------------------------


def write_imatrix(path: str | Path, imatrix: Imatrix) -> None:
    """Writes the file that the name asks for: .dat the older format, all others GGUF."""
    write_bytes(path, _dat(imatrix) if Path(path).suffix == ".dat" else _gguf(imatrix))


def _gguf(imatrix: Imatrix) -> bytes:
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": list(imatrix.datasets) or [""],
        "imatrix.chunk_count": imatrix.chunks,
        "imatrix.chunk_size": imatrix.chunk_size,
    }
    tensors, data = [], []
    for name in sorted(imatrix.sums):
        for suffix, values in ((_SUMS, imatrix.sums[name]), (_COUNTS, torch.tensor([float(imatrix.counts[name])]))):
            stored = values.float().numpy().tobytes()
            tensors.append((name + suffix, tuple(values.shape), 0, len(stored)))
            data.append(stored + bytes(-len(stored) % ALIGNMENT))
    return container_head(metadata, tensors) + b"".join(data)


def _dat(imatrix: Imatrix) -> bytes:
    size = imatrix.chunk_size or 1
    out = [struct.pack("<i", len(imatrix.sums))]
    for name in sorted(imatrix.sums):
        count, sums = imatrix.counts[name], imatrix.sums[name].float()
        calls = -(-count // size)
        means = sums / count if count else torch.ones_like(sums)
        out += [struct.pack("<i", len(name.encode())), name.encode(), struct.pack("<ii", calls, len(sums))]
        out.append((means * calls).numpy().tobytes())
    dataset = imatrix.datasets[-1].encode() if imatrix.datasets else b""
    return b"".join([*out, struct.pack("<ii", imatrix.chunks, len(dataset)), dataset])
