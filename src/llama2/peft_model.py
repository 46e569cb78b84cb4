"""A model with adapters under peft's names: a thin view over `lora` and the adapter files, no second LoRA.

    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    model.print_trainable_parameters()
    ...                                                   trained
    model.save_pretrained("adapter")
    model = PeftModel.from_pretrained(base, "adapter")    or AutoPeftModelForCausalLM.from_pretrained("adapter")
    model = model.merge_and_unload()

As in peft, `model.base_model.model` is the model itself, and its parameters are called "base_model.model." + name.
"""

import warnings
from abc import ABC
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from llama2 import lora
from llama2.auto import AutoModelForCausalLM, AutoModelForSequenceClassification
from llama2.checkpoint.peft import adapter_tensors, load_adapter, save_adapter
from llama2.checkpoint.peft_files import PREFIX, read_config
from llama2.checkpoint.quantized import packed_layers
from llama2.checkpoint.source import locate, split_hub_options
from llama2.errors import InputError
from llama2.files import saving
from llama2.lora_config import LoraConfig

_HUB = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download")


class LoraModel(nn.Module):
    """The layer between a PeftModel and its model that gives parameters peft's names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


class PeftModel(nn.Module):
    """A model and its adapters; whatever is not here is the model's own.

    peft_config: adapter -> its configuration. Raises InputError where the name of an adapter is taken, or none is
    there by the name that is asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig | None,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """peft_config: of a new adapter, or None for a model that has its adapters already."""
        super().__init__()
        if isinstance(model, PeftModel):
            raise InputError("the model is a PeftModel already; call model.add_adapter(name, config) for one more")
        _warn_of(autocast_adapter_dtype=None if autocast_adapter_dtype else False)
        self.peft_config: dict[str, LoraConfig] = {}
        if peft_config is not None:
            peft_config = _for_model(model, peft_config)
            lora.add_adapter(model, peft_config, adapter_name)
            if hasattr(model, "score"):  # a classifier's head is new: it is trained and saved too
                model.score.requires_grad_(True)
            self.peft_config[adapter_name] = peft_config
        self.base_model = LoraModel(model)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner: Any = super().__getattr__("base_model")
            return getattr(inner.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        return self.get_base_model().generate(*args, **kwargs)

    def get_base_model(self) -> Any:
        """The model itself, its adapters in it."""
        return self.base_model.model

    # -- which adapter -------------------------------------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that act."""
        active = {name for layer in lora.layers(self.get_base_model()).values() for name in layer.active}
        return [name for name in lora.names(self.get_base_model()) if name in active]

    @property
    def active_adapter(self) -> str | list[str]:
        """The adapter that acts, or a list where it is not one."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    def add_adapter(self, adapter_name: str, peft_config: LoraConfig, low_cpu_mem_usage: bool = False) -> None:
        """Adds a new adapter, which acts from now on."""
        peft_config = _for_model(self.get_base_model(), peft_config)
        lora.add_adapter(self.get_base_model(), peft_config, adapter_name)
        self.peft_config[adapter_name] = peft_config

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes one adapter, or several, act and be trained."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        lora.set_adapter(self.get_base_model(), *names)
        if inference_mode:
            self._freeze()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter."""
        lora.remove_adapter(self.get_base_model(), adapter_name)
        self.peft_config.pop(adapter_name, None)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The model without its adapters."""
        with lora.disabled(self.get_base_model()):
            yield

    def _freeze(self) -> None:
        self.get_base_model().requires_grad_(False)

    # -- sizes ---------------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Parameters that are trained, and all; a packed weight counts by its values."""
        parameters = list(self.parameters())
        packed = sum(layer.packed_count for layer in packed_layers(self).values())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        return trained, packed + sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Prints both, and the share."""
        trained, every = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {every:,d} || trainable%: {100 * trained / every:.4f}")

    # -- into the weights, and files -----------------------------------------------------------------------------

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        """The model with the acting adapters, or those of adapter_names, in its weights.

        Packed weights are unpacked first, since the sum would not fit into them. A warning says so, unless they were
        packed only because the adapter's folder says that it was trained on such. With safe_merge
        InputError is raised for an adapter that holds NaN or inf.
        """
        model = self.get_base_model()
        if adapter_names is not None:
            lora.set_adapter(model, *adapter_names)
        if safe_merge:
            for path, layer in lora.layers(model).items():
                if not all(layer.delta(name).isfinite().all() for name in layer.active):
                    raise InputError(f"the adapter of {path} holds NaN or inf, so the model would too; train it again")
        if packed_layers(model):
            if not model.__dict__.get("_packed_for_adapter"):
                warnings.warn(
                    f"the packed weights are unpacked to {model.dtype}, since an adapter does not fit into them; the "
                    "model grows by that",
                    stacklevel=2,
                )
            model.dequantize()
        lora.merge(model)
        self.peft_config.clear()
        return model

    def unload(self) -> Any:
        """The model without any adapter."""
        for name in lora.names(self.get_base_model()):
            lora.remove_adapter(self.get_base_model(), name)
        self.peft_config.clear()
        return self.get_base_model()

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Writes the adapters as peft does: "default" into the folder, another into a folder of its name in it."""
        _warn_of(safe_serialization=None if safe_serialization else False, **kwargs)
        if not is_main_process:
            return
        there = lora.names(self.get_base_model())
        with saving(save_directory) as save:
            for name in there if selected_adapters is None else selected_adapters:
                folder = save.stage / ("" if name == "default" else name)
                save_adapter(self.get_base_model(), folder, self.peft_config.get(name), name)

    def load_adapter(self, model_id: str | Path, adapter_name: str, is_trainable: bool = False, **kwargs: Any) -> None:
        """Loads an adapter from a folder or a hub id; it acts from now on, and is trained where that is said."""
        hub = {name: kwargs.pop(name) for name in _HUB if name in kwargs}
        _warn_of(**kwargs)
        place = locate(model_id, split_hub_options(hub)).path
        self.peft_config[adapter_name] = load_adapter(self.get_base_model(), place, adapter_name)
        if not is_trainable:
            self._freeze()

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        **kwargs: Any,
    ) -> "PeftModel":
        """A model with the adapter of a folder, or of a hub id."""
        if config is not None:
            raise InputError("config is the adapter's own, in its folder; leave it out")
        found = cls(model, None)
        found.load_adapter(model_id, adapter_name, is_trainable, **kwargs)
        return found


