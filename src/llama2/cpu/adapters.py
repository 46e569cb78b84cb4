"""LoRA adapters of the native engine: pairs of tensors by module path, copied once into kernel layout.

An adapter's tensors are a mapping from the module path ("model.layers.0.self_attn.q_proj") to (A, B, scale): A (r, in)
and B (out, r) of any of the three float types, scale the number that multiplies B A (alpha / r, or alpha / sqrt(r)).
The copies keep the type of the file, so a bfloat16 adapter costs half the bytes of a float32 one in every step; B is
cut into tiles of 16 rows, which needs no sum across lanes. Sums are float32 whatever the type.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama2.compiled import native
from llama2.errors import InputError, MismatchError
from llama2.stored_arrays import BFLOAT16, patterns

Tensors = Mapping[str, tuple[Any, Any, float]]

PARTS = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
_PATH = re.compile(r"model\.layers\.(\d+)\.(\w+\.\w+)")


def make_adapter(model: Any, layers: int, tensors: Tensors) -> Any:
    """The native adapter for a native model of `layers` layers.

    Raises InputError for a path that is no linear of a layer, MismatchError for shapes that do not fit the model.
    """
    if not tensors:
        raise InputError("an adapter without tensors changes nothing; give at least one module path with (A, B, scale)")
    adapter = native().make_adapter(model)
    for path, (a, b, scale) in sorted(tensors.items(), key=lambda item: _place(item[0], layers)):
        layer, linear = _place(path, layers)
        first, second = _matrix(a, f"A of {path}"), _matrix(b, f"B of {path}")
        try:
            adapter.set(layer, linear, first, second, scale)
        except ValueError as error:
            raise MismatchError(f"the adapter does not fit this model at {path}: {error}") from error
    return adapter


def _place(path: str, layers: int) -> tuple[int, str]:
    match = _PATH.fullmatch(path)
    if match is None or match[2] not in PARTS:
        raise InputError(
            f"{path!r} is no linear that the native engine can adapt; those are model.layers.N. with {', '.join(PARTS)}"
        )
    if int(match[1]) >= layers:
        raise MismatchError(f"the adapter has {path!r}, but the model has {layers} layers; it is for another model")
    return int(match[1]), PARTS[match[2]]


def _matrix(values: Any, name: str) -> Any:
    """A native view of an array (`stored_arrays`) or a torch tensor of float32, float16 or bfloat16, for the copy."""
    bfloat16 = str(getattr(values, "dtype", "")) == "torch.bfloat16"
    if hasattr(values, "detach"):
        values = values.detach().cpu().contiguous()
        values = (_pattern(values) if bfloat16 else values).numpy()
    array = np.ascontiguousarray(values)
    if array.dtype == BFLOAT16:
        array, bfloat16 = patterns(array), True
    if array.ndim != 2 or not array.size:
        raise MismatchError(f"{name} has shape {tuple(array.shape)}; a matrix is needed")
    if not bfloat16 and array.dtype not in (np.float32, np.float16):
        raise InputError(f"{name} is {array.dtype}; an adapter is float32, float16 or bfloat16: convert it first")
    return native().view(array, bfloat16)


def _pattern(tensor: Any) -> Any:
    import torch

    return tensor.view(torch.uint16)
