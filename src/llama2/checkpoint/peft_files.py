"""The two files of a LoRA adapter as peft writes them: adapter_config.json, and adapter_model.safetensors or .bin.

A tensor is called "base_model.model." + path in the model + one of
    .lora_A.weight (r, in), .lora_B.weight (out, r)              scaling * B A is added to the module's weight
    .lora_embedding_A (r, V), .lora_embedding_B (D, r)           of the embedding: scaling * (B A) transposed is added
    .lora_magnitude_vector (out,)                                DoRA (arXiv 2402.09353)
    .token_adapter.trainable_tokens_delta (n, D)                 rows that take the place of the embedding's own
    .weight, .bias, perhaps behind .base_layer                   a parameter that takes the place of the model's own
where the path begins with "model." for an adapter of a causal model, and not for one that was made on AutoModel.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama2.checkpoint import read_json
from llama2.checkpoint.hf import load_bin, map_safetensors
from llama2.checkpoint.tensor_library import ARRAYS, TensorLibrary
from llama2.errors import CheckpointError
from llama2.lora_config import LoraConfig
from llama2.schema import FLAG, Schema, check, either, maybe, real, several, table, text, whole
from llama2.text_file import linked_inside

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
HEADS = ("score", "classifier", "qa_outputs")
_NAME = re.compile(
    r"(?P<path>.+?)(?:"
    r"\.lora_(?P<half>[AB])(?:\.default)?\.weight"
    r"|\.lora_embedding_(?P<table>[AB])(?:\.default)?"
    r"|\.(?P<magnitude>lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
    r"|\.token_adapter\.(?P<rows>trainable_tokens_delta)(?:\.default)?"
    r"|(?:\.base_layer|\.modules_to_save\.default|\.original_module)?\.(?P<full>weight|bias))"
)
_FLOATS = ("F32", "F16", "BF16")
# What changes the sum in ways that are not computed here, and whether peft can merge it.
_FOREIGN = {
    "lora_bias": ("B has a bias", False),
    "fan_in_fan_out": ("its weights are stored transposed", True),
    "layer_replication": ("it repeats layers of the model", True),
    "target_parameters": ("it changes parameters that are no linears", True),
    "alora_invocation_tokens": ("it acts from an invocation sequence on only", False),
    "use_qalora": ("it pools the input (QALoRA)", False),
    "use_bdlora": ("its matrices are block-diagonal", True),
    "arrow_config": ("it routes between several adapters", False),
    "kasa_config": ("it changes the base weights (KaSA)", True),
}
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # the others take something out of the base weights
# Kinds that live beside the weights, so that nothing can be merged.
_UNMERGEABLE = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "MULTITASK_PROMPT_TUNING", "CPT",
                "XLORA", "CARTRIDGE")  # fmt: skip

_NAMES, _LAYERS = several(text(), 10_000), whole(0, 100_000)
_ROWS = several(whole(), 10_000_000)
_SCHEMA: Schema = {
    "peft_type": text(100),
    **dict.fromkeys(("task_type", "revision", "base_model_name_or_path", "bias"), maybe(text())),
    "r": whole(1, 100_000),
    "lora_alpha": real(-1e9, 1e9),
    "lora_dropout": maybe(real(0, 1)),
    "target_modules": maybe(either(text(10_000), _NAMES)),
    "exclude_modules": maybe(either(text(10_000), _NAMES)),
    "modules_to_save": maybe(_NAMES),
    "layers_to_transform": maybe(either(_LAYERS, several(_LAYERS, 100_000))),
    "layers_pattern": maybe(either(text(), _NAMES)),
    "rank_pattern": maybe(table(whole(1, 100_000), 10_000)),
    "alpha_pattern": maybe(table(real(-1e9, 1e9), 10_000)),
    "trainable_token_indices": maybe(either(_ROWS, table(_ROWS, 100))),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode"), maybe(FLAG)),
    "init_lora_weights": maybe(either(FLAG, text(100))),
}


@dataclass
class Parts:
    """The tensors of an adapter by what they change; paths and parameters in the model's own names."""

    pairs: dict[str, dict[str, Any]] = field(default_factory=dict)  # module -> "A", "B", "magnitude_vector"
    full: dict[str, Any] = field(default_factory=dict)  # parameter -> its value
    rows: dict[str, Any] = field(default_factory=dict)  # parameter -> the rows that trainable_token_indices names


