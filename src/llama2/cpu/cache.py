"""Keys and values in pages of 16 positions, shared out among sequences."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from llama2.compiled import native
from llama2.cpu.weights import CpuWeights
from llama2.errors import InputError

PAGE = 16
KvDtype = Literal["float32", "bfloat16", "int8"]
_ELSEWHERE = "the sequence is in a step of another thread; give each thread a sequence of its own"
KV_DTYPES: tuple[str, ...] = get_args(KvDtype)
Pages = TypeVar("Pages", covariant=True)


def bytes_per_value(dtype: KvDtype, width: int) -> float:
    """Bytes in the cache per number of a key or value of `width` channels: int8 has two scales of 2 bytes per 64."""
    return {"float32": 4, "bfloat16": 2, "int8": 1 + 4 * -(-width // 64) / width}[dtype]


class CachedSequence:
    """One text in the cache: its pages in order and how many positions of them are filled.

    One thread at a time may use it: while a step runs with it, every other use raises InputError."""

    def __init__(self, cache: "PagedCache") -> None:
        self.cache = cache
        self.pages: list[int] = []
        self.length = 0
        self._running = threading.Lock()

    def _check_idle(self) -> None:
        if self._running.locked():
            raise InputError(_ELSEWHERE)

    def crop(self, length: int) -> None:
        """Forgets all but the first `length` positions."""
        self._check_idle()
        if not 0 <= length <= self.length:
            raise InputError(f"cannot keep {length} positions of a sequence that has {self.length}")
        self.length = length
        keep = -(-length // PAGE)
        self.cache._give_back(self.pages[keep:])
        del self.pages[keep:]

    def free(self) -> None:
        """Gives every page back."""
        self.crop(0)

    def fork(self) -> "CachedSequence":
        """A second sequence with the same content; pages are shared until one of the two writes to them."""
        other = CachedSequence(self.cache)
        other.pages, other.length = list(self.pages), self.length
        for page in self.pages:
            self.cache._owners[page] += 1
        return other

    def copy_of(self, other: "CachedSequence") -> None:
        """Takes the content of a sequence of any cache of the same shape and dtype; its own is forgotten."""
        self.free()
        self._reserve(other.length)
        for theirs, ours in zip(other.pages, self.pages, strict=False):
            self.cache.handle.copy_page_from(other.cache.handle, theirs, ours)
        self.length = other.length

    def read(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values float32 (layers, kv heads, length, width)."""
        c = self.cache
        keys = np.empty((c.layers, c.heads, self.length, c.width), np.float32)
        values, table = np.empty_like(keys), np.array(self.pages, np.int32)
        for layer in range(c.layers):
            c.handle.read(layer, table, keys[layer], values[layer])
        return keys, values

    def write(self, keys: NDArray[np.float32], values: NDArray[np.float32]) -> None:
        """Appends keys, rotated, and values (layers, kv heads, positions, width), rounded to the cache's dtype."""
        end = self.length + keys.shape[2]
        self._reserve(end)
        table = np.array(self.pages, np.int32)
        for layer in range(self.cache.layers):
            self.cache.handle.write(layer, table, self.length, keys[layer], values[layer])
        self.length = end

    def _reserve(self, length: int) -> None:
        """Pages of its own for positions self.length .. length."""
        self._check_idle()
        first = self.length // PAGE
        if first < len(self.pages) and self.cache._owners[self.pages[first]] > 1:
            own = self.cache._take()
            self.cache.handle.copy_page(self.pages[first], own)
            self.cache._give_back([self.pages[first]])
            self.pages[first] = own
        while len(self.pages) * PAGE < length:
            self.pages.append(self.cache._take())


