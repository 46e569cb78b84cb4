"""What a LoRA adapter is: rank, scale and the linears it changes. Field names are peft's. Standard library only."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from llama2.errors import InputError

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (Hu et al., arXiv 2106.09685): scaling * B A is added to a weight, scaling = alpha / r.

    target_modules: suffixes of module paths, one regex for whole paths, or "all-linear" (every linear of the layers).
    layers_to_transform: only these layers, () for all. use_rslora: scaling = alpha / sqrt(r) (arXiv 2312.03732).
    use_dora: rows of the changed weight get a learned length (arXiv 2402.09353). rank_pattern and alpha_pattern give
    modules whose path ends in a match another r or alpha. The defaults are peft's for Llama.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] = ()
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        for value in (self.r, *self.rank_pattern.values()):
            if type(value) is not int or value < 1:
                raise InputError(f"r is {value!r}; it must be a positive integer")
        for number in (self.lora_alpha, *self.alpha_pattern.values()):
            if type(number) not in (int, float) or not math.isfinite(number):
                raise InputError(f"lora_alpha is {number!r}; it must be a number")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"lora_dropout is {self.lora_dropout!r}; it must lie in [0, 1)")
        listed = (self.target_modules, self.exclude_modules)
        for pattern in (*self.rank_pattern, *self.alpha_pattern, *(p for p in listed if isinstance(p, str))):
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"{pattern!r} is not a pattern: {error}") from error

    def rank(self, module: str) -> int:
        """r of one module."""
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scaling(self, module: str) -> float:
        """What multiplies B A of one module."""
        alpha, rank = _by_pattern(self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module: str) -> bool:
        """Whether the adapter is meant to change the module at this path."""
        if _listed(self.exclude_modules, module):
            return False
        if self.target_modules == "all-linear":
            return module.endswith(LINEARS)
        if self.layers_to_transform and not isinstance(self.target_modules, str):
            layer = re.match(r".*?\.[^.]*\.(\d+)\.", module)
            if layer is None or int(layer[1]) not in self.layers_to_transform:
                return False
        return _listed(self.target_modules, module)


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _listed(modules: tuple[str, ...] | str, module: str) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, module) is not None
    return any(module == one or module.endswith(f".{one}") for one in modules)
