"""A Hugging Face folder as a conversion target: config.json, generation_config.json, safetensors shards and index."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from llama2.checkpoint import Checkpoint
from llama2.checkpoint.save import index_text, plan_shards, safetensors_header, shard_names
from llama2.checkpoint.writer import Appender, Target, row_blocks
from llama2.files import write_bytes
from llama2.generation.config import GenerationConfig


class HfTarget(Target):
    """Shards of at most `shard_size` bytes; `dtypes`: the tensors to write and what each is stored as."""

    format = "hf"

    def __init__(self, source: Checkpoint, dtypes: Mapping[str, torch.dtype], shard_size: int) -> None:
        self.config = copy.deepcopy(source.config)
        self.config.dtype = str(_main_dtype(source, dtypes))
        self.config.architectures = self.config.architectures or ["LlamaForCausalLM"]
        self._generation = source.generation_settings
        self._tensors = {
            name: torch.empty(source.tensors[name].shape, dtype=dtype, device="meta") for name, dtype in dtypes.items()
        }
        shards = plan_shards(self._tensors, shard_size)
        self.files = shard_names("model", "safetensors", None, len(shards))
        self._heads: list[bytes] = []
        self.steps = []
        self._file_of: dict[str, int] = {}
        self._shards: dict[str, list[str]] = {}
        for i, shard in enumerate(shards):
            head, names = safetensors_header({name: self._tensors[name] for name in shard})
            self._heads.append(head)
            self.steps += names
            self._file_of |= dict.fromkeys(names, i)
            self._shards[self.files[i]] = names
        self.size = sum(map(len, self._heads)) + sum(t.nbytes for t in self._tensors.values())

    def begin(self, out: Sequence[Appender]) -> None:
        for file, head in zip(out, self._heads, strict=True):
            file.write(head)

    def write(self, name: str, source: Checkpoint, out: Sequence[Appender]) -> None:
        file, dtype = out[self._file_of[name]], self._tensors[name].dtype
        for _, rows in row_blocks(source, name, self.config.head_dim):
            file.write(rows.to(dtype))

    def describe(self, folder: Path) -> str:
        if len(self.files) > 1:
            write_bytes(folder / "model.safetensors.index.json", index_text(self._tensors, self._shards))
        settings = self._generation
        made = GenerationConfig.from_model_config(self.config) if settings is None else None
        generation = GenerationConfig.from_dict(settings) if made is None and settings is not None else made
        assert generation is not None
        generation.save_pretrained(folder)
        self.config.save_pretrained(folder)
        return "config.json"


def _main_dtype(source: Checkpoint, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """Returns the dtype for config.json: that of the matrices, whatever the norms have."""
    matrices = (dtype for name, dtype in dtypes.items() if len(source.tensors[name].shape) > 1)
    return next(matrices, next(iter(dtypes.values())))
