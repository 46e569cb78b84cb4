"""State of which every rank writes its own rows: safetensors files, and JSON that says which rows are where.

shards/rank-00000.safetensors, ...   what a rank holds of each tensor; what is not sharded is in the first alone
shards/index.json                    {"ranks": R, "tensors": {NAME: {"dtype": "F32", "shape": [...], "starts": [...]}}}

starts: the first row that each rank holds, or [] for a tensor that is whole in the first file. Earlier versions wrote
torch's distributed checkpoints, whose directory is a pickle: `old_shards` reads them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llama2 import schema
from llama2.checkpoint.hf import map_safetensors
from llama2.checkpoint.save import write_safetensors
from llama2.checkpoint.torch_tensors import CODES, DTYPES
from llama2.errors import CheckpointError
from llama2.files import replacing, write_text
from llama2.text_file import LISTING_BYTES, inside, read_object
from llama2.train.distributed import Ranks, first_row, local

INDEX = "index.json"
_ENTRY = {
    "dtype": schema.choice(*DTYPES),
    "shape": schema.several(schema.whole(0, 2**48), 8),
    "starts": schema.several(schema.whole(0, 2**48), 65536),
}


@dataclass(frozen=True)
class TensorParts:
    """A tensor in parts. parts: the first row of each, how many rows, and what reads it; a whole tensor is one part."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[tuple[int, int, Callable[[], Tensor]], ...]

    def __post_init__(self) -> None:
        """Raises CheckpointError where the parts leave rows out, or hold some twice."""
        at = 0
        for start, rows, _ in self.parts if self.shape else ():
            if start != at:
                raise CheckpointError(f"{self.name} of the checkpoint lacks the rows {at} to {start}; it is damaged")
            at += rows
        if not self.parts or (self.shape and at != self.shape[0]):
            raise CheckpointError(f"{self.name} of the checkpoint has {at} of its rows, {self.shape}; it is damaged")

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, a copy. Raises CheckpointError for a part of another shape or dtype."""
        found = [torch.empty((0, *self.shape[1:]), dtype=self.dtype)]
        for first, rows, read in self.parts:
            if max(first, start) < min(first + rows, stop):
                part = self._checked(read(), (rows, *self.shape[1:]))
                found.append(part[max(start - first, 0) : stop - first])
        return torch.cat(found)

    def whole(self) -> Tensor:
        """All of it, a copy."""
        return self.rows(0, self.shape[0]) if self.shape else self._checked(self.parts[0][2](), ()).clone()

    def _checked(self, part: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(part.shape) != shape or part.dtype != self.dtype:
            raise CheckpointError(
                f"a part of {self.name} of the checkpoint is {part.dtype} {tuple(part.shape)}, not {self.dtype} "
                f"{shape}; it is damaged"
            )
        return part


def write(folder: Path, content: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Writes this rank's rows of `content`, and what is not sharded with rank 0. All ranks call it."""
    folder.mkdir(exist_ok=True)
    mine = {name: local(t).detach() for name, t in content.items() if ranks.first or isinstance(t, DTensor)}
    with replacing(folder / _file(ranks.rank)) as file:
        write_safetensors(file, mine)
    if ranks.first:
        tensors = {
            name: {"dtype": CODES[t.dtype], "shape": list(t.shape), "starts": _starts(t)} for name, t in content.items()
        }
        write_text(folder / INDEX, json.dumps({"ranks": ranks.world, "tensors": tensors}) + "\n")


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _starts(tensor: Tensor) -> list[int]:
    if not isinstance(tensor, DTensor):
        return []
    ranks = tensor.device_mesh.size()
    return [first_row(len(tensor), rank, ranks) for rank in range(ranks)]


def read(folder: Path) -> dict[str, TensorParts]:
    """Returns the tensors of all ranks' parts, by name; only the directories of the files are read."""
    where = folder / INDEX
    content = read_object(where, INDEX, most=LISTING_BYTES)
    ranks, tensors = content.get("ranks"), content.get("tensors")
    schema.check({"ranks": ranks}, {"ranks": schema.whole(1, 65536)}, where)
    assert isinstance(ranks, int)
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{where} names no tensors; the checkpoint is damaged")
    files = [map_safetensors(inside(folder, _file(rank), where)) for rank in range(ranks)]
    return {name: _stored(name, entry, files, where) for name, entry in tensors.items()}


def _stored(name: str, entry: object, files: list[dict[str, Tensor]], where: Path) -> TensorParts:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY.keys():
        raise CheckpointError(
            f"{where}: the entry of {name!r} is no dtype, shape and starts; the checkpoint is damaged"
        )
    schema.check(entry, _ENTRY, f"{where}: {name!r}")
    shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
    if lost := [rank for rank in range(len(entry["starts"]) or 1) if rank >= len(files) or name not in files[rank]]:
        raise CheckpointError(f"{where.parent / _file(lost[0])} has no {name!r}; the checkpoint is damaged")
    if not entry["starts"]:
        rows = shape[0] if shape else 1
        return TensorParts(name, shape, dtype, ((0, rows, lambda: files[0][name]),))
    stops = [*entry["starts"][1:], shape[0] if shape else 0]
    spans = zip(entry["starts"], stops, files, strict=False)
    parts = tuple((a, max(b - a, 0), lambda held=held: held[name]) for a, b, held in spans)
    return TensorParts(name, shape, dtype, parts)
