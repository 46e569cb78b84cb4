"""Counts the weights of packed linears, from the names in a header and the sizes of the configuration alone."""

import math
from collections.abc import Iterable

from llama2.architecture import linear_shapes
from llama2.config import LlamaConfig
from llama2.errors import InputError
from llama2.quantization.formats import settings_in
from llama2.quantization_config import QuantizationConfig


class Packing:
    """The packed matrices of a checkpoint whose tensors have these names; none where nothing is packed."""

    def __init__(self, config: LlamaConfig, names: Iterable[str]) -> None:
        self._settings = _settings(config)
        head = (config.vocab_size, config.hidden_size)
        self._shapes = {**linear_shapes(config), "lm_head": head, "model.embed_tokens": head}
        self._parts: dict[str, list[str]] = {}
        self._owners: dict[str, str] = {}
        for name in names if self._settings is not None else ():
            path = name
            while path and path not in self._shapes:
                path = path.rpartition(".")[0]
            if path and name[len(path) + 1 :] != "bias":
                self._parts.setdefault(path, []).append(name)
                self._owners[name] = path

    def share(self, name: str) -> tuple[str, int] | None:
        """The type of a tensor and the weights of the model that it stands for, 0 for the parts that only describe
        others; None for a tensor that is what it seems."""
        path = self._owners.get(name)
        if path is None or self._settings is None or self._parts[path] == [f"{path}.weight"]:
            return None
        return self._settings.label(path), math.prod(self._shapes[path]) if name == self._parts[path][0] else 0


def _settings(config: LlamaConfig) -> QuantizationConfig | None:
    try:
        return settings_in(vars(config))
    except InputError:
        return None