PeftModelForCausalLM = PeftModelForSequenceClassification = PeftModel


def _for_model(model: Any, config: LoraConfig) -> LoraConfig:
    """The configuration with the name of the model that it is for."""
    if not isinstance(config, LoraConfig):
        raise InputError(f"peft_config is a {type(config).__name__}; it must be a llama2.LoraConfig")
    name = getattr(model, "name_or_path", None)
    return replace(config, base_model_name_or_path=name) if name and not config.base_model_name_or_path else config


def _warn_of(**kwargs: Any) -> None:
    named = [name for name, value in kwargs.items() if value is not None]
    if named:
        warnings.warn(f"no effect here has {', '.join(named)}: adapters are float32 safetensors", stacklevel=3)


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """A model with a new adapter, everything else frozen. Raises InputError where it targets nothing."""
    if mixed:
        raise InputError("mixed adapters are of several kinds, and LoRA is the one here; leave mixed out")
    return PeftModel(model, peft_config, adapter_name, autocast_adapter_dtype)


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freezes a packed model and, where it is packed, recomputes layers in the backward pass. Returns it.

    Nothing is cast to float32 as peft does: norms and losses are computed in float32 in any case.
    """
    model.requires_grad_(False)
    if packed_layers(model) and use_gradient_checkpointing:
        given = dict(gradient_checkpointing_kwargs or {})
        if given.get("use_reentrant", False):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(given)
    return model


class _AutoPeft:
    """An adapter with the model that it names."""

    _auto: ClassVar[Any]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, adapter_name: str = "default", is_trainable: bool = False,
        **kwargs: Any,
    ) -> PeftModel:  # fmt: skip
        """A PeftModel from the folder or hub id of an adapter; the model is the one that the adapter names."""
        if adapter_name != "default":
            raise InputError(f"adapter_name is {adapter_name!r}; one that is loaded with its model is called 'default'")
        model = cls._auto.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if not lora.names(model):
            raise InputError(f"{pretrained_model_name_or_path} is no adapter; load it with {cls._auto.__name__}")
        found = PeftModel(model, None)
        if not is_trainable:
            found._freeze()
        return found


class AutoPeftModelForCausalLM(_AutoPeft):
    """AutoPeftModelForCausalLM.from_pretrained(adapter)."""

    _auto = AutoModelForCausalLM


class AutoPeftModelForSequenceClassification(_AutoPeft):
    """AutoPeftModelForSequenceClassification.from_pretrained(adapter)."""

    _auto = AutoModelForSequenceClassification


class PeftConfig(ABC):  # noqa: B024  # LoraConfig is registered below, and the only one
    """PeftConfig.from_pretrained(adapter): the configuration of an adapter, which is a LoraConfig."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> LoraConfig:
        """The LoraConfig of a folder or a hub id. Raises CheckpointError for another kind of adapter."""
        hub = {name: kwargs.pop(name) for name in _HUB if name in kwargs}
        _warn_of(**kwargs)
        place = locate(pretrained_model_name_or_path, split_hub_options(hub)).path
        return read_config(place)


PeftConfig.register(LoraConfig)


def get_peft_model_state_dict(
    model: Any, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default", **kwargs: Any
) -> dict[str, Tensor]:
    """The tensors of an adapter as its file names them, "base_model.model....lora_A.weight".

    state_dict: a state_dict of the model whose values take the place of the model's own.
    """
    _warn_of(**kwargs)
    tensors = adapter_tensors(_inside(model), adapter_name)
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    given = state_dict or {}
    return {PREFIX + name: given.get(names[id(tensor)], tensor) for name, tensor in tensors.items()}


class Loaded(NamedTuple):
    """Keys that a state dict lacked, and unexpected ones."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def set_peft_model_state_dict(
    model: Any, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default", **kwargs: Any
) -> Loaded:
    """Copies the tensors of an adapter, named as in its file, into that of the model. Raises InputError for a shape."""
    _warn_of(**kwargs)
    there = {PREFIX + name: tensor for name, tensor in adapter_tensors(_inside(model), adapter_name).items()}
    with torch.no_grad():
        for name in there.keys() & peft_model_state_dict.keys():
            given = peft_model_state_dict[name]
            if given.shape != there[name].shape:
                raise InputError(
                    f"{name} has shape {tuple(given.shape)}, but {tuple(there[name].shape)} in the model; its adapter "
                    "has another r, or is of another model"
                )
            there[name].copy_(given)
    return Loaded(
        sorted(there.keys() - peft_model_state_dict.keys()), sorted(peft_model_state_dict.keys() - there.keys())
    )


def _inside(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
