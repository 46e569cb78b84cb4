"""Which number format a model computes in while it trains."""

import warnings

import torch
from torch import nn

from llama2.errors import InputError
from llama2.pretrained import PreTrainedModel

_NARROW = (torch.float16, torch.bfloat16)


def best_of_processor() -> torch.dtype:
    """bfloat16 where this processor multiplies it, else float32; no processor computes float16 fast here.

    Measured without such instructions (AVX2): an adapter's step is 18 times slower in bfloat16 or float16.
    """
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """As configurations call it."""
    return str(dtype).removeprefix("torch.")


def beneath_adapter(stored: str | torch.dtype, device: str) -> tuple[str, str]:
    """Returns the compute dtype of the weights beneath an adapter, and a sentence on it where they are stored
    otherwise, or ""."""
    kept = stored if isinstance(stored, torch.dtype) else getattr(torch, stored)
    best = best_of_processor()
    if device != "cpu" or kept not in _NARROW or kept == best:
        return name_of(kept), ""
    return name_of(best), (
        f"the weights are stored in {name_of(kept)} and compute in {name_of(best)}, which this processor does many "
        "times faster (dtype, --dtype choose another)"
    )


def suit_processor(model: PreTrainedModel) -> None:
    """Changes float16 weights of a model on the CPU to what the processor computes fast; a warning says so.

    What is trained becomes float32: steps are too small for 16 bits.
    """
    found = {p for p in model.parameters() if p.dtype == torch.float16 and p.device.type == "cpu"}
    if not found:
        return
    best = torch.float32 if any(p.requires_grad for p in found) else best_of_processor()
    with torch.no_grad():
        for parameter in found:
            parameter.data = parameter.data.to(best)
    warnings.warn(
        f"the weights are float16, in which this processor is slow: they are {name_of(best)} from now on. Load the "
        f"model with dtype='{name_of(best)}' to choose it yourself",
        stacklevel=4,
    )


def check_float16(model: nn.Module) -> None:
    """Raises InputError for float16 on a processor without it, and warns of what it does to Llama 2 elsewhere."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise InputError(
            f"fp16 needs a CUDA device, and the model is on {device}: use bf16=True there. Llama 2 was trained in "
            "bfloat16; in float16, whose largest number is 65,504, training it is known to end in NaN"
        )
    warnings.warn(
        "Llama 2 was trained in bfloat16; in float16 its activations may overflow and the loss become NaN. Use "
        "bf16=True where the device has it",
        stacklevel=4,
    )
