"""Checkpoints with packed linears (GPTQ, bitsandbytes): into a module as they are, out of one, or seen unpacked."""

import copy
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from llama2.architecture import linear_shapes
from llama2.checkpoint import Checkpoint, RawTensor, Stored
from llama2.checkpoint.packed_names import packed_parts, settings_of
from llama2.checkpoint.torch_tensors import CODES
from llama2.checkpoint.wrapper import SeenCheckpoint
from llama2.config import LlamaConfig
from llama2.errors import CheckpointError, InputError, MismatchError
from llama2.quantization.formats import BY_ID, layer_class, parse
from llama2.quantization.gguf import GgufEmbedding, GgufLinear, checked
from llama2.quantization.linear import PackedLinear
from llama2.quantization.settings import MlxConfig
from llama2.quantization_config import GgufConfig, GPTQConfig, QuantizationConfig

PackedLayer = PackedLinear | GgufEmbedding


def asked_for(quantization_config: Any, load_in_4bit: bool, load_in_8bit: bool) -> QuantizationConfig | None:
    """The quantisation that a call of from_pretrained asks for. Raises InputError where it says two things."""
    if quantization_config is not None and (load_in_4bit or load_in_8bit):
        raise InputError("quantization_config and load_in_4bit or load_in_8bit are one setting; give one of them")
    if quantization_config is None and not (load_in_4bit or load_in_8bit):
        return None
    config = parse(
        {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit}
        if quantization_config is None
        else quantization_config
    )
    if isinstance(config, GPTQConfig) and config.dataset is not None and config.tokenizer is None:
        raise InputError(
            "GPTQConfig has a dataset to calibrate on and no tokenizer, and from_pretrained rounds without calibration "
            "otherwise; give GPTQConfig(tokenizer=...) too, or leave dataset out"
        )
    return config


def is_zero(source: Any, name: str) -> bool:
    """Whether a tensor is 0 throughout: AutoGPTQ writes such a bias for linears that have none."""
    return not bool(source.read(name).any())


def load_layer(
    source: Any,
    path: str,
    parts: Mapping[str, str],
    shape: tuple[int, int],
    bias: nn.Parameter | None,
    config: QuantizationConfig,
) -> PackedLinear:
    """The packed layer at `path`; `parts`: what its tensors are called in `source`. Errors name the layer."""
    tensors = {suffix: source.read(name) for suffix, name in parts.items()}
    try:
        return layer_class(config).from_file(tensors, shape, bias, config.at(path))
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error


# -- in a module -------------------------------------------------------------------------------------------------


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear of a model by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, PackedLinear)
    }


def matrices(model: nn.Module) -> dict[str, nn.Linear | nn.Embedding]:
    """Every linear and the embedding of a model by path."""
    embeddings = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not isinstance(module, GgufEmbedding)
    }
    return {**embeddings, **linears(model)}


def place(
    model: nn.Module, names: Mapping[str, str], weights: Any, config: QuantizationConfig
) -> tuple[set[str], dict[str, Tensor]]:
    """Puts the packed linears of a file in place of the model's; returns the names of the file's tensors it used,
    and by the model's names the weights that it unpacked.

    names: the file's tensors, from the model's name to the file's. Raises CheckpointError where one cannot be right.
    """
    blocks = isinstance(config, GgufConfig)
    linears: Mapping[str, Any] = matrices(model)
    filled: dict[str, Tensor] = {}
    used = {name for said, name in names.items() if config.describes_others(said)}
    tied = getattr(model, "config", None) is not None and model.config.tie_word_embeddings  # type: ignore[union-attr]
    for path, part_names in packed_parts(names, linears).items():
        if path == "lm_head" and tied:
            if isinstance(config, MlxConfig):  # a copy of the embedding's
                used |= {names[name] for name in part_names.values()}
                continue
            raise MismatchError("the head is packed but the configuration ties it to the embedding; untie them")
        parts = {suffix: names[name] for suffix, name in part_names.items()}
        used |= set(parts.values())
        linear = linears[path]
        if isinstance(linear, nn.Embedding) and not blocks:
            filled[f"{path}.weight"] = _unpacked_table(weights, path, parts, linear, model, config)
            continue
        if isinstance(linear, nn.Embedding):
            model.set_submodule(path, _embedding(weights, path, parts, linear, model))
            continue
        shape = (linear.out_features, linear.in_features)
        model.set_submodule(path, load_layer(weights, path, parts, shape, linear.bias, config))
        if linear.bias is None and (stray := names.get(f"{path}.bias")) and is_zero(weights, stray):
            used.add(stray)
    if not packed_layers(model):
        raise CheckpointError(
            f"the configuration says {config.quant_method}, but no linear of the file is packed; remove "
            "quantization_config from config.json, or fetch the file again"
        )
    if blocks:
        tie(model)
    return used, filled