@dataclass(frozen=True)
class CacheView(Generic[Pages]):
    """Where the new tokens of a step go: tokens starts[s] .. starts[s+1] follow the past[s] positions of sequence s.

    `tables` int32 (sequences, pages) lists each sequence's pages in order; unused entries are 0. `cache` holds the
    pages, a PagedCache in the native engine.
    """

    cache: Pages
    starts: NDArray[np.int32]
    past: NDArray[np.int32]
    tables: NDArray[np.int32]
    last: NDArray[np.int32]  # the last token of each sequence, starts[1:] - 1
    counts: tuple[tuple[CachedSequence, int], ...] = ()  # new tokens of each sequence

    @contextmanager
    def held(self) -> Iterator[None]:
        """The sequences belong to one step. Raises InputError where one is in a step of another thread."""
        taken: list[CachedSequence] = []
        try:
            for sequence, _ in self.counts:
                if not sequence._running.acquire(blocking=False):
                    raise InputError(_ELSEWHERE)
                taken.append(sequence)
            yield
        finally:
            for sequence in taken:
                sequence._running.release()

    def commit(self) -> None:
        """Counts the new tokens as cached; called by the runner once they are. A view of bare pages has nothing to."""
        for (sequence, count), past in zip(self.counts, self.past.tolist(), strict=False):
            sequence.length = past + count


class PagedCache:
    """Pages for `tokens` positions in all. Memory is taken as positions are written, not before.

    dtype: what keys and values are rounded to. Of the float64 attention output over 150 random positions with one
    channel six times the others, "float32" errs by 2e-7, "bfloat16" (half its bytes) by 3e-3 and "int8" (17/64 of its
    bytes: a scale for every 32 channels of a position) by 1e-2 to 2e-2.
    """

    def __init__(self, weights: CpuWeights, tokens: int, dtype: KvDtype = "bfloat16") -> None:
        if dtype not in KV_DTYPES:
            raise InputError(f"a native cache is one of {', '.join(KV_DTYPES)}, not {dtype!r}")
        if tokens < 1:
            raise InputError(f"a cache of {tokens} tokens cannot hold anything; give at least 1")
        c = weights.config
        self.tokens, self.dtype = tokens, dtype
        self.layers, self.heads, self.width = c.num_hidden_layers, c.num_key_value_heads, c.head_dim
        pages = -(-tokens // PAGE)
        self.handle: Any = native().make_cache(dtype, c.num_hidden_layers, c.num_key_value_heads, c.head_dim, pages)
        self._free = list(range(pages - 1, -1, -1))
        self._owners = [0] * pages  # sequences that hold each page

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, written or not."""
        return int(self.handle.nbytes)

    def sequence(self) -> CachedSequence:
        """A new, empty sequence."""
        return CachedSequence(self)

    def view(self, counts: Iterable[tuple[CachedSequence, int]]) -> "CacheView[PagedCache]":
        """Room for `count` new tokens of each sequence, in the order they will be packed."""
        pairs = list(counts)
        if len(pairs) == 1 and pairs[0][1] > 0 and pairs[0][0].cache is self:  # decoding: every microsecond counts
            sequence, count = pairs[0]
            sequence._reserve(sequence.length + count)
            starts, past = np.array((0, count), np.int32), np.array((sequence.length,), np.int32)
            tables, last = np.array((sequence.pages,), np.int32), np.array((count - 1,), np.int32)
            return CacheView(self, starts, past, tables, last, tuple(pairs))
        if not pairs or any(n < 1 for _, n in pairs):
            raise InputError("a step needs at least one new token of every sequence in it")
        if len({id(s) for s, _ in pairs}) != len(pairs):
            raise InputError("a sequence appears twice in one step; pack its tokens together")
        for sequence, count in pairs:
            if sequence.cache is not self:
                raise InputError("a sequence of another cache cannot take part in this step")
            sequence._reserve(sequence.length + count)
        tables = np.zeros((len(pairs), max(len(s.pages) for s, _ in pairs)), np.int32)
        for i, (sequence, _) in enumerate(pairs):
            tables[i, : len(sequence.pages)] = sequence.pages
        starts = np.cumsum([0, *(n for _, n in pairs)], dtype=np.int32)
        past = np.array([s.length for s, _ in pairs], np.int32)
        return CacheView(self, starts, past, tables, starts[1:] - 1, tuple(pairs))

    def _take(self) -> int:
        if not self._free:
            raise InputError(f"the cache of {self.tokens} positions is full; make it larger or free a sequence")
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _give_back(self, pages: list[int]) -> None:
        for page in reversed(pages):
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free.append(page)
