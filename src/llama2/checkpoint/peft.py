"""LoRA adapters as the peft package writes them: adapter_config.json beside adapter_model.safetensors.

A tensor is called "base_model.model." + module path + ".lora_A.weight" (r, in) or ".lora_B.weight" (out, r); it adds
scaling * B A to the module's weight, scaling = alpha / r, or alpha / sqrt(r) with use_rslora (arXiv 2106.09685,
2312.03732). `rank_pattern` and `alpha_pattern` give single modules another r or alpha.

peft itself lets a wrong prefix, a missing half or a layer too many pass with a warning, and the adapter then does
nothing. Here every tensor of the file must have its place, and every module that the configuration targets its tensors.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llama2 import lora
from llama2.checkpoint import read_json
from llama2.checkpoint.hf import load_bin, map_safetensors
from llama2.checkpoint.save import replacing, write_safetensors
from llama2.config import LlamaConfig
from llama2.errors import CheckpointError, InputError, MismatchError
from llama2.lora_config import LINEARS, LoraConfig

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_NAME = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# What changes the sum or the base weights themselves: used without it, the adapter would give wrong answers.
_FOREIGN = {
    "use_dora": "DoRA rescales each row of the merged weight",
    "modules_to_save": "it brings whole layers of its own",
    "lora_bias": "B has a bias",
    "fan_in_fan_out": "its weights are stored transposed",
    "layer_replication": "it repeats layers of the model",
    "trainable_token_indices": "it changes rows of the embedding",
    "target_parameters": "it changes parameters that are no linears",
    "alora_invocation_tokens": "it acts from an invocation sequence on only",
    "use_qalora": "it pools the input (QALoRA)",
    "use_bdlora": "its matrices are block-diagonal",
    "arrow_config": "it routes between several adapters",
    "kasa_config": "it changes the base weights (KaSA)",
}
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
    "revision": None,
}
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # the others take something out of the base weights


class LowRank(NamedTuple):
    """scale * b @ a is added to a weight: a (r, in), b (out, r)."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a model. modules: {path in the model: (A, B, scale)}, as `CpuWeights.add_adapter` takes."""

    path: Path
    config: LoraConfig
    modules: Mapping[str, LowRank]


def read_adapter(folder: str | Path, model: LlamaConfig) -> Adapter:
    """Opens the adapter in `folder` for a model of this configuration; tensors are views of the mapped file.

    Raises CheckpointError for files that are missing, malformed, or of a kind that is not plain LoRA; MismatchError
    where names or shapes do not fit the model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder that holds {CONFIG} and {WEIGHTS}")
    config = read_config(folder)
    halves = _pair(folder, _tensors(folder))
    shapes = linear_shapes(model)
    if stray := sorted(set(halves) - set(shapes)):
        if f"model.{stray[0]}" in shapes:
            raise CheckpointError(
                f"{folder} holds tensors whose names begin with {PREFIX}{stray[0]}; the prefix of a Llama model is "
                f"{PREFIX}model.: put the missing 'model.' in, or save the adapter again with peft"
            )
        raise MismatchError(
            f"{folder} adapts {stray[0]!r} ({len(stray)} modules in all), which is no linear of a layer of this "
            f"{model.num_hidden_layers}-layer model; adapters of {', '.join(LINEARS)} are supported"
        )
    _check_targets(folder, config, set(halves), set(shapes))
    modules = {}
    for module in sorted(halves, key=list(shapes).index):
        a, b = halves[module]["A"], halves[module]["B"]
        _check_shapes(folder, module, (a, b), config.rank(module), shapes[module])
        modules[module] = LowRank(a, b, config.scaling(module))
    return Adapter(folder, config, modules)


def linear_shapes(model: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear of every layer, by module path."""
    hidden, ffn = model.hidden_size, model.intermediate_size
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    sizes = ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (ffn, hidden), (ffn, hidden), (hidden, ffn))
    return {
        f"model.layers.{i}.{'mlp' if name in LINEARS[4:] else 'self_attn'}.{name}": size
        for i in range(model.num_hidden_layers)
        for name, size in zip(LINEARS, sizes, strict=True)
    }


