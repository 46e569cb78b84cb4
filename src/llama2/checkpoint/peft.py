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
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llama2 import lora
from llama2.architecture import EMBEDDING, HEAD, parameter_shapes
from llama2.checkpoint import gguf_adapter
from llama2.checkpoint.adapter_header import adapter_file
from llama2.checkpoint.packing import warn_of_packing, write_packing
from llama2.checkpoint.peft_files import (
    CONFIG,
    HEADS,
    PREFIX,
    WEIGHTS,
    Parts,
    read_config,
    read_fields,
    read_parts,
    token_indices,
)
from llama2.checkpoint.quantized import PackedLayer, packed_layers, unpack_layer
from llama2.checkpoint.save import write_safetensors
from llama2.config import LlamaConfig
from llama2.errors import CheckpointError, InputError, MismatchError
from llama2.files import replacing, saving, write_text
from llama2.lora_config import LINEARS, LoraConfig, each_module

SCORE = "score.weight"
_OUTER = {"lm_head", "model.embed_tokens"}  # modules beside the layers that an adapter may change
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


class LowRank(NamedTuple):
    """scale * b @ a is added to a weight: a (r, in), b (out, r). Of an embedding (V, D): a (r, D), b (V, r).

    magnitude (out,), of DoRA: what the rows of the sum are long.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    def added(self, weight: Tensor, start: int = 0) -> Tensor:
        """Rows `start` .. start + len(weight) of the changed W, in the weight's dtype and on its device."""
        a, b = (half.to(weight.device, torch.float32) for half in (self.a, self.b[start : start + len(weight)]))
        total = torch.addmm(weight.float(), b, a, alpha=self.scale)
        if self.magnitude is not None:
            wanted = self.magnitude[start : start + len(weight)].to(weight.device, torch.float32)
            total *= (wanted / total.norm(dim=1))[:, None]
        return total.to(weight.dtype)


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a model.

    modules: pairs by path in the model. full: parameters that take the place of the model's own, by name. rows: of a
    parameter (indices, values). vocab_size: rows of embedding and head with the adapter. untied: whether a head that
    the model ties to its embedding differs from it with the adapter.
    """

    path: Path
    config: LoraConfig
    modules: Mapping[str, LowRank]
    full: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    vocab_size: int = 0
    untied: bool = False

    @property
    def layered(self) -> bool:
        """Whether the adapter is nothing but A and B of linears in the layers."""
        return not (self.config.use_dora or self.full or self.rows or _OUTER & set(self.modules))

    @property
    def plain(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """{path: (A, B, scale)}, as `CpuWeights.add_adapter` takes. Raises CheckpointError for what changes more."""
        self.check_low_rank("it cannot be added while the native engine runs", _OUTER & set(self.modules))
        return {path: (low.a, low.b, low.scale) for path, low in self.modules.items()}

    def check_low_rank(self, why: str, others: Collection[str] = ()) -> None:
        """Raises CheckpointError, which says why that matters, for an adapter that is more than A and B."""
        own = [*self.full, *self.rows, *others]
        if self.config.use_dora or own:
            what = (
                "is a DoRA adapter, which rescales the rows of the weights"
                if self.config.use_dora
                else f"brings {', '.join(own[:3])} of its own"
            )
            raise CheckpointError(f"{self.path} {what}, and {why}; put it into the weights with `llama2 merge-adapter`")

    def changed(self, name: str, rows: Tensor, start: int = 0) -> Tensor:
        """Rows `start` .. start + len(rows) of a parameter with the adapter in it, in their dtype; rows: the model's.

        Where the adapter brings the parameter whole, only the dtype and the number of rows count.
        """
        if (whole := self.full.get(name)) is not None:
            rows = whole[start : start + len(rows)].to(rows.device, rows.dtype)
        if (low := self.modules.get(name.removesuffix(".weight"))) is not None and name.endswith(".weight"):
            rows = low.added(rows, start)
        if name in self.rows:
            indices, values = self.rows[name]
            rows = rows.clone()
            for index, value in zip(indices, values, strict=True):
                if start <= index < start + len(rows):
                    rows[index - start] = value.to(rows.dtype)
        return rows

    @property
    def parameters(self) -> set[str]:
        """Names of the parameters that it changes."""
        return {*self.full, *self.rows, *(f"{path}.weight" for path in self.modules)}


def read_adapter(folder: str | Path, model: LlamaConfig, classifier: bool = False) -> Adapter:
    """Opens the adapter of a folder, or of a GGUF file, for a model of this configuration; tensors are views of the
    mapped file.

    classifier: whether the model has a classifier's head. Raises CheckpointError for files that are missing, malformed,
    or of a kind that is no LoRA; MismatchError where names or shapes do not fit the model.
    """
    folder, fields, config, parts = _opened(Path(folder), model)
    vocab_size = next((len(parts.full[name]) for name in (EMBEDDING, HEAD) if name in parts.full), model.vocab_size)
    shapes = _shapes(model, vocab_size)
    _check_heads(folder, parts, model, classifier)
    _check_full(folder, parts, fields, shapes)
    linears = {name.removesuffix(".weight"): size for name, size in shapes.items() if len(size) == 2}
    if stray := sorted(set(parts.pairs) - set(linears)):
        raise MismatchError(
            f"{folder} adapts {stray[0]!r} ({len(stray)} modules in all), which is no linear of a layer of this "
            f"{model.num_hidden_layers}-layer model; adapters of {', '.join(LINEARS)}, lm_head and embed_tokens are "
            "supported"
        )
    _check_targets(folder, config, parts, set(linears))
    modules = {}
    for module in sorted(parts.pairs, key=list(linears).index):
        modules[module] = _low_rank(folder, module, parts.pairs[module], config, linears[module])
    rows = {name: _token_rows(folder, fields, name, values, shapes) for name, values in parts.rows.items()}
    if fields.get("trainable_token_indices") and not rows:
        raise MismatchError(f"{folder}: {CONFIG} names trainable_token_indices, but there are no rows; save it again")
    if model.tie_word_embeddings and EMBEDDING in rows and HEAD not in rows:
        rows[HEAD] = rows[EMBEDDING]
    return Adapter(folder, config, modules, parts.full, rows, vocab_size, _unties(parts, rows, model, vocab_size))


def _opened(place: Path, model: LlamaConfig) -> tuple[Path, dict[str, Any], LoraConfig, Parts]:
    """The adapter's own path, what its settings say (GGUF has none), and its tensors by what they change."""
    if (file := adapter_file(place)) is not None:
        return file, {}, *gguf_adapter.read_parts(file, model)
    if not place.is_dir():
        raise CheckpointError(
            f"{place} is neither a folder nor a GGUF file; give the folder that holds {CONFIG} and {WEIGHTS}, or a "
            "LoRA adapter of llama.cpp (.gguf)"
        )
    fields, config = read_fields(place), read_config(place)
    return place, fields, config, read_parts(place, config.use_dora)