def _unpacked_table(
    weights: Any, path: str, parts: Mapping[str, str], plain: nn.Embedding, model: nn.Module, config: QuantizationConfig
) -> Tensor:
    """An embedding that a folder packs, unpacked: rows are looked up, which no kernel of linears does."""
    shape = (plain.num_embeddings, plain.embedding_dim)
    dtype: torch.dtype = model.config.dtype  # type: ignore[assignment]
    return load_layer(weights, path, parts, shape, None, config).dequantize(dtype)


def _embedding(
    weights: Any, path: str, parts: Mapping[str, str], plain: nn.Embedding, model: nn.Module
) -> GgufEmbedding:
    shape = (plain.num_embeddings, plain.embedding_dim)
    try:
        type_name, rows = checked({suffix: weights.read(name) for suffix, name in parts.items()}, shape)
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error
    dtype: torch.dtype = model.config.dtype  # type: ignore[assignment]
    return GgufEmbedding(shape, type_name, rows, dtype, plain.padding_idx)


def tie(model: Any) -> None:
    """Lets the head of a tied model read the packed embedding, where that is packed."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and model.config.tie_word_embeddings and isinstance(embedding, GgufEmbedding):
        shape = (embedding.num_embeddings, embedding.embedding_dim)
        tied = GgufLinear(shape, embedding.kind, None, head.bias, tied=embedding)
        model.set_submodule("lm_head", tied.train(head.training))


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """Every packed linear of a model by path, and its embedding where that is packed."""
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedLayer)}


def dequantize(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Unpacks every packed layer in place, in `dtype` or the model's own; returns the model.

    Raises InputError where none is packed.
    """
    if not packed_layers(model):
        raise InputError("the model has no packed linear; there is nothing to dequantise")
    return dequantize_as(model, dtype or model.dtype)


def dequantize_as(model: Any, dtype: torch.dtype) -> Any:
    """As `dequantize`; a model without packed layers stays as it is."""
    layers = packed_layers(model)
    if not layers:
        return model
    with torch.no_grad():
        for path, layer in layers.items():
            model.set_submodule(path, plain(layer, dtype))
    model.tie_weights()
    before = model.config
    config = copy.deepcopy(before)
    _forget(config)
    for module in model.modules():  # those that hold the model's configuration go on with the same one
        if getattr(module, "config", None) is before:
            module.config = config
    return model


def _forget(config: LlamaConfig) -> None:
    """Takes what says that weights are packed out of a configuration."""
    for name in ("quantization_config", "quantization", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)


def unpack_layer(model: Any, path: str) -> nn.Module:
    """Unpacks the layer at `path`, and the head with the embedding that it reads; returns what stands there now."""
    layer = model.get_submodule(path)
    unpacked = plain(layer, model.dtype)
    model.set_submodule(path, unpacked)
    for other, module in packed_layers(model).items():
        if getattr(module, "tied", None) is layer:
            head = plain(module, model.dtype)
            head.weight = unpacked.weight
            model.set_submodule(other, head)
    return unpacked


