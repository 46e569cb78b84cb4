"""The model of a folder of Hugging Face's or Meta's files for the native engine alone: arrays over mapped files, packed
linears repacked. No torch here.

What is read and checked, and in which words it is refused, is what loading into torch does: the readers, the coverage
and the formats are the same.
"""

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama2 import cpu
from llama2.architecture import HEAD, linear_shapes
from llama2.checkpoint import Checkpoint
from llama2.checkpoint.config_repair import stored_generation
from llama2.checkpoint.covered import CoveredCheckpoint
from llama2.checkpoint.packed_names import packed_parts, settings_of, with_prefix
from llama2.errors import CheckpointError, InputError
from llama2.quantization.formats import BY_ID


def why_torch(source: Checkpoint) -> str:
    """Why the native engine alone cannot run a checkpoint's model, as its headers say, or ""."""
    config = source.config
    if config.hidden_act not in ("silu", "swish"):
        return f"hidden_act is {config.hidden_act!r}, for which the native engine has no kernel"
    if config.pretraining_tp > 1:
        return "pretraining_tp asks for torch's order of summation"
    settings = settings_of(config, source.path)
    if settings is not None and not BY_ID[settings.format_id].packs:
        return f"it is packed as {settings.label('')}"
    return "its weights are float64" if source.auto_dtype == "float64" else ""


def open_model(source: Checkpoint, threads: int | None = None) -> cpu.CpuModel:
    """The model of a checkpoint of arrays. Raises CheckpointError, and InputError for what no kernel takes."""
    weights = cpu.CpuWeights.from_arrays(source.config, _Arrays(source), threads)
    cache: cpu.KvDtype = "float32" if source.auto_dtype == "float32" else "bfloat16"
    return cpu.CpuModel(weights, stored_generation(source, source.config), cache)


class _Arrays:
    """See `cpu.weights.ArraySource`."""

    def __init__(self, source: Checkpoint) -> None:
        self.source, self.config = source, source.config
        self.settings = settings_of(source.config, source.path)
        parts: dict[str, dict[str, str]] = {}
        if self.settings is not None:
            parts = packed_parts(self._names, [*linear_shapes(self.config), "lm_head", "model.embed_tokens"])
            self._check(parts)
        self._parts = parts
        used = [name for found in parts.values() for name in found.values()]
        used += [name for name in self._names if self.settings is not None and self.settings.describes_others(name)]
        self._plain = CoveredCheckpoint(source, list(parts), [self._names[name] for name in used])

    @cached_property
    def _names(self) -> dict[str, str]:
        """The model's names of the file's tensors."""
        return {with_prefix(name): name for name in self.source.tensors}

    def _check(self, parts: dict[str, dict[str, str]]) -> None:
        assert self.settings is not None
        method = self.settings.quant_method
        if not parts:
            raise CheckpointError(
                f"the configuration says {method}, but no linear of the file is packed; remove quantization_config "
                "from config.json, or fetch the file again"
            )
        if "model.embed_tokens" in parts:
            raise InputError(f"{self.source.path}: its embedding is packed as {method}")
        if "lm_head" in parts and self.config.tie_word_embeddings:
            raise CheckpointError("the head is packed but the configuration ties it to the embedding; untie them")

    def parameter(self, name: str) -> NDArray[Any]:
        """As ArraySource.parameter."""
        if name not in self._plain.tensors:
            raise CheckpointError(
                f"{self.source.path} has no {name}: it is no causal language model; llama2[torch] gives it a new head"
                if name == HEAD
                else f"{self.source.path} has no {name}; fetch the checkpoint again"
            )
        return np.ascontiguousarray(self._plain.read(name, self.source.auto_dtype))

    def bias(self, path: str) -> NDArray[Any] | None:
        """As ArraySource.bias."""
        name = f"{path}.bias"
        return self.parameter(name) if name in self._plain.tensors else None

    def packed(self, path: str) -> Any:
        """As ArraySource.packed."""
        if path not in self._parts:
            return None
        assert self.settings is not None
        tensors = {part: self.source.read(self._names[name]) for part, name in self._parts[path].items()}
        shape = {**linear_shapes(self.config), "lm_head": (self.config.vocab_size, self.config.hidden_size)}[path]
        settings = self.settings.at(path)
        try:
            made = BY_ID[self.settings.format_id].packed(tensors, shape, settings)
        except (CheckpointError, InputError) as error:
            raise type(error)(f"{path}: {error}") from error
        if made is None:
            raise InputError(f"{path}: no kernel takes {settings.label(path)} as it is; use runner='torch'")
        return made