def _shapes(model: LlamaConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    shapes = parameter_shapes(model)
    return {name: (vocab_size, size[1]) if name in (EMBEDDING, HEAD) else size for name, size in shapes.items()}


def _check_heads(folder: Path, parts: Parts, model: LlamaConfig, classifier: bool) -> None:
    """The head of a classifier or of another task, which only such a model has."""
    for name in [name for name in parts.full if name.partition(".")[0] in HEADS]:
        if not classifier:
            raise MismatchError(
                f"{folder} is an adapter of a classifier (it holds {name}); load it into the class of its task, such "
                "as LlamaForSequenceClassification, or use `llama2 classify`"
            )
        rows = 2 if name.startswith("qa_outputs") else model.num_labels
        wanted = (rows, model.hidden_size) if name.endswith("weight") else (rows,)
        found = tuple(parts.full[name].shape)
        if found != wanted:
            raise MismatchError(
                f"{folder}: {name} has shape {found}, but this model needs {wanted}; give the model "
                f"num_labels={found[0]}, or it is an adapter of another model"
            )


def _check_full(folder: Path, parts: Parts, fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Parameters that the adapter brings whole: each is one of the model's, of its shape, and none is lost."""
    for name, tensor in parts.full.items():
        if name.partition(".")[0] in HEADS:
            continue
        if name not in shapes:
            raise MismatchError(
                f"{folder} holds {name} {tuple(tensor.shape)}, which this model has no place for; it is an adapter of "
                "another model" + (" with biases (attention_bias, mlp_bias)" if name.endswith(".bias") else "")
            )
        if tuple(tensor.shape) != shapes[name]:
            raise MismatchError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, but this model needs {shapes[name]}; it is an "
                "adapter of another model"
            )
    for module in fields.get("modules_to_save") or ():
        there = any(re.search(rf"(?:^|\.){re.escape(module)}\.", name) for name in parts.full)
        if not there and module not in HEADS:
            raise MismatchError(
                f"{folder}: modules_to_save names {module!r}, but the file holds no tensor of it; save it again"
            )
    biased = any(name.endswith(".bias") for name in shapes)
    if fields.get("bias", "none") != "none" and biased and not any(name.endswith(".bias") for name in parts.full):
        warnings.warn(
            f"{folder}: bias is {fields['bias']!r}, but the file holds no bias (older versions of peft lost them); "
            "those of the model are used",
            stacklevel=3,
        )


def _token_rows(
    folder: Path, fields: Mapping[str, Any], name: str, values: Tensor, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[int], Tensor]:
    indices = token_indices(folder, fields, name)
    wanted = shapes.get(name, (0, 0))
    fits = tuple(values.shape) == (len(indices), wanted[-1]) and all(0 <= row < wanted[0] for row in indices)
    if name not in (EMBEDDING, HEAD) or not fits:
        raise MismatchError(
            f"{folder}: the rows {indices[:8]} of {name} have shape {tuple(values.shape)}, which does not fit "
            f"{wanted}; it is an adapter of another model"
        )
    return indices, values


def _unties(parts: Parts, rows: Mapping[str, Any], model: LlamaConfig, vocab_size: int) -> bool:
    """Whether head and embedding, tied in the model, differ with the adapter. As in peft, what changes one of them
    leaves the other as the model has it."""
    if not model.tie_word_embeddings:
        return False
    if _OUTER & set(parts.pairs):
        return True
    embedding, head = parts.full.get(EMBEDDING), parts.full.get(HEAD)
    if embedding is not None and head is not None:
        return not torch.equal(embedding, head)
    if (embedding is not None or head is not None) and vocab_size == model.vocab_size:
        return True
    return HEAD in rows and (EMBEDDING not in rows or rows[HEAD][0] != rows[EMBEDDING][0])


def _low_rank(
    folder: Path, module: str, pair: Mapping[str, Tensor], config: LoraConfig, shape: tuple[int, ...]
) -> LowRank:
    rank, magnitude = config.rank(module), pair.get("magnitude_vector")
    for half, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
        if tuple(pair[half].shape) != size:
            raise MismatchError(
                f"{folder}: lora_{half} of {module} has shape {tuple(pair[half].shape)}, but rank {rank} and this "
                f"model's weight of {shape} need {size}; it is an adapter of another model or rank"
            )
    if magnitude is not None and (magnitude.shape != shape[:1] or module == "model.embed_tokens"):
        raise MismatchError(
            f"{folder}: lora_magnitude_vector of {module} has shape {tuple(magnitude.shape)}, but this model needs "
            f"{shape[:1]} (and DoRA of an embedding is not supported); it is an adapter of another model"
        )
    return LowRank(pair["A"], pair["B"], config.scaling(module), magnitude)


def _check_targets(folder: Path, config: LoraConfig, parts: Parts, known: set[str]) -> None:
    found, whole = set(parts.pairs), {name.rpartition(".")[0] for name in parts.full}
    targeted = {module for module in known if config.targets(module) or config.targets(module.removeprefix("model."))}
    if not targeted:
        raise MismatchError(
            f"{folder} targets {config.target_modules!r}, which names no linear of this model's layers; "
            f"they are {', '.join(LINEARS)}"
        )
    if lost := sorted(targeted - found - whole):
        raise MismatchError(
            f"{folder} targets {lost[0]!r} ({len(lost)} modules in all) but holds no tensors for it; "
            "it is for a model with fewer layers, or was cut: fetch or save it again"
        )
    if extra := sorted(found - targeted):
        raise MismatchError(
            f"{folder} holds tensors for {extra[0]!r}, which its target_modules {config.target_modules!r} do not "
            "name; peft would leave them out. Correct target_modules or save the adapter again"
        )


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
