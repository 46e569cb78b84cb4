"""The torch column of `arrays`, and the way from a tensor on a CPU to numpy and back, without a copy."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class _Torch:
    """See `arrays.Arrays`."""

    def array(self, values: Any, like: Tensor) -> Tensor:
        tensor = torch.as_tensor(values, device=like.device)
        return tensor.to(like.dtype) if tensor.is_floating_point() else tensor

    def copy(self, x: Tensor) -> Tensor:
        return x.clone()

    def full_like(self, x: Tensor, value: float) -> Tensor:
        return torch.full_like(x, value)

    def where(self, mask: Tensor, yes: Any, no: Any) -> Tensor:
        return torch.where(mask, yes, no)

    def masked(self, x: Tensor, mask: Tensor, value: float) -> Tensor:
        return x.masked_fill(mask, value)

    def concat(self, parts: Iterable[Tensor]) -> Tensor:
        return torch.cat(list(parts), 1)

    def peak(self, x: Tensor) -> Tensor:
        return x.amax(-1, keepdim=True)

    def best(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        largest = x.topk(count, sorted=True)
        return largest.values, largest.indices

    def kth(self, x: Tensor, count: int) -> Tensor:
        return x.topk(count, sorted=True).values[:, -1:]

    def order(self, x: Tensor) -> Tensor:
        return x.sort(dim=-1, stable=True).indices

    def take(self, x: Tensor, places: Tensor) -> Tensor:
        return x.gather(1, places)

    def put(self, x: Tensor, places: Tensor, values: Tensor) -> Tensor:
        return x.scatter(1, places, values)

    def softmax(self, x: Tensor) -> Tensor:
        return x.softmax(-1)

    def log_softmax(self, x: Tensor) -> Tensor:
        return x.log_softmax(-1)

    def exp(self, x: Tensor) -> Tensor:
        return x.exp()

    def total(self, x: Tensor) -> Tensor:
        return x.nansum(-1, keepdim=True)

    def sums(self, x: Tensor, first: Any = 0.0) -> Tensor:
        return (x.double().cumsum(-1) + first).to(x.dtype)

    def finite(self, x: Tensor) -> Tensor:
        return x.isfinite()

    def without_nan(self, x: Tensor) -> Tensor:
        return x.nan_to_num(nan=0.0)

    def likely(self, p: Tensor, least: float, keep: int) -> Tensor | None:
        return None  # counting would cost a synchronisation, and sorting everything is cheap

    def inverse(self, p: Tensor, uniform: Any) -> Tensor:
        ends = p.double().cumsum(-1)
        total = ends[:, -1:]
        target = torch.as_tensor(uniform, device=p.device)[:, None] * total
        target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(ends, target, right=True).squeeze(1)


_TORCH = _Torch()
_NUMBERS = (torch.float32, torch.float64)  # half precision has no numpy dtype, or rounds otherwise


def arrays() -> _Torch:
    """The operations on tensors."""
    return _TORCH


def lies_in_memory(x: Tensor) -> bool:
    """Whether numpy can work on a tensor in place."""
    return type(x) is Tensor and x.device.type == "cpu" and x.dtype in _NUMBERS and not x.requires_grad


def through(rule: Callable[..., Any], owner: Any, input_ids: Any, scores: Tensor) -> Tensor:
    """The result of a rule as a tensor: on numpy where the scores (B, V) lie in memory, else on the tensors."""
    if not lies_in_memory(scores):
        processed: Tensor = rule(owner, input_ids, scores)
        return processed
    seen = scores.numpy()
    ids = input_ids.numpy() if isinstance(input_ids, Tensor) else input_ids
    with np.errstate(all="ignore"):
        result = rule(owner, ids, seen)
    return scores if result is seen else torch.from_numpy(result)


def to_numpy(x: Any) -> Any:
    """The content of a tensor, in place where it can be; what is no tensor as it is."""
    if not isinstance(x, Tensor):
        return x
    x = x.detach().cpu()
    return x.float().numpy() if x.is_floating_point() and x.dtype not in _NUMBERS else x.numpy()


def ids_tensor(ids: list[int], device: Any) -> Tensor:
    """Token ids as the tensor that transformers' processors show."""
    return torch.tensor(ids, dtype=torch.long, device=device)


def permuted(seed: int, size: int, count: int) -> np.ndarray:
    """The first of torch's random permutation of a seed, where no compiled module makes them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator)[:count].numpy()
