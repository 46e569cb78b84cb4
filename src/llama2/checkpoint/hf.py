"""Checkpoints as transformers writes them: safetensors or .bin, single or sharded by an index.

A safetensors file is a u64 header length, a JSON header {name: {dtype, shape, data_offsets}} and the data. It is parsed
here and not by the safetensors package, so that tensors are views of one copy-on-write map (parameters can be trained
without a copy, and the file never changes) and so that every offset is checked before any byte is touched. Tensors are
torch's, or arrays (`tensor_library`). No torch here.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from llama2.checkpoint import (
    Checkpoint,
    RawTensor,
    Stored,
    read_config,
    read_generation,
    read_index,
    read_json,
)
from llama2.checkpoint.directory import found, read_directory
from llama2.checkpoint.tensor_library import TensorLibrary
from llama2.checkpoint.unwrap import inner_dict, plain_names, without_wrappers
from llama2.config import LlamaConfig
from llama2.coverage import is_table
from llama2.errors import CheckpointError
from llama2.lazy import door
from llama2.mapping import mapped
from llama2.stored_arrays import NAMES

_torch = door("checkpoint.torch_tensors", "library", "The operations on torch's tensors.")
_raw = door("checkpoint.torch_tensors", "raw", "A tensor of torch as engines take it.")
_META_NAMES = ("tok_embeddings.weight", "layers.0.attention.wq.weight")


class HfCheckpoint(Checkpoint):
    """A folder with config.json, or a single .safetensors or .bin file, alone or beside its config.json."""

    format = "hf"

    def __init__(
        self,
        path: Path,
        *,
        use_safetensors: bool | None = None,
        variant: str | None = None,
        weights_only: bool = True,
        library: TensorLibrary | None = None,
    ) -> None:
        """library: whose tensors these are; None for torch's."""
        self.path, self.library = path, library or _torch()
        self.folder = path if path.is_dir() else path.parent
        if path.is_dir():
            self.config  # noqa: B018 - a foreign architecture is refused before its files are looked for
        self.files = find_files(path, use_safetensors, variant) if path.is_dir() else [path]
        self._weights_only = weights_only
        self._weight_map = self._read_index()
        self._shards: dict[Path, Mapping[str, Any]] = {}

    def _read_index(self) -> dict[str, Path] | None:
        """Where each tensor is, by the index; None for a single file. Every shard named must exist."""
        index = self.files[0]
        if index.suffix != ".json":
            return None
        weight_map, self.files = read_index(index)
        return {new: self.folder / weight_map[old] for new, old in plain_names(weight_map).items()}

    @cached_property
    def _located(self) -> dict[str, Path]:
        located: dict[str, Path] = {}
        for file in self.files:
            for name in self._shard(file):
                if self._weight_map is None or self._weight_map.get(name, file) == file:
                    located[name] = file
        if self._weight_map is not None and (lost := sorted(set(self._weight_map) - set(located))):
            raise CheckpointError(
                f"the index of {self.folder} places {lost[0]!r} ({len(lost)} tensors in all) in "
                f"{self._weight_map[lost[0]].name}, which does not hold it; fetch the checkpoint again"
            )
        if any(name in located for name in _META_NAMES):
            raise CheckpointError(
                f"{self.path} holds Meta's original tensor names ({_META_NAMES[0]}, ...); "
                "give the folder that holds them together with params.json, and no config.json"
            )
        return {name: file for name, file in located.items() if not is_table(name)}

    def _shard(self, file: Path) -> Mapping[str, Any]:
        if file not in self._shards:
            # By content; but a .safetensors too short to tell is a damaged one, and no pickle to be opened.
            if is_safetensors(file) or file.suffix == ".safetensors":
                tensors: Mapping[str, Any] = map_safetensors(file, self.library)
            else:
                tensors = load_bin(file, weights_only=self._weights_only, library=self.library)
            self._shards[file] = without_wrappers(tensors, file)
        return self._shards[file]

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        stored = {}
        for name, file in self._located.items():
            tensor = self._shard(file)[name]
            stored[name] = Stored(tuple(tensor.shape), self.library.code(tensor))
        return stored

    @cached_property
    def config(self) -> LlamaConfig:
        return LlamaConfig.from_dict(read_config(self.folder / "config.json"))

    @property
    def generation_settings(self) -> dict[str, Any] | None:
        return read_generation(self.folder)

    @property
    def tokenizer_source(self) -> Path:
        return self.folder

    @cached_property
    def auto_dtype(self) -> str:
        if (self.folder / "config.json").exists() and self.config.dtype_name is not None:
            return self.config.dtype_name
        for name, file in self._located.items():
            tensor = self._shard(file)[name]
            if self.library.is_float(tensor):
                code = self.library.code(tensor)
                return NAMES.get(code, code)
        raise CheckpointError(f"{self.path} holds no floating-point tensor; it is not a model")

    def read(self, name: str, dtype: Any = None) -> Any:
        tensor = self._shard(self._located[name])[name]
        return tensor if dtype is None else self.library.converted(tensor, dtype)

    def mapped(self, name: str) -> list[Any]:
        return [self._shard(self._located[name])[name]]

    def raw(self, name: str) -> RawTensor:
        raw_tensor: RawTensor = _raw(self.read(name))
        return raw_tensor


