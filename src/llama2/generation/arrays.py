"""Logits as arrays: what a processor, a filter or a draw asks of numpy arrays and of torch tensors alike.

Each rule is written once, over `of(scores)`. numpy arrays, and torch tensors on a CPU, which are seen as numpy arrays
in place, take the numpy column here; tensors elsewhere, of half precision or under autograd the one in `tensors`.
B rows, V entries. No torch here: it is imported where a tensor comes in.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

from llama2.compiled import kernels
from llama2.lazy import door

Array: TypeAlias = Any  # a numpy array or a torch tensor; what comes out is of the kind that went in
Rule = TypeVar("Rule", bound=Callable[..., Any])


class Arrays(Protocol):
    """Operations on rows (B, V). None of them changes what it is given."""

    def array(self, values: Any, like: Array) -> Array:
        """Values where `like` is; numbers of the dtype of `like`, but ids and booleans as they are."""

    def copy(self, x: Array) -> Array: ...

    def full_like(self, x: Array, value: float) -> Array: ...

    def where(self, mask: Array, yes: Any, no: Any) -> Array: ...

    def masked(self, x: Array, mask: Array, value: float) -> Array:
        """x with `value` where the mask is True."""

    def concat(self, parts: Iterable[Array]) -> Array:
        """Side by side."""

    def peak(self, x: Array) -> Array:
        """The largest of each row (B, 1); NaN where there is one."""

    def best(self, x: Array, count: int) -> tuple[Array, Array]:
        """The `count` largest of each row, falling, and their places."""

    def kth(self, x: Array, count: int) -> Array:
        """The `count`-th largest of each row (B, 1)."""

    def order(self, x: Array) -> Array:
        """Places of rising values; equal ones stay in their order."""

    def take(self, x: Array, places: Array) -> Array:
        """The values (B, n) at places (B, n)."""

    def put(self, x: Array, places: Array, values: Array) -> Array:
        """x with the values (B, n) at places (B, n)."""

    def softmax(self, x: Array) -> Array: ...

    def log_softmax(self, x: Array) -> Array: ...

    def exp(self, x: Array) -> Array: ...

    def total(self, x: Array) -> Array:
        """The sum of each row (B, 1); NaN counts as 0."""

    def sums(self, x: Array, first: Any = 0.0) -> Array:
        """Cumulative sums of each row, summed in float64 from `first` on, in the dtype of x."""

    def finite(self, x: Array) -> Array: ...

    def without_nan(self, x: Array) -> Array:
        """NaN as 0, infinities as the largest and the smallest number of the dtype."""

    def likely(self, p: Array, least: float, keep: int) -> Array | None:
        """Places (B, n), rising, that hold every probability of at least `least` and the `keep` largest of each row;
        None where looking for them costs more than sorting everything."""

    def inverse(self, p: Array, uniform: Any) -> Array:
        """The token (B,) in whose stretch of the cumulative distribution of p a number in [0, 1) of each row falls.

        In float64. A token of probability 0 has an empty stretch, and a number that rounds up to the total stays inside
        the last stretch that is not empty.
        """


_LISTED = 64  # of a row; the compiled module finds so many in a tenth of the time of a partition


class _Numpy:
    """See `Arrays`."""

    def array(self, values: Any, like: Array) -> Array:
        array = np.asarray(values)
        return array.astype(like.dtype, copy=False) if array.dtype.kind == "f" else array

    def copy(self, x: Array) -> Array:
        return x.copy()

    def full_like(self, x: Array, value: float) -> Array:
        return np.full_like(x, value)

    def where(self, mask: Array, yes: Any, no: Any) -> Array:
        like = yes if isinstance(yes, np.ndarray) else no  # before numpy 2 a number would make it float64
        return (
            np.where(mask, yes, no).astype(like.dtype, copy=False)
            if isinstance(like, np.ndarray)
            else np.where(mask, yes, no)
        )

    def masked(self, x: Array, mask: Array, value: float) -> Array:
        out = x.copy()
        np.copyto(out, value, where=mask)
        return out

    def concat(self, parts: Iterable[Array]) -> Array:
        return np.concatenate(list(parts), axis=1)

    def peak(self, x: Array) -> Array:
        return x.max(-1, keepdims=True)

    def best(self, x: Array, count: int) -> tuple[Array, Array]:
        size = x.shape[-1]
        places = np.argpartition(x, size - count, axis=-1)[:, size - count :] if count < size else self.order(x)
        places.sort(axis=-1)
        falling = np.argsort(-np.take_along_axis(x, places, -1), axis=-1, kind="stable")
        places = np.take_along_axis(places, falling, -1)
        return np.take_along_axis(x, places, -1), places

    def kth(self, x: Array, count: int) -> Array:
        if x.dtype == np.float32 and count <= _LISTED and kernels() is not None and x.shape[-1] >= 1024:
            rows = kernels().shortlists(np.ascontiguousarray(x), 1.0, count, 1.0, 1)
            if None not in rows:  # a few of each row, the count-th among them
                return np.array([[np.sort(row[ids])[len(ids) - count]] for row, (ids, _) in zip(x, rows, strict=True)])
        index = x.shape[-1] - count
        return np.partition(x, index, axis=-1)[:, index : index + 1]

    def order(self, x: Array) -> Array:
        return np.argsort(x, axis=-1, kind="stable")

    def take(self, x: Array, places: Array) -> Array:
        return np.take_along_axis(x, places, -1)

    def put(self, x: Array, places: Array, values: Array) -> Array:
        out = x.copy()
        np.put_along_axis(out, places, values, -1)
        return out

    def softmax(self, x: Array) -> Array:
        out = x - x.max(-1, keepdims=True)
        np.exp(out, out=out)
        out /= out.sum(-1, keepdims=True)
        return out

    def log_softmax(self, x: Array) -> Array:
        out = x - x.max(-1, keepdims=True)
        out -= np.log(np.exp(out).sum(-1, keepdims=True))
        return out

    def exp(self, x: Array) -> Array:
        return np.exp(x)

    def total(self, x: Array) -> Array:
        return np.nansum(x, -1, keepdims=True)

    def sums(self, x: Array, first: Any = 0.0) -> Array:
        return (np.cumsum(x, -1, dtype=np.float64) + first).astype(x.dtype)

    def finite(self, x: Array) -> Array:
        return np.isfinite(x)

    def without_nan(self, x: Array) -> Array:
        return np.nan_to_num(x, nan=0.0)

    def likely(self, p: Array, least: float, keep: int) -> Array | None:
        if p.shape[-1] < 1024:
            return None
        if len(p) == 1:
            places = np.flatnonzero(p[0] >= least)[None]
            most = places.shape[1]
        else:
            most = int(np.count_nonzero(p >= least, axis=-1).max())
        if not keep <= most <= p.shape[-1] // 2:
            return None
        if len(p) > 1:  # rows with fewer are filled up with others
            places = np.sort(np.argpartition(p, -most, axis=-1)[:, -most:], axis=-1)
        return places

    def inverse(self, p: Array, uniform: Any) -> Array:
        ends = np.cumsum(p, -1, dtype=np.float64)
        totals = ends[:, -1]
        targets = np.minimum(np.asarray(uniform) * totals, np.nextafter(totals, 0.0))
        columns = [row.searchsorted(target, side="right") for row, target in zip(ends, targets, strict=True)]
        return np.array(columns, np.int64)


NUMPY: Arrays = _Numpy()
_of_tensors = door("generation.tensors", "arrays", "The operations on tensors.")
_through = door("generation.tensors", "through", "A rule on a tensor.")
_from_tensor = door("generation.tensors", "to_numpy", "The content of a tensor.")


def of(x: Array) -> Arrays:
    """The operations for arrays such as x."""
    return NUMPY if isinstance(x, np.ndarray) else _of_tensors()


def to_numpy(x: Array) -> np.ndarray:
    """The content of an array of either kind, in place where it can be."""
    return x if isinstance(x, np.ndarray) else _from_tensor(x)


def on_arrays(rule: Rule) -> Rule:
    """Makes a method (self, input_ids, scores) -> scores work on arrays of either kind; see the head of this module."""

    @wraps(rule)
    def call(self: Any, input_ids: Array, scores: Array) -> Array:
        if isinstance(scores, np.ndarray):
            with np.errstate(all="ignore"):  # -inf and NaN are logits too, and told of by whoever picks the token
                return rule(self, input_ids, scores)
        return _through(rule, self, input_ids, scores)

    return call  # type: ignore[return-value]
