"""Adapters inside a model by the methods of transformers: `model.add_adapter`, `load_adapter`, `set_adapter`, ...

They are thin names for `lora` and `checkpoint.peft`. A configuration may be ours or peft's own LoraConfig.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from llama2 import lora
from llama2.checkpoint.hub import HubOptions, fetch
from llama2.checkpoint.peft import load_adapter as read_into
from llama2.checkpoint.peft import low_rank_tensors
from llama2.checkpoint.source import hub_id, local_path, locate, split_hub_options
from llama2.errors import InputError
from llama2.keywords import refuse_unknown
from llama2.lora_config import LoraConfig

_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_NAMES = {field.name for field in fields(LoraConfig)}
# Fields of peft's LoraConfig that say nothing about the adapter's values.
_SAID = {"task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode", "runtime_config"}


def as_lora_config(config: Any) -> LoraConfig:
    """Our LoraConfig of ours or peft's. Raises InputError for another kind, or a field that would change the result."""
    if isinstance(config, LoraConfig):
        return config
    given = config if isinstance(config, Mapping) else config.to_dict() if hasattr(config, "to_dict") else None
    kind = getattr((given or {}).get("peft_type"), "value", (given or {}).get("peft_type"))
    if given is None or kind not in ("LORA", None):
        raise InputError(
            f"an adapter's configuration is a LoraConfig, not {type(config).__name__}; peft.get_peft_model(model, "
            "config) takes the other kinds"
        )
    neutral = getattr(type(config), "__dataclass_fields__", {})
    for name, value in given.items():
        default = neutral[name].default if name in neutral else None
        if name not in _NAMES | _SAID and value not in (default, None, False, "none", True) and value:
            raise InputError(
                f"{name}={value!r} is a setting of peft's that this method does not have; use peft.get_peft_model"
            )
    kept = {name: _frozen(value) for name, value in given.items() if name in _NAMES and value is not None}
    return LoraConfig(**{"target_modules": LoraConfig().target_modules, **kept})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | set) else value


def add_adapter(model: Any, adapter_config: Any, adapter_name: str | None = None) -> None:
    """Freezes the model and gives it a fresh adapter (A random, B zero), which becomes the active one.

    adapter_config: our LoraConfig or peft's. Raises InputError where the name is taken or no linear is targeted.
    """
    _enabled(model)
    lora.add_adapter(model, as_lora_config(adapter_config), adapter_name or "default")
    model._hf_peft_config_loaded = True


def load_adapter(
    model: Any,
    peft_model_id: str | Path | None = None,
    adapter_name: str | None = None,
    is_trainable: bool = False,
    **kwargs: Any,
) -> None:
    """Attaches an adapter of a folder or hub id as peft writes it, or of a GGUF file, and activates it.

    Keywords: revision, token, cache_dir, local_files_only, subfolder. Its parameters take gradients only with
    is_trainable=True. Raises as `checkpoint.peft.load_adapter`.
    """
    if peft_model_id is None:
        raise InputError("load_adapter needs the folder or hub id of an adapter")
    hub = split_hub_options(kwargs)
    for name in ("device_map", "low_cpu_mem_usage", "peft_config", "adapter_state_dict", "max_memory", "key_mapping"):
        if kwargs.pop(name, None) not in (None, False, True, "auto"):
            raise InputError(f"load_adapter reads adapters from folders onto the model's own device; leave {name} out")
    refuse_unknown("load_adapter", kwargs)
    folder = local_path(peft_model_id, hub.get("subfolder", ""))
    if folder is None:
        meant = hub_id(str(peft_model_id))
        whole = meant is None or (meant.file or meant.tag) is None
        folder = fetch(str(peft_model_id), HubOptions(**hub), _FILES) if whole else locate(peft_model_id, hub).path
    _enabled(model)
    name = adapter_name or "default"
    read_into(model, folder, name)
    model._hf_peft_config_loaded = True
    if not is_trainable:
        for layer in lora.layers(model).values():
            for held in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                if name in held:
                    held[name].requires_grad_(False)


def set_adapter(model: Any, adapter_name: str | list[str]) -> None:
    """Makes these adapters, and no others, active and trainable. Raises InputError for one that is not there."""
    model.__dict__.pop("_disabled_adapters", None)
    lora.set_adapter(model, *([adapter_name] if isinstance(adapter_name, str) else adapter_name))


def disable_adapters(model: Any) -> None:
    """Runs the model without its adapters until enable_adapters."""
    _some(model)
    if "_disabled_adapters" not in model.__dict__:
        model.__dict__["_disabled_adapters"] = {path: layer.active for path, layer in lora.layers(model).items()}
        for layer in lora.layers(model).values():
            layer.active = ()


def enable_adapters(model: Any) -> None:
    """Makes the adapters active again that disable_adapters found active."""
    _some(model)
    _enabled(model)


def _enabled(model: Any) -> None:
    there = lora.layers(model)
    for path, active in model.__dict__.pop("_disabled_adapters", {}).items():
        if path in there:
            there[path].active = active


def _some(model: Any) -> None:
    if not lora.names(model):
        raise InputError("the model has no adapter; add one with add_adapter or load_adapter")


def active_adapters(model: Any) -> list[str]:
    """Names of the active adapters, those that disable_adapters set aside included."""
    _some(model)
    aside = model.__dict__.get("_disabled_adapters", {})
    found = (aside.get(path, layer.active) for path, layer in lora.layers(model).items())
    return list(dict.fromkeys(name for active in found for name in active))


def delete_adapter(model: Any, adapter_names: str | list[str]) -> None:
    """Forgets adapters. Raises InputError for one that is not there."""
    for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
        lora.remove_adapter(model, name)
    model._hf_peft_config_loaded = bool(lora.names(model))


def get_adapter_state_dict(model: Any, adapter_name: str | None = None) -> dict[str, Tensor]:
    """The tensors of one adapter (default: the first active one) under peft's names, "...q_proj.lora_A.weight"."""
    _some(model)
    name = adapter_name or next(iter(active_adapters(model)), lora.names(model)[0])
    return {key: tensor.detach() for key, tensor in low_rank_tensors(model, name).items()}
