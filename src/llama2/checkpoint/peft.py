"""LoRA adapters as the peft package writes them: adapter_config.json beside adapter_model.safetensors.

A tensor is called "base_model.model." + module path + ".lora_A.weight" (r, in) or ".lora_B.weight" (out, r); it adds
scaling * B A to the module's weight, scaling = alpha / r, or alpha / sqrt(r) with use_rslora (arXiv 2106.09685,
2312.03732). `rank_pattern` and `alpha_pattern` give single modules another r or alpha.

DoRA (arXiv 2402.09353) has ".lora_magnitude_vector" (out,) besides, and an adapter of a classifier the whole head,
"base_model.model.score.weight" (labels, D).

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
HEAD = "score.weight"
_HEADS = {"classifier", "score"}  # what peft calls a classifier's head in modules_to_save
_NAME = re.compile(
    r"(.+)\.(?:lora_(?P<half>[AB])(?:\.default)?\.weight|lora_magnitude_vector(?:\.default)?(?:\.weight)?)"
)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# What changes the sum or the base weights themselves: used without it, the adapter would give wrong answers.
_FOREIGN = {
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
    """scale * b @ a is added to a weight: a (r, in), b (out, r).

    magnitude (out,), of DoRA: what the rows of the sum are long.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a model. modules by path in the model; head: the classifier's weight (labels, D)."""

    path: Path
    config: LoraConfig
    modules: Mapping[str, LowRank]
    head: Tensor | None = None

    @property
    def plain(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """{path: (A, B, scale)}, as `CpuWeights.add_adapter` takes. Raises CheckpointError for DoRA."""
        if self.config.use_dora:
            raise CheckpointError(
                f"{self.path} is a DoRA adapter, which rescales the rows of the weights, so it cannot be added while "
                "the native engine runs; put it into the weights with `llama2 merge-adapter`"
            )
        return {path: (low.a, low.b, low.scale) for path, low in self.modules.items()}


def read_adapter(folder: str | Path, model: LlamaConfig, classifier: bool = False) -> Adapter:
    """Opens the adapter in `folder` for a model of this configuration; tensors are views of the mapped file.

    classifier: whether the model has a classifier's head. Raises CheckpointError for files that are missing, malformed,
    or of a kind that is no LoRA; MismatchError where names or shapes do not fit the model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder that holds {CONFIG} and {WEIGHTS}")
    config = read_config(folder)
    tensors = dict(_tensors(folder))
    head = _head(folder, tensors.pop(PREFIX + HEAD, None), model, classifier)
    halves = _pair(folder, tensors, config.use_dora)
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
        magnitude = halves[module].get("magnitude_vector")
        _check_shapes(folder, module, (a, b), config.rank(module), shapes[module])
        if magnitude is not None and magnitude.shape != shapes[module][:1]:
            raise MismatchError(
                f"{folder}: lora_magnitude_vector of {module} has shape {tuple(magnitude.shape)}, but this model needs "
                f"{shapes[module][:1]}; it is an adapter of another model"
            )
        modules[module] = LowRank(a, b, config.scaling(module), magnitude)
    return Adapter(folder, config, modules, head)


def _head(folder: Path, head: Tensor | None, model: LlamaConfig, classifier: bool) -> Tensor | None:
    if head is None:
        return None
    if not classifier:
        raise MismatchError(
            f"{folder} is an adapter of a classifier (it holds {HEAD}); load it into a LlamaForSequenceClassification, "
            "or use `llama2 classify`"
        )
    wanted = (model.num_labels, model.hidden_size)
    if tuple(head.shape) != wanted:
        raise MismatchError(
            f"{folder}: {HEAD} has shape {tuple(head.shape)}, but this model needs {wanted}; give the model "
            f"num_labels={head.shape[0]}, or it is an adapter of another model"
        )
    return head


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
    folder: str | Path, config: LoraConfig, tensors: Mapping[str, Tensor], task: str = "CAUSAL_LM"
) -> None:
    """Writes an adapter as peft does, for peft to load. tensors: by name behind PREFIX, as in its files.

    task: peft's task_type, SEQ_CLS for a classifier. Each file takes the place of an earlier one only when it is whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as file:
        write_safetensors(file, {PREFIX + name: tensor.detach().cpu() for name, tensor in tensors.items()})
    fields = {**_WRITTEN, **vars(config), "task_type": task, "inference_mode": True}
    if task == "SEQ_CLS":
        fields["modules_to_save"] = sorted(_HEADS)
    if config.target_modules == "all-linear":  # as peft, which writes the names that it finds
        fields["target_modules"] = LINEARS
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    fields["layers_to_transform"] = fields["layers_to_transform"] or None
    fields["exclude_modules"] = fields["exclude_modules"] or None
    with replacing(folder / CONFIG) as file:
        file.write((json.dumps(fields, indent=2, sort_keys=True) + "\n").encode())


def save_adapter(model: nn.Module, folder: str | Path, config: LoraConfig | None = None, name: str = "default") -> None:
    """Writes the adapter `name` of a model to a folder that peft, and `load_adapter`, read.

    Without its config one is written that names each module, with its rank and scale.
    """
    tensors = {}
    for path, layer in lora.layers(model).items():
        if name in layer.lora_A:
            tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = layer.lora_A[name], layer.lora_B[name]
        if name in layer.lora_magnitude_vector:
            tensors[f"{path}.lora_magnitude_vector"] = layer.lora_magnitude_vector[name]
    if not tensors:
        raise InputError(f"the model has no adapter {name!r}; there are {', '.join(lora.names(model)) or 'none'}")
    config = config or _config_of(model, name)
    if classifier := hasattr(model, "score"):
        tensors[HEAD] = model.get_parameter(HEAD)
    write_adapter(folder, config, tensors, "SEQ_CLS" if classifier else "CAUSAL_LM")


def _config_of(model: Any, name: str) -> LoraConfig:
    found = {path: layer for path, layer in lora.layers(model).items() if name in layer.lora_A}
    ranks = {path: len(layer.lora_A[name]) for path, layer in found.items()}
    alphas = {path: layer.scaling[name] * ranks[path] for path, layer in found.items()}
    first, one = next(iter(ranks.values())), next(iter(alphas.values()))
    return LoraConfig(
        r=first,
        lora_alpha=one,
        target_modules=tuple(found),
        lora_dropout=max(layer.dropout[name] for layer in found.values()),
        use_dora=any(name in layer.lora_magnitude_vector for layer in found.values()),
        rank_pattern={re.escape(path): rank for path, rank in ranks.items() if rank != first},
        alpha_pattern={re.escape(path): alpha for path, alpha in alphas.items() if alpha != one},
        base_model_name_or_path=model.name_or_path or None,
    )


def load_adapter(model: Any, folder: str | Path, name: str = "default") -> LoraConfig:
    """Attaches the adapter of a folder to a model and activates it; returns its configuration.

    Raises as `read_adapter`, and InputError where the name is taken.
    """
    adapter = read_adapter(folder, model.config, classifier=hasattr(model, "score"))
    config = replace(adapter.config, target_modules=tuple(adapter.modules), layers_to_transform=(), exclude_modules=())
    lora.add_adapter(model, config, name)
    with torch.no_grad():
        for path, low in adapter.modules.items():
            layer = model.get_submodule(path)
            layer.lora_A[name].copy_(low.a)
            layer.lora_B[name].copy_(low.b)
            layer.scaling[name] = low.scale
            if low.magnitude is not None:
                layer.lora_magnitude_vector[name].copy_(low.magnitude)
        if adapter.head is not None:
            model.score.weight.copy_(adapter.head)
    return adapter.config


def adapted_base(path: str | Path | None) -> tuple[str, dict[str, Any]] | None:
    """Where the model of an adapter's folder is, and how many labels it has and what they are called.

    None for anything but such a folder. Raises CheckpointError where the folder does not say which model it is for.
    """
    folder = None if path is None else Path(path)
    if folder is None or not (folder / CONFIG).is_file() or any(folder.glob("*model*.safetensors.index.json")):
        return None
    if any((folder / name).exists() for name in ("model.safetensors", "pytorch_model.bin")):
        return None
    base = read_config(folder).base_model_name_or_path
    if not base:
        raise CheckpointError(
            f"{folder / CONFIG} does not say which model the adapter is for (base_model_name_or_path); load that model "
            "and call llama2.checkpoint.peft.load_adapter(model, folder)"
        )
    return base, classifier_labels(folder)


def classifier_labels(folder: Path) -> dict[str, Any]:
    """What a classifier's adapter says of the labels, as keywords of from_pretrained; {} for another adapter."""
    head = _tensors(folder).get(PREFIX + HEAD)
    if head is None:
        return {}
    said = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    found = {
        key: said[key] for key in ("id2label", "label2id", "problem_type", "pad_token_id") if said.get(key) is not None
    }
    return found if "id2label" in found else {**found, "num_labels": head.shape[0]}


# -- adapter_config.json -----------------------------------------------------------------------------------------


def read_config(folder: Path) -> LoraConfig:
    """adapter_config.json. Raises CheckpointError for another kind of adapter than LoRA and DoRA."""
    where, fields = folder / CONFIG, read_json(folder / CONFIG)
    if fields.get("peft_type") != "LORA":
        raise CheckpointError(f"{where} has peft_type {fields.get('peft_type')!r}; only 'LORA' adapters are supported")
    for key, why in _FOREIGN.items():
        if fields.get(key):
            _refuse(where, f"{key} is {fields[key]!r}: {why}")
    saved = fields.get("modules_to_save") or ()
    if not set(saved) <= _HEADS:
        _refuse(where, f"modules_to_save is {saved!r}: it brings whole layers of its own")
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
        use_dora=bool(fields.get("use_dora")),
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


def _pair(folder: Path, tensors: Mapping[str, Tensor], dora: bool) -> dict[str, dict[str, Tensor]]:
    """{module: {"A": tensor, "B": tensor}}, with DoRA "magnitude_vector" too; every tensor has its place and every
    module all of them."""
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
        half = match["half"] or "magnitude_vector"
        if half == "magnitude_vector" and not dora:
            raise CheckpointError(
                f"{folder} holds {name!r}, but {CONFIG} says that it is no DoRA adapter; set use_dora, or save it again"
            )
        halves.setdefault(match[1].removeprefix(PREFIX), {})[half] = tensor
    if not halves:
        raise CheckpointError(f"{folder} holds no tensors: the adapter was saved empty; save it again")
    for module, pair in halves.items():
        for half in "AB":
            if half not in pair:
                raise CheckpointError(
                    f"{folder} has no {PREFIX}{module}.lora_{half}.weight, the other half of a pair; save it again"
                )
        if dora and "magnitude_vector" not in pair:
            raise CheckpointError(f"{folder} has no {PREFIX}{module}.lora_magnitude_vector (DoRA); save it again")
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
