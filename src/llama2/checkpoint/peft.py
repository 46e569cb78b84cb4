"""LoRA adapters as the peft package writes them (`peft_files`), or llama.cpp's GGUF files (`gguf_adapter`), fitted to a
model, attached to it, and written.

An adapter changes linears (and the head) by pairs A, B; and may bring parameters of its own: an embedding and a head
that were trained whole (modules_to_save, or what peft saves by itself when the vocabulary was resized), rows of them
(trainable_token_indices), biases. peft itself lets a wrong prefix, a missing half or a layer too many pass with a
warning, and the adapter then does nothing. Here every tensor of the file must have its place, and every module that
the configuration targets its tensors.

What `load_adapter` attaches as layers is A and B of linears; all else goes into the model's own parameters, which
`save_adapter` writes whole again.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama2 import lora
from llama2.architecture import EMBEDDING, HEAD
from llama2.checkpoint.packing_note import warn_of_packing, write_packing
from llama2.checkpoint.peft_adapter import Adapter, read_adapter
from llama2.checkpoint.peft_files import (
    CONFIG,
    HEADS,
    PREFIX,
    WEIGHTS,
)
from llama2.checkpoint.quantized import PackedLayer, packed_layers, unpack_layer
from llama2.checkpoint.save import write_safetensors
from llama2.config import LlamaConfig
from llama2.errors import InputError
from llama2.files import replacing, saving, write_text
from llama2.lora_config import LINEARS, LoraConfig, each_module

SCORE = "score.weight"
# What peft's own files say besides; its loader fills in the rest.
_WRITTEN = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "auto_mapping": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "layers_pattern": None,
    "modules_to_save": None,
}


# -- in a model --------------------------------------------------------------------------------------------------


def load_adapter(model: Any, folder: str | Path, name: str = "default") -> LoraConfig:
    """Attaches the adapter of a folder to a model and activates it; returns its configuration.

    A vocabulary that the adapter was made with is taken over, and so are parameters that it brings whole. Raises as
    `read_adapter`, and InputError where the name is taken.
    """
    adapter = read_adapter(folder, model.config, classifier=any(hasattr(model, head) for head in HEADS))
    warn_of_packing(Path(folder), model.config)
    return attach(model, adapter, name)


def attach(model: Any, adapter: Adapter, name: str = "default") -> LoraConfig:
    """As `load_adapter`, of an adapter that was read for this model."""
    if name in lora.names(model):
        raise InputError(f"there is an adapter {name!r} already; remove_adapter(model, {name!r}) or take another name")
    linears = {path: low for path, low in adapter.modules.items() if path != "model.embed_tokens"}
    with torch.no_grad():
        _attach_parameters(model, adapter)
        if linears:
            paths = {_own(model, path): low for path, low in linears.items()}
            config = replace(adapter.config, target_modules=tuple(paths), layers_to_transform=(), exclude_modules=())
            lora.add_adapter(model, config, name)
        for path, low in paths.items() if linears else ():
            layer = model.get_submodule(path)
            layer.lora_A[name].copy_(low.a)
            layer.lora_B[name].copy_(low.b)
            layer.scaling[name] = low.scale
            if low.magnitude is not None:
                layer.lora_magnitude_vector[name].copy_(low.magnitude)
    return adapter.config


def _own(model: Any, name: str) -> str:
    """The name of a module or parameter in this model: a LlamaModel has no "model." in front."""
    prefix = model.base_model_prefix + "."
    if not name.startswith("model."):
        return name
    return name.removeprefix("model.") if model.base_model is model else prefix + name.removeprefix("model.")


def _attach_parameters(model: Any, adapter: Adapter) -> None:
    """Puts everything but the linears' A and B into the model's own parameters, and notes which they are."""
    if adapter.vocab_size != model.config.vocab_size:
        model.resize_token_embeddings(adapter.vocab_size)
    tied = {name for name in adapter.rows if name == HEAD and model.config.tie_word_embeddings}
    if adapter.untied:
        _untie(model)
    lows = {f"{path}.weight" for path in adapter.modules if path == "model.embed_tokens"}
    for name in (*adapter.full, *lows, *(set(adapter.rows) - (set() if adapter.untied else tied))):
        own = _own(model, name)
        path, _, leaf = own.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, PackedLayer) and leaf == "weight":
            module = unpack_layer(model, path)
        parameter = getattr(module, leaf)
        only = replace(adapter, modules={}) if name not in lows else adapter
        parameter.copy_(only.changed(name, parameter.detach()))
        held = model.__dict__.setdefault("_adapter_parameters", {})
        held[own] = name


def _untie(model: Any) -> None:
    """Gives a tied model a head of its own, equal to the embedding."""
    head = model.get_output_embeddings()
    if head is None:
        return
    for path, module in packed_layers(model).items():
        if module is model.get_input_embeddings():
            unpack_layer(model, path)
            head = model.get_output_embeddings()
    head.weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


# -- writing -----------------------------------------------------------------------------------------------------


def write_adapter(
    folder: str | Path, config: LoraConfig, tensors: Mapping[str, Tensor], task: str = "CAUSAL_LM"
) -> None:
    """Writes an adapter as peft does, for peft to load. tensors: by name behind PREFIX, as in its files.

    task: peft's task_type, SEQ_CLS for a classifier. Both files take the place of earlier ones together, when whole.
    """
    fields = {**_WRITTEN, **vars(config), "task_type": task, "inference_mode": True}
    saved = {name.rpartition(".")[0].rpartition(".")[2] for name in tensors if name.endswith(".weight")}
    saved -= {"lora_A", "lora_B"}
    if task == "SEQ_CLS":
        saved |= {"classifier", "score"}  # what peft calls a classifier's head
    fields["modules_to_save"] = sorted(saved - {"base_layer"}) or None
    if any(name.endswith(".bias") for name in tensors):
        fields["bias"] = "all"
    if config.target_modules == "all-linear":  # as peft, which writes the names that it finds
        fields["target_modules"] = LINEARS
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    fields["layers_to_transform"] = fields["layers_to_transform"] or None
    fields["exclude_modules"] = fields["exclude_modules"] or None
    with saving(folder) as save:
        with replacing(save.stage / WEIGHTS) as file:
            write_safetensors(file, {PREFIX + name: tensor.detach().cpu() for name, tensor in tensors.items()})
        write_text(save.stage / CONFIG, json.dumps(fields, indent=2, sort_keys=True) + "\n")


def save_adapter(
    model: nn.Module, folder: str | Path, config: LoraConfig | None = None, name: str | None = None
) -> None:
    """Writes the adapter `name` of a model, else its active one, to a folder that peft, and `load_adapter`, read.

    Without its config one is written that names each module, with its rank and scale.
    """
    name = lora.current(model) if name is None and lora.names(model) else name or "default"
    tensors = adapter_tensors(model, name)
    config = config or _config_of(model, name)
    classifier = hasattr(model, "score")
    with saving(folder) as save:
        write_adapter(save.stage, config, tensors, "SEQ_CLS" if classifier else "CAUSAL_LM")
        if classifier:  # the names of the labels, which peft's own files leave out
            content = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}  # type: ignore[operator, union-attr]
            LlamaConfig.from_dict(content).save_pretrained(save.stage)
        write_packing(save.stage, getattr(getattr(model, "config", None), "quantization_config", None))


def low_rank_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """A, B and lengths of one adapter, the model's own tensors, under peft's names "...q_proj.lora_A.weight"."""
    tensors: dict[str, Tensor] = {}
    for path, layer in lora.layers(model).items():
        if name in layer.lora_A:
            tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = layer.lora_A[name], layer.lora_B[name]
        if name in layer.lora_magnitude_vector:
            tensors[f"{path}.lora_magnitude_vector"] = layer.lora_magnitude_vector[name]
    if not tensors:
        raise InputError(f"the model has no adapter {name!r}; there are {', '.join(lora.names(model)) or 'none'}")
    return tensors


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """All that the file of an adapter holds, by name behind PREFIX: its pairs, parameters kept whole, and the head of a
    classifier. They are the model's own tensors. Raises InputError for an adapter that is not there."""
    tensors = low_rank_tensors(model, name) | _held_parameters(model)
    if hasattr(model, "score"):
        tensors[SCORE] = model.get_parameter(SCORE)
    return tensors


