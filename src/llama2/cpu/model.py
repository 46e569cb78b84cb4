"""A causal language model that the native engine alone holds: weights, configuration, how it generates. No torch."""

from typing import Any, Self

from llama2.config import LlamaConfig
from llama2.cpu.cache import KvDtype
from llama2.cpu.gguf_reader import GgufSource
from llama2.cpu.packed_file import find as find_packed
from llama2.cpu.weights import CpuWeights
from llama2.generation.config import GenerationConfig


class CpuModel:
    """The model as the engine needs it: a GGUF file's blocks stay as they are, and no torch tensor exists."""

    training = False

    def __init__(
        self,
        weights: CpuWeights,
        generation_config: GenerationConfig | None = None,
        cache_dtype: KvDtype = "bfloat16",
    ) -> None:
        """cache_dtype: what keys and values are kept in unless a caller says otherwise."""
        self.config: LlamaConfig = weights.config
        self.cache_dtype = cache_dtype
        self.adapter: str | None = None  # what generation uses; see set_adapter
        self.generation_config = generation_config or GenerationConfig.from_model_config(weights.config)
        self.weights = weights

    @classmethod
    def from_source(cls, file: GgufSource, threads: int | None = None) -> Self:
        """The model of an opened GGUF file, its blocks repacked losslessly for the kernels, or found packed beside it.

        Raises CheckpointError for foreign, malformed and truncated files, and InputError for a type without kernels.
        """
        file.check_extents()
        return cls(CpuWeights.from_gguf(file, threads, find_packed(file)))

    def add_adapter(self, name: str, tensors: Any) -> None:
        """Adds the tensors of a LoRA adapter (`cpu.adapters`) and uses it from now on. Raises InputError where there is
        one of that name."""
        self.weights.add_adapter(name, tensors)
        self.adapter = name

    def set_adapter(self, name: str | None) -> None:
        """Which of the loaded adapters generation uses from its next call on; None: the model alone."""
        if name is not None:
            self.weights.adapter(name)
        self.adapter = name
