"""A LoRA adapter of peft's files that fits a model: pairs, whole parameters and rows. No torch here: the tensors are
torch's, or arrays (`tensor_library`), whose sums the native engine computes."""

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llama2.architecture import EMBEDDING, HEAD, parameter_shapes
from llama2.checkpoint.adapter_header import adapter_file
from llama2.checkpoint.packing_note import warn_of_packing
from llama2.checkpoint.peft_files import (
    CONFIG,
    HEADS,
    WEIGHTS,
    Parts,
    read_config,
    read_fields,
    read_parts,
    token_indices,
)
from llama2.checkpoint.tensor_library import ARRAYS, TensorLibrary
from llama2.config import LlamaConfig
from llama2.errors import CheckpointError, MismatchError
from llama2.lazy import door
from llama2.lora_config import LINEARS, LoraConfig

_gguf_parts = door("checkpoint.gguf_adapter", "read_parts", "The adapter of a GGUF file, as torch's tensors.")
torch_library = door("checkpoint.torch_tensors", "library", "The operations on torch's tensors.")
_OUTER = {"lm_head", "model.embed_tokens"}  # modules beside the layers that an adapter may change


class LowRank(NamedTuple):
    """scale * b @ a is added to a weight: a (r, in), b (out, r). Of an embedding (V, D): a (r, D), b (V, r).

    magnitude (out,), of DoRA: what the rows of the sum are long.
    """

    a: Any
    b: Any
    scale: float
    magnitude: Any | None = None

    def added(self, weight: Any, start: int = 0) -> Any:
        """Rows `start` .. start + len(weight) of the changed W, in the weight's dtype and on its device."""
        a, b = (half.to(weight.device).float() for half in (self.a, self.b[start : start + len(weight)]))
        total = weight.float().addmm(b, a, alpha=self.scale)
        if self.magnitude is not None:
            magnitudes = self.magnitude[start : start + len(weight)].to(weight.device).float()
            total *= (magnitudes / total.norm(dim=1))[:, None]
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
    full: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, tuple[list[int], Any]] = field(default_factory=dict)
    vocab_size: int = 0
    untied: bool = False

    @property
    def layered(self) -> bool:
        """Whether the adapter is nothing but A and B of linears in the layers."""
        return not (self.config.use_dora or self.full or self.rows or _OUTER & set(self.modules))

    @property
    def plain(self) -> dict[str, tuple[Any, Any, float]]:
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

    def changed(self, name: str, rows: Any, start: int = 0) -> Any:
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


def read_adapter(
    folder: str | Path, model: LlamaConfig, classifier: bool = False, library: TensorLibrary | None = None
) -> Adapter:
    """Opens the adapter of a folder, or of a GGUF file (which torch reads), for a model of this configuration; tensors
    are views of the mapped file.

    classifier: whether the model has a classifier's head. library: whose tensors; None for torch's. Raises
    CheckpointError for files that are missing, malformed, or of a kind that is no LoRA; MismatchError where names or
    shapes do not fit the model.
    """
    tensors = library or torch_library()
    folder, fields, config, parts = _opened(Path(folder), model, tensors)
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
    return Adapter(
        folder, config, modules, parts.full, rows, vocab_size, _unties(parts, rows, model, vocab_size, tensors)
    )


def engine_pairs(folder: Path, model: LlamaConfig) -> dict[str, tuple[Any, Any, float]]:
    """{path: (A, B, scale)} of an adapter for the native engine, read without torch. Warns where it was trained on
    packed weights and the model's are plain. Raises as `read_adapter` and `Adapter.plain`."""
    warn_of_packing(folder, model)
    return read_adapter(folder, model, library=ARRAYS).plain


def _opened(place: Path, model: LlamaConfig, library: TensorLibrary) -> tuple[Path, dict[str, Any], LoraConfig, Parts]:
    """The adapter's own path, what its settings say (GGUF has none), and its tensors by what they change."""
    if (file := adapter_file(place)) is not None:
        return file, {}, *_gguf_parts(file, model)
    if not place.is_dir():
        raise CheckpointError(
            f"{place} is neither a folder nor a GGUF file; give the folder that holds {CONFIG} and {WEIGHTS}, or a "
            "LoRA adapter of llama.cpp (.gguf)"
        )
    fields, config = read_fields(place), read_config(place)
    return place, fields, config, read_parts(place, config.use_dora, library)


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
        expected = (rows, model.hidden_size) if name.endswith("weight") else (rows,)
        own_shape = tuple(parts.full[name].shape)
        if own_shape != expected:
            raise MismatchError(
                f"{folder}: {name} has shape {own_shape}, but this model needs {expected}; give the model "
                f"num_labels={own_shape[0]}, or it is an adapter of another model"
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
        matches = any(re.search(rf"(?:^|\.){re.escape(module)}\.", name) for name in parts.full)
        if not matches and module not in HEADS:
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
    folder: Path, fields: Mapping[str, Any], name: str, values: Any, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[int], Any]:
    indices = token_indices(folder, fields, name)
    shape = shapes.get(name, (0, 0))
    fits = tuple(values.shape) == (len(indices), shape[-1]) and all(0 <= row < shape[0] for row in indices)
    if name not in (EMBEDDING, HEAD) or not fits:
        raise MismatchError(
            f"{folder}: the rows {indices[:8]} of {name} have shape {tuple(values.shape)}, which does not fit "
            f"{shape}; it is an adapter of another model"
        )
    return indices, values


def _unties(parts: Parts, rows: Mapping[str, Any], model: LlamaConfig, vocab_size: int, library: TensorLibrary) -> bool:
    """Whether head and embedding, tied in the model, differ with the adapter. As in peft, what changes one of them
    leaves the other as the model has it."""
    if not model.tie_word_embeddings:
        return False
    if _OUTER & set(parts.pairs):
        return True
    embedding, head = parts.full.get(EMBEDDING), parts.full.get(HEAD)
    if embedding is not None and head is not None:
        return not library.equal(embedding, head)
    if (embedding is not None or head is not None) and vocab_size == model.vocab_size:
        return True
    return HEAD in rows and (EMBEDDING not in rows or rows[HEAD][0] != rows[EMBEDDING][0])


def _low_rank(
    folder: Path, module: str, pair: Mapping[str, Any], config: LoraConfig, shape: tuple[int, ...]
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
