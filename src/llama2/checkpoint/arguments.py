"""Arguments of from_pretrained: the dtype and the device that a call names."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from llama2.errors import DeviceError, InputError

DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_ALIASES = {"half": "float16", "float": "float32", "double": "float64"}


def resolve_dtype(dtype: Any, torch_dtype: Any = None) -> torch.dtype | None:
    """The dtype asked for, None for "auto" or nothing. Raises InputError listing the valid names."""
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise InputError(f"dtype is {dtype!r} and torch_dtype is {torch_dtype!r}; they are one setting, give one")
    wanted = torch_dtype if dtype is None else dtype
    if wanted is None or wanted == "auto":
        return None
    name = str(wanted).removeprefix("torch.") if isinstance(wanted, str | torch.dtype) else ""
    found = DTYPES.get(_ALIASES.get(name, name))
    if found is None:
        raise InputError(
            f"dtype is {wanted!r}; it must be 'auto', {', '.join(map(repr, DTYPES))} or the torch.dtype of that name"
        )
    return found


def resolve_device(device_map: Any) -> torch.device:
    """The one device that a device_map names. Raises InputError for maps over several devices."""
    if device_map is None:
        device = torch.get_default_device()
        if device.type == "meta":
            raise DeviceError(
                "from_pretrained under torch.device('meta') has nowhere to put the weights; call it outside of that "
                "context. A model without weights is Class(config) inside of it"
            )
        return device
    mapped = dict(device_map) if isinstance(device_map, Mapping) else None
    if isinstance(device_map, Mapping):
        places = {str(place) for place in device_map.values()}
        if len(places) != 1:
            raise InputError(
                f"device_map spreads the model over {sorted(places) or 'no device'}; one device is supported. "
                "Give device_map='auto' or {'': 'cuda:0'}"
            )
        device_map = next(iter(device_map.values()))
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device_map, int) and not torch.cuda.is_available():  # torch knows no number without accelerators
        device_map = f"cuda:{device_map}"
    try:
        device = torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"device_map is {device_map!r}; give 'auto', 'cpu', 'cuda', a device number or {{'': device}}"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        if mapped:  # how single-GPU scripts say "on the accelerator": it runs where there is none, as with "auto"
            warnings.warn(
                f"device_map is {mapped!r} and torch sees no CUDA device; the model is on the CPU", stacklevel=6
            )
            return torch.device("cpu")
        raise InputError(f"device_map is {device_map!r} but torch sees no CUDA device; give device_map='cpu' or 'auto'")
    return device
