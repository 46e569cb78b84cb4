"""The layer of every format that is read only: the tensors of the file, and a reader that says what they mean."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from llama2.errors import CheckpointError, InputError
from llama2.lazy import resolve
from llama2.quantization.formats import BY_ID
from llama2.quantization.forms import Form
from llama2.quantization.linear import Fused, PackedLinear
from llama2.quantization.packable import PackableWeight
from llama2.stored_arrays import misfit, said

Dtypes = tuple[torch.dtype, ...]
FLOATS: Dtypes = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class TensorPart:
    """Requirements on a tensor. shape: None for any. optional: whether a file may lack it. read: whether it is part of
    the weight; the others (scales of activations) are left out of the layer."""

    dtypes: Dtypes
    shape: tuple[int, ...] | None
    optional: bool = False
    read: bool = True


@dataclass(frozen=True)
class FileReader:
    """How a format's tensors are read. layout: the parts by name, for a weight (out, in), its settings and what is
    there; form: what they mean."""

    layout: Callable[[tuple[int, int], Any, Mapping[str, Tensor]], Mapping[str, TensorPart]]
    form: Callable[[Mapping[str, Tensor], tuple[int, int], Any], Form]


class FileLinear(PackedLinear):
    """A linear layer of a file's tensors."""

    def __init__(
        self, shape: tuple[int, int], tensors: Mapping[str, Tensor], bias: nn.Parameter | None, settings: Any
    ) -> None:
        super().__init__(shape, tensors, bias)
        self.settings = settings

    @property
    def _reader(self) -> FileReader:
        return _reader(self.settings)

    @classmethod
    def from_file(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: nn.Parameter | None, config: Any
    ) -> Self:
        """As PackedLinear.from_file: the tensors that the reader's layout names."""
        layout = _reader(config).layout(shape, config, tensors)
        for name, part in layout.items():
            _check(name, tensors.get(name), part)
        if stray := sorted(set(tensors) - set(layout)):
            raise CheckpointError(
                f"{stray[0]} is no part of a weight in {config.label('')} ({', '.join(layout)}); fetch the file again"
            )
        kept = {name: tensors[name] for name, part in layout.items() if part.read and name in tensors}
        layer = cls(shape, kept, bias, config)
        form = layer.form()
        for field in ("scales", "zeros", "minima"):
            held = getattr(form, field, None)
            if held is not None and not bool(held.float().isfinite().all()):
                raise CheckpointError(f"the {field} hold NaN or infinity; fetch the file again")
        if (values := getattr(form, "values", None)) is not None and bool(values.float().isnan().any()):
            raise CheckpointError("the weight holds NaN, so it is damaged or of another type; fetch the file again")
        return layer

    @classmethod
    def quantize(cls, weight: Tensor, bias: nn.Parameter | None, config: Any) -> Self:
        """These formats are not made while a model is loaded: raises InputError."""
        raise InputError(
            f"a model is not quantised to {config.quant_method} while it is loaded; `llama2 quantize` makes files"
        )

    def form(self) -> Form:
        """Returns the decoded form of the tensors."""
        return self._reader.form(self.packed, (self.out_features, self.in_features), self.settings)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """As PackedLinear.dequantize."""
        return self.form().dequantize(dtype)

    def packable(self) -> PackableWeight | None:
        """As PackedLinear.packable."""
        return self.form().packable()

    def has_kernels(self, dtype: torch.dtype, device: torch.device) -> bool:
        """None of these formats has kernels on a GPU."""
        return False

    def fused(self) -> Fused:
        """Never asked for: `has_kernels` is false."""
        raise AssertionError(f"{self.format_name} has no kernels on a GPU")

    @property
    def format_name(self) -> str:
        """As PackedLinear.format_name."""
        name: str = self.settings.label("")
        return name

    def extra_repr(self) -> str:
        """Returns the text that print(model) shows."""
        return f"{super().extra_repr()}, {self.format_name}"


def _reader(settings: Any) -> FileReader:
    module, _, name = BY_ID[settings.format_id].reader.partition(":")
    found: Any = resolve(module, name)
    assert isinstance(found, FileReader)
    return found


def _check(name: str, tensor: Tensor | None, part: TensorPart) -> None:
    fault = misfit(tensor, part.dtypes, part.shape)
    if not fault or (tensor is None and part.optional):
        return
    if tensor is None:
        raise CheckpointError(f"{name} is {fault}: fetch the file again")
    types = " or ".join(map(said, part.dtypes))
    raise CheckpointError(
        f"{name} is {fault}; {types} {part.shape or ''} is needed: correct quantization_config, or fetch the file again"
    )


def unpack_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes (N, count) uint8 of rows of words (N, W), read as one run of bits from the lowest of the first word on."""
    data = words.contiguous().view(torch.uint8)
    if bits == 8:
        return data[:, :count].contiguous()
    if bits in (1, 2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
        return ((data[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :count].contiguous()
    at = torch.arange(count, device=data.device) * bits
    low, shift = at // 8, at % 8
    high = (low + 1).clamp(max=data.shape[1] - 1)
    pairs = data[:, low].int() | data[:, high].int() << 8
    return ((pairs >> shift) & ((1 << bits) - 1)).to(torch.uint8)
