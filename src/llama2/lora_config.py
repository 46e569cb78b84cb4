"""Settings of a LoRA adapter: rank, scale and the linears it changes. Field names are peft's. Standard library only."""

import difflib
import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from llama2.errors import InputError
from llama2.pattern import check as pattern_check
from llama2.pattern import ends as pattern_ends
from llama2.pattern import fullmatch

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BIASES = ("none", "all", "lora_only")
INITS = (True, False, "gaussian")


class TaskType(StrEnum):
    """The task of a model with an adapter, in peft's terms."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


# The modules that are trained whole with an adapter for a task: its fresh head.
HEADS = {
    "SEQ_CLS": ("score", "classifier"),
    "TOKEN_CLS": ("score", "classifier"),
    "QUESTION_ANS": ("qa_outputs",),
}
# peft's fields that have no meaning here, with the values that leave them so.
_WITHOUT = {
    **dict.fromkeys(
        ("peft_type", "auto_mapping", "peft_version", "inference_mode", "megatron_config",
         "loftq_config", "runtime_config", "qalora_group_size", "ensure_weight_tying", "megatron_core"), "ignored"
    ),
    **dict.fromkeys(
        ("fan_in_fan_out", "eva_config", "corda_config", "lora_ga_config", "velora_config", "alora_invocation_tokens",
         "use_qalora", "monteclora_config", "layer_replication", "lora_bias", "target_parameters", "use_bdlora",
         "arrow_config", "kasa_config", "trainable_token_indices"), "refused"
    ),
}  # fmt: skip


def _as_in_peft(init: Callable[..., None]) -> Callable[..., None]:
    """An __init__ that takes peft's other fields too: those that change nothing, and the rest where they are off."""

    @functools.wraps(init)
    def made(self: Any, *args: Any, **given: Any) -> None:
        for name in [name for name in given if name in _WITHOUT]:
            value = given.pop(name)
            if value and _WITHOUT[name] == "refused":
                raise InputError(f"{name} is {value!r}, which is not supported; leave it out, or train with peft")
        known = self.__dataclass_fields__
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                raise InputError(f"LoraConfig has no {name!r}{f'; did you mean {close[0]}?' if close else ''}")
        init(self, *args, **given)

    return made


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (Hu et al., arXiv 2106.09685): scaling * B A is added to a weight, scaling = alpha / r.

    target_modules: suffixes of module paths, one regex for whole paths, or "all-linear" (every linear of the layers).
    layers_to_transform: only these layers, () for all. use_rslora: scaling = alpha / sqrt(r) (arXiv 2312.03732).
    use_dora: rows of the changed weight get a learned length (arXiv 2402.09353). rank_pattern and alpha_pattern give
    modules whose path ends in a match another r or alpha. modules_to_save: modules that are trained whole and go into
    the adapter; task_type SEQ_CLS adds a classifier's head. bias: which biases are trained with it, "none", "all" or
    "lora_only" (of the adapted linears). init_lora_weights: True (A uniform, B zero), "gaussian" (A normal) or False
    (B random too, so that the adapter changes something at once). revision: of base_model_name_or_path, a hub id. The
    defaults are peft's for Llama.
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
    revision: str | None = None
    task_type: str | None = None
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    init_lora_weights: bool | str = True
    layers_pattern: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._convert()
        for value in (self.r, *self.rank_pattern.values()):
            if type(value) is not int or value < 1:
                raise InputError(f"r is {value!r}; it must be a positive integer")
        for number in (self.lora_alpha, *self.alpha_pattern.values()):
            if type(number) not in (int, float) or not math.isfinite(number):
                raise InputError(f"lora_alpha is {number!r}; it must be a number")
        if not isinstance(self.lora_dropout, int | float) or not 0 <= self.lora_dropout < 1:
            raise InputError(f"lora_dropout is {self.lora_dropout!r}; it must lie in [0, 1)")
        for name, known in (("bias", BIASES), ("init_lora_weights", INITS), ("task_type", (None, *TaskType))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(map(str, known))}")
        listed = (self.target_modules, self.exclude_modules)
        for pattern in (*self.rank_pattern, *self.alpha_pattern, *(p for p in listed if isinstance(p, str))):
            pattern_check(pattern)
        if self.layers_to_transform and isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            raise InputError(
                f"layers_to_transform is {list(self.layers_to_transform)} and target_modules one pattern for whole "
                "paths; put the layers into the pattern, or give names of modules"
            )

    def _convert(self) -> None:
        """Values as peft and configuration files give them: None, lists and sets, a task's enum."""
        changed: dict[str, Any] = {}
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save", "layers_pattern"):
            value = getattr(self, name)
            whole = isinstance(value, str) and name in ("target_modules", "exclude_modules")
            parts = (value,) if isinstance(value, str | int) else sorted(value) if isinstance(value, set) else value
            changed[name] = value if whole else tuple(parts or ())
        if not changed["target_modules"]:
            changed["target_modules"] = ("q_proj", "v_proj")
        for name in ("rank_pattern", "alpha_pattern"):
            changed[name] = getattr(self, name) or {}
        if self.task_type is not None:
            changed["task_type"] = str(self.task_type)
        for name, value in changed.items():
            object.__setattr__(self, name, value)

    @property
    def saved_modules(self) -> tuple[str, ...]:
        """Names of the modules that are trained whole and go into the adapter."""
        return (*self.modules_to_save, *HEADS.get(self.task_type or "", ()))

    def rank(self, module: str) -> int:
        """r of one module."""
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scaling(self, module: str) -> float:
        """Returns the factor of B A in one module."""
        alpha, rank = _by_pattern(self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module: str) -> bool:
        """Whether the adapter is meant to change the module at this path."""
        if _listed(self.exclude_modules, module):
            return False
        if self.layers_to_transform and self._layer(module) not in self.layers_to_transform:
            return False
        if self.target_modules == "all-linear":
            return module.endswith(LINEARS)
        return _listed(self.target_modules, module)

    def _layer(self, module: str) -> int | None:
        """The layer that a module lies in; layers_pattern: what the list of layers is called."""
        name = "|".join(map(re.escape, self.layers_pattern)) or "[^.]*"
        found = re.match(rf"(?:.*?\.)?(?:{name})\.(\d+)\.", module)
        return None if found is None else int(found[1])


def each_module(settings: Mapping[str, tuple[int, float]], **more: Any) -> LoraConfig:
    """The configuration that names each module, with its rank and alpha; more: other fields of LoraConfig."""
    rank, alpha = next(iter(settings.values()), (8, 8.0))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=tuple(settings),
        rank_pattern={re.escape(path): each for path, (each, _) in settings.items() if each != rank},
        alpha_pattern={re.escape(path): each for path, (_, each) in settings.items() if each != alpha},
        **more,
    )


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    for pattern, value in patterns.items():
        if pattern_ends(pattern, module):
            return value
    return default


def _listed(modules: tuple[str, ...] | str, module: str) -> bool:
    if isinstance(modules, str):
        return fullmatch(modules, module)
    return any(module == one or module.endswith(f".{one}") for one in modules)


LoraConfig.__init__ = _as_in_peft(LoraConfig.__init__)  # type: ignore[method-assign]
