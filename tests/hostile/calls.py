"""Calls into the compiled module with arguments changed at random: each answers, or raises one of the known errors.

    python tests/hostile/calls.py --count 20000 --seed 0 [--module build/check/_native.so]

Call i of a seed is always the same, after the calls of its batch before it. `make fuzz-native` gives a module built
with AddressSanitizer and UndefinedBehaviorSanitizer (--module, libasan preloaded): what it finds ends the process with
a report, and the line of stderr before that repeats it. Arrays have exactly the size that a call needs, so that a byte
beyond shows.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

KNOWN = (ValueError, TypeError, MemoryError, OverflowError, IndexError)
EDGES = (0, 1, -1, 2, 15, 16, 17, 31, 63, 65, 255, 2**31 - 1, 2**31, -(2**31), 2**32, 2**48, 2**62, 2**63 - 1, -(2**63))
FLOATS = (0.0, -1.0, 1.0, 1e-30, 1e30, float("inf"), float("-inf"), float("nan"))
BLOCKS = {
    2: (32, 18),
    3: (32, 20),
    6: (32, 22),
    7: (32, 24),
    8: (32, 34),
    12: (256, 144),
    13: (256, 176),
    14: (256, 210),
}
ISAS = ("auto", "scalar", "avx2", "avx512", "avx512vnni", "avx512bf16", "neon")

BATCH = 50

Call = tuple[Callable[..., Any], list[Any]]


class Bounded(int):
    """A number of repetitions, which is changed to small ones alone: any other is a long wait and no fault."""


class Calls:
    """The calls that can be made, each with arguments that fit."""

    def __init__(self, native: Any, rng: random.Random) -> None:
        self.native, self.rng = native, rng
        self.draw = np.random.default_rng(rng.getrandbits(32))
        self.isas = [isa for isa in ISAS if isa == "auto" or isa in native.available_isas()]
        self.pools = [native.Pool(threads, []) for threads in (1, 2, 3)]
        self.arena = native.Arena()
        self.models: list[tuple[Any, dict[str, int]]] = []
        self.ways: list[Callable[[], Call]] = [
            getattr(self, name) for name in sorted(dir(self)) if name.startswith("call_")
        ]

    # -- arguments ------------------------------------------------------------------------------------------------

    def floats(self, *shape: int) -> np.ndarray:
        return self.draw.standard_normal(shape, dtype=np.float32)

    def bytes(self, size: int) -> np.ndarray:
        return self.draw.integers(0, 256, size, dtype=np.uint8)

    def pool(self) -> Any:
        return self.rng.choice(self.pools)

    def isa(self) -> str:
        return self.rng.choice(self.isas)

    def shape(self, multiple: int = 1) -> tuple[int, int]:
        return self.rng.choice((1, 5, 16, 33, 50)), self.rng.choice((1, 2, 3)) * multiple

    def matrix(self, rows: int, cols: int) -> Any:
        if cols % 32 == 0 and self.rng.random() < 0.6:
            kind = self.rng.choice([k for k, (weights, _) in BLOCKS.items() if cols % weights == 0])
            weights, size = BLOCKS[kind]
            raw = self.bytes(rows * cols // weights * size)
            return self.native.pack(self.arena, self.pool(), raw, kind, rows, cols, None)
        array = self.floats(rows, cols)
        return self.native.view(array.astype(np.float16) if self.rng.random() < 0.5 else array, False)

    def model(self) -> tuple[Any, dict[str, int]]:
        if len(self.models) >= 6:
            return self.rng.choice(self.models)
        heads, group, width = self.rng.choice((1, 2)), self.rng.choice((1, 2)), self.rng.choice((6, 16, 24))
        s = {"hidden": 64, "heads": heads * group, "kv": heads, "width": width, "ffn": 96, "vocab": 37, "layers": 2}
        across, kv = s["heads"] * width, heads * width
        ones = np.ones(64, np.float32)
        made = self.native.make_model(
            64, s["heads"], heads, width, 96, 37, 1e-5, self.matrix(37, 64), self.matrix(37, 64), ones
        )
        for _ in range(s["layers"]):
            made.add_layer(
                ones, self.matrix(across, 64), self.matrix(kv, 64), self.matrix(kv, 64), self.matrix(64, across), ones,
                self.matrix(96, 64), self.matrix(96, 64), self.matrix(64, 96),
            )  # fmt: skip
        self.models.append((made, s))
        return self.models[-1]

    def cache(self, s: dict[str, int], dtype: str | None = None) -> Any:
        dtype = dtype or self.rng.choice(("float32", "bfloat16", "int8"))
        return self.native.make_cache(dtype, s["layers"], s["kv"], s["width"], 6)

    # -- weights --------------------------------------------------------------------------------------------------

    def call_pack(self) -> Call:
        kind = self.rng.choice(list(BLOCKS))
        weights, size = BLOCKS[kind]
        rows, cols = self.shape(weights)
        order = self.draw.permutation(rows).astype(np.int32) if self.rng.random() < 0.5 else None
        raw = self.bytes(rows * cols // weights * size)
        return self.native.pack, [self.arena, self.pool(), raw, kind, rows, cols, order]

    def call_pack_tiles(self) -> Call:
        kind = self.rng.choice(list(BLOCKS))
        weights, size = BLOCKS[kind]
        rows, cols = self.shape(weights)
        tiles = (rows + 15) // 16
        first = self.rng.randrange(tiles)
        out = np.empty(self.native.tile_bytes(kind, rows, cols) * (tiles - first), np.uint8)
        raw = self.bytes(rows * cols // weights * size)
        return self.native.pack_tiles, [self.pool(), raw, kind, rows, cols, None, first, out]

    def call_packed_view(self) -> Call:
        kind = self.rng.choice(list(BLOCKS))
        rows, cols = self.shape(BLOCKS[kind][0])
        size = self.native.tile_bytes(kind, rows, cols) * ((rows + 15) // 16)
        memory = np.zeros(size + 64, np.uint8)
        start = -memory.ctypes.data % 64
        return self.native.packed_view, [memory[start : start + size], kind, rows, cols]

    def call_pack_codebook(self) -> Call:
        rows, cols = self.shape(64)
        pairs = self.rng.random() < 0.5
        codes = self.bytes(rows * cols // 2) if pairs else self.bytes(rows * cols) & 15
        scales = self.floats((rows * cols + 63) // 64)
        bfloat16 = self.rng.random() < 0.5
        args = [self.arena, self.pool(), codes, scales, self.floats(16), rows, cols, 64, bfloat16]
        return self.native.pack_codebook, args

    def call_pack_groups(self) -> Call:
        rows, cols = self.shape(self.rng.choice((7, 32, 64)))
        bits, group = self.rng.choice((4, 8)), self.rng.choice((32, 64, 128))
        codes = self.bytes(rows * cols) & (15 if bits == 4 else 255)
        count = rows * ((cols + group - 1) // group)
        order = self.draw.permutation(cols).astype(np.int32) if self.rng.random() < 0.5 else None
        scales = self.bytes(2 * count).view(np.uint16)
        return self.native.pack_groups, [
            self.arena, self.pool(), codes, scales, self.bytes(count), rows, cols, group, bits, order,
        ]  # fmt: skip

    def call_pack_rows(self) -> Call:
        rows, cols = self.shape(self.rng.choice((1, 7, 32)))
        values = self.bytes(rows * cols).view(np.int8)
        return self.native.pack_rows, [self.arena, self.pool(), values, self.floats(rows), rows, cols]

    def call_view(self) -> Call:
        array = self.floats(*self.shape(7))
        return self.native.view, [array.astype(np.float16) if self.rng.random() < 0.5 else array, False]

    def call_tile_bytes(self) -> Call:
        kind = self.rng.choice(list(BLOCKS))
        return self.native.tile_bytes, [kind, *self.shape(BLOCKS[kind][0])]

    def call_matmul(self) -> Call:
        rows, cols = self.shape(self.rng.choice((7, 64, 256)))
        m = self.rng.choice((1, 2, 3, 9))
        x, out = self.floats(m, cols), np.empty((m, rows), np.float32)
        exact = self.rng.random() < 0.5
        return self.native.matmul, [self.pool(), self.isa(), self.matrix(rows, cols), x, out, exact, Bounded(1)]

    def call_dequantize(self) -> Call:
        rows, cols = self.shape(self.rng.choice((7, 64, 256)))
        return self.native.dequantize, [self.isa(), self.matrix(rows, cols), np.empty((rows, cols), np.float32)]

    def call_set_bias(self) -> Call:
        rows, cols = self.shape(64)
        return self.matrix(rows, cols).set_bias, [self.floats(rows)]

    def call_read_matrix(self) -> Call:
        return self.native.read_matrix, [self.pool(), self.isa(), self.matrix(*self.shape(64))]

    # -- the step -------------------------------------------------------------------------------------------------

    def call_make_model(self) -> Call:
        embed, head = self.matrix(37, 64), self.matrix(37, 64)
        return self.native.make_model, [64, 4, 2, 16, 96, 37, 1e-5, embed, head, self.floats(64)]

    def call_add_layer(self) -> Call:
        made = self.native.make_model(
            64, 4, 2, 16, 96, 37, 1e-5, self.matrix(37, 64), self.matrix(37, 64), self.floats(64)
        )
        q, k, v, o = self.matrix(64, 64), self.matrix(32, 64), self.matrix(32, 64), self.matrix(64, 64)
        gate, up, down = self.matrix(96, 64), self.matrix(96, 64), self.matrix(64, 96)
        return made.add_layer, [self.floats(64), q, k, v, o, self.floats(64), gate, up, down]

    def adapter(self) -> tuple[Any, list[Any]]:
        model, s = self.model()
        shapes = {"q": (64, s["heads"] * s["width"]), "o": (s["heads"] * s["width"], 64), "down": (96, 64)}
        part = self.rng.choice(list(shapes))
        rank = self.rng.choice((1, 3, 8))
        columns, rows = shapes[part]
        a, b = self.native.view(self.floats(rank, columns), False), self.native.view(self.floats(rows, rank), False)
        return self.native.make_adapter(model), [self.rng.randrange(s["layers"]), part, a, b, 0.5]

    def call_set_adapter(self) -> Call:
        adapter, args = self.adapter()
        return adapter.set, args

    def call_step(self) -> Call:
        model, s = self.model()
        cache = self.cache(s)
        lengths = [self.rng.choice((1, 2, 17)) for _ in range(self.rng.choice((1, 2)))]
        past = [self.rng.choice((0, 1, 15)) for _ in lengths]
        tokens = sum(lengths)
        places = [p + i for p, n in zip(past, lengths) for i in range(n)]
        starts = np.cumsum([0, *lengths]).astype(np.int32)
        tables = self.draw.permutation(6)[: 3 * len(lengths)].reshape(len(lengths), 3).astype(np.int32)
        rows = np.array([end - 1 for end in starts[1:]], np.int32)
        runner = self.native.Runner(self.pool(), self.isa(), self.rng.random() < 0.5)
        adapters = None if self.rng.random() < 0.7 else [None] * len(lengths)
        return runner.step, [
            model, cache, self.draw.integers(0, 37, tokens).astype(np.int32), np.array(places, np.int32), starts,
            np.array(past, np.int32), tables, rows, self.floats(s["width"] // 2), 1.0,
            np.empty((len(rows), 37), np.float32), adapters,
        ]  # fmt: skip

    def call_runner(self) -> Call:
        return self.native.Runner, [self.pool(), self.isa(), False]

    def call_pool(self) -> Call:
        return self.native.Pool, [Bounded(2), []]

    # -- the cache ------------------------------------------------------------------------------------------------

    def call_make_cache(self) -> Call:
        return self.native.make_cache, ["float32", 2, 2, 16, 3]

    def call_cache_rows(self) -> Call:
        s = self.model()[1]
        cache, count = self.cache(s), self.rng.choice((1, 16, 33))
        keys, values = (self.floats(s["kv"], count, s["width"]) for _ in range(2))
        table = np.arange(4, dtype=np.int32)
        if self.rng.random() < 0.5:
            return cache.read, [self.rng.randrange(2), table, keys, values]
        return cache.write, [self.rng.randrange(2), table, self.rng.choice((0, 3)), keys, values]

    def call_copy_page(self) -> Call:
        s = self.model()[1]
        cache = self.cache(s, "int8")
        if self.rng.random() < 0.5:
            return cache.copy_page, [self.rng.randrange(6), self.rng.randrange(6)]
        return cache.copy_page_from, [self.cache(s, "int8"), self.rng.randrange(6), self.rng.randrange(6)]

    def call_attend(self) -> Call:
        s = self.model()[1]
        tokens, past = self.rng.choice((1, 5, 17)), self.rng.choice((0, 3))
        across, kv = s["heads"] * s["width"], s["kv"] * s["width"]
        return self.native.attend, [
            self.pool(), self.isa(), self.cache(s), self.rng.randrange(2), np.arange(4, dtype=np.int32), past,
            self.floats(tokens, across), self.floats(tokens, kv), self.floats(tokens, kv), self.floats(tokens, across),
        ]  # fmt: skip

    # -- sampling and probes --------------------------------------------------------------------------------------

    def call_shortlists(self) -> Call:
        scores = self.floats(self.rng.choice((1, 3)), self.rng.choice((1, 64, 1000)))
        return self.native.shortlists, [scores, 0.7, self.rng.choice((1, 12)), 0.9, 1]

    def call_exponentials(self) -> Call:
        import torch

        state = torch.Generator().manual_seed(1).get_state().numpy().copy()
        places = np.sort(self.draw.choice(1000, 5, replace=False)).astype(np.int64)
        return self.native.exponentials, [state, Bounded(1000), places]

    def call_read_bandwidth(self) -> Call:
        return self.native.read_bandwidth, [self.pool(), self.isa(), self.bytes(self.rng.choice((0, 64, 1000)))]

    # -- training -------------------------------------------------------------------------------------------------

    def call_norm(self) -> Call:
        x, w = self.floats(5, 32), self.floats(32)
        if self.rng.random() < 0.5:
            return self.native.norm, [self.pool(), x, w, 1e-5, np.empty_like(x)]
        grad, residual, to_w = self.floats(5, 32), self.rng.choice((None, self.floats(5, 32))), self.floats(32)
        return self.native.norm_grad, [self.pool(), x, w, 1e-5, grad, residual, np.empty_like(x), to_w]

    def call_swiglu(self) -> Call:
        arrays = [self.floats(3, 48) for _ in range(6)]
        if self.rng.random() < 0.5:
            return self.native.swiglu, [self.pool(), *arrays[:3]]
        return self.native.swiglu_grad, [self.pool(), *arrays]

    def call_drop(self) -> Call:
        added = self.rng.choice((None, self.floats(7, 31)))
        return self.native.drop, [self.pool(), self.floats(7, 31), 5, 0.1, added, self.floats(7, 31)]

    def call_texts(self) -> Call:
        n, heads, kv, width = 20, 4, 2, self.rng.choice((6, 32))
        q, k, v = self.floats(n, heads, width), self.floats(n, kv, width), self.floats(n, kv, width)
        cos, sin, ends = self.floats(n, width), self.floats(n, width), np.array([7, n], np.int64)
        out, lse = self.floats(n, heads, width), self.floats(heads, n)
        if self.rng.random() < 0.5:
            return self.native.texts, [self.pool(), q, k, v, cos, sin, ends, 0.2, out, lse]
        to = [np.empty_like(q), np.empty_like(q), np.empty_like(k), np.empty_like(v)]
        return self.native.texts_grad, [self.pool(), q, k, v, cos, sin, ends, 0.2, out, lse, *to]

    def call_log_probs(self) -> Call:
        targets = self.draw.integers(0, 37, 5)
        factors = self.rng.choice((None, self.floats(5)))
        return self.native.log_probs, [self.pool(), self.floats(5, 37), targets, factors, self.floats(5)]

    def call_unpack4(self) -> Call:
        n = self.rng.choice((1, 31, 64, 200))
        scales = self.floats((n + 63) // 64)
        return self.native.unpack4, [self.pool(), self.bytes((n + 1) // 2), scales, self.floats(16), 64, self.floats(n)]

    def call_unpack_blocks(self) -> Call:
        kind = self.rng.choice(list(BLOCKS))
        weights, size = BLOCKS[kind]
        rows, cols = self.shape(weights)
        raw = self.bytes(rows * cols // weights * size)
        return self.native.unpack_blocks, [self.pool(), raw, kind, np.empty((rows, cols), np.float32)]


def changed_array(rng: random.Random, a: np.ndarray) -> Any:
    """Another array in the place of `a`: of another size, type, layout or content."""
    way = rng.randrange(8)
    if way == 0:
        return np.empty(tuple(max(0, n + rng.choice((-1, 0, 1))) for n in a.shape), a.dtype)
    if way == 1:
        return a[: rng.randrange(len(a) + 1)].copy()
    if way == 2:
        return np.repeat(a, 2, axis=-1)[..., ::2]  # the same values, not contiguous
    if way == 3:
        return a.astype(rng.choice((np.float32, np.float64, np.int8, np.int32, np.int64, np.uint8, np.uint16)))
    if way == 4:
        return a.reshape(-1) if a.ndim > 1 else a.reshape(1, -1)
    if way == 5:
        locked = a.copy()
        locked.flags.writeable = False
        return locked
    if way == 6:
        return np.empty(0, a.dtype)
    b = a.copy()
    for _ in range(min(b.size, 3)):
        at = rng.randrange(b.size)
        if b.dtype.kind == "f":
            b.reshape(-1)[at] = rng.choice(FLOATS)
        else:
            bounds = np.iinfo(b.dtype)
            b.reshape(-1)[at] = min(max(rng.choice(EDGES), bounds.min), bounds.max)
    return b


def changed(rng: random.Random, value: Any, others: list[Any]) -> Any:
    """`value`, or what a caller might give in its place."""
    if rng.random() < 0.05:
        return rng.choice((None, "text", b"", 1.5, [], others[0]))
    if isinstance(value, np.ndarray):
        with np.errstate(all="ignore"):
            return changed_array(rng, value)
    if isinstance(value, Bounded):
        return rng.choice((-1, 0, 1, 2))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((*EDGES, value - 1, value + 1, value * 2))
    if isinstance(value, float):
        return rng.choice(FLOATS)
    if isinstance(value, str):
        return rng.choice(("", "auto", "scalar", "float16", "k", "x" * 300, *ISAS))
    if isinstance(value, list):
        return rng.choice(([], [None] * 3, value * 2, others[:1]))
    return rng.choice([other for other in others if not isinstance(other, (np.ndarray, int, float))] or [None])


def load(path: str | None) -> Any:
    """The compiled module of the installation, or the one at `path`."""
    if path is None:
        from llama2 import compiled

        return compiled.native()
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="a multiple of 50")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--module", help="a compiled module other than the installed one")
    parser.add_argument("--changes", type=int, default=3, help="most changes of one call's arguments")
    given = parser.parse_args()
    native = load(given.module)
    outcomes: Counter[str] = Counter()
    faults = 0
    for number in range(given.first, given.first + given.count):
        rng = random.Random(f"{given.seed}/{number}")
        if number % BATCH == 0 or number == given.first:
            batch = number  # what stays from call to call is of one batch
            calls = Calls(native, random.Random(f"{given.seed}/{batch}"))
        calls.rng = rng
        calls.draw = np.random.default_rng(rng.getrandbits(32))
        way = rng.choice(calls.ways)
        function, args = way()
        for _ in range(min(rng.choice((0, 1, 1, 1, 2, 3)), given.changes)):
            at = rng.randrange(len(args))
            args[at] = changed(rng, args[at], args)
        again = f"--seed {given.seed} --first {batch} --count {number - batch + 1}"
        print(f"{again}  # {way.__name__}", file=sys.stderr, flush=True)
        try:
            function(*args)
            outcomes["answered"] += 1
        except KNOWN as error:
            outcomes[type(error).__name__] += 1
            if not given.changes:
                print(f"{again}: {type(error).__name__}: {error}")
        except BaseException as error:
            faults += 1
            print(f"{again}: {type(error).__name__}: {error}")
    told = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
    print(f"{given.count} calls, {told}, {faults} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
