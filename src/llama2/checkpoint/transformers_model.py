"""The model as transformers' own class over the same parameters, for libraries that ask for that class."""

import importlib
from typing import Any

import torch

from llama2 import lora
from llama2.errors import InputError, MissingDependencyError
from llama2.quantization.linear import PackedLinear


def to_transformers(model: Any) -> Any:
    """transformers' model of the same class name whose parameters are this model's: training one trains both.

    Nothing is copied. transformers' Trainer saves a configuration only beside such a model. Raises InputError for
    packed linears and for adapters inside the model, MissingDependencyError without transformers.
    """
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise InputError("packed linears have no counterpart in transformers; call model.dequantize() first")
    if names := lora.names(model):
        raise InputError(f"the model has adapters ({', '.join(names)}); merge or delete them first")
    try:
        theirs: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingDependencyError("to_transformers() needs transformers: pip install transformers") from error
    name = next(cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("llama2."))
    config = theirs.LlamaConfig(**model.config.to_dict())
    config._attn_implementation = model.attn_implementation
    with torch.device("meta"):
        made = getattr(theirs, name)(config)
    made.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    made.tie_weights()
    inner = made.base_model
    inner.rotary_emb = type(inner.rotary_emb)(config=config).to(model.device)  # its buffers are in no state_dict
    made.generation_config = theirs.GenerationConfig(**model.generation_config.to_dict())
    made.name_or_path = model.name_or_path
    return made.train(model.training)