def _held_parameters(model: Any) -> dict[str, Tensor]:
    """The parameters of the model that an adapter brought or changed, under peft's names."""
    held: dict[str, str] = getattr(model, "_adapter_parameters", {})
    wrapped = lora.layers(model)
    tensors = {}
    for own, theirs in held.items():
        path, _, leaf = own.rpartition(".")
        module = wrapped[path].base_layer if path in wrapped else model.get_submodule(path)
        tensors[f"{path}.base_layer.{leaf}" if path in wrapped else theirs] = getattr(module, leaf)
    if EMBEDDING in tensors and HEAD not in tensors and model.config.tie_word_embeddings:
        tensors[HEAD] = tensors[EMBEDDING]  # alone it would mean that the head is the base model's
    return tensors


def _config_of(model: Any, name: str) -> LoraConfig:
    found = {path: layer for path, layer in lora.layers(model).items() if name in layer.lora_A}
    ranks = {path: len(layer.lora_A[name]) for path, layer in found.items()}
    return each_module(
        {path: (rank, found[path].scaling[name] * rank) for path, rank in ranks.items()},
        lora_dropout=max(layer.dropout[name] for layer in found.values()),
        use_dora=any(name in layer.lora_magnitude_vector for layer in found.values()),
        base_model_name_or_path=model.name_or_path or None,
    )
