"""A linear layer whose weight stays packed: the one interface of every packed format that torch runs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from llama2.errors import InputError
from llama2.quantization.packable import PackableWeight
from llama2.stored_arrays import BFLOAT16

_FUSED = (torch.float32, torch.float16, torch.bfloat16)
_ROWS = 16  # of x, up to which a kernel multiplies with packed weights


class Fused(Protocol):
    """The kernels of one packed weight (N, K); the classes of `fused`."""

    def multiplies(self, rows: int, dtype: torch.dtype) -> bool:
        """Whether `product` is worth taking for this shape and format and so many rows of x."""

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """Returns the result of the layer's `dequantize`."""

    def product(self, x: Tensor) -> Tensor:
        """x (M, K) W^T (M, N), M from 1 to 16."""


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def arrays_of(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Tensors as arrays (`stored_arrays`), in place where they are on the CPU."""
    return {name: _array_of(tensor) for name, tensor in tensors.items()}


def _array_of(tensor: Tensor) -> NDArray[Any]:
    held = tensor.detach().cpu()
    if held.dtype == torch.bfloat16:
        return held.view(torch.uint16).numpy().view(BFLOAT16)
    return held.numpy()


def kernels_run(device: torch.device) -> bool:
    """Whether `fused` has kernels for tensors there; without them torch computes everything."""
    return device.type == "cuda" and _has_triton()


class PackedTensors(nn.Module):
    """Base class of layers of packed tensors: buffers that never change their dtype, and a weight that can be looked
    at.

    The buffers have the names that files give them, with dots; those that are not persistent are no packed tensors.
    """

    def _kept(self) -> dict[str, Tensor]:
        passing = self._non_persistent_buffers_set
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None and name not in passing}

    @property
    def weight(self) -> Tensor:
        """For libraries that ask an nn.Linear where its weight is: packed codes whose device and dtype can be read.

        Computing with them raises InputError: they are not the weight. That is `weight_in`.
        """
        return codes_of(next(iter(self.packed.values())))

    @property
    def packed(self) -> dict[str, Tensor]:
        """The tensors that a file holds of this layer, without the bias."""
        return self._kept()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return sum(tensor.nbytes for tensor in self.packed.values())

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        held = self._kept()
        super()._apply(fn, recurse)
        for name, old in held.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, found, error_msgs)
        unexpected_keys += [key for key in found if key.removeprefix(prefix) not in self._buffers]


class PackedLinear(PackedTensors, nn.Linear, ABC):  # type: ignore[override]
    """x (..., in) -> x W^T + b (..., out), W unpacked for each product, or multiplied packed where a kernel can.

    The packed tensors are buffers under the names that files give them ("qweight", or "weight" and "weight.absmax"), so
    `state_dict()` is what the file holds. They follow the module to another device but never change their dtype, and
    take no gradient; x does, and W is unpacked again for it instead of being kept.

    It is an nn.Linear for libraries that look for linears by their class (peft's "all-linear"), not for its weight.
    """

    def __init__(self, shape: tuple[int, int], tensors: Mapping[str, Tensor], bias: nn.Parameter | None) -> None:
        """shape: (out, in) of the weight."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.bias = bias  # type: ignore[assignment]
        self._buffers.update(tensors)  # register_buffer refuses the dots of "weight.absmax"

    @classmethod
    @abstractmethod
    def from_file(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: nn.Parameter | None, config: Any
    ) -> Self:
        """The layer of a file's tensors (by name after the module's path) for a weight (out, in).

        config: the QuantizationConfig of the file. Raises CheckpointError for shapes, dtypes and values that cannot be.
        """

    @classmethod
    @abstractmethod
    def quantize(cls, weight: Tensor, bias: nn.Parameter | None, config: Any) -> Self:
        """The layer of a weight (out, in), rounded without calibration."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out, in) in `dtype`."""

    @abstractmethod
    def fused(self) -> Fused:
        """The kernels over this layer's tensors. Asked for where `kernels_run`; imports triton."""

    @abstractmethod
    def packable(self) -> PackableWeight | None:
        """The weight as the native engine packs it without losing a bit; None where no layout of its holds it, so that
        the engine takes it in bfloat16. Raises InputError for values that no kernel takes."""

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """As `dequantize`, by a kernel where there is one."""
        device = next(iter(self.packed.values())).device
        return self.fused().unpack(dtype) if self.has_kernels(dtype, device) else self.dequantize(dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """x W^T without gradients."""
        rows = x.numel() // self.in_features
        if 1 <= rows <= _ROWS and self.has_kernels(x.dtype, x.device):
            fused = self.fused()
            if fused.multiplies(rows, x.dtype):
                out = fused.product(x.reshape(rows, self.in_features).contiguous())
                return out.view(*x.shape[:-1], self.out_features)
        return F.linear(x, self.weight_in(x.dtype))

    def has_kernels(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether kernels, not torch, unpack and multiply for x of this dtype there."""
        return dtype in _FUSED and kernels_run(device)

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Linear."""
        out = self.product(x)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x W^T without the bias."""
        out: Tensor = _Product.apply(x, self)
        return out

    @property
    def packed_count(self) -> int:
        """Weights that are packed here."""
        return self.out_features * self.in_features

    @property
    def format_name(self) -> str:
        """The format for people."""
        return type(self).__name__

    def extra_repr(self) -> str:
        """Returns the text that print(model) shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


_READABLE = frozenset(
    getattr(Tensor, name).__get__
    for name in ("device", "dtype", "shape", "is_cuda", "is_cpu", "is_meta", "is_quantized", "requires_grad", "ndim")
) | frozenset((Tensor.is_floating_point, Tensor.is_complex, Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size))


class _Codes(Tensor):
    """Packed codes in place of a weight: what they are can be read, nothing can be computed with them."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READABLE:
            return super().__torch_function__(func, types, args, kwargs or {})
        raise InputError(
            "the weight of this linear is packed: nothing can be added to it or computed from its codes. Call "
            "model.dequantize() before a method that changes weights (merge, DoRA), or merge the saved adapter with "
            "`llama2 merge-adapter`"
        )


def codes_of(packed: Tensor) -> Tensor:
    """Packed codes for the place of a weight: device, dtype and shape can be read, computing raises InputError."""
    return packed.as_subclass(_Codes)


class _Product(torch.autograd.Function):
    """x W^T that keeps neither W nor x for the backward pass: W takes no gradient, and is unpacked again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return layer.multiply(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.layer.weight_in(grad.dtype), None