def plain(layer: PackedLayer, dtype: torch.dtype) -> nn.Linear | nn.Embedding:
    """The layer with its weight unpacked; a tied head without one, for `tie_weights` to fill."""
    unpacked: nn.Linear | nn.Embedding
    if isinstance(layer, GgufEmbedding):
        size, padding = (layer.num_embeddings, layer.embedding_dim), layer.padding_idx
        unpacked = nn.Embedding(*size, padding, device="meta")
    else:
        unpacked = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        unpacked.bias = layer.bias
    if getattr(layer, "tied", None) is None:
        unpacked.weight = nn.Parameter(layer.dequantize(dtype))
    return unpacked.train(layer.training)


# -- as a checkpoint ---------------------------------------------------------------------------------------------


def unpacked(source: Checkpoint) -> Checkpoint:
    """The checkpoint seen with its packed linears unpacked (float32); itself where nothing is packed."""
    config = settings_of(source.config, source.path)
    return source if config is None else UnpackedCheckpoint(source, config)


class UnpackedCheckpoint(SeenCheckpoint):
    """A checkpoint whose packed linears are read as float32 matrices, one at a time."""

    def __init__(self, source: Checkpoint, config: QuantizationConfig) -> None:
        super().__init__(source)
        self._settings = config
        self._blocks = isinstance(config, GgufConfig)  # which stay what they are where GGUF is written
        self._shapes = linear_shapes(source.config)
        head = (source.config.vocab_size, source.config.hidden_size)
        self._shapes |= dict.fromkeys(("lm_head", "model.embed_tokens"), head)
        self._parts = packed_parts(source.tensors, self._shapes)

    @cached_property
    def config(self) -> LlamaConfig:
        config = copy.deepcopy(self.source.config)
        _forget(config)
        return config

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        return dict(self._seen())

    def _seen(self) -> Iterator[tuple[str, Stored]]:
        owners = {name: path for path, parts in self._parts.items() for name in parts.values()}
        for name, stored in self.source.tensors.items():
            path = owners.get(name)
            if path is None and self._settings.describes_others(name):
                continue
            if path is None:
                if not self._needless(name):
                    yield name, stored
            elif name == next(iter(self._parts[path].values())):
                first_suffix = next(iter(self._parts[path]))
                type_name = first_suffix.removeprefix("weight.") if self._blocks else "F32"
                yield f"{path}.weight", Stored(self._shapes[path], type_name)

    def kept_type(self, name: str) -> str:
        """Of unpacked linears what the rest of the model is stored in: float32 would double its size."""
        if self._blocks:
            return self.tensors[name].type
        if name.removesuffix(".weight") in self._parts:
            return CODES[getattr(torch, self.source.auto_dtype)]
        return self.source.kept_type(name)

    def packed_type(self, name: str) -> str:
        path = name.removesuffix(".weight")
        if path not in self._parts:
            return self.source.packed_type(name)
        return self.tensors[name].type if self._blocks else BY_ID[self._settings.format_id].name

    def _needless(self, name: str) -> bool:
        """Whether it is the bias of a packed linear that has none, and 0."""
        path, _, suffix = name.rpartition(".")
        config = self.source.config
        biased = config.attention_bias if ".self_attn." in name else config.mlp_bias
        return suffix == "bias" and path in self._parts and not biased and is_zero(self.source, name)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        path = name.removesuffix(".weight")
        if path not in self._parts:
            return self.source.read(name, dtype)
        layer = load_layer(self.source, path, self._parts[path], self._shapes[path], None, self._settings)
        return layer.dequantize(dtype or torch.float32)

    def _tensors_of(self, path: str) -> dict[str, Tensor]:
        return {suffix: self.source.read(name) for suffix, name in self._parts[path].items()}

    def mapped(self, name: str) -> list[Tensor]:
        path = name.removesuffix(".weight")
        stored_names = self._parts[path].values() if path in self._parts else [name]
        return [view for stored_name in stored_names for view in self.source.mapped(stored_name)]

    def raw(self, name: str) -> RawTensor:
        path = name.removesuffix(".weight")
        if path not in self._parts:
            return self.source.raw(name)
        if self._blocks:
            type_name, rows = checked(self._tensors_of(path), self._shapes[path])
            return RawTensor(rows, type_name, self._shapes[path])
        tensor = self.read(name)
        return RawTensor(tensor.view(torch.uint8), CODES[tensor.dtype], tuple(tensor.shape))
