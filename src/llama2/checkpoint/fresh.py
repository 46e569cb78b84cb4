"""Parameters that no checkpoint holds: a head for a task, and what a caller's own subclass adds to the network."""

from collections.abc import Iterable

import torch

from llama2.architecture import parameter_shapes
from llama2.checkpoint.peft_files import HEADS
from llama2.errors import CheckpointError
from llama2.layers import LlamaRMSNorm
from llama2.pretrained import PreTrainedModel


def not_of_the_network(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Those of a model's parameters that are no part of the Llama network, so that no checkpoint of one has them."""
    network = parameter_shapes(model.config)
    inside = model.base_model_prefix + "." if model.base_model is model else ""
    return {name for name in names if name.partition(".")[0] in HEADS or inside + name not in network}


def draw(model: PreTrainedModel, names: Iterable[str], dtype: torch.dtype, device: torch.device) -> None:
    """Gives the modules of these meta parameters their first values: those of the module's class, then `_init_weights`.

    Raises CheckpointError for a parameter that neither sets.
    """
    for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module = model.get_submodule(path)
        module.to_empty(device=device, recurse=False).to(dtype)
        with torch.no_grad():
            for parameter in module.parameters(recurse=False):
                parameter.fill_(1.0 if isinstance(module, LlamaRMSNorm) else torch.nan)
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
        model._init_weights(module)
        for name, parameter in module.named_parameters(recurse=False):
            if bool(parameter.isnan().any()):
                raise CheckpointError(
                    f"{path}.{name} of {type(model).__name__} is in no checkpoint, and nothing says what it begins as; "
                    f"give {type(module).__name__} a reset_parameters(), or set it in _init_weights(module)"
                )