# -- adapter_config.json -----------------------------------------------------------------------------------------


def read_fields(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises CheckpointError for another kind of adapter than LoRA and DoRA."""
    where, fields = folder / CONFIG, read_json(linked_inside(folder / CONFIG, folder))
    check(fields, _SCHEMA, where)
    kind = fields.get("peft_type")
    if kind != "LORA":
        remedy = (
            "it lives beside the weights and cannot be merged: run it with peft"
            if kind in _UNMERGEABLE
            else "merge it with peft (PeftModel.from_pretrained(...).merge_and_unload()) and use the result"
        )
        raise CheckpointError(f"{where} has peft_type {kind!r}; only 'LORA' adapters are supported. {remedy}")
    for key, (why, mergeable) in _FOREIGN.items():
        if fields.get(key):
            _refuse(where, f"{key} is {fields[key]!r}: {why}", mergeable)
    if (init := fields.get("init_lora_weights")) not in _PLAIN_INITS:
        _refuse(
            where,
            f"init_lora_weights is {init!r}, which changes the base weights too (peft's save_pretrained with "
            "path_initial_model_for_weight_conversion makes plain LoRA of it)",
            True,
        )
    return fields


def read_config(folder: Path) -> LoraConfig:
    """The settings of adapter_config.json; raises as `read_fields`."""
    fields = read_fields(folder)
    try:
        return _parse(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} is malformed: {error!r}; save the adapter again") from error


def _refuse(where: Path, what: str, mergeable: bool) -> None:
    remedy = "merge the adapter with peft (merge_and_unload) and use the result" if mergeable else "run it with peft"
    raise CheckpointError(f"{where}: {what}, which is not supported; {remedy}")


def _parse(fields: Mapping[str, Any]) -> LoraConfig:
    targets, excluded = fields["target_modules"], fields.get("exclude_modules") or ()
    layers = fields.get("layers_to_transform")
    return LoraConfig(
        r=fields["r"],
        revision=fields.get("revision"),
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


def token_indices(folder: Path, fields: Mapping[str, Any], parameter: str) -> list[int]:
    """Which rows of a parameter `trainable_token_indices` names: a list for the embedding, or a dict by module."""
    said = fields.get("trainable_token_indices")
    path = parameter.removesuffix(".weight")
    if isinstance(said, Mapping):
        said = next((rows for name, rows in said.items() if path == name or path.endswith(f".{name}")), None)
    if not isinstance(said, list) or not all(type(row) is int for row in said):
        raise CheckpointError(
            f"{folder} holds rows for {parameter}, but trainable_token_indices of its {CONFIG} does not say which; "
            "save the adapter again"
        )
    return said


# -- the tensors -------------------------------------------------------------------------------------------------


def read_tensors(folder: Path, library: TensorLibrary | None = None) -> Mapping[str, Any]:
    """The adapter's tensors by the names of its file, views of the mapped file."""
    if (folder / WEIGHTS).exists():
        return map_safetensors(linked_inside(folder / WEIGHTS, folder), library)
    if (folder / PICKLE).exists():
        return load_bin(linked_inside(folder / PICKLE, folder), library=library)
    raise CheckpointError(f"{folder} holds neither {WEIGHTS} nor {PICKLE}; fetch or save the adapter again")


def read_parts(folder: Path, dora: bool, library: TensorLibrary) -> Parts:
    """The tensors sorted by what they change. Raises CheckpointError for a name or a dtype that fits nothing, and for
    half of a pair."""
    parts = Parts()
    tensors = read_tensors(folder, library)
    inner = _made_on_base(tensors)
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or not name.startswith(PREFIX):
            raise CheckpointError(
                f"{folder} holds the tensor {name!r}; those of a LoRA adapter are called {PREFIX}MODULE.lora_A.weight "
                f"and .lora_B.weight, MODULE as in the model (model.layers.0.self_attn.q_proj). Rename it, or save the "
                "adapter again with peft"
            )
        if library.code(tensor) not in _FLOATS:
            raise CheckpointError(
                f"{folder}: {name!r} is {tensor.dtype}; an adapter is float32, float16 or bfloat16. Convert it first"
            )
        path = match["path"].removeprefix(PREFIX)
        if inner and path.partition(".")[0] in ("layers", "embed_tokens", "norm"):
            path = f"model.{path}"
        _sort_in(folder, parts, match, path, tensor, dora)
    if not tensors:
        raise CheckpointError(f"{folder} holds no tensors: the adapter was saved empty; save it again")
    _check_pairs(folder, parts, dora)
    return parts


def _sort_in(folder: Path, parts: Parts, match: re.Match[str], path: str, tensor: Any, dora: bool) -> None:
    if match["full"]:
        parts.full[f"{path}.{match['full']}"] = tensor
    elif match["rows"]:
        parts.rows[f"{path}.weight"] = tensor
    elif match["magnitude"]:
        if not dora:
            raise CheckpointError(
                f"{folder} holds {match[0]!r}, but {CONFIG} says that it is no DoRA adapter; set use_dora, or save it "
                "again"
            )
        parts.pairs.setdefault(path, {})["magnitude_vector"] = tensor
    elif match["table"]:  # transposed, so that the sum is that of a linear (V, D)
        parts.pairs.setdefault(path, {})["A" if match["table"] == "B" else "B"] = tensor.T
    else:
        parts.pairs.setdefault(path, {})[match["half"]] = tensor


def _made_on_base(tensors: Mapping[str, Any]) -> bool:
    """Whether the names lack the "model." of a causal model: the adapter was made on AutoModel."""
    return any(name.startswith(f"{PREFIX}layers.") for name in tensors)


def _check_pairs(folder: Path, parts: Parts, dora: bool) -> None:
    for module, pair in parts.pairs.items():
        for half in "AB":
            if half not in pair:
                raise CheckpointError(
                    f"{folder} has no {PREFIX}{module}.lora_{half}.weight, the other half of a pair; save it again"
                )
        if dora and "magnitude_vector" not in pair:
            raise CheckpointError(f"{folder} has no {PREFIX}{module}.lora_magnitude_vector (DoRA); save it again")


# -- an adapter's folder -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdaptedBase:
    """The base model that an adapter's folder names: where it is, at which revision, and of a classifier the labels
    and the names of its head's parameters."""

    base: str
    revision: str | None
    labels: dict[str, Any]
    heads: tuple[str, ...]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    if not (folder / CONFIG).is_file() or any(folder.glob("*model*.safetensors.index.json")):
        return False
    return not any((folder / name).exists() for name in ("model.safetensors", "pytorch_model.bin"))


def adapted_base(folder: Path) -> AdaptedBase | None:
    """The model of an adapter's folder; None for anything but such a folder.

    Raises CheckpointError where the folder does not say which model it is for.
    """
    if not is_adapter(folder):
        return None
    fields = read_fields(folder)
    base = fields.get("base_model_name_or_path")
    if not base:
        raise CheckpointError(
            f"{folder / CONFIG} does not say which model the adapter is for (base_model_name_or_path); load that model "
            "and call llama2.checkpoint.peft.load_adapter(model, folder)"
        )
    heads = tuple(name for name in head_parameters(folder))
    return AdaptedBase(str(base), fields.get("revision"), classifier_labels(folder), heads)


def head_parameters(folder: Path) -> list[str]:
    """The parameters of a classifier's or another task's head that an adapter holds."""
    names = (name.removeprefix(PREFIX).replace(".modules_to_save.default", "") for name in read_tensors(folder, ARRAYS))
    return [name for name in names if name.partition(".")[0] in HEADS]


def classifier_labels(folder: Path) -> dict[str, Any]:
    """Returns the labels of a classifier's adapter, as keywords of from_pretrained; {} for another adapter."""
    tensors = read_tensors(folder, ARRAYS)
    head = next((t for name, t in tensors.items() if name.removeprefix(PREFIX).startswith("score")), None)
    if head is None:
        return {}
    said = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    found = {
        key: said[key] for key in ("id2label", "label2id", "problem_type", "pad_token_id") if said.get(key) is not None
    }
    return found if "id2label" in found else {**found, "num_labels": head.shape[0]}