def find_files(folder: Path, use_safetensors: bool | None = None, variant: str | None = None) -> list[Path]:
    """The first of the four places transformers looks in: a single safetensors file, its index, .bin, its index; then
    AutoGPTQ's, gptq_model-4bit-128g.safetensors, its index, .bin; ExLlamaV2's output.safetensors or its shards, beside
    which the index of the source may have been left; MLX's weights.00.safetensors."""
    infix = "" if variant is None else f".{variant}"
    names = []
    if use_safetensors is not False:
        names += [f"model{infix}.safetensors", f"model.safetensors.index{infix}.json"]
    if use_safetensors is not True:
        names += [f"pytorch_model{infix}.bin", f"pytorch_model.bin.index{infix}.json"]
    others = sorted(folder.glob("output*.safetensors")) or sorted(folder.glob("weights.*.safetensors"))
    others = others if use_safetensors is not False and variant is None else []
    for name in names:
        if (folder / name).exists() and not (others and not _is_whole(folder / name)):
            return [folder / name]
    if others:
        return others
    for suffix in ("safetensors", "safetensors.index.json", "bin"):
        gptq = sorted(folder.glob(f"gptq_model-*bit-*g.{suffix}"))
        if use_safetensors is (suffix != "bin") or use_safetensors is None:
            if len(gptq) > 1:
                raise CheckpointError(
                    f"{folder} holds {len(gptq)} quantised models, {', '.join(file.name for file in gptq)}; keep one"
                )
            if gptq:
                return gptq
    weight_names = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pth", ".gguf"))
    raise CheckpointError(
        f"{folder} holds none of {', '.join(names)}; "
        + (f"it holds {', '.join(weight_names[:8])}" if weight_names else "it holds no weights at all")
        + ". Check the path, `variant` and `use_safetensors`"
    )


def _is_whole(file: Path) -> bool:
    """Whether the shards that an index names are there; a file that is none is."""
    if file.suffix != ".json":
        return True
    weight_map = read_json(file).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    return all(isinstance(name, str) and (file.parent / name).exists() for name in names)


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as a safetensors file does: a header length, then JSON."""
    with found(path) as file:
        return file.read(9)[8:] == b"{"


def load_bin(path: Path, *, weights_only: bool = True, library: TensorLibrary | None = None) -> Mapping[str, Any]:
    """A state dict that torch.save wrote, mapped where the format allows; CheckpointError for anything else."""
    tensor_library = library or _torch()
    content = inner_dict(tensor_library.unpickled(path, weights_only), path, tensor_library.is_tensor)
    named = isinstance(content, Mapping) and all(isinstance(name, str) for name in content)
    if not named or not all(tensor_library.is_tensor(tensor) for tensor in content.values()):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of tensors; it is not a checkpoint")
    state: Mapping[str, Any] = content
    return state


def map_safetensors(path: Path, library: TensorLibrary | None = None) -> dict[str, Any]:
    """Every tensor of a safetensors file as a view of the file, mapped copy-on-write; all offsets are checked first."""
    tensor_library = library or _torch()
    with found(path) as file:
        header_end, entries = read_directory(path, file)
        data = mapped(file)
    return {name: tensor_library.view(data, code, shape, header_end + start) for name, code, shape, start, _ in entries}