def write_adapter(
    folder: str | Path, config: LoraConfig, tensors: Mapping[str, Tensor], inference: bool = True
) -> None:
    """Writes an adapter as peft does, for peft to load. tensors: by name behind PREFIX, as in its files.

    Each file takes the place of an earlier one only when it is whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as file:
        write_safetensors(file, {PREFIX + name: tensor.detach().cpu() for name, tensor in tensors.items()})
    fields = {**_WRITTEN, **vars(config), "inference_mode": True}
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    fields["layers_to_transform"] = fields["layers_to_transform"] or None
    fields["exclude_modules"] = fields["exclude_modules"] or None
    with replacing(folder / CONFIG) as file:
        file.write((json.dumps(fields, indent=2, sort_keys=True) + "\n").encode())


def save_adapter(model: nn.Module, folder: str | Path, config: LoraConfig, name: str = "default") -> None:
    """Writes the adapter `name` of a model to a folder that peft, and `load_adapter`, read."""
    tensors = {}
    for path, layer in lora.layers(model).items():
        if name in layer.lora_A:
            tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = layer.lora_A[name], layer.lora_B[name]
        if name in layer.lora_magnitude_vector:
            tensors[f"{path}.lora_magnitude_vector"] = layer.lora_magnitude_vector[name]
    if not tensors:
        raise InputError(f"the model has no adapter {name!r}; there are {', '.join(lora.names(model)) or 'none'}")
    write_adapter(folder, config, tensors)


def load_adapter(model: Any, folder: str | Path, name: str = "default") -> LoraConfig:
    """Attaches the adapter of a folder to a model and activates it; returns its configuration.

    Raises as `read_adapter`, and InputError where the name is taken.
    """
    adapter = read_adapter(folder, model.config)
    config = replace(adapter.config, target_modules=tuple(adapter.modules), layers_to_transform=(), exclude_modules=())
    lora.add_adapter(model, config, name)
    with torch.no_grad():
        for path, low in adapter.modules.items():
            layer = model.get_submodule(path)
            layer.lora_A[name].copy_(low.a)
            layer.lora_B[name].copy_(low.b)
            layer.scaling[name] = low.scale
    return adapter.config


# -- adapter_config.json -----------------------------------------------------------------------------------------


def read_config(folder: Path) -> LoraConfig:
    """adapter_config.json. Raises CheckpointError for another kind of adapter than plain LoRA, naming what is not."""
    where, fields = folder / CONFIG, read_json(folder / CONFIG)
    if fields.get("peft_type") != "LORA":
        raise CheckpointError(f"{where} has peft_type {fields.get('peft_type')!r}; only 'LORA' adapters are supported")
    for key, why in _FOREIGN.items():
        if fields.get(key):
            _refuse(where, f"{key} is {fields[key]!r}: {why}")
    if fields.get("bias", "none") != "none":
        _refuse(where, f"bias is {fields['bias']!r}: it changes biases of the model")
    if (init := fields.get("init_lora_weights")) not in _PLAIN_INITS:
        _refuse(where, f"init_lora_weights is {init!r}, which changes the base weights too (save it as plain LoRA)")
    try:
        return _parse(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where} is malformed: {error!r}; save the adapter again") from error


def _refuse(where: Path, what: str) -> None:
    raise CheckpointError(
        f"{where}: {what}, which is not supported; merge the adapter with peft (merge_and_unload) and use the result"
    )


def _parse(fields: Mapping[str, Any]) -> LoraConfig:
    targets, excluded = fields["target_modules"], fields.get("exclude_modules") or ()
    layers = fields.get("layers_to_transform")
    return LoraConfig(
        r=fields["r"],
        lora_alpha=fields["lora_alpha"],
        target_modules=targets if isinstance(targets, str) else tuple(map(str, targets)),
        exclude_modules=excluded if isinstance(excluded, str) else tuple(map(str, excluded)),
        layers_to_transform=() if layers is None else (layers,) if isinstance(layers, int) else tuple(map(int, layers)),
        lora_dropout=fields.get("lora_dropout") or 0.0,
        use_rslora=bool(fields.get("use_rslora")),
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
        base_model_name_or_path=fields.get("base_model_name_or_path"),
    )


# -- the tensors -------------------------------------------------------------------------------------------------


def _tensors(folder: Path) -> Mapping[str, Tensor]:
    if (folder / WEIGHTS).exists():
        return map_safetensors(folder / WEIGHTS)
    if (folder / PICKLE).exists():
        return load_bin(folder / PICKLE)
    raise CheckpointError(f"{folder} holds neither {WEIGHTS} nor {PICKLE}; fetch or save the adapter again")


def _pair(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{module: {"A": tensor, "B": tensor}}; every tensor has its place and every pair both halves."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or not name.startswith(PREFIX):
            raise CheckpointError(
                f"{folder} holds the tensor {name!r}; those of a LoRA adapter are called {PREFIX}MODULE.lora_A.weight "
                f"and .lora_B.weight, MODULE as in the model (model.layers.0.self_attn.q_proj). Rename it, or save the "
                "adapter again with peft"
            )
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{folder}: {name!r} is {tensor.dtype}; an adapter is float32, float16 or bfloat16. Convert it first"
            )
        halves.setdefault(match[1].removeprefix(PREFIX), {})[match[2]] = tensor
    if not halves:
        raise CheckpointError(f"{folder} holds no tensors: the adapter was saved empty; save it again")
    for module, pair in halves.items():
        for half in "AB":
            if half not in pair:
                raise CheckpointError(
                    f"{folder} has no {PREFIX}{module}.lora_{half}.weight, the other half of a pair; save it again"
                )
    return halves


def _check_targets(folder: Path, config: LoraConfig, found: set[str], known: set[str]) -> None:
    targeted = {module for module in known if config.targets(module)}
    if not targeted:
        raise MismatchError(
            f"{folder} targets {config.target_modules!r}, which names no linear of this model's layers; "
            f"they are {', '.join(LINEARS)}"
        )
    if lost := sorted(targeted - found):
        raise MismatchError(
            f"{folder} targets {lost[0]!r} ({len(lost)} modules in all) but holds no tensors for it; "
            "it is for a model with fewer layers, or was cut: fetch or save it again"
        )
    if extra := sorted(found - targeted):
        raise MismatchError(
            f"{folder} holds tensors for {extra[0]!r}, which its target_modules {config.target_modules!r} do not "
            "name; peft would leave them out. Correct target_modules or save the adapter again"
        )


def _check_shapes(folder: Path, module: str, pair: tuple[Tensor, Tensor], rank: int, shape: tuple[int, int]) -> None:
    wanted = ((rank, shape[1]), (shape[0], rank))
    for half, tensor, size in zip("AB", pair, wanted, strict=True):
        if tuple(tensor.shape) != size:
            raise MismatchError(
                f"{folder}: lora_{half} of {module} has shape {tuple(tensor.shape)}, but rank {rank} and this model's "
                f"weight of {shape} need {size}; it is an adapter of another model or rank"
            )
