"""The plain-network predicate: whether a model is, part for part, the network that the fast paths compute.

    difference(model)               what is not plain, or ""     native engine, CUDA graphs, reordered weights
    layer_difference(layer, ...)    the same for one layer       fused training layers
    warn_once(owner, ...)           says a reason once for each model

The fast paths read parameters and skip the modules' forward methods. That is right only where every module is one of
ours, called as written: no hooks, no forward replaced on the object or on its class, no parametrised or subclassed
tensor, no edited constant, every layer in its place. Classes and functions are compared by identity, never by name
(peft's LoRA layer is called `Linear` as well). Whatever differs is run by torch, as written.
"""

import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from llama2.attention import ATTENTION
from llama2.classifiers import (
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)
from llama2.config import LlamaConfig
from llama2.layers import ACTIVATIONS, LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from llama2.linear import has_global_hooks, runs_as_written
from llama2.lora import LoraLinear
from llama2.model import LlamaForCausalLM, LlamaModel
from llama2.pretrained import require_grad
from llama2.quantization.formats import layer_classes
from llama2.quantization.gguf import GgufEmbedding
from llama2.rope import LlamaRotaryEmbedding

Kinds = tuple[type[nn.Module], ...]
_PACKED: Kinds = layer_classes()
_BASES: Kinds = (nn.Linear, *_PACKED)
_LINEARS: Kinds = (*_BASES, LoraLinear)
_NORM: Kinds = (LlamaRMSNorm,)
# The parts of each class and what they may be. The layers of a decoder are examined one by one.
_PARTS: dict[type[nn.Module], tuple[tuple[str, Kinds], ...]] = {
    LlamaForCausalLM: (("model", (LlamaModel,)), ("lm_head", _LINEARS)),
    LlamaForSequenceClassification: (("model", (LlamaModel,)), ("score", _LINEARS)),
    LlamaForTokenClassification: (("model", (LlamaModel,)), ("score", _LINEARS)),
    LlamaForQuestionAnswering: (("transformer", (LlamaModel,)), ("qa_outputs", _LINEARS)),
    LlamaModel: (
        ("embed_tokens", (nn.Embedding, GgufEmbedding)),
        ("layers", (nn.ModuleList,)),
        ("norm", _NORM),
        ("rotary_emb", (LlamaRotaryEmbedding,)),
    ),
    LlamaDecoderLayer: (
        ("self_attn", (LlamaAttention,)),
        ("mlp", (LlamaMLP,)),
        ("input_layernorm", _NORM),
        ("post_attention_layernorm", _NORM),
    ),
    LlamaAttention: tuple((name, _LINEARS) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    LlamaMLP: tuple((name, _LINEARS) for name in ("gate_proj", "up_proj", "down_proj")),
    LoraLinear: (("base_layer", _BASES),),
}
_WEIGHTED = frozenset((nn.Linear, LlamaRMSNorm, nn.Embedding))
_TENSORS = frozenset((Tensor, nn.Parameter, nn.Buffer))
# What else computes, beside forward, and may be replaced on an object.
_METHODS: dict[type[nn.Module], tuple[str, ...]] = {
    LlamaModel: ("_embed", "_places", "_run"),
    **dict.fromkeys(_PACKED, ("product", "multiply", "dequantize", "weight_in")),
    GgufEmbedding: ("dequantize",),
}


def _as_imported() -> list[tuple[Any, str, Any]]:
    """Every function that computes the network, where it is looked up: replacing one changes all models."""
    kinds = [*_PARTS, *_WEIGHTED, *_PACKED, GgufEmbedding, LlamaRotaryEmbedding]
    originals: list[tuple[Any, str, Any]] = [
        (kind, name, getattr(kind, name)) for kind in kinds for name in ("forward", *_METHODS.get(kind, ()))
    ]
    calls = [(nn.Module, "__call__"), (nn.Module, "_call_impl"), (F, "scaled_dot_product_attention"), (F, "linear")]
    return originals + [(owner, name, getattr(owner, name)) for owner, name in calls]


_FUNCTIONS, _ATTENTION = _as_imported(), dict(ATTENTION)


def difference(model: nn.Module, training: bool = False) -> str:
    """Returns what makes `model` another network than its configuration describes, or "" where it is plain.

    One walk over its modules, some 0.5 us each. `training`: backward hooks count as well. Adapters of this library and
    packed linears are plain; whether a fast path computes them is for that path to know.
    """
    config = getattr(model, "config", None)
    return _surroundings(model, training) or _named("the model", _examine(model, _TOPS, training, config))


def layer_difference(layer: nn.Module, config: LlamaConfig | None, training: bool = False) -> str:
    """As `difference`, for one decoder layer of a model of `config`; `layers[place]` is not looked at."""
    difference_text = _examine(layer, (LlamaDecoderLayer,), training, config)
    return _surroundings(layer, training) or _named("a layer", difference_text)


def _named(whole: str, reason: str) -> str:
    return reason[1:] if reason.startswith(".") else whole + reason if reason else ""


_TOPS: Kinds = (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaForQuestionAnswering,
    LlamaModel,
)
_TOLD: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def warn_once(owner: Any, reason: str, consequence: str, stacklevel: int = 2) -> None:
    """Warns "{consequence}: {reason}", once for each model (`owner`) and text."""
    text = f"{consequence}: {reason}"
    told = _TOLD.setdefault(owner, set())
    if text not in told:
        told.add(text)
        warnings.warn(text, stacklevel=stacklevel + 1)


# -- around the model --------------------------------------------------------------------------------------------


def _surroundings(model: nn.Module, training: bool) -> str:
    """Returns a global setting that changes how modules run, or ""."""
    if has_global_hooks():
        return "a global module hook is registered"
    for owner, name, function in _FUNCTIONS:
        if getattr(owner, name) is not function:
            return f"{owner.__name__}.{name} was replaced"
    chosen = getattr(model, "attn_implementation", None)
    if chosen is not None and ATTENTION.get(chosen) is not _ATTENTION.get(chosen):
        return f"the attention implementation {chosen!r} was replaced"
    if torch._C._len_torch_dispatch_stack():
        return "a torch dispatch mode is active"
    for index in range(torch._C._len_torch_function_stack()):
        mode = torch._C._get_function_stack_at(index)
        if type(mode) is not DeviceContext:  # torch.set_default_device
            return f"the torch function mode {type(mode).__name__} is active"
    return ""


# -- the modules -------------------------------------------------------------------------------------------------


def _examine(module: Any, kinds: Kinds, training: bool, config: Any) -> str:
    """Returns the difference of a module and its children, the path first, or ""."""
    module_class = type(module)
    if module_class not in kinds:
        return f" is a {module_class.__module__}.{module_class.__qualname__}, not a {kinds[0].__name__}"
    attributes = module.__dict__
    if not runs_as_written(module, training) and (reason := _disturbed(attributes)):
        return reason
    for name in _METHODS.get(module_class, ()):
        if name in attributes:
            return f"'s {name} was replaced"
    if reason := _tensors(module_class, attributes) or _constants(module_class, attributes, config):
        return reason
    parts = attributes["_modules"]
    for name, allowed in _PARTS.get(module_class, ()):
        child_rule = parts.get(name)
        reason = f" is {child_rule!r}" if child_rule is None else _examine(child_rule, allowed, training, config)
        if reason:
            return f".{name}{reason}"
    return _layers(parts["layers"], training, config) if module_class is LlamaModel else ""


def _layers(layers: nn.ModuleList, training: bool, config: LlamaConfig) -> str:
    if len(layers) != config.num_hidden_layers:
        return f".layers has {len(layers)} layers; the configuration says {config.num_hidden_layers}"
    for index, layer in enumerate(layers._modules.values()):
        reason = _examine(layer, (LlamaDecoderLayer,), training, config)
        if not reason and layer.self_attn.layer_idx != index:  # type: ignore[union-attr]
            reason = f" is layer {layer.self_attn.layer_idx} of the model"  # type: ignore[union-attr]
        if reason:
            return f".layers.{index}{reason}"
    return ""


def _disturbed(held: dict[str, Any]) -> str:
    """Why a module does not run as written, or "" where its only hooks are those of enable_input_require_grads."""
    if "forward" in held:
        return "'s forward was replaced"
    if held.get("_compiled_call_impl") is not None:
        return " is compiled"
    for name in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"):
        if any(hook is not require_grad for hook in held[name].values()):
            return f" has a {name.strip('_').removesuffix('s').replace('_', ' ')}"
    return ""


def _tensors(kind: type[nn.Module], held: dict[str, Any]) -> str:
    parameters = held["_parameters"]
    if kind in _WEIGHTED and parameters.get("weight") is None:
        return " has no weight of its own"
    for group in (parameters, held["_buffers"]):
        for name, tensor in group.items():
            if tensor is not None and type(tensor) not in _TENSORS:
                return f".{name} is a {type(tensor).__module__}.{type(tensor).__qualname__}"
    return ""


def _constants(kind: type[nn.Module], held: dict[str, Any], config: LlamaConfig) -> str:
    """A number or function of a module that the configuration does not give."""
    expected: dict[str, Any]
    if kind is LlamaRMSNorm:
        expected = {"variance_epsilon": config.rms_norm_eps}
    elif kind is LlamaAttention:
        expected = {"config": config, "head_dim": config.head_dim, "scaling": config.head_dim**-0.5}
    elif kind is LlamaMLP:
        expected = {"config": config, "act_fn": ACTIVATIONS.get(config.hidden_act)}
    elif kind is LlamaRotaryEmbedding:
        expected = {"config": config, "_given": None}
    elif kind in (nn.Embedding, GgufEmbedding):
        expected = {"max_norm": None}
    elif kind is LlamaModel:
        expected = {"config": config}
        if held["run_layer"] is not None and not getattr(held["run_layer"], "equivalent", False):
            return ".run_layer is set"
    else:
        return ""
    for name, value in expected.items():
        found = held.get(name)
        if found is not value and found != value:
            plain = isinstance(value, int | float) and isinstance(found, int | float)
            return f".{name} is {found}, not the configuration's {value}" if plain else f".{name} was replaced"
    return ""
